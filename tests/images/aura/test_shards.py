"""Packed shards: the same bytes for any number of workers, resumed after a kill, packed again when damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sailors import lines, paragraphs

from aura.data import documents
from aura.data.packing import Packer, PackingConfig, ShardText, pack_in_workers, split_into_shards
from aura.data.shards import Shard, pack
from aura.data.sources import find_sources
from aura.tokenizer.loading import Tokenizer
from aura.tokenizer.training import train_tokenizer
from estiba.errors import CheckpointError, DataError, EstibaError, Interrupted
from estiba.platform.stop import Stop
from estiba.processes import Worker


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(lines(2000), vocab_size=500, folder=tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 60_000)
    monkeypatch.setattr(documents, "SAMPLE_BYTES", 10_000)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Two long files (running text, one document per line), JSON lines, and twenty short files."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text(paragraphs(400_000), "utf-8")
    (folder / "b.txt").write_text("\n".join(lines(1500, seed=2)), "utf-8")
    rows = [json.dumps({"text": line}) for line in lines(800, seed=3)]
    (folder / "c.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    for number in range(20):
        (folder / f"d{number:02d}.txt").write_text(paragraphs(2000, seed=10 + number), "utf-8")
    return folder


def packing_config(tokenizer: Tokenizer, validation_split: float = 0.1) -> PackingConfig:
    return PackingConfig(
        backend_json=tokenizer.backend_json(),
        tokenizer_identity=tokenizer.identity,
        eos_id=tokenizer.eos_id,
        eos_text=tokenizer.eos_text,
        vocab_size=tokenizer.vocab_size,
        validation_split=validation_split,
    )


@pytest.fixture
def packed(text: Path, tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., list[Shard]]:
    def run(
        folder: str = "shards", *, path: Path = text, workers: int = 1, stop: Stop | None = None, split: float = 0.1
    ) -> list[Shard]:
        return pack(
            find_sources(str(path)), config=packing_config(tokenizer, split), text_format="auto",
            folder=tmp_path / folder, workers=workers, stop=stop or Stop(),
        )  # fmt: skip

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.tokens")}


@pytest.mark.timeout(60)
def test_a_fifo_in_place_of_the_lock_hangs_nothing(packed: Callable[..., list[Shard]], tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    os.mkfifo(tmp_path / "shards/.packing.lock")
    assert packed()


def stream(shards: list[Shard], side: str = "train") -> list[int]:
    return [int(id_) for shard in shards for id_ in getattr(shard, side)]


def test_the_ids_are_the_text_with_an_end_of_text_after_every_document(
    packed: Any, text: Path, tokenizer: Tokenizer
) -> None:
    rows = lines(1500, seed=2)
    shards = packed(path=text / "b.txt", split=0.0)
    expected = [id_ for ids in tokenizer.encode_batch(rows) for id_ in [*ids, tokenizer.eos_id]]
    assert stream(shards) == expected
    assert sum(shard.stats.documents for shard in shards) == 1500
    assert sum(shard.stats.words for shard in shards) == sum(len(row.split()) for row in rows)


def test_running_text_continues_across_its_blocks(packed: Any, text: Path, tokenizer: Tokenizer) -> None:
    shards = packed(path=text / "a.txt", split=0.0)
    whole = stream(shards)
    assert tokenizer.decode([id_ for id_ in whole if id_ != tokenizer.eos_id]) == (text / "a.txt").read_text("utf-8")
    assert whole.count(tokenizer.eos_id) == len(shards) > 5  # one where a chunk ends


def test_each_document_is_on_one_side_of_the_split_and_has_an_end(
    packed: Any, text: Path, tokenizer: Tokenizer
) -> None:
    rows = lines(1500, seed=2)
    shards = packed(path=text / "b.txt")
    train, held_out = (_documents(stream(shards, side), tokenizer) for side in ("train", "validation"))
    assert sorted(train + held_out) == sorted(rows)
    assert 90 < len(held_out) < 210
    assert not set(train) & set(held_out)  # the same text is never on both sides


def test_held_out_blocks_of_running_text_have_ends_on_both_sides(packed: Any, text: Path, tokenizer: Tokenizer) -> None:
    shards = packed(path=text / "a.txt", split=0.3)
    whole = (text / "a.txt").read_text("utf-8")
    runs = _documents(stream(shards), tokenizer) + _documents(stream(shards, "validation"), tokenizer)
    assert sum(map(len, runs)) == len(whole)
    assert all(run in whole for run in runs)  # no run joins what did not follow


def _documents(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    assert ids[-1] == tokenizer.eos_id
    found, one = [], []
    for id_ in ids:
        if id_ == tokenizer.eos_id:
            found.append(tokenizer.decode(one))
            one = []
        else:
            one.append(id_)
    return found


def test_adding_files_does_not_move_documents_across_the_split(packed: Any, text: Path, tokenizer: Tokenizer) -> None:
    before = set(_documents(stream(packed("one", path=text / "b.txt"), "validation"), tokenizer))
    (text / "aa.txt").write_text("\n".join(lines(400, seed=8)), "utf-8")
    after = set(_documents(stream(packed("two"), "validation"), tokenizer))
    assert before <= after


def test_the_bytes_are_the_same_for_any_number_of_workers(packed: Any, tmp_path: Path) -> None:
    one = packed("one", workers=1)
    three = packed("three", workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert len(contents(tmp_path / "one")) > 10
    assert [shard.digest for shard in one] == [shard.digest for shard in three]


def test_a_vocabulary_above_65536_uses_four_bytes(text: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    import dataclasses

    wide = dataclasses.replace(packing_config(tokenizer), vocab_size=65_537)
    sources = find_sources(str(text))
    shards = pack(sources, config=wide, text_format="auto", folder=tmp_path / "wide", workers=1, stop=Stop())
    narrow = pack(
        sources, config=packing_config(tokenizer), text_format="auto", folder=tmp_path / "n", workers=1, stop=Stop()
    )
    assert {shard.train.dtype for shard in shards} == {np.dtype("<u4")}
    assert {shard.train.dtype for shard in narrow} == {np.dtype("<u2")}
    assert stream(shards) == stream(narrow)


def test_an_unchanged_input_is_not_read_again(packed: Any, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = packed()

    def never(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("aura.data.packing.read_chunks", never)
    assert stream(packed()) == stream(first)


def test_text_that_was_moved_is_not_packed_again(packed: Any, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = packed()
    text.rename(text.with_name("moved"))
    monkeypatch.setattr(Packer, "pack", lambda *_: pytest.fail("packed"))
    assert [shard.digest for shard in packed(path=text.with_name("moved"))] == [shard.digest for shard in first]


def test_only_changes_are_packed_again_and_unneeded_shards_are_deleted(packed: Any, text: Path, tmp_path: Path) -> None:
    packed()
    before = contents(tmp_path / "shards")
    with (text / "a.txt").open("a", encoding="utf-8") as file:
        file.write("Y nada más.\n")
    shards = packed()
    after = contents(tmp_path / "shards")
    assert 0 < len(before.keys() - after.keys()) <= 3
    assert len(after) == len({shard.key for shard in shards})
    (recipe,) = (tmp_path / "shards").glob("text-*")
    packed(split=0.2)
    assert [path != recipe for path in (tmp_path / "shards").glob("text-*")] == [True]


@pytest.mark.parametrize("damage", ["bit", "page", "short", "empty", "longer"])
def test_a_damaged_shard_is_detected_and_packed_again(
    packed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    good = stream(packed())
    before = contents(tmp_path / "shards")
    victim = sorted((tmp_path / "shards").rglob("*.tokens"))[3]
    data = bytearray(victim.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 4
    elif damage == "page":
        data[4096:8192] = bytes(4096)
    else:
        data = {"short": data[:-5], "empty": bytearray(), "longer": data + b"x"}[damage]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").rglob("*.tokens")}
    victim.write_bytes(data)
    capsys.readouterr()
    assert stream(packed()) == good
    assert f"{victim}: its bytes do not match its digest; quarantined" in capsys.readouterr().err
    assert contents(tmp_path / "shards") == before
    changed = {path for path, when in times.items() if path.stat().st_mtime_ns != when}
    assert changed == {victim}


def test_a_damaged_or_missing_index_only_costs_time(packed: Any, tmp_path: Path) -> None:
    good = stream(packed())
    (index,) = (tmp_path / "shards").rglob("index.*.json")
    index.write_bytes(index.read_bytes().replace(b'"units": ["', b'"units": ["0'))
    assert stream(packed()) == good
    next((tmp_path / "shards").rglob("*.tokens")).unlink()
    assert stream(packed()) == good


def test_a_disk_that_loses_bytes_ends_the_job(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aura.data.shards._open_verified", lambda *_: None)
    with pytest.raises(CheckpointError, match="check the disk"):
        packed()


def test_a_stop_leaves_whole_shards_that_the_next_run_uses(
    packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = stream(packed("whole"))
    stop = Stop()
    original = Packer.pack

    def third(self: Packer, text: ShardText, *rest: Any) -> bytes | None:
        if len(contents(tmp_path / "shards")) == 2:
            stop.request("the test")
        return original(self, text, *rest)

    monkeypatch.setattr(Packer, "pack", third)
    with pytest.raises(Interrupted, match="stopped by the test: 2 shards of text are packed and kept"):
        packed(stop=stop)
    assert len(contents(tmp_path / "shards")) == 2
    assert stream(packed()) == good


def _wait_for(folder: Path, count: int) -> None:
    until = time.monotonic() + 60
    while len(list(folder.rglob("*.tokens"))) < count and time.monotonic() < until:
        time.sleep(0.002)


KILLED = """
import sys, threading, time, os
from pathlib import Path
from aura.data import documents
from aura.data.corpus import prepare
from aura.data.shards import ShardStore
from aura.tokenizer.loading import load_tokenizer
from estiba.platform.stop import Stop

