"""The forward pass on one device: token tensors in, checked float32 vectors out.

Shapes: B rows, T tokens per row, D embedding width.
"""

from __future__ import annotations

import contextlib
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from embed.model.heads import BatchTokens, Heads
from embed.model.memory import USED_SHARE, MemoryModel, fitted
from embed.model.tokens import TASK, Features
from estiba.errors import ConfigError

CPUINFO = Path("/proc/cpuinfo")
TRIM_BELOW = 0.1
UNIT_NORM_TOLERANCE = 1e-4
"""One tolerance for every dtype, since vectors are scaled to unit length in float32."""


class InFlight(Protocol):
    """A batch that is being computed."""

    @property
    def rows(self) -> np.ndarray: ...  # int64[B]: the rows of the window

    @property
    def padded_tokens(self) -> int: ...

    @property
    def tokens(self) -> BatchTokens | None: ...  # what the heads give, if there are any; complete after `wait`

    def wait(self) -> np.ndarray: ...  # float32[B, D]


@dataclass(frozen=True, kw_only=True)
class Copying:
    """A batch whose vectors are being copied to the host."""

    rows: np.ndarray
    vectors_BD: torch.Tensor
    """float32[B, D] in host memory; complete once `copied` has happened."""
    copied: torch.cuda.Event | None
    padded_tokens: int
    tokens: BatchTokens | None
    """As `vectors_BD`."""

    def wait(self) -> np.ndarray:
        """Wait for the device."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.vectors_BD.numpy()


class Engine:
    """A model on a device, and the token budget of its batches. This one runs it by torch."""

    kind = "torch"
    depth = 2
    """Batches in flight: the next one is launched before the vectors of the one before are taken."""

    def __init__(
        self,
        model: SentenceTransformer,
        device: torch.device,
        dtype: torch.dtype,
        *,
        token_budget: int,
        normalize: bool,
        dimensions: int | None,
        heads: Heads | None = None,
    ) -> None:
        self.model = model
        self.heads = heads or Heads()
        self.device = device
        self.dtype = dtype
        self.token_budget = token_budget
        self.memory: MemoryModel | None = None
        """What a batch takes on a GPU, once that is measured."""
        self.multiple = (
            8 if device.type == "cuda" and dtype != torch.float32 else 1
        )  # tensor cores work in multiples of eight
        self.normalize = normalize
        self.dimensions = dimensions
        self.precision = str(dtype).removeprefix("torch.")
        """Precision of the matrix products; the weights have `dtype`."""
        self.ranges = ""
        """Digest of the texts on which the ranges of products in int8 were set."""
        self.version = f"torch {torch.__version__}"
        self.threads = torch.get_num_threads() if device.type == "cpu" else 0
        """That compute one batch, on a CPU: they decide the order of a sum."""

    @property
    def settings(self) -> dict[str, Any]:
        """The other arguments of an engine that computes the same vectors in another way."""
        return {
            "token_budget": self.token_budget,
            "normalize": self.normalize,
            "dimensions": self.dimensions,
            "heads": self.heads,
        }

    @property
    def is_exact(self) -> bool:
        """Whether a row that overflows would overflow in float32 too."""
        return self.dtype == torch.float32

    def rows_of(self, width: int) -> int:
        """How many rows of `width` tokens a batch may have."""
        rows = self.token_budget // max(1, width)
        return max(1, rows if self.memory is None else min(rows, self.memory.rows_of(width)))

    def measure_memory(self, batch_of: Callable[[int, int], Features], longest: int, *, workers: int) -> None:
        """On a GPU, learn what a batch takes; nothing where not even the measured batches fit, which are then halved.

        `batch_of` makes a batch of so many rows of so many tokens; all `workers` share the GPUs evenly. The same kind
        of GPU gives the same model: what counts is all of its memory, and not what others leave of it.
        """
        if self.device.type != "cuda":
            return

        def peak_bytes(rows: int, width: int) -> int:
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.launch(batch_of(rows, width), np.arange(rows)).wait()
            return torch.cuda.max_memory_allocated(self.device) - before

        total = torch.cuda.get_device_properties(self.device).total_memory
        sharing = max(1, math.ceil(workers / torch.cuda.device_count()))
        room = USED_SHARE * (total / sharing - torch.cuda.memory_allocated(self.device))
        try:
            self.memory = fitted(peak_bytes, room, longest)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        finally:
            self.free()

    def launch(self, features: Features, rows: np.ndarray) -> InFlight:
        """Start one batch. On CUDA this returns before the vectors are computed. Raises torch.OutOfMemoryError."""
        tokens = self.computed_tokens(features)
        with torch.inference_mode():
            output = self.forward(self.to_device(features))
            vectors_BD = self.finished(output["sentence_embedding"])
            by_token = self.heads.of_batch(output, features, normalize=self.normalize)
            copied = None
            if self.device.type == "cuda":
                vectors_BD = _to_host(vectors_BD)
                by_token = by_token and by_token.map(_to_host)
                copied = torch.cuda.Event()
                copied.record(torch.cuda.current_stream(self.device))
        return Copying(rows=rows, vectors_BD=vectors_BD, copied=copied, padded_tokens=tokens, tokens=by_token)

    def finished(self, output_BD: torch.Tensor) -> torch.Tensor:
        """What the settings make of the model's output: float32[B, D]."""
        vectors_BD = output_BD.float()
        if self.dimensions is not None:
            vectors_BD = vectors_BD[:, : self.dimensions]
        if self.normalize:  # a zero vector stays zero: divided by 1e-12, not by 0
            vectors_BD = torch.nn.functional.normalize(vectors_BD, p=2, dim=1)
        return vectors_BD

    def forward(self, features: Features) -> Features:
        """The model's output for one batch; its "sentence_embedding" is [B, full width], in the model's precision."""
        output = self.model(features, task=TASK)
        if "sentence_embedding" not in output:
            raise ConfigError(
                f"the model gives no vector of a text, only {', '.join(sorted(map(str, output)))}; pass a "
                "SentenceTransformer model, whose modules end with a pooling"
            )
        return output  # type: ignore[no-any-return]

    def computed_tokens(self, features: Features) -> int:
        """The tokens that the layers compute, those of the padding among them."""
        return padded_tokens(features)

    def to_device(self, features: Features) -> Features:
        """The features as `forward` takes them."""
        return {key: self._on_device(value) for key, value in features.items()}

    def _on_device(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or self.device.type == "cpu":
            return value
        if self.device.type == "cuda":
            return value.pin_memory().to(self.device, non_blocking=True)
        return value.to(self.device)

    def free(self) -> None:
        """Return cached memory that no tensor uses to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def trim(self) -> None:
        """Free memory if little is left: a cache full of one file's shapes leaves too little for the next file's."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            if free < TRIM_BELOW * total:
                self.free()

    def invalid(self, vectors_BD: np.ndarray) -> np.ndarray:
        """bool[B]: the vector is not finite, or should have unit length and does not (a zero vector, say)."""
        invalid = ~np.isfinite(vectors_BD).all(axis=1)
        if self.normalize:
            with np.errstate(invalid="ignore", over="ignore"):
                norms = np.sqrt(np.einsum("bd,bd->b", vectors_BD, vectors_BD))
                invalid |= ~(np.abs(norms - 1) <= UNIT_NORM_TOLERANCE)
        return invalid


def is_out_of_memory(error: BaseException) -> bool:
    """True for an error of the device's allocator, of cuBLAS's workspace, or of the host's allocator."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    markers = ("CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator", "bad_alloc", "could not allocate memory")
    return isinstance(error, RuntimeError) and any(marker in str(error) for marker in markers)


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """Start the copy of float32 values to pinned memory."""
    on_host = torch.empty(values.shape, dtype=torch.float32, pin_memory=True)
    return on_host.copy_(values, non_blocking=True)


def padded_tokens(features: Features) -> int:
    for key in ("attention_mask", "input_ids"):
        if isinstance(tensor := features.get(key), torch.Tensor):
            return tensor.numel()
    return 0


def products_of(modules: torch.nn.Module) -> tuple[tuple[int, int], ...]:
    """The linear layers that every token passes; a pooler reads one token of a text."""
    return tuple(
        (layer.in_features, layer.out_features)
        for name, layer in modules.named_modules()
        if isinstance(layer, torch.nn.Linear) and "pooler" not in name
    )


def cpu_name() -> str:
    """The kind of CPU, whose instructions decide the order of a sum."""
    return cpu_field("model name") or platform.machine()


def cpu_field(name: str, cpuinfo: Path = CPUINFO) -> str:
    """What the kernel says of the first core, such as its `flags`; empty if it does not."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.partition(":")[0].strip() == name:
                return line.partition(":")[2].strip()
    return ""
