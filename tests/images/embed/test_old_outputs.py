"""Outputs of earlier runs are replaced, or named; vectors of two models never share a folder unnoticed."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_model import build
from whole_job import outputs, run, write

from embed import job
from embed.config import EmbedConfig
from embed.job import embed
from embed.model.loading import digest
from estiba.errors import ConfigError, EstibaError
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.storage import open_store


@pytest.fixture
def two_models(tiny_model, tmp_path_factory) -> tuple[Path, Path]:
    """The tiny model, and one that reads fewer tokens by its own configuration: another digest."""
    return tiny_model, build(tmp_path_factory.mktemp("other") / "model", max_length=17)


def stale(results: dict) -> list[str]:
    return [item["path"] for item in results["files"]["stale"]]


def test_an_output_whose_input_was_deleted_is_named_and_removed_by_flag(root, inputs, tiny_model, capfd):
    for name in ("a.parquet", "x/b.parquet"):
        write(inputs / name, ["hola"])
    assert stale(run(tiny_model)) == []
    (inputs / "x/b.parquet").unlink()
    pq.write_table(pa.table({"texto": ["someone else's"]}), root / "output/data/foreign.parquet")
    capfd.readouterr()
    assert stale(run(tiny_model)) == ["x/b.parquet"]
    shown = capfd.readouterr().err
    assert "x/b.parquet (its input no longer exists)" in shown and "--stale-outputs remove" in shown
    assert outputs(root, "x/b.parquet").num_rows == 1
    with pytest.raises(ConfigError, match=r"x/b\.parquet.*--stale-outputs remove"):
        run(tiny_model, stale_outputs="refuse")
    results = run(tiny_model, stale_outputs="remove")
    assert stale(results) == ["x/b.parquet"] and results["files"]["stale_removed"]
    left = {path.name for path in (root / "output/data").rglob("*.parquet")}
    assert left == {"a.parquet", "foreign.parquet"}
    assert stale(run(tiny_model)) == []


def test_an_output_whose_input_became_empty_is_named_and_removed_by_flag(root, inputs, tiny_model):
    for name in ("a.parquet", "b.parquet"):
        write(inputs / name, ["hola"])
    run(tiny_model)
    (inputs / "b.parquet").write_bytes(b"")
    results = run(tiny_model, on_bad_file="skip")
    assert stale(results) == ["b.parquet"] and "can no longer" in results["files"]["stale"][0]["reason"]
    run(tiny_model, on_bad_file="skip", stale_outputs="remove")
    assert not (root / "output/data/b.parquet").exists() and (root / "output/data/a.parquet").exists()


def test_vectors_of_two_models_in_one_folder_are_refused_or_all_replaced(root, inputs, two_models):
    one, other = two_models
    for name in ("a.parquet", "b.parquet"):
        write(inputs / name, ["hola"])
    run(one)
    before = (root / "output/data/a.parquet").read_bytes()
    (inputs / "b.parquet").unlink()
    with pytest.raises(ConfigError, match=r"2 outputs of another model \(a\.parquet.*--output-path.*remove"):
        run(other)
    assert (root / "output/data/a.parquet").read_bytes() == before
    results = run(other, stale_outputs="remove")
    assert stale(results) == ["b.parquet"]
    digests = {
        json.loads(pq.read_metadata(path).metadata[b"estiba"])["digest"]
        for path in (root / "output/data").glob("*.parquet")
    }
    assert digests == {results["model"]["digest"]}


def test_two_models_in_one_prefix_of_a_bucket_are_refused(root, inputs, two_models, s3):
    write(inputs / "a.parquet", ["hola"])
    options = {"output_path": f"s3://{s3.bucket}/out"}
    embed(EmbedConfig(model=str(two_models[0]), **options), Job.read(), Stop())
    with pytest.raises(ConfigError, match=f"s3://{s3.bucket}/out holds 1 outputs of another model"):
        embed(EmbedConfig(model=str(two_models[1]), **options), Job.read(), Stop())


def test_results_of_a_run_with_more_hosts_are_named_and_removed_by_flag(root, inputs, tiny_model):
    for index in range(4):
        write(inputs / f"{index}.parquet", ["hola"])
    config = root / "input/config"
    config.mkdir()
    for host in ("algo-1", "algo-2", "algo-3"):
        hosts = {"current_host": host, "hosts": ["algo-1", "algo-2", "algo-3"]}
        (config / "resourceconfig.json").write_text(json.dumps(hosts))
        embed(EmbedConfig(model=str(tiny_model)), Job.read(), Stop())
    (config / "resourceconfig.json").write_text(json.dumps({"current_host": "algo-1", "hosts": ["algo-1", "algo-2"]}))
    embed(EmbedConfig(model=str(tiny_model)), Job.read(), Stop())
    results = json.loads((root / "output/data/results-algo-1.json").read_text())
    assert stale(results) == ["results-algo-3.json"]
    (config / "resourceconfig.json").unlink()
    assert stale(run(tiny_model)) == [f"results-algo-{index}.json" for index in (1, 2, 3)]
    run(tiny_model, stale_outputs="remove")
    assert [path.name for path in (root / "output/data").glob("*.json")] == ["results.json"]


def test_one_file_of_many_as_input_says_nothing_about_the_other_outputs(root, inputs, tiny_model):
    for name in ("a.parquet", "b.parquet"):
        write(inputs / name, ["hola"])
    run(tiny_model)
    results = run(tiny_model, input_path=str(inputs / "a.parquet"), stale_outputs="remove")
    assert stale(results) == [] and (root / "output/data/b.parquet").exists()


# --- which files are data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "kind"),
    [
        ("t/_delta_log/00000000000000000000.json", "Delta"),
        ("_delta_log/00000000000000000000.json", "Delta"),
        ("t/metadata/00000-1b2c.metadata.json", "Iceberg"),
        ("t/metadata/v1.metadata.json", "Iceberg"),
        ("t/.hoodie/hoodie.properties", "Hudi"),
    ],
)
def test_a_table_whose_log_says_which_files_count_is_refused_by_name(root, inputs, tiny_model, log, kind):
    write(inputs / "t/part-0.parquet", ["deleted"])
    (inputs / log).parent.mkdir(parents=True)
    (inputs / log).write_text("{}")
    with pytest.raises(ConfigError, match=rf"table of the format {kind}.*write its current rows"):
        run(tiny_model)
    assert not list((root / "output").rglob("*.parquet"))


@pytest.mark.parametrize("log", ["_delta_log/0.json", "metadata/v1.metadata.json", ".hoodie/hoodie.properties"])
def test_a_part_of_such_a_table_is_refused_too(root, inputs, tiny_model, log):
    write(inputs / "t/data/year=2026/part-0.parquet", ["deleted"])
    (inputs / "t" / log).parent.mkdir(parents=True)
    (inputs / "t" / log).write_text("{}")
    for part in ("t/data", "t/data/year=2026", "t/data/year=2026/part-0.parquet"):
        with pytest.raises(ConfigError, match="table of the format"):
            run(tiny_model, input_path=str(inputs / part))


@pytest.mark.parametrize("log", ["_delta_log/0.json", "metadata/v1.metadata.json", ".hoodie/hoodie.properties"])
def test_a_part_of_a_table_is_recognised_by_its_url_and_through_a_link(root, inputs, tiny_model, log):
    part = root / "tables/t/data/year=2026"
    write(part / "part-0.parquet", ["deleted"])
    (root / "tables/t" / log).parent.mkdir(parents=True, exist_ok=True)
    (root / "tables/t" / log).write_text("{}")
    write(inputs / "x/own.parquet", ["hola"])
    (root / "link").symlink_to(part)
    (inputs / "x/y").symlink_to(part)
    (root / "in2").mkdir()
    (root / "in2/a.parquet").symlink_to(part / "part-0.parquet")
    places = [f"file://{part}", f"file://{part}/part-0.parquet", root / "link", inputs, root / "in2"]
    for place in places:
        with pytest.raises(ConfigError, match="table of the format"):
            run(tiny_model, input_path=str(place))


@pytest.mark.parametrize("log", ["_delta_log/0.json", "metadata/v1.metadata.json", ".hoodie/hoodie.properties"])
def test_a_part_of_a_table_in_a_bucket_is_refused(root, inputs, tiny_model, s3, log):
    write(root / "a.parquet", ["deleted"])
    client = s3.client()
    client.upload_file(str(root / "a.parquet"), s3.bucket, "t/data/year=2026/a.parquet")
    client.upload_file(str(root / "a.parquet"), s3.bucket, "plain/year=2026/a.parquet")
    client.put_object(Bucket=s3.bucket, Key=f"t/{log}", Body=b"{}")
    for part in ("t/data", "t/data/year=2026/", "t/data/year=2026/a.parquet"):
        with pytest.raises(ConfigError, match=r"s3://prueba/t around .* is a table of the format"):
            run(tiny_model, input_path=f"s3://{s3.bucket}/{part}")
    assert run(tiny_model, input_path=f"s3://{s3.bucket}/plain/year=2026")["rows"]["embedded"] == 1


def test_a_hive_partition_whose_name_begins_with_an_underscore_counts_and_ignored_names_are_told(
    root, inputs, tiny_model, capfd
):
    write(inputs / "_id=3/a.parquet", ["hola"])
    write(inputs / "_id=4/_tipo=x/b.parquet", ["mar"])
    write(inputs / "_temporary/0/c.parquet", ["no"])
    write(inputs / "d.parquet._COPYING_", ["no"])
    write(inputs / ".e=1/f.parquet", ["no"])
    (inputs / "_SUCCESS").touch()
    results = run(tiny_model)
    assert results["rows"]["embedded"] == 2
    ignored = [".e=1/f.parquet", "_SUCCESS", "_temporary/0/c.parquet", "d.parquet._COPYING_"]
    assert sorted(results["files"]["ignored"]) == ignored
    shown = capfd.readouterr().err
    for name in ignored:
        assert name in shown


def test_an_input_of_hidden_files_only_is_refused_with_their_names(root, inputs, tiny_model):
    write(inputs / "_a.parquet", ["hola"])
    write(inputs / ".b.parquet", ["hola"])
    with pytest.raises(EstibaError) as caught:
        run(tiny_model)
    assert caught.value.exit_code == 2 and "_a.parquet" in str(caught.value) and ".b.parquet" in str(caught.value)


def test_one_input_file_of_another_model_does_not_join_the_outputs_of_the_old_one(root, inputs, two_models):
    for name in ("a.parquet", "b.parquet"):
        write(inputs / name, ["hola"])
    run(two_models[0])
    before = (root / "output/data/a.parquet").read_bytes()
    with pytest.raises(ConfigError, match=r"1 outputs of another model \(b\.parquet.*replaces its own output only"):
        run(two_models[1], input_path=str(inputs / "a.parquet"), stale_outputs="remove")
    assert (root / "output/data/a.parquet").read_bytes() == before
    (root / "output/data/b.parquet").unlink()
    run(two_models[1], input_path=str(inputs / "a.parquet"), stale_outputs="remove")
    assert (root / "output/data/a.parquet").read_bytes() != before


def test_an_output_stays_whose_input_changed_while_the_job_ran(root, inputs, tiny_model, monkeypatch):
    for name in ("a.parquet", "b.parquet"):
        write(inputs / name, ["hola"])
    run(tiny_model)
    before = (root / "output/data/b.parquet").read_bytes()
    write(inputs / "b.parquet", ["adiós"])
    original = job.list_input

    def list_input(*arguments):
        found = original(*arguments)
        write(inputs / "b.parquet", ["otra vez"])
        return found

    monkeypatch.setattr(job, "list_input", list_input)
    results = run(tiny_model, stale_outputs="remove", on_bad_file="skip")
    assert results["files"]["bad"] and stale(results) == []
    assert (root / "output/data/b.parquet").read_bytes() == before


def test_a_model_that_was_replaced_on_s3_is_another_one(tmp_path, two_models, s3, monkeypatch):
    """Also where the copy of the first one is still in the temporary directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = EmbedConfig(model=f"s3://{s3.bucket}/model")
    copies = []
    for model in two_models:
        for path in model.rglob("*"):
            if path.is_file():
                open_store(config.model).write(str(path.relative_to(model)), path.read_bytes())
        copies.append(Path(job.local_model(config)))
        assert job.local_model(config) == str(copies[-1])
    assert [digest(copy) for copy in copies] == [digest(model) for model in two_models]
    assert job.local_model(EmbedConfig(model=f"file://{two_models[0]}")) == str(two_models[0])