put = ShardStore.put

def slowly(*shard):
    put(*shard)
    time.sleep(0.05)

def main():
    documents.CHUNK_BYTES, documents.SAMPLE_BYTES = 60_000, 10_000
    ShardStore.put = slowly
    prepare(sys.argv[1], tokenizer=load_tokenizer(sys.argv[2]), folder=Path(sys.argv[3]), seq_length=64,
            validation_split=0.1, text_format="auto", workers=int(sys.argv[4]), stop=Stop(), seed=1)
    print("done")

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_packing_that_is_killed_resumes_and_ends_with_the_same_bytes(
    packed: Any, text: Path, tmp_path: Path, tokenizer: Tokenizer, workers: int
) -> None:
    packed("whole")
    whole = contents(tmp_path / "whole")
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "program.py").write_text(KILLED, "utf-8")
    command = [
        sys.executable, str(tmp_path / "program.py"), str(text), str(tmp_path / "tokenizer"), str(tmp_path / "killed"),
        str(workers),
    ]  # fmt: skip
    environ = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    for shards in (1, 5):
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        _wait_for(tmp_path / "killed", shards)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = contents(tmp_path / "killed")
        assert shards <= len(kept) < len(whole)
        assert kept.items() <= whole.items()
        assert not _lingering(str(tmp_path / "program.py"), f"aura.data.packing:make_worker\0{process.pid}\0")
    ended = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    assert ended.stdout == "done\n"
    assert contents(tmp_path / "killed") == whole
    assert not list((tmp_path / "killed").rglob("*.estiba-tmp"))


