"""Windows contain the right tokens, once per epoch, in an order set by seed and index alone; corpora from paths."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sailors import lines, paragraphs

from aura.data.corpus import Corpus, prepare
from aura.data.windows import ORDER_BLOCK, Windows, permuted
from aura.tokenizer.loading import Tokenizer
from aura.tokenizer.training import train_tokenizer
from estiba.errors import ConfigError, DataError
from estiba.platform.stop import Stop


def windows_of(tokens: int, *, parts: int = 1, seq_length: int = 4, seed: int = 1) -> Windows:
    """Windows over the stream 0, 1, 2, ... in `parts` arrays."""
    return Windows(
        [part.astype(np.uint16) for part in np.array_split(np.arange(tokens), parts)],
        seq_length=seq_length,
        seed=seed,
        stream_identity=f"{tokens}",
    )


@settings(max_examples=150, deadline=None)
@given(tokens=st.integers(2, 600), parts=st.integers(1, 40), seq_length=st.integers(1, 50), seed=st.integers(0, 2**63))
def test_an_epoch_contains_every_window_once_for_any_number_of_parts(
    tokens: int, parts: int, seq_length: int, seed: int
) -> None:
    windows = windows_of(tokens, parts=parts, seq_length=seq_length, seed=seed)
    assert len(windows) == (tokens - 1) // seq_length
    if not len(windows):
        return
    for epoch in range(2):
        taken = windows.take(epoch * len(windows), len(windows))
        assert taken.dtype == torch.int64 and taken.shape == (len(windows), seq_length + 1)
        expected = torch.arange(len(windows))[:, None] * seq_length + torch.arange(seq_length + 1)
        assert torch.equal(taken[taken[:, 0].argsort()], expected)


@settings(max_examples=100, deadline=None)
@given(first=st.integers(0, 500), count=st.integers(0, 200), cut=st.integers(0, 200))
def test_samples_depend_on_the_index_alone(first: int, count: int, cut: int) -> None:
    windows = windows_of(400, parts=7)
    cut = min(cut, count)
    whole = windows.take(first, count)
    fresh = windows_of(400)
    assert torch.equal(torch.cat([fresh.take(first, cut), fresh.take(first + cut, count - cut)]), whole)


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    windows = windows_of(1001)
    orders = [windows.order(epoch * 250, 250).tolist() for epoch in range(3)]
    orders.append(windows_of(1001, seed=2).order(0, 250).tolist())
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, ORDER_BLOCK, ORDER_BLOCK + 1, 3 * ORDER_BLOCK + 17, 10**6 + 3])
def test_the_order_is_a_permutation_and_blocks_of_it_agree(count: int) -> None:
    whole = permuted(np.arange(count, dtype=np.uint64), count, 7, 3)
    assert np.array_equal(np.sort(whole), np.arange(count))
    some = np.arange(count, dtype=np.uint64)[count // 3 : count // 3 + 1000]
    assert np.array_equal(permuted(some, count, 7, 3), whole[count // 3 : count // 3 + 1000])


@pytest.mark.parametrize("count", [5_000, 300_000])
def test_the_order_looks_random(count: int) -> None:
    order = permuted(np.arange(count, dtype=np.uint64), count, 11, 0).astype(np.float64)
    bound = 5 / np.sqrt(count)
    assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < bound
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < bound
    cells = np.histogram2d(np.arange(count), order, bins=20)[0]
    chi2 = ((cells - count / 400) ** 2 / (count / 400)).sum()
    assert 250 < chi2 < 480  # 361 degrees of freedom: 361 +- 27
    other = permuted(np.arange(count, dtype=np.uint64), count, 11, 1)
    assert (order == other).sum() < 20


def test_the_order_matches_the_first_release() -> None:
    """Another version must be able to resume a run: never change these without a new VERSION."""
    assert permuted(np.arange(8, dtype=np.uint64), 8, 42, 0).tolist() == [1, 2, 0, 6, 3, 5, 4, 7]
    large = permuted(np.arange(6, dtype=np.uint64), 1_000_000, 42, 1)
    assert large.tolist() == [
        371478,
        954664,
        697604,
        754353,
        359552,
        979806,
    ]


def test_samples_continue_across_blocks_and_across_epochs() -> None:
    windows = windows_of(60_000, seq_length=1)
    windows._count = 3 * ORDER_BLOCK + 5  # only the order is asked for
    first = windows.order(ORDER_BLOCK - 3, 6).tolist()
    assert first == [int(windows.order(ORDER_BLOCK - 3 + step, 1)[0]) for step in range(6)]
    end = windows.order(windows._count - 2, 4).tolist()
    assert end == [int(windows.order(windows._count - 2 + step, 1)[0]) for step in range(4)]


def test_the_identity_depends_on_stream_length_and_seed() -> None:
    same = [windows_of(400).identity, windows_of(400).identity]
    others = [windows_of(401), windows_of(400, seq_length=5), windows_of(400, seed=2)]
    assert same[0] == same[1]
    assert len({same[0], *(windows.identity for windows in others)}) == 4


def test_too_few_tokens_for_a_window_are_an_error() -> None:
    windows = windows_of(4)
    assert len(windows) == 0
    with pytest.raises(DataError, match="4 tokens make no window of 4 \\+ 1"):
        windows.take(0, 1)


# --- from a path ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(lines(2000), vocab_size=500, folder=tmp_path_factory.mktemp("tokenizer") / "es")


def corpus_of(path: Path | str, folder: Path, tokenizer: Tokenizer, **changes: object) -> Corpus:
    options: dict[str, object] = {
        "seq_length": 64, "validation_split": 0.1, "text_format": "auto", "workers": 1, "stop": Stop(), "seed": 5,
    } | changes  # fmt: skip
    return prepare(str(path), tokenizer=tokenizer, folder=folder, **options)  # type: ignore[arg-type]


def test_a_corpus_does_not_depend_on_its_location_or_the_number_of_workers(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(paragraphs(200_000), "utf-8")
    one = corpus_of(tmp_path / "one", tmp_path / "a", tokenizer)
    two = corpus_of(f"{tmp_path}/two/*.txt", tmp_path / "b", tokenizer, workers=2)
    assert one.identity == two.identity
    assert torch.equal(one.train.take(3, 50), two.train.take(3, 50))
    assert torch.equal(one.validation.take(0, 5), two.validation.take(0, 5))
    assert one.stats.text_bytes == (tmp_path / "one/one.txt").stat().st_size
    assert one.tokens == one.train.tokens + one.validation.tokens
    assert 1 < one.tokens_per_word < 10 and one.stats.documents > 40
    other = corpus_of(tmp_path / "one", tmp_path / "a", tokenizer, seed=6)
    assert other.identity != one.identity


def test_s3_gives_the_same_corpus(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    s3server = pytest.importorskip("s3server", reason="no S3 stand-in here")
    text = paragraphs(150_000)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text(text, "utf-8")
    try:
        server = s3server.s3_server()
        running = server.__enter__()
    except ModuleNotFoundError as error:
        pytest.skip(f"the S3 stand-in needs {error.name}")
    try:
        for name, value in running.environ.items():
            monkeypatch.setenv(name, value)
        running.make_bucket("textos")
        from estiba.storage import open_store

        store = open_store("s3://textos/es")
        store.write("a.txt", text.encode())
        store.write("LEEME.md", b"no")
        here = corpus_of(tmp_path / "text", tmp_path / "a", tokenizer)
        for number, location in enumerate(("s3://textos/es", "s3://textos/es/a.txt", "s3://textos/**/*.txt")):
            assert corpus_of(location, tmp_path / f"s{number}", tokenizer).identity == here.identity
        with pytest.raises(ConfigError, match=r"no \.txt or \.jsonl"):
            corpus_of("s3://textos/fr", tmp_path / "n", tokenizer)
    finally:
        server.__exit__(None, None, None)


def test_too_little_text_is_an_error_with_a_remedy(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("Hola.\n", "utf-8")
    with pytest.raises(DataError, match=r"tokens to train on make no window of 64 \+ 1.*--seq_length of at most"):
        corpus_of(tmp_path / "a.txt", tmp_path / "s", tokenizer, validation_split=0.0)


def test_too_little_validation_text_is_a_warning(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(paragraphs(20_000), "utf-8")
    corpus = corpus_of(tmp_path / "a.txt", tmp_path / "s", tokenizer, validation_split=0.001)
    assert len(corpus.validation) == 0 < len(corpus.train)
    assert "no validation loss; raise the split" in capsys.readouterr().err
    corpus_of(tmp_path / "a.txt", tmp_path / "s", tokenizer, validation_split=0.0)
    assert "no validation loss" not in capsys.readouterr().err


def test_empty_documents_are_counted_and_reported(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("\n".join([*lines(300), "", "  ", "fin."]), "utf-8")
    corpus = corpus_of(tmp_path / "a.txt", tmp_path / "s", tokenizer, text_format="lines")
    assert corpus.stats.documents == 301
    assert "skipped 2 empty documents of 303" in capsys.readouterr().err


@pytest.mark.parametrize("split", [-0.1, 1.0, 2.0])
def test_a_validation_split_must_be_a_fraction(tmp_path: Path, tokenizer: Tokenizer, split: float) -> None:
    with pytest.raises(ConfigError, match="validation_split"):
        corpus_of(tmp_path, tmp_path / "s", tokenizer, validation_split=split)


@pytest.mark.slow
def test_packing_a_large_file_takes_little_memory(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = paragraphs(2_000_000)
    with (tmp_path / "a.txt").open("w", encoding="utf-8") as file:
        for number in range(24):
            file.write(text.replace(" la ", f" la{number} "))
    tokenizer.save(tmp_path / "tokenizer")
    program = (
        "import sys, resource; from pathlib import Path; from aura.data.corpus import prepare; "
        "from aura.tokenizer.loading import load_tokenizer; from estiba.platform.stop import Stop\n"
        "tokenizer = load_tokenizer(sys.argv[2]); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "prepare(sys.argv[1], tokenizer=tokenizer, folder=Path(sys.argv[3]), seq_length=64, validation_split=0.01, "
        "text_format='auto', workers=1, stop=Stop(), seed=1)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.txt"), str(tmp_path / "tokenizer"), str(tmp_path / "s")],
        env={"PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert int(ended.stdout) < 300  # MiB, of a 48 MB text; its maps count too
