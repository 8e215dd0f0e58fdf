"""Text, outputs and checkpoints on S3: checked before anything slow, complete for a new host."""

from __future__ import annotations

import signal
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rehearsal import Place, config_at, outcome, run, stopped_at, write_text

from aura import train as job
from aura.commands import COMMANDS
from aura.data import shards
from aura.tokenizer import training
from estiba.errors import ConfigError, StoreError
from estiba.storage import open_store, s3_client
from s3server import S3Server, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server(persist=False) as server:
        server.make_bucket("aura")
        yield server


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix for this test alone."""
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    return f"s3://aura/{uuid.uuid4().hex}"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text/a.txt")


def host(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with a temporary folder of its own."""
    folder = tmp_path / f"host-{number}"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


@pytest.mark.parametrize("flag", ["output_dir", "checkpoint_path", "checkpoint_upload"])
def test_a_wrong_bucket_is_reported_before_the_text_is_read(
    flag: str, s3: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("the text was read")

    monkeypatch.setattr(job, "resolve_tokenizer", read)
    host(0, tmp_path, monkeypatch)
    with pytest.raises((ConfigError, StoreError), match="s3://no-such-bucket"):
        run(tmp_path / "run", text, **{flag: "s3://no-such-bucket/x"})


def test_a_server_that_does_not_answer_is_reported_in_seconds(
    s3: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 186 silent seconds. The limit itself is not waited for here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert s3_client.PROBE_TIMEOUT.total_seconds() <= 20
    monkeypatch.setattr("estiba.storage.s3.PROBE_TIMEOUT", s3_client.PROBE_TIMEOUT / 20)
    with pytest.raises((ConfigError, StoreError), match="aura"):
        run(tmp_path / "run", text, output_dir="s3://aura/out")
    with pytest.raises((ConfigError, StoreError), match="aura"):
        config_at(tmp_path / "run", text, dataset_path="s3://aura/text/").preflight()


def test_a_new_host_gets_tokens_and_tokenizer_and_computes_neither(
    s3: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", text)
    host(0, tmp_path, monkeypatch)
    stopped_at(Place(step=9), tmp_path / "first", text, monkeypatch, checkpoint_path=f"{s3}/ck")
    names = [entry.path for entry in open_store(f"{s3}/ck").list()]
    assert any(name.endswith(".tokens") for name in names)
    assert any(name.startswith("tokenizer-300-") and name.endswith("/tokenizer.json") for name in names)

    def compute(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    host(1, tmp_path, monkeypatch)
    monkeypatch.setattr(training, "train_tokenizer", compute)
    monkeypatch.setattr(shards.ShardStore, "put", compute)
    run(tmp_path / "second", text, checkpoint_path=f"{s3}/ck")
    assert outcome(tmp_path / "second") == outcome(tmp_path / "whole")


def test_after_the_prefix_was_deleted_the_same_host_starts_anew(
    s3: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = host(0, tmp_path, monkeypatch)
    run(tmp_path / "first", text, checkpoint_path=f"{s3}/ck", max_steps=8, epochs=1.0)
    store = open_store(f"{s3}/ck")
    for entry in store.list():
        store.delete(entry.path)
    capfd.readouterr()
    run(tmp_path / "second", text, checkpoint_path=f"{s3}/ck", max_steps=8, epochs=1.0)
    said = capfd.readouterr().err
    assert "resuming" not in said and "the copy was moved to" in said
    assert len(list(folder.glob("estiba-checkpoints-*"))) == 2  # nothing is lost
    run(tmp_path / "third", text, checkpoint_path=f"{s3}/ck", max_steps=8, epochs=1.0)
    assert "resuming at step 8 of 8" in capfd.readouterr().err


def test_what_ctrl_c_writes_is_uploaded_and_resumed_from(
    s3: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", text)
    host(0, tmp_path, monkeypatch)
    place = Place(step=10, signum=signal.SIGINT)
    stopped_at(place, tmp_path / "first", text, monkeypatch, output_dir=f"{s3}/out")
    store = open_store(f"{s3}/out")
    names = {entry.path for entry in store.list()}
    (left,) = (name for name in names if name.startswith("interrupt-step-") and name.endswith(".pt"))
    assert {"tokenizer.json", "vocab.json", "model_config.json", f"{left}.xxh128"} <= names
    run(tmp_path / "second", text, resume_from=f"{s3}/out/{left}")
    assert outcome(tmp_path / "second") == outcome(tmp_path / "whole")


def test_a_checkpoint_on_s3_can_be_exported(
    s3: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host(0, tmp_path, monkeypatch)
    run(tmp_path / "run", text, checkpoint_path=f"{s3}/ck", max_steps=8, epochs=1.0)
    host(1, tmp_path, monkeypatch)
    COMMANDS["export"](["--checkpoint", f"{s3}/ck", "--to", str(tmp_path / "newest.pt")])
    assert torch.load(tmp_path / "newest.pt", weights_only=True)["step"] == 8
    COMMANDS["export"](["--checkpoint", f"{s3}/ck/step-00000008", "--to", str(tmp_path / "eight.pt")])
    assert torch.load(tmp_path / "eight.pt", weights_only=True)["step"] == 8
    COMMANDS["export"](["--checkpoint", f"{s3}/ck", "--to", str(tmp_path / "hf")])
    assert (tmp_path / "hf/tokenizer.json").exists()
    with pytest.raises(ConfigError, match="contains no checkpoint"):
        COMMANDS["export"](["--checkpoint", f"{s3}/none", "--to", str(tmp_path / "none.pt")])


def test_an_older_step_on_s3_supersedes_the_later_ones_which_are_kept(
    s3: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", text)
    host(0, tmp_path, monkeypatch)
    places = {"checkpoint_path": f"{s3}/ck", "output_dir": f"{s3}/out"}
    for step in (10, 20):
        stopped_at(Place(step=step), tmp_path / "first", text, monkeypatch, **places)
    host(1, tmp_path, monkeypatch)
    from estiba.checkpoint.remote import Remote

    steps = sorted(int(name[5:]) for name in Remote(f"{s3}/ck").names())
    assert len(steps) > 1
    run(tmp_path / "second", text, checkpoint_path=f"{s3}/ck", resume_from=f"{s3}/out/checkpoint-step-{steps[0]}.pt")
    assert outcome(tmp_path / "second") == outcome(tmp_path / "whole")
    kept = {entry.path for entry in open_store(f"{s3}/ck").list()}
    assert {f"superseded-step-{step:08d}/manifest.json" for step in steps[1:]} <= kept