def _lingering(*commands: str) -> list[str]:
    """Return the processes running one of the commands that remain for several seconds."""
    for _ in range(50):
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if any(command.encode() in path.read_bytes() for command in commands):
                    found.append(path.parent.name)
            except OSError:
                continue
        if not found:
            return []
        time.sleep(0.1)
    return found


def test_an_error_in_a_worker_names_file_and_line(packed: Any, text: Path) -> None:
    with (text / "c.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"texto": "sin campo"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl: line 801 has no field `text`"):
        packed(workers=2)


def test_a_killed_worker_is_an_error_with_a_remedy(
    text: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Worker] = []
    original = Worker.__init__
    monkeypatch.setattr(
        Worker, "__init__", lambda self, *args, **kw: started.append(self) or original(self, *args, **kw)
    )
    texts = split_into_shards(find_sources(str(text)), "auto")
    running = pack_in_workers(texts, packing_config(tokenizer), 2, lambda: False)
    next(running)
    for worker in started:
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(EstibaError, match=r"was killed, likely out of memory.*fewer --num_workers"):
        list(running)


def test_a_second_process_waits_for_the_first_and_then_packs_nothing(
    packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[list[Shard]] = []
    made: list[str] = []
    original = Packer.pack

    def counted(self: Packer, text: ShardText, *rest: Any) -> bytes | None:
        made.append(text.key)
        return original(self, text, *rest)

    monkeypatch.setattr(Packer, "pack", counted)
    threads = [threading.Thread(target=lambda: results.append(packed())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and stream(results[0]) == stream(results[1]) == stream(results[2])
    assert len(made) == len(set(made))


def test_there_may_be_more_shards_than_open_files(
    text: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 12_000)
    before = len(os.listdir("/proc/self/fd"))
    shards = pack(
        find_sources(str(text)), config=packing_config(tokenizer), text_format="auto", folder=tmp_path / "many",
        workers=1, stop=Stop(),
    )  # fmt: skip
    assert len(shards) > 50
    assert len(os.listdir("/proc/self/fd")) < before + 10
