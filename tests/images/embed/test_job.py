"""The whole job, in this process, on a tiny real model: what comes out, what is refused, what is resumed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rehearsal import WORDS, compare, make_input

from embed.config import EmbedConfig
from embed.work import embed
from estiba.contract import Job
from estiba.errors import ConfigError, DataError, EstibaError, Interrupted, StoreError
from estiba.stop import Stop


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("ESTIBA_ROOT", str(tmp_path))
    (tmp_path / "input/data/dataset").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def inputs(place):
    return place / "input/data/dataset"


def run(tiny_model: Path, **options: object) -> dict:
    config = EmbedConfig(model=str(tiny_model), **options)
    embed(config, Job.read(), Stop())
    return json.loads((Path(config.output_path) / "results.json").read_text())


def write(path: Path, texts: list, **more: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"texto": pa.array(texts, pa.string()), **more}), path)


def outputs(place: Path, name: str = "a.parquet") -> pa.Table:
    return pq.read_table(place / "output/data" / name)


def test_rows_keep_their_order_and_columns_and_get_a_unit_vector(place, inputs, tiny_model):
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
    out = outputs(place)
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
        "truncated": 0,
        "computed_in_this_attempt": 300,
        "resumed": 0,
    }
    provenance = json.loads(out.schema.metadata[b"estiba"])
    assert provenance["digest"].startswith("xxh3-128:") and provenance["dtype"] == "float32"


def test_vectors_agree_with_sentence_transformers_row_by_row(place, inputs, tiny_model):
    from sentence_transformers import SentenceTransformer

    texts = [" ".join(WORDS[index % 7 :: 1 + index % 5]) * (1 + index % 9) for index in range(200)]
    write(inputs / "a.parquet", texts)
    run(tiny_model)
    ours = np.array(outputs(place)["embeddings"].to_pylist(), np.float32)
    theirs = SentenceTransformer(str(tiny_model), device="cpu").encode(texts)
    assert (ours * theirs).sum(axis=1).min() >= 0.9999


def test_rows_without_text_get_no_vector_and_say_why(place, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola", None, "", " \n\t\u00a0", "mar"])
    results = run(tiny_model)
    out = outputs(place)
    assert out["status"].to_pylist() == ["ok", "null", "empty", "empty", "ok"]
    assert [vector is None for vector in out["embeddings"].to_pylist()] == [False, True, True, True, False]
    assert results["rows"]["without_vector"] == {"empty": 2, "null": 1}


def test_stored_precision_names_and_columns_are_as_asked(place, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola", None], id=[1, 2], otro=["x", "y"])
    run(tiny_model, columns=["id"], embedding_column="v", status_column="s", embedding_dtype="float16", dimensions=8)
    out = outputs(place)
    assert out.schema.names == ["id", "v", "s"]
    assert out.schema.field("v").type == pa.list_(pa.float16(), 8)
    assert math.isclose(np.linalg.norm(np.array(out["v"].to_pylist()[0], np.float32)), 1, abs_tol=2e-3)


def test_relative_paths_are_kept_and_empty_files_stay_empty_files(place, inputs, tiny_model):
    write(inputs / "x/y/uno.parquet", ["a"])
    write(inputs / "vacio.parquet", [])
    pq.write_table(pa.table({"texto": pa.array([], pa.string())}), inputs / "sin_grupos.pq", row_group_size=1)
    (inputs / "_SUCCESS").touch()
    results = run(tiny_model)
    assert outputs(place, "x/y/uno.parquet").num_rows == 1
    assert outputs(place, "vacio.parquet").schema.names == ["texto", "embeddings", "status"]
    assert outputs(place, "sin_grupos.pq").num_rows == 0
    assert results["files"]["ignored"] == ["_SUCCESS"]


def test_bad_files_are_named_the_rest_is_done_and_the_job_fails(place, inputs, tiny_model):
    write(inputs / "bien.parquet", ["hola"] * 5)
    (inputs / "roto.parquet").write_bytes(b"PAR1 y nada mas que esto PAR1")
    (inputs / "notas.txt").write_text("no soy parquet")
    pq.write_table(pa.table({"text": ["x"]}), inputs / "otra.parquet")
    with pytest.raises(DataError) as failure:
        run(tiny_model)
    for name in ("roto.parquet", "notas.txt", "otra.parquet", "--text-column", "--on-bad-file skip"):
        assert name in str(failure.value)
    assert outputs(place, "bien.parquet").num_rows == 5
    results = json.loads((place / "output/data/results.json").read_text())
    assert results["status"] == "failed" and len(results["files"]["bad"]) == 3
    assert run(tiny_model, on_bad_file="skip")["status"] == "complete"
    assert not (place / "output/data/roto.parquet").exists()


def test_a_file_that_breaks_half_way_leaves_no_output(place, inputs, tiny_model):
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
    assert sorted(path.name for path in (place / "output/data").iterdir()) == ["bien.parquet", "results.json"]


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
def test_what_cannot_work_is_refused_before_anything_is_written(place, inputs, tiny_model, options, words):
    write(inputs / "a.parquet", ["hola"], id=[1])
    config = EmbedConfig(**{"model": str(tiny_model), **options})
    with pytest.raises(ConfigError) as failure:
        embed(config, Job.read(), Stop())
    for word in words:
        assert word in str(failure.value)
    assert not list((place / "output").rglob("*.parquet")) if (place / "output").exists() else True


def test_places_that_lie_in_one_another_are_refused(place, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola"])
    for options in ({"output_path": str(inputs)}, {"output_path": str(inputs / "x")}, {"checkpoint_path": str(place)}):
        with pytest.raises(ConfigError, match="lie in one another"):
            run(tiny_model, **options)


def test_a_second_run_computes_nothing_and_a_damaged_output_is_joined_again(place, inputs, tiny_model):
    make_input(inputs, files=6, rows=40, seed=1)
    first = run(tiny_model)
    names = sorted((place / "output/data").rglob("*.parquet"))
    bytes_before = [path.read_bytes() for path in names]
    again = run(tiny_model)
    assert again["rows"]["computed_in_this_attempt"] == 0 and again["files"]["already_complete"] == 6
    assert again["rows"]["total"] == first["rows"]["total"] and again["tokens"]["total"] == first["tokens"]["total"]
    raw = bytearray(bytes_before[0])
    raw[len(raw) // 2] ^= 1
    names[0].write_bytes(raw)
    names[1].write_bytes(bytes_before[1][:-3])
    names[2].unlink()
    mended = run(tiny_model)
    assert mended["rows"]["computed_in_this_attempt"] == 0 and mended["files"]["done_in_this_attempt"] == 3
    assert [path.read_bytes() for path in names] == bytes_before


def test_only_the_checkpoint_directory_is_needed_to_go_on(place, inputs, tiny_model, tmp_path):
    make_input(inputs, files=4, rows=40, seed=2)
    run(tiny_model)
    shutil.copytree(place / "output/data", place / "kept")
    shutil.rmtree(place / "output")
    again = run(tiny_model)
    assert again["rows"]["computed_in_this_attempt"] == 0
    assert compare(place / "kept", place / "output/data") == []


def test_without_a_checkpoint_directory_whole_outputs_are_still_not_computed_again(place, inputs, tiny_model):
    make_input(inputs, files=3, rows=40, seed=3)
    first = run(tiny_model)
    shutil.rmtree(place / "checkpoints")
    again = run(tiny_model)
    assert again["rows"]["computed_in_this_attempt"] == 0
    assert again["rows"]["embedded"] == first["rows"]["embedded"]


def test_a_flipped_bit_in_saved_work_costs_that_piece_and_nothing_else(place, inputs, tiny_model, capfd):
    make_input(inputs, files=3, rows=200, seed=4)
    run(tiny_model)
    shutil.copytree(place / "output/data", place / "kept")
    shutil.rmtree(place / "output")
    pieces = sorted((place / "checkpoints").rglob("*.piece"))
    victim = next(path for path in pieces if "/pieces/" in str(path))
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 16
    victim.write_bytes(raw)
    again = run(tiny_model)
    rows = int(victim.name.split(".")[0].split("-")[2])
    assert again["rows"]["computed_in_this_attempt"] == rows and again["checkpoint"]["pieces_set_aside"] == 1
    assert "set aside" in capfd.readouterr().err
    assert compare(place / "kept", place / "output/data") == []


def test_changed_input_or_model_is_computed_anew(place, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola", "mar"])
    write(inputs / "b.parquet", ["uno"])
    run(tiny_model)
    write(inputs / "a.parquet", ["hola", "río"])
    assert run(tiny_model)["rows"]["computed_in_this_attempt"] == 2
    assert run(tiny_model, max_length=8)["rows"]["computed_in_this_attempt"] == 3
    renamed = run(tiny_model, max_length=8, embedding_column="v")
    assert renamed["rows"]["computed_in_this_attempt"] == 0  # same vectors, joined again under another name
    assert "v" in outputs(place).schema.names


def test_no_checkpoint_keeps_nothing_and_uses_nothing(place, inputs, tiny_model):
    make_input(inputs, files=2, rows=40, seed=5)
    for _ in range(2):
        results = run(tiny_model, no_checkpoint=True)
        assert results["rows"]["computed_in_this_attempt"] == results["rows"]["total"]
    assert not (place / "checkpoints").exists()


def test_a_stop_saves_what_is_done_and_says_how_to_go_on(place, inputs, tiny_model, monkeypatch):
    make_input(inputs, files=6, rows=100, seed=6)
    run(tiny_model, output_path=str(place / "whole"), checkpoint_path=str(place / "other"))
    from embed import worker

    stop, seen = Stop(), []
    plain = worker.Encoder.encode

    def encode(self, *arguments):
        seen.append(1)
        if len(seen) == 5:
            stop.request("SIGTERM", signum=15)
        return plain(self, *arguments)

    monkeypatch.setattr(worker.Encoder, "encode", encode)
    with pytest.raises(Interrupted, match="rows are saved") as stopped:
        embed(EmbedConfig(model=str(tiny_model)), Job.read(), stop)
    assert stopped.value.exit_code == 143
    monkeypatch.undo()
    monkeypatch.setenv("ESTIBA_ROOT", str(place))
    results = run(tiny_model)
    assert 0 < results["rows"]["resumed"] < results["rows"]["total"]
    assert compare(place / "whole", place / "output/data") == []


def test_input_output_and_checkpoints_on_s3_and_nothing_half_written(place, inputs, tiny_model, s3):
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
        assert (results["rows"]["computed_in_this_attempt"] == results["rows"]["total"]) is computed_all
    fetched = place / "fetched"
    for path in sorted(inputs.rglob("*.parquet")):
        name = path.relative_to(inputs).as_posix()
        (fetched / name).parent.mkdir(parents=True, exist_ok=True)
        client.download_file(s3.bucket, f"out/{name}", str(fetched / name))
        ours, theirs = pq.read_table(fetched / name), outputs(place, name)
        assert ours.equals(theirs)
    assert not client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads")


def test_two_hosts_do_every_file_once_between_them(place, inputs, tiny_model):
    make_input(inputs, files=7, rows=30, seed=8)
    config_dir = place / "input/config"
    config_dir.mkdir()
    done = []
    for host in ("algo-1", "algo-2"):
        (config_dir / "resourceconfig.json").write_text(
            json.dumps({"current_host": host, "hosts": ["algo-1", "algo-2"]})
        )
        embed(EmbedConfig(model=str(tiny_model)), Job.read(), Stop())
        done.append(json.loads((place / f"output/data/results-{host}.json").read_text())["files"]["done"])
    assert sum(done) == 7 and min(done) >= 2
    assert len(list((place / "output/data").rglob("*.parquet"))) == 7


def test_a_sharded_channel_is_all_this_hosts_own(place, inputs, tiny_model):
    make_input(inputs, files=3, rows=10, seed=9)
    config_dir = place / "input/config"
    config_dir.mkdir()
    (config_dir / "resourceconfig.json").write_text(
        json.dumps({"current_host": "algo-2", "hosts": ["algo-1", "algo-2"]})
    )
    (config_dir / "inputdataconfig.json").write_text(
        json.dumps({"dataset": {"TrainingInputMode": "File", "S3DistributionType": "ShardedByS3Key"}})
    )
    embed(EmbedConfig(model=str(tiny_model)), Job.read(), Stop())
    assert json.loads((place / "output/data/results-algo-2.json").read_text())["files"]["done"] == 3


@pytest.mark.slow
def test_two_workers_give_the_bytes_of_one(place, inputs, tiny_model):
    make_input(inputs, files=4, rows=100, seed=10)
    run(tiny_model, output_path=str(place / "solo"), checkpoint_path=str(place / "ck1"))
    results = run(tiny_model, workers=2)
    assert results["rows"]["computed_in_this_attempt"] == results["rows"]["total"]
    assert compare(place / "solo", place / "output/data") == []


def test_the_guides_token_column_is_added_up_and_the_cost_is_known_with_the_instance(place, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola", "mar"], tokens_aproximados=[3, 4])
    (place / "input/config").mkdir()
    (place / "input/config/resourceconfig.json").write_text(
        json.dumps({"current_host": "algo-1", "hosts": ["algo-1"], "current_instance_type": "ml.g4dn.xlarge"})
    )
    results = run(tiny_model)
    assert results["tokens_aproximados"] == 7
    assert results["cost"]["usd_per_h"] == 0.7364 and results["cost"]["price_date"]


def test_two_jobs_on_one_checkpoint_directory_are_refused(place, inputs, tiny_model):
    from estiba.checkpoint import exclusive
    from estiba.store import open_store

    write(inputs / "a.parquet", ["hola"])
    with (
        exclusive(open_store(str(place / "checkpoints")), "embed-algo-1"),
        pytest.raises(EstibaError, match="another job"),
    ):
        run(tiny_model)


def test_a_full_disk_ends_the_job_with_its_saved_work_intact(place, inputs, tiny_model, monkeypatch):
    import errno

    make_input(inputs, files=4, rows=60, seed=11)
    from estiba import checkpoint

    plain, count = checkpoint.Pieces.commit, []

    def commit(self, key, data):
        count.append(1)
        if len(count) == 4:
            from estiba.store import _explained

            with _explained(self.store.url):
                raise OSError(errno.ENOSPC, "No space left on device")
        return plain(self, key, data)

    monkeypatch.setattr(checkpoint.Pieces, "commit", commit)
    with pytest.raises(StoreError, match="free"):
        run(tiny_model)
    monkeypatch.undo()
    monkeypatch.setenv("ESTIBA_ROOT", str(place))
    assert run(tiny_model)["rows"]["resumed"] > 0


def test_columns_of_every_kind_pass_through_unchanged(place, inputs, tiny_model):
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
    out = outputs(place)
    assert out.select(expected.schema.names).equals(expected)
    assert out.schema.metadata[b"otro"] == "ñ".encode() and b"pandas" in out.schema.metadata
    for name in expected.schema.names:
        assert out.schema.field(name).type == expected.schema.field(name).type


def test_work_is_saved_where_the_checkpoint_config_says(place, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola"])
    (place / "input/config").mkdir()
    (place / "input/config/checkpointconfig.json").write_text('{"LocalPath": "/opt/ml/otro"}')
    run(tiny_model)
    assert list((place / "otro").rglob("*.piece")) and not (place / "checkpoints").exists()
    assert EmbedConfig().checkpoint_path == str(place / "otro")


def test_a_revision_of_a_directory_is_refused(place, inputs, tiny_model):
    write(inputs / "a.parquet", ["hola"])
    with pytest.raises(ConfigError, match="--revision"):
        run(tiny_model, revision="main")
