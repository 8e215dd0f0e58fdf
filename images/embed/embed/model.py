"""Texts to vectors: what SentenceTransformer.encode_document gives, without the padding and without the surprises.

    encoder = Encoder(EncoderConfig(model="BAAI/bge-m3"))
    window = encoder.tokenize(["Zarpamos al alba.", None, ""])      # CPU work, safe in another thread
    encoded = encoder.encode(window)                                 # vectors float32[3, 1024], status 0 1 2

The order of work is in `Encoder.encode`; batches.py says which rows share a batch, tokens.py which ids they have,
engine.py runs one, source.py loads the model, choices.py holds EncoderConfig.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from embed import choices, source
from embed.batches import default_token_budget, longest_first, padded_width, rows_that_fit
from embed.choices import NO_LIMIT, EncoderConfig
from embed.engine import Engine, Flight, ran_out_of_memory
from embed.tokens import STATUS_WORDS, Status, Window, read_window, tokens_for
from estiba.errors import ConfigError, DataError

__all__ = ["STATUS_WORDS", "Encoded", "Encoder", "EncoderConfig", "Status", "Stopped", "Window"]

logger = logging.getLogger(__name__)

LEAST_BUDGET = 512  # padded tokens that out-of-memory does not shrink the budget below; single batches still are split


class Stopped(Exception):
    """`should_stop` turned true between two batches; nothing of the window was kept."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A window's vectors, in the window's order of rows."""

    vectors: np.ndarray
    """float32[rows, dimensions]; zeros where status is not OK."""
    status: np.ndarray
    """uint8[rows], a Status each."""
    n_tokens: np.ndarray
    """int32[rows], special tokens included; 0 where not OK."""
    truncated: np.ndarray
    """bool[rows]: the model read only the beginning."""
    padded_tokens: int
    """Tokens computed, padding and second tries included."""


