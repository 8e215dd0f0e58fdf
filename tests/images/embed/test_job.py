"""The whole job, in this process, on a tiny real model: outputs, refusals, resumption."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rehearsal import WORDS, compare, make_input
from whole_job import outputs, run, write

from embed.artifacts.outputs import why_not_named
from embed.checks import check_locations
from embed.config import EmbedConfig
from embed.job import embed
from estiba.checkpoint import ChunkStore
from estiba.errors import ConfigError, DataError, EstibaError, Interrupted, StoreError
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.storage import FileStore, open_store


def test_rows_keep_their_order_and_columns_and_get_a_unit_vector(root, inputs, tiny_model):
    texts = [" ".join(WORDS[: 1 + index % 40]) + f" {index}" for index in range(300)]
    table = pa.table(
        {
            "id": pa.array(range(300), pa.int64()),
            "texto": texts,
            "anidado": [{"lista": [index, index + 1]} for index in range(300)],
            "grande": pa.array(texts, pa.large_string()),
        },
        metadata={"origen": "prueba"},
    )
    pq.write_table(table, inputs / "a.parquet", row_group_size=100)
    results = run(tiny_model, n_tokens=True, truncated=True)
    out = outputs(root)
    assert out.select(table.schema.names).equals(table)
    assert out.schema.metadata[b"origen"] == b"prueba"
    assert out.schema.names[4:] == ["embeddings", "status", "n_tokens", "truncated"]
    assert out.schema.field("embeddings").type == pa.list_(pa.float32(), 32)
    vectors = np.array(out["embeddings"].to_pylist(), np.float32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert set(out["status"].to_pylist()) == {"ok"}
    assert results["rows"] == {
        "total": 300,
        "embedded": 300,
        "without_vector": {},
        "bad": [],
        "truncated": 0,
        "computed_in_this_attempt": 300,
        "resumed": 0,
        "copied": 0,
        "reused": 0,
    }
    provenance = json.loads(out.schema.metadata[b"estiba"])
    assert provenance["digest"].startswith("xxh3-128:") and provenance["dtype"] == "float32"


def test_vectors_agree_with_sentence_transformers_row_by_row(root, inputs, tiny_model):
    from sentence_transformers import SentenceTransformer

    texts = [" ".join(WORDS[index % 7 :: 1 + index % 5]) * (1 + index % 9) for index in range(200)]
    write(inputs / "a.parquet", texts)
    run(tiny_model)
    ours = np.array(outputs(root)["embeddings"].to_pylist(), np.float32)
    theirs = SentenceTransformer(str(tiny_model), device="cpu").encode(texts)
    assert (ours * theirs).sum(axis=1).min() >= 0.9999


def test_rows_without_text_get_no_vector_and_say_why(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola", None, "", " \n\t\u00a0", "mar"])
    results = run(tiny_model)
    out = outputs(root)
    assert out["status"].to_pylist() == ["ok", "null", "empty", "empty", "ok"]
    assert [vector is None for vector in out["embeddings"].to_pylist()] == [False, True, True, True, False]
    assert results["rows"]["without_vector"] == {"empty": 2, "null": 1}


def test_stored_precision_names_and_columns_are_configurable(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola", None], id=[1, 2], otro=["x", "y"])
    run(tiny_model, columns=["id"], embedding_column="v", status_column="s", embedding_dtype="float16", dimensions=8)
    out = outputs(root)
    assert out.schema.names == ["id", "v", "s"]
    assert out.schema.field("v").type == pa.list_(pa.float16(), 8)
    assert math.isclose(np.linalg.norm(np.array(out["v"].to_pylist()[0], np.float32)), 1, abs_tol=2e-3)


def test_relative_paths_are_kept_and_empty_files_stay_empty_files(root, inputs, tiny_model):
    write(inputs / "x/y/uno.parquet", ["a"])
    write(inputs / "vacio.parquet", [])
    pq.write_table(pa.table({"texto": pa.array([], pa.string())}), inputs / "sin_grupos.pq", row_group_size=1)
    (inputs / "_SUCCESS").touch()
    results = run(tiny_model)
    assert outputs(root, "x/y/uno.parquet").num_rows == 1
    assert outputs(root, "vacio.parquet").schema.names == ["texto", "embeddings", "status"]
    assert outputs(root, "sin_grupos.pq").num_rows == 0
    assert results["files"]["ignored"] == ["_SUCCESS"]


def test_bad_files_are_reported_after_all_others_are_done_and_fail_the_job(root, inputs, tiny_model):
    write(inputs / "bien.parquet", ["hola"] * 5)
    (inputs / "roto.parquet").write_bytes(b"PAR1 y nada mas que esto PAR1")
    (inputs / "notas.txt").write_text("no soy parquet")
    pq.write_table(pa.table({"text": ["x"]}), inputs / "otra.parquet")
    with pytest.raises(DataError) as failure:
        run(tiny_model)
    for name in ("roto.parquet", "notas.txt", "otra.parquet", "--text-column", "--on-bad-file skip"):
        assert name in str(failure.value)
    assert outputs(root, "bien.parquet").num_rows == 5
    results = json.loads((root / "output/data/results.json").read_text())
    assert results["status"] == "failed" and len(results["files"]["bad"]) == 3
    assert run(tiny_model, on_bad_file="skip")["status"] == "complete"
    assert not (root / "output/data/roto.parquet").exists()


def test_a_file_that_is_corrupt_half_way_leaves_no_output(root, inputs, tiny_model):
    write(inputs / "bien.parquet", ["hola"])
    pq.write_table(
        pa.table({"texto": [f"fila {i} " * 30 for i in range(4000)]}),
        inputs / "roto.parquet", row_group_size=1000, compression="none", use_dictionary=False, data_page_size=4096,
    )  # fmt: skip
    raw = bytearray((inputs / "roto.parquet").read_bytes())
    third = len(raw) * 2 // 3
    raw[third : third + 20_000] = b"\xff" * 20_000
    (inputs / "roto.parquet").write_bytes(raw)
    with pytest.raises(DataError, match=r"roto\.parquet"):
        run(tiny_model)
    assert sorted(path.name for path in (root / "output/data").iterdir()) == ["bien.parquet", "results.json"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text_column": "cuerpo"}, ["no column 'cuerpo'", "id", "--text-column"]),
        ({"text_column": "id"}, ["int64", "--text-column"]),
        ({"embedding_column": "id"}, ["already has a column 'id'", "--embedding-column"]),
        ({"columns": ["nada"]}, ["'nada'", "--columns"]),
        ({"status_column": "embeddings"}, ["different names"]),
        ({"model": "/no/hay"}, ["/no/hay"]),
    ],
)
def test_an_impossible_configuration_is_refused_before_anything_is_written(root, inputs, tiny_model, options, words):
    write(inputs / "a.parquet", ["hola"], id=[1])
    config = EmbedConfig(**{"model": str(tiny_model), **options})
    with pytest.raises(ConfigError) as failure:
        embed(config, Job.read(), Stop())
    for word in words:
        assert word in str(failure.value)
    assert not list((root / "output").rglob("*.parquet")) if (root / "output").exists() else True


def test_locations_that_overlap_are_refused(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola"])
    for options in ({"output_path": str(inputs)}, {"output_path": str(inputs / "x")}, {"checkpoint_path": str(root)}):
        with pytest.raises(ConfigError, match="overlap"):
            run(tiny_model, **options)


def test_a_link_or_another_spelling_does_not_lead_the_output_into_the_input(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola"])
    before = (inputs / "a.parquet").read_bytes()
    (root / "link").symlink_to(inputs)
    (root / "up").symlink_to(root)
    (root / "sub").mkdir()
    spellings = [root / "link", root / "link/x", root / "up/input/data/dataset", root / "sub/../input/data/dataset"]
    for place in [*map(str, spellings), f"file://localhost{root}/link", f"FILE://{inputs}"]:
        for setting in ("output_path", "checkpoint_path"):
            with pytest.raises(ConfigError, match="overlap"):
                run(tiny_model, **{setting: place})
    with pytest.raises(ConfigError, match="overlap"):
        run(tiny_model, input_path="s3://b/x", output_path="S3://b/x/")
    assert (inputs / "a.parquet").read_bytes() == before


def test_a_directory_that_is_mounted_twice_is_recognised(root, inputs, tiny_model, monkeypatch):
    """A bind mount needs privileges; the test makes two directories look like one, as `stat` shows it."""
    from embed import checks

    write(inputs / "a.parquet", ["hola"])
    original = checks._inode
    same = {root / "output/data": inputs}
    (root / "output/data").mkdir(parents=True)
    monkeypatch.setattr(checks, "_inode", lambda path: original(same.get(path, path)))
    with pytest.raises(ConfigError, match="overlap"):
        run(tiny_model)
    with pytest.raises(ConfigError, match="overlap"):
        run(tiny_model, output_path=str(root / "output/data/below"))


def test_a_second_run_computes_nothing_and_a_damaged_output_is_joined_again(root, inputs, tiny_model):
    make_input(inputs, files=6, rows=40, seed=1)
    first = run(tiny_model)
    names = sorted((root / "output/data").rglob("*.parquet"))
    bytes_before = [path.read_bytes() for path in names]
    again = run(tiny_model)
    assert again["rows"]["computed_in_this_attempt"] == 0 and again["files"]["already_complete"] == 6
    assert again["rows"]["total"] == first["rows"]["total"] and again["tokens"]["total"] == first["tokens"]["total"]
    raw = bytearray(bytes_before[0])
    raw[len(raw) // 2] ^= 1
    names[0].write_bytes(raw)
    names[1].write_bytes(bytes_before[1][:-3])
    names[2].unlink()
    repaired = run(tiny_model)
    assert repaired["rows"]["computed_in_this_attempt"] == 0 and repaired["files"]["done_in_this_attempt"] == 3
    assert [path.read_bytes() for path in names] == bytes_before


def test_only_the_checkpoint_directory_is_needed_to_resume(root, inputs, tiny_model, tmp_path):
    make_input(inputs, files=4, rows=40, seed=2)
    run(tiny_model)
    shutil.copytree(root / "output/data", root / "kept")
    shutil.rmtree(root / "output")
    again = run(tiny_model)
    assert again["rows"]["computed_in_this_attempt"] == 0
    assert compare(root / "kept", root / "output/data") == []


def test_complete_outputs_are_not_computed_again_even_without_a_checkpoint_directory(root, inputs, tiny_model):
    make_input(inputs, files=3, rows=40, seed=3)
    first = run(tiny_model)
    shutil.rmtree(root / "checkpoints")
    again = run(tiny_model)
    assert again["rows"]["computed_in_this_attempt"] == 0
    assert again["rows"]["embedded"] == first["rows"]["embedded"]


def test_a_flipped_bit_in_saved_work_costs_that_chunk_and_nothing_else(root, inputs, tiny_model, capfd):
    make_input(inputs, files=3, rows=200, seed=4)
    run(tiny_model)
    shutil.copytree(root / "output/data", root / "kept")
    shutil.rmtree(root / "output")
    pieces = sorted((root / "checkpoints").rglob("*.piece"))
    victim = next(path for path in pieces if "/pieces/" in str(path))
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 16
    victim.write_bytes(raw)
    again = run(tiny_model)
    rows = int(victim.name.split(".")[0].split("-")[2])
    assert again["rows"]["computed_in_this_attempt"] == rows and again["checkpoint"]["pieces_set_aside"] == 1
    assert "quarantined" in capfd.readouterr().err
    assert compare(root / "kept", root / "output/data") == []


def test_changed_input_or_model_is_computed_again(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola", "mar"])
    write(inputs / "b.parquet", ["uno"])
    run(tiny_model)
    write(inputs / "a.parquet", ["hola", "río"])
    assert run(tiny_model)["rows"]["computed_in_this_attempt"] == 2
    assert run(tiny_model, max_length=8)["rows"]["computed_in_this_attempt"] == 3
    renamed = run(tiny_model, max_length=8, embedding_column="v")
    assert renamed["rows"]["computed_in_this_attempt"] == 0  # the same vectors, joined again under another column name
    assert "v" in outputs(root).schema.names


def test_no_checkpoint_saves_nothing_and_reuses_nothing(root, inputs, tiny_model):
    make_input(inputs, files=2, rows=40, seed=5)
    for _ in range(2):
        results = run(tiny_model, no_checkpoint=True)
        assert results["rows"]["computed_in_this_attempt"] == results["rows"]["total"]
    assert not (root / "checkpoints").exists()


def test_a_stop_saves_finished_work_and_the_next_run_resumes(root, inputs, tiny_model, monkeypatch):
    make_input(inputs, files=6, rows=100, seed=6)
    run(tiny_model, output_path=str(root / "whole"), checkpoint_path=str(root / "other"))
    from embed.model import Encoder

    stop, calls = Stop(), []
    original = Encoder._launch

    def launch(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            stop.request("SIGTERM", signum=15)
        return original(self, *arguments)

    monkeypatch.setattr(Encoder, "_launch", launch)
    with pytest.raises(Interrupted, match="rows are saved") as stopped:
        embed(EmbedConfig(model=str(tiny_model)), Job.read(), stop)
    assert stopped.value.exit_code == 143
    monkeypatch.undo()
    monkeypatch.setenv("ESTIBA_ROOT", str(root))
    results = run(tiny_model)
    assert 0 < results["rows"]["resumed"] < results["rows"]["total"]
    assert compare(root / "whole", root / "output/data") == []


def test_input_output_and_checkpoints_can_be_on_s3_and_no_upload_is_left_unfinished(root, inputs, tiny_model, s3):
    make_input(inputs, files=5, rows=60, seed=7)
    run(tiny_model)
    client = s3.client()
    for path in inputs.rglob("*.parquet"):
        client.upload_file(str(path), s3.bucket, f"in/{path.relative_to(inputs)}")
    options = {
        "input_path": f"s3://{s3.bucket}/in",
        "output_path": f"s3://{s3.bucket}/out",
        "checkpoint_path": f"s3://{s3.bucket}/ck",
    }
    config = EmbedConfig(model=str(tiny_model), **options)
    for computed_all in (True, False):
        embed(config, Job.read(), Stop())
        results = json.loads(client.get_object(Bucket=s3.bucket, Key="out/results.json")["Body"].read())
        assert (results["rows"]["resumed"] == 0) is computed_all
    fetched = root / "fetched"
    for path in sorted(inputs.rglob("*.parquet")):
        name = path.relative_to(inputs).as_posix()
        (fetched / name).parent.mkdir(parents=True, exist_ok=True)
        client.download_file(s3.bucket, f"out/{name}", str(fetched / name))
        ours, theirs = pq.read_table(fetched / name), outputs(root, name)
        assert ours.equals(theirs)
    assert not client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads")


def test_two_hosts_split_the_files_between_them(root, inputs, tiny_model):
    make_input(inputs, files=7, rows=30, seed=8)
    config_dir = root / "input/config"
    config_dir.mkdir()
    done = []
    for host in ("algo-1", "algo-2"):
        (config_dir / "resourceconfig.json").write_text(
            json.dumps({"current_host": host, "hosts": ["algo-1", "algo-2"]})
        )
        embed(EmbedConfig(model=str(tiny_model)), Job.read(), Stop())
        done.append(json.loads((root / f"output/data/results-{host}.json").read_text())["files"]["done"])
    assert sum(done) == 7 and min(done) >= 2
    assert len(list((root / "output/data").rglob("*.parquet"))) == 7


@pytest.mark.parametrize("name", ["nightly-1", None])
def test_a_file_that_hosts_with_different_listings_left_out_is_named(
    root, inputs, tiny_model, monkeypatch, capsys, name
):
    """The second host starts after the largest file is gone, so that the parts shift and c.parquet is in neither."""
    config_dir = root / "input/config"
    config_dir.mkdir()
    if name is not None:
        monkeypatch.setenv("TRAINING_JOB_NAME", name)
    make_input(inputs, files=4, rows=10, seed=8)
    sizes = {path: path.stat().st_size for path in sorted(inputs.rglob("*.parquet"))}
    largest, *others = sorted(sizes, key=lambda path: (-sizes[path], str(path)))

    def run(host: str) -> None:
        hosts = {"current_host": host, "hosts": ["algo-1", "algo-2"]}
        (config_dir / "resourceconfig.json").write_text(json.dumps(hosts))
        embed(EmbedConfig(model=str(tiny_model)), Job.read(), Stop())

    run("algo-1")
    largest.unlink()
    missing = others[0].relative_to(inputs)  # first of the first listing's second host, and of the second's first host
    if name is None:
        run("algo-2")
        assert re.search(rf"listed 4 files.*without output: {missing}", capsys.readouterr().err, re.DOTALL)
        return
    with pytest.raises(DataError, match=rf"listed 4 files.*without output: {missing}.*run the same command again"):
        run("algo-2")
    results = root / "output/data/results-algo-2.json"
    assert json.loads(results.read_text())["status"] == "failed"
    run("algo-1")
    run("algo-2")
    assert all((root / "output/data" / path.relative_to(inputs)).exists() for path in others)
    assert json.loads(results.read_text())["status"] == "complete"


def test_nodes_of_slurm_and_pods_of_kubernetes_split_the_files_too(root, inputs, tiny_model, monkeypatch):
    make_input(inputs, files=4, rows=10, seed=8)
    slurm = [{"SLURM_STEP_NODELIST": "gpu[01-02]", "SLURM_NODEID": str(node)} for node in range(2)]
    pods = [
        {"JOB_COMPLETION_INDEX": str(index), "ESTIBA_HOST_COUNT": "2", "HOSTNAME": f"embed-{index}"}
        | {"ESTIBA_HOST_SERVICE": "embed"}
        for index in range(2)
    ]
    done = {}
    for environ in (*slurm, *pods):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        embed(EmbedConfig(model=str(tiny_model), no_checkpoint=True), Job.read(), Stop())
        results = root / f"output/data/results-{Job.read().current_host}.json"
        done[Job.read().current_host] = json.loads(results.read_text())["files"]["done"]
        for name in environ:
            monkeypatch.delenv(name)
    assert done == {"gpu01": 2, "gpu02": 2, "embed-0.embed": 2, "embed-1.embed": 2}


def second_host_of_a_sharded_channel(root: Path) -> None:
    config_dir = root / "input/config"
    config_dir.mkdir()
    (config_dir / "resourceconfig.json").write_text(
        json.dumps({"current_host": "algo-2", "hosts": ["algo-1", "algo-2"]})
    )
    (config_dir / "inputdataconfig.json").write_text(
        json.dumps({"dataset": {"TrainingInputMode": "File", "S3DistributionType": "ShardedByS3Key"}})
    )


def test_a_host_does_all_files_of_a_sharded_channel(root, inputs, tiny_model):
    make_input(inputs, files=3, rows=10, seed=9)
    second_host_of_a_sharded_channel(root)
    embed(EmbedConfig(model=str(tiny_model)), Job.read(), Stop())
    assert json.loads((root / "output/data/results-algo-2.json").read_text())["files"]["done"] == 3


@pytest.mark.slow
def test_two_workers_write_the_same_bytes_as_one_with_as_many_threads_each(root, inputs, tiny_model, monkeypatch):
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_input(inputs, files=4, rows=100, seed=10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(tiny_model, engine="torch", output_path=str(root / "solo"), checkpoint_path=str(root / "ck1"))
    finally:
        torch.set_num_threads(threads)
    results = run(tiny_model, engine="torch", workers=2)
    assert results["rows"]["computed_in_this_attempt"] == results["rows"]["total"]
    assert results["stages"]["compute"]["busy_s"] > 0
    assert compare(root / "solo", root / "output/data") == []


def test_results_sum_the_guides_token_column_and_price_a_known_instance(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola", "mar"], tokens_aproximados=[3, 4])
    (root / "input/config").mkdir()
    (root / "input/config/resourceconfig.json").write_text(
        json.dumps({"current_host": "algo-1", "hosts": ["algo-1"], "current_instance_type": "ml.g4dn.xlarge"})
    )
    results = run(tiny_model)
    assert results["tokens_aproximados"] == 7
    assert results["cost"]["usd_per_h"] == 0.7364 and results["cost"]["price_date"]


def test_results_say_how_long_each_stage_worked_in_this_attempt(root, inputs, tiny_model):
    make_input(inputs, files=2, rows=300, seed=11)
    stages = run(tiny_model)["stages"]
    assert list(stages) == ["read", "tokenise", "compute", "save", "join"]
    assert all(stage["busy_s"] > 0 for stage in stages.values())
    assert {name for name, stage in stages.items() if "waiting_s" in stage} == {"read", "compute"}
    again = run(tiny_model)["stages"]
    assert {seconds for stage in again.values() for seconds in stage.values()} == {0.0}


def test_two_jobs_on_one_checkpoint_directory_are_refused(root, inputs, tiny_model):
    from estiba.checkpoint import exclusive
    from estiba.storage import open_store

    write(inputs / "a.parquet", ["hola"])
    with (
        exclusive(open_store(str(root / "checkpoints")), "embed-algo-1"),
        pytest.raises(EstibaError, match="another job"),
    ):
        run(tiny_model)


def test_a_full_disk_ends_the_job_with_its_saved_work_intact(root, inputs, tiny_model, monkeypatch):
    import errno
    import os

    make_input(inputs, files=4, rows=60, seed=11)
    sync, count = os.fsync, []

    def fsync(descriptor):
        count.append(1)
        if len(count) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreError, match="free"):
        run(tiny_model)
    monkeypatch.undo()
    monkeypatch.setenv("ESTIBA_ROOT", str(root))
    assert run(tiny_model)["rows"]["resumed"] > 0


def test_columns_of_every_kind_pass_through_unchanged(root, inputs, tiny_model):
    import datetime as dt
    from decimal import Decimal

    texts = ["hola", None, "mar"]
    table = pa.table(
        {
            "texto": pa.array(texts).dictionary_encode(),
            "hora": pa.array(
                [dt.datetime(2026, 1, 1), None, dt.datetime(2027, 1, 1)], pa.timestamp("us", "Europe/Madrid")
            ),
            "dinero": pa.array([Decimal("1.50"), None, Decimal("2.25")], pa.decimal128(9, 2)),
            "mapa": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int32())),
            "bytes": pa.array([b"\x00\xff", None, b""], pa.binary()),
            "fijo": pa.array([b"abcd", None, b"efgh"], pa.binary(4)),
            "lista": pa.array([[1, None], None, []], pa.large_list(pa.int8())),
            "vector": pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float64(), 2)),
            "hondo": pa.array([{"a": [{"b": None}]}, None, {"a": []}]),
            "nada": pa.nulls(3),
            "dur": pa.array([1, None, 3], pa.duration("ms")),
            "con.punto": pa.array([True, None, False]),
            "vista": pa.array(texts, pa.string_view()),
        },
    ).replace_schema_metadata({"pandas": '{"columns": []}', "otro": "ñ"})
    pq.write_table(table, inputs / "a.parquet", row_group_size=2)
    run(tiny_model)
    expected = pq.read_table(inputs / "a.parquet")
    out = outputs(root)
    assert out.select(expected.schema.names).equals(expected)
    assert out.schema.metadata[b"otro"] == "ñ".encode() and b"pandas" in out.schema.metadata
    for name in expected.schema.names:
        assert out.schema.field(name).type == expected.schema.field(name).type


def test_chunks_are_saved_where_the_checkpoint_config_says(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola"])
    (root / "input/config").mkdir()
    (root / "input/config/checkpointconfig.json").write_text('{"LocalPath": "/opt/ml/otro"}')
    run(tiny_model)
    assert list((root / "otro").rglob("*.piece")) and not (root / "checkpoints").exists()
    assert EmbedConfig().checkpoint_path == str(root / "otro")


def test_a_revision_of_a_directory_is_refused(root, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola"])
    with pytest.raises(ConfigError, match="--revision"):
        run(tiny_model, revision="main")


@pytest.mark.parametrize("program", ["tokenizer.py", "run.py"])
def test_the_tokenizer_guides_command_line_works_as_it_is(tmp_path, tiny_model, program):
    """Only `--model` differs, since tests have no access to the hub."""
    package = Path(inspect.getfile(EmbedConfig)).parent
    found = [path for path in (package.parent / "src" / program, package.parent / program) if path.is_file()]
    (tmp_path / "src").mkdir()
    shutil.copy(found[0], tmp_path / "src")
    write(tmp_path / "samples/parquet/a.parquet", ["hola", None, "mar"])
    words = "--input-path ./samples/parquet --output-path ./output --batch-size 0 --model".split()
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "ESTIBA_ROOT": str(tmp_path / "ml"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, f"src/{program}", *words, str(tiny_model)]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "output/a.parquet")["status"].to_pylist() == ["ok", "null", "ok"]
    assert json.loads((tmp_path / "output/results.json").read_text())["rows"]["embedded"] == 2


def test_a_host_of_a_sharded_channel_may_have_no_file(root, inputs, tiny_model):
    second_host_of_a_sharded_channel(root)
    inputs.mkdir(parents=True, exist_ok=True)
    embed(EmbedConfig(model=str(tiny_model)), Job.read(), Stop())
    results = json.loads((root / "output/data/results-algo-2.json").read_text())
    assert results["status"] == "complete" and results["files"]["done"] == 0


def test_many_damaged_chunks_of_a_file_are_computed_again_at_once(root, inputs, tiny_model):
    write(inputs / "a.parquet", [f"barco {index}" for index in range(90)])
    table = pq.read_table(inputs / "a.parquet")
    pq.write_table(table, inputs / "a.parquet", row_group_size=10)
    run(tiny_model)
    before = (root / "output/data/a.parquet").read_bytes()
    (root / "output/data/a.parquet").unlink()
    pieces = sorted((root / "checkpoints").rglob("pieces/**/*.piece"))
    assert len(pieces) == 9
    for piece in pieces[::2]:
        piece.write_bytes(piece.read_bytes()[:-7])
    results = run(tiny_model)
    assert results["rows"]["computed_in_this_attempt"] == 50
    assert (root / "output/data/a.parquet").read_bytes() == before


def test_a_chunk_that_s3_does_not_give_is_not_damaged(s3, monkeypatch):
    store = open_store(f"s3://{s3.bucket}/chunks")
    chunks = ChunkStore(store, "pieces")
    name = chunks.commit("a", b"data")

    def unanswered(self, path):
        raise StoreError("no answer in three minutes")

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "read", unanswered)
        with pytest.raises(StoreError, match="no answer"):
            chunks.load("a")
    assert chunks.load("a") == b"data"
    store.delete(name)
    assert chunks.load("a") is None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("s3://bucket//data", "s3://bucket/data"),
        ("s3://bucket/data", "s3://bucket//data/out/"),
        ("s3://bucket", "s3://bucket/a"),
    ],
)
def test_addresses_of_one_prefix_overlap_however_they_are_written(first, second):
    for one, other in ((first, second), (second, first)):
        with pytest.raises(ConfigError, match="overlap"):
            check_locations(EmbedConfig(input_path=one, output_path=other, checkpoint_path="s3://another"))


def test_a_name_that_s3_cannot_take_is_that_files_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "1")
    local, remote = FileStore(tmp_path), open_store("s3://bucket/out")
    assert why_not_named("año.parquet", remote) is None
    assert "not UTF-8" in why_not_named("caf\udce9.parquet", remote)
    assert "control character" in why_not_named("a\nb.parquet", remote)
    assert "at most 1024" in why_not_named("x/" * 520 + "a.parquet", remote)
    assert why_not_named("a\nb.parquet", local) is None
