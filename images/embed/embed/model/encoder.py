"""Texts to vectors: those of SentenceTransformer.encode_document, with less padding and every vector checked.

encoder = Encoder(EmbedConfig(model="BAAI/bge-m3"))
window = encoder.tokenize(["Zarpamos al alba.", None, ""])      # CPU work, safe in another thread
encoded = encoder.encode(window)                                 # vectors float32[3, 1024], status 0 1 2
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from embed.config import EmbedConfig
from embed.data.chunks import Encoded, ModelInfo, Status
from embed.data.known_vectors import KnownVectors
from embed.data.passages import Passages
from embed.model import heads, loading, resolve, samples
from embed.model.batches import BatchDone, BatchLimits, Stopped, pack
from embed.model.engines import Engines, vectors_of
from embed.model.fallbacks import EngineLoader
from embed.model.forward import Engine, InFlight, cpu_name, is_out_of_memory, products_of
from embed.model.known import divide
from embed.model.passages import cutter_for
from embed.model.resolve import NO_LIMIT
from embed.model.samples import SENTENCES
from embed.model.tokens import FastTokens, Features, Window, read_window, tokens_for
from embed.model.window_work import WindowWork
from estiba.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

MIN_TOKEN_BUDGET = 512
"""Running out of memory does not shrink the budget below this; single batches are still split."""


class Encoder:
    """A loaded model. `tokenize` may run in one thread while `encode` runs in another."""

    dimensions: int
    max_length: int
    """Tokens read of a text, special tokens included; NO_LIMIT if the model has no limit."""
    device: str
    dtype: str
    prompt: str
    """Put before every text."""
    identity: dict[str, str]

    def __init__(self, config: EmbedConfig, first_texts: Sequence[str] = ()) -> None:
        """Load the model and embed one sentence. Raises ConfigError if a setting or the model cannot be used.

        `config.model` is a directory or a name on the hub; the caller copies one from s3:// to a directory.
        `first_texts` are some of the input, on which an engine other than torch must give torch's vectors.
        """
        self.config = config
        self._files = loading.find(config.model, config.revision, heads.file_names(config))
        self._heads = heads.load(self._files.directory, config)
        device = resolve.device_for(config.device)
        dtype = resolve.dtype_for(config.dtype, device)
        self._loader = EngineLoader(self._files, config, self._heads)
        self._use(self._loader.load(device, dtype))
        model = self._engine.model
        limit = resolve.position_limit(model)
        self.prompt = resolve.prompt_for(model, config)
        max_length = resolve.set_max_length(model, config.max_length, limit)
        self.max_length = max_length or NO_LIMIT
        resolve.refuse_long_prompt(model, self.prompt, self.max_length)
        self._tokens = tokens_for(model, self.prompt, max_length, limit)
        self._cutter = cutter_for(self._tokens, config, max_length)
        self._heads.check_tokens(self._tokens)
        self._known_ids = resolve.known_ids(model)
        self.unknown_tokens = resolve.tokens_beyond(model, self._known_ids)
        resolve.warn_of_tokens_beyond(self.unknown_tokens, self._known_ids)
        self._check_sentences()
        digest = loading.digest(self._files.directory)
        self.identity = {
            "model": self._files.name,
            "commit": self._files.commit or "",
            "digest": f"xxh3-128:{digest}",
            "dtype": self.dtype,
            "pooling": loading.pooling(model),
            "prompt": self.prompt,
            "max_length": str(max_length or ""),
            "dimensions": str(self.dimensions),
            "normalize": str(config.normalize).lower(),
            **self._heads.digests,
            **loading.versions(),
        }
        if config.dtype in ("float32", "int8") and device.type == "cpu":
            self.identity["products"] = config.dtype  # so that work in lower precision is not taken for higher
        if self._cutter is not None:
            self.identity |= {
                "chunk": str(self._cutter.length),
                "chunk_overlap": str(config.chunk_overlap),
                "chunk_output": config.chunk_output,
            }
        why_not = "" if isinstance(self._tokens, FastTokens) else "the model has a tokenizer of its own"
        why_not = "--trust-remote-code is set" if config.trust_remote_code else why_not
        why_not = f"it does not compute {self._heads.flags}" if self._heads.digests else why_not
        tokens = self._tokens
        compared: list[Features] = []
        calibration: list[Features] = []
        if config.engine != "torch" and isinstance(tokens, FastTokens) and not config.trust_remote_code:
            compared = samples.batches(tokens, self._known_ids, first_texts, self.token_budget)
        if config.dtype == "int8" and not why_not:
            calibration = samples.calibration(tokens, self._known_ids, first_texts)
        self._engines = Engines(
            config,
            self._engine,
            compared,
            lambda width: samples.row_of_width(tokens, width),
            digest,
            why_not,
            calibration,
        )
        if isinstance(tokens, FastTokens):
            for engine in {self._engines.best, self._engines.reference}:
                engine.measure_memory(
                    lambda rows, width: samples.rows_of_width(tokens, width, rows),
                    self.max_length,
                    workers=config.workers,
                )
        self._use(self._engines.for_width(1))

    @property
    def computed_by(self) -> dict[str, Any]:
        """What the last bits of a vector depend on, beside the model."""
        is_cpu, best = self._engine.device.type == "cpu", self._engines.best
        # A resume continues with the engine of the job, and not with the one of a window with long rows.
        chosen = {} if self._engine is best else {"instead_of": {"engine": best.version, "dtype": best.precision}}
        return {
            "engine": self._engine.version,
            "dtype": self._engine.precision,
            "hardware": cpu_name() if is_cpu else torch.cuda.get_device_name(self._engine.device),
            "threads": self._engine.threads,
            **({"ranges": self._engine.ranges} if self._engine.ranges else {}),
            **chosen,
        }

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            identity=self.identity,
            dimensions=self.dimensions,
            device=self.device,
            dtype=self.dtype,
            token_budget=self.token_budget,
            engine=f"{self._engine.version}, {self._engine.precision}",
            token_dimensions=self._heads.vector_width,
            products=products_of(self._engine.model),
        )

    def continue_with(self, earlier: Mapping[str, Any]) -> None:
        """Use the engine that computed the rows of an earlier attempt, if it runs here."""
        self._engines.continue_with(earlier)
        self._use(self._engines.for_width(1))

    def choose_engine(self, window: Window) -> None:
        """Use the engine for the window's longest row."""
        self._use(self._engines.for_width(int(window.n_tokens.max(initial=1))))

    def tokenize(self, texts: Sequence[str | bytes | None]) -> Window:
        """Classify and tokenise one window. Raises DataError on a value that is not text, bytes or None."""
        return read_window(self._tokens, texts, self._known_ids)

    def windows(self, texts: Sequence[str | bytes | None]) -> Iterator[tuple[Window, Passages | None]]:
        """The windows of a row range: one, whose rows are those of the range, or with --chunk its passages."""
        if self._cutter is None:
            yield self.tokenize(texts), None
        else:
            yield from self._cutter.windows(texts, self._known_ids)

    def token_of(self, id: int) -> str:
        """The text of a token that the embedding table lacks."""
        return next((token for token, other in self.unknown_tokens.items() if other == id), "?")

    def trim(self) -> None:
        """Return cached device memory if little is left. Call it between files."""
        self._engine.trim()

    def encode(
        self,
        window: Window,
        should_stop: Callable[[], bool] = lambda: False,
        on_batch: Callable[[BatchDone], None] = lambda _: None,
        prior: Encoded | None = None,
        not_needed: np.ndarray | None = None,
        limits: BatchLimits = BatchLimits(),  # noqa: B008 - frozen
        known: KnownVectors | None = None,
    ) -> Encoded:
        """The window's vectors: longest rows first, every vector checked, invalid ones computed again in float32.

        On a CPU the same window gives the same bits. `prior` is what an earlier attempt had of it, and the rows of the
        mask `not_needed` have their vectors elsewhere: the batches are the same, those with nothing missing are not
        computed, and vectors of `prior` keep their bits. Rows with equal tokens are computed once, and rows with a
        `known` vector not at all. Raises Stopped between batches, and DataError if a single row does not fit in memory.
        """
        vectors = np.zeros((len(window.status), self.dimensions), np.float32)
        done = np.zeros(len(window.status), bool)
        tokens = self._heads.of_window(window)
        if prior is not None:
            done = (prior.status == Status.OK) & (window.status == Status.OK)
            vectors[done] = prior.vectors[done]
            if tokens is not None and prior.tokens is not None:
                tokens.put_rows_of(prior.tokens, np.flatnonzero(done))
        division, again = divide(window, known), np.zeros(len(done), bool)
        if not_needed is not None:
            again = division.originals_of(~not_needed) & not_needed & ~done  # a copy needs their vectors here
            done |= not_needed & ~again
        rows = division.computed

        work = WindowWork(
            window=window,
            vectors=vectors,
            done=done,
            tokens=tokens,
            on_batch=on_batch,
            limits=limits,
            again=again,
        )
        by_batch, padded_tokens = self._encode_rows(self._engine, work, rows, should_stop)
        if by_batch and not self._engine.is_exact:
            # Half precision overflows on some texts with some models. Only these rows are computed again, those of each
            # batch together: a resumed job does not learn which rows of the batches that it leaves out overflowed.
            count, precision = sum(map(len, by_batch)), self._engine.precision
            logger.info("%d of %d vectors overflowed in %s; using float32 for them", count, len(rows), precision)
            engine, overflowed, by_batch = self._float32_engine(), by_batch, []
            for batch in overflowed:
                left, more = self._encode_rows(engine, work, batch, should_stop, is_again=True)
                by_batch += left
                padded_tokens += more
        invalid = division.with_copies(np.concatenate([rows[:0], *by_batch]))
        division.fill(vectors, tokens, known)
        status, n_tokens, truncated = window.status.copy(), window.n_tokens.copy(), window.truncated.copy()
        vectors[invalid] = 0
        status[invalid], n_tokens[invalid], truncated[invalid] = Status.NOT_FINITE, 0, False
        if tokens is not None and len(invalid):
            tokens = tokens.only(status == Status.OK)
        return Encoded(
            vectors=vectors, status=status, n_tokens=n_tokens, truncated=truncated, padded_tokens=padded_tokens,
            tokens=tokens, origin=division.origin(len(status)),
        )  # fmt: skip

    def _encode_rows(
        self,
        engine: Engine,
        work: WindowWork,
        rows: np.ndarray,
        should_stop: Callable[[], bool],
        *,
        is_again: bool = False,
    ) -> tuple[list[np.ndarray], int]:
        """Fill work.vectors[rows]. Returns the rows of each batch whose vector is invalid, and the padded tokens."""
        window, done, has_room = work.window, work.done, work.limits.has_room
        max_rows = min(filter(None, (self.config.batch_size, work.limits.max_rows)), default=0)
        batches = pack(window.n_tokens, rows, engine.rows_of, max_rows, engine.multiple)
        halves: list[np.ndarray] = []  # of batches that did not fit in memory
        invalid: list[np.ndarray] = []
        padded_tokens = 0
        in_flight: deque[InFlight] = deque()

        def finish_oldest() -> int:
            batch = in_flight.popleft()
            computed = vectors_of(engine, batch)
            is_invalid = engine.invalid(computed)
            if work.tokens is not None and batch.tokens is not None:
                is_invalid |= batch.tokens.put_into(work.tokens, batch.rows, ~done[batch.rows])
            invalid.append(batch.rows[is_invalid])
            work.add(batch, computed, is_invalid, is_again=is_again)
            return batch.padded_tokens

        try:
            while (batch := halves.pop() if halves else next(batches, None)) is not None:
                if done[batch].all():
                    continue
                if should_stop():
                    while in_flight:
                        finish_oldest()
                    raise Stopped
                while not has_room(sum(len(each.rows) for each in in_flight) + len(batch)) and in_flight:
                    padded_tokens += finish_oldest()
                if (launched := self._launch(engine, window, batch)) is not None:
                    in_flight.append(launched)
                while len(in_flight) >= (engine.depth if launched is not None else 1):
                    padded_tokens += finish_oldest()
                if launched is None:
                    engine.free()
                    if len(batch) > 1:
                        middle = (len(batch) + 1) // 2
                        halves += [batch[middle:], batch[:middle]]
                        self._shrink_budget(engine, window, batch)
                    else:
                        in_flight.append(self._launch_alone(engine, window, batch))
            while in_flight:
                padded_tokens += finish_oldest()
        finally:  # after an error nothing must compute on
            for each in in_flight:
                with contextlib.suppress(Exception):
                    each.wait()
        return [rows for rows in invalid if len(rows)], padded_tokens

    def _launch(self, engine: Engine, window: Window, batch: np.ndarray) -> InFlight | None:
        """None if memory ran out. The exception, whose frames hold the tensors, is freed when this returns."""
        try:
            return engine.launch(self._tokens.features(window, batch, engine.multiple), batch)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
        return None

    def _shrink_budget(self, engine: Engine, window: Window, batch: np.ndarray) -> None:
        """Make later batches smaller, in this window and the next ones."""
        computed = len(batch) * int(window.n_tokens[batch].max())
        budget = max(MIN_TOKEN_BUDGET, computed // 2)
        if budget < engine.token_budget:
            logger.warning(
                "out of memory on %s with %d rows (%d tokens); continuing with at most %d tokens in a batch",
                engine.device, len(batch), computed, budget,
            )  # fmt: skip
            engine.token_budget = budget

    def _launch_alone(self, engine: Engine, window: Window, row: np.ndarray) -> InFlight:
        """Fall back to the CPU for a row that does not fit on the device: slow, but the job continues."""
        tokens = int(window.n_tokens[row[0]])
        if engine.device.type != "cpu":
            logger.warning("a row of %d tokens does not fit on %s; computing it on the CPU", tokens, engine.device)
            in_flight = self._launch(self._loader.cpu(self._engine), window, row)
            if in_flight is not None:
                return in_flight
        raise DataError(
            f"out of memory: row {row[0]} of the window, alone in its batch, has {tokens} tokens; "
            f"lower --max-length (now {self.max_length}) or use a machine with more memory"
        )

    @property
    def token_budget(self) -> int:
        """The largest number of padded tokens in a batch; falls when memory runs out."""
        return self._engine.token_budget

    def _use(self, engine: Engine) -> None:
        self._engine = engine
        self.device = str(engine.device)
        self.dtype = str(engine.dtype).removeprefix("torch.")

    def _float32_engine(self) -> Engine:
        if self._engine.precision != self.dtype:  # OpenVINO with faster products
            return self._engines.reference
        return self._loader.float32(self._engine)

    def _check_sentences(self) -> None:
        """Learn the width of a vector. Raise ConfigError if vectors are not finite, or do not tell sentences apart."""
        resolve.refuse_unknown_words(self._engine.model, self.config.model, SENTENCES)
        window = self.tokenize(SENTENCES)
        rows = np.flatnonzero(window.status == Status.OK)
        if not len(rows):
            raise ConfigError(
                f"model {self.config.model!r}: its tokenizer finds no token in a plain sentence; "
                "the tokenizer's files do not belong to the model"
            )

        def is_invalid(engine: Engine) -> bool:
            vectors_BD = engine.launch(self._tokens.features(window, rows, engine.multiple), rows).wait()
            self.dimensions = vectors_BD.shape[1]
            self._sample_BD = vectors_BD
            return bool(engine.invalid(vectors_BD).any())

        if is_invalid(self._engine):
            if self._engine.dtype == torch.float32 or is_invalid(self._float32_engine()):
                raise ConfigError(
                    f"model {self.config.model!r}: its vector for a plain sentence is not finite, or is zero, in "
                    "float32 too; the weights are damaged, download or save the model again"
                )
            if self.config.dtype == "auto":
                logger.info("the model overflows in %s; using float32", self.dtype)
                engine = self._float32_engine()
                self._loader.forget()
                engine.token_budget = self._engine.token_budget
                self._use(engine)
        noise = 1e-5 if self._engine.dtype == torch.float32 else 1e-3
        resolve.refuse_same_vectors(self._sample_BD, noise, self.config.model)
        requested = self.config.dimensions
        if requested is not None and requested > self.dimensions:
            raise ConfigError(f"--dimensions {requested}: the model has {self.dimensions}; pass that or fewer")