class Encoder:
    """A loaded model. `tokenize` may run in one thread while `encode` runs in another."""

    dimensions: int
    """Width of a vector."""
    max_length: int
    """Tokens of a text that are read, special tokens included; NO_LIMIT where the model has none."""
    device: str
    dtype: str
    prompt: str
    """What is put before every text."""
    identity: dict[str, str]
    """What makes the vectors what they are: for provenance, and to refuse to go on with another model."""

    def __init__(self, config: EncoderConfig) -> None:
        """Load and try the model. Raises ConfigError on a mistake in `config` or a model that cannot be used."""
        choices.check(config)
        self.config = config
        self._source = source.find(config.model, config.revision)
        device = choices.device_for(config.device)
        dtype = choices.dtype_for(config.dtype, device)
        self._slow_engines: dict[str, Engine] = {}
        self._use(self._load(device, dtype))
        model = self._engine.model
        limit = choices.position_limit(model)
        self.prompt = choices.prompt_for(model, config)
        max_length = choices.set_max_length(model, config.max_length, limit)
        self.max_length = max_length or NO_LIMIT
        if self.prompt and (used := choices.length_of(model, self.prompt)) >= self.max_length:
            raise ConfigError(
                f"the prompt {self.prompt!r:.80} takes {used} of {self.max_length} tokens and leaves none for a text; "
                "shorten --prompt or raise --max-length"
            )
        self._tokens = tokens_for(model, self.prompt, max_length, limit)
        self._try_out()
        self.identity = {
            "model": self._source.name,
            "commit": self._source.commit or "",
            "digest": f"xxh3-128:{source.digest(self._source.directory)}",
            "dtype": self.dtype,
            "pooling": source.pooling(model),
            "prompt": self.prompt,
            "max_length": str(max_length or ""),
            "dimensions": str(self.dimensions),
            "normalize": str(config.normalize).lower(),
            **source.versions(),
        }

    def tokenize(self, texts: Sequence[str | bytes | None]) -> Window:
        """Judge and tokenise one window. Raises DataError on a value that is no text, bytes or None."""
        return read_window(self._tokens, texts)

    def trim(self) -> None:
        """Between files: give cached device memory back where little is left."""
        self._engine.trim()

    def encode(self, window: Window, should_stop: Callable[[], bool] = lambda: False) -> Encoded:
        """The window's vectors: longest rows first, every vector checked, broken ones computed again in float32.

        On a CPU the same window gives the same bits. Raises Stopped between batches, DataError when one row alone does
        not fit in memory.
        """
        vectors = np.zeros((len(window.status), self.dimensions), np.float32)
        rows = np.flatnonzero(window.status == Status.OK)
        broken, padded = self._encode_rows(self._engine, window, rows, vectors, should_stop)
        if len(broken) and self._engine.dtype != torch.float32:
            # Half precision overflows on some texts of some models. These rows, and only these, go again.
            logger.info("%d of %d vectors broke in %s; computing them in float32", len(broken), len(rows), self.dtype)
            broken, more = self._encode_rows(self._float32_engine(), window, broken, vectors, should_stop)
            padded += more
        status, n_tokens, truncated = window.status.copy(), window.n_tokens.copy(), window.truncated.copy()
        vectors[broken] = 0
        status[broken], n_tokens[broken], truncated[broken] = Status.NOT_FINITE, 0, False
        return Encoded(vectors=vectors, status=status, n_tokens=n_tokens, truncated=truncated, padded_tokens=padded)

    def _encode_rows(
        self, engine: Engine, window: Window, rows: np.ndarray, vectors: np.ndarray, should_stop: Callable[[], bool]
    ) -> tuple[np.ndarray, int]:
        """Fill vectors[rows]. Returns the rows whose vector is broken, and the padded tokens computed."""
        order = longest_first(window.n_tokens, rows)
        broken: list[np.ndarray] = []
        padded = start = 0
        halves: list[np.ndarray] = []  # of batches that did not fit
        flying: Flight | None = None

        def land(flight: Flight | None) -> int:
            if flight is None:
                return 0
            landed = flight.land()
            vectors[flight.rows] = landed
            broken.append(flight.rows[engine.broken(landed)])
            return flight.padded_tokens

        while halves or start < len(order):
            if should_stop():
                raise Stopped
            if halves:
                batch = halves.pop()
            else:
                width = padded_width(int(window.n_tokens[order[start]]), engine.multiple)
                batch = order[start : start + rows_that_fit(width, engine.token_budget, self.config.batch_size)]
                start += len(batch)
            launched = self._launch(engine, window, batch)
            padded += land(flying)  # the batch before, while this one computes
            flying = launched
            if launched is None:
                engine.free()
                if len(batch) > 1:
                    halves += [batch[(len(batch) + 1) // 2 :], batch[: (len(batch) + 1) // 2]]
                    self._shrink(engine, window, batch)
                else:
                    flying = self._launch_alone(engine, window, batch)
        padded += land(flying)
        return np.concatenate(broken) if broken else rows[:0], padded

    def _launch(self, engine: Engine, window: Window, batch: np.ndarray) -> Flight | None:
        """None when memory ran out. The exception, whose frames hold the tensors, is gone when this returns."""
        try:
            return engine.launch(self._tokens.features(window, batch, engine.multiple), batch)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not ran_out_of_memory(error):
                raise
        return None

    def _shrink(self, engine: Engine, window: Window, batch: np.ndarray) -> None:
        """Later batches are smaller, of this window and the next ones."""
        computed = len(batch) * int(window.n_tokens[batch].max())
        budget = max(LEAST_BUDGET, computed // 2)
        if budget < engine.token_budget:
            logger.warning(
                "out of memory on %s with %d rows (%d tokens); going on with at most %d tokens in a batch",
                engine.device, len(batch), computed, budget,
            )  # fmt: skip
            engine.token_budget = budget

    def _launch_alone(self, engine: Engine, window: Window, row: np.ndarray) -> Flight:
        """One row that does not fit on the device is computed on the CPU: slow, but the job goes on."""
        tokens = int(window.n_tokens[row[0]])
        if engine.device.type != "cpu":
            logger.warning("a row of %d tokens does not fit on %s; computing it on the CPU", tokens, engine.device)
            flight = self._launch(self._cpu_engine(), window, row)
            if flight is not None:
                return flight
        raise DataError(
            f"out of memory: row {row[0]} of the window, alone in its batch, has {tokens} tokens; "
            f"lower --max-length (now {self.max_length}) or use a machine with more memory"
        )

    def _load(self, device: torch.device, dtype: torch.dtype) -> Engine:
        trust = self.config.trust_remote_code
        model = source.load(self._source, device=str(device), dtype=dtype, trust_remote_code=trust)
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        budget = self.config.token_budget or default_token_budget(device.type, memory)
        width = self.config.dimensions or model.truncate_dim
        return Engine(model, device, dtype, token_budget=budget, normalize=self.config.normalize, dimensions=width)

    @property
    def token_budget(self) -> int:
        """Most padded tokens in a batch; falls when memory runs out."""
        return self._engine.token_budget

    def _use(self, engine: Engine) -> None:
        self._engine = engine
        self.device = str(engine.device)
        self.dtype = str(engine.dtype).removeprefix("torch.")

    def _float32_engine(self) -> Engine:
        """The model again, from its files and so from its true weights; on the CPU if the device cannot hold both."""
        if "float32" not in self._slow_engines:
            try:
                engine = self._load(self._engine.device, torch.float32)
                engine.token_budget = max(1, engine.token_budget // 4)  # twice the bytes a token, and two models
                self._slow_engines["float32"] = engine
            except torch.OutOfMemoryError:
                logger.warning("the model in float32 does not fit on %s beside the first; using the CPU", self.device)
        return self._slow_engines.get("float32") or self._cpu_engine()

    def _cpu_engine(self) -> Engine:
        if self._engine.device.type == "cpu" and self._engine.dtype == torch.float32:
            return self._engine
        if "cpu" not in self._slow_engines:
            self._slow_engines["cpu"] = self._load(torch.device("cpu"), torch.float32)
        return self._slow_engines["cpu"]

    def _try_out(self) -> None:
        """One text through the whole model: its width, and whether its numbers are numbers at all."""
        window = self.tokenize(["Zarpamos al alba, con la bodega bien estibada."])
        rows = np.arange(1)

        def tried(engine: Engine) -> np.ndarray:
            vectors_BD = engine.launch(self._tokens.features(window, rows, engine.multiple), rows).land()
            self.dimensions = vectors_BD.shape[1]
            return engine.broken(vectors_BD)

        if tried(self._engine).any():
            if self._engine.dtype == torch.float32 or tried(self._float32_engine()).any():
                raise ConfigError(
                    f"model {self.config.model!r}: its vector of a plain sentence is not finite, or is zero, in "
                    "float32 too; the weights are damaged, fetch or save the model again"
                )
            if self.config.dtype == "auto":
                logger.info("the model overflows in %s; using float32", self.dtype)
                engine = self._float32_engine()
                self._slow_engines.clear()
                engine.token_budget = self._engine.token_budget
                self._use(engine)
        asked = self.config.dimensions
        if asked is not None and asked > self.dimensions:
            raise ConfigError(f"--dimensions {asked}: the model gives {self.dimensions}; pass that or fewer")
