"""The forward pass by OpenVINO on a CPU: in float32 1.2 times as many tokens per CPU second as torch (MiniLM-L6, one
thread, AVX-512), in bfloat16 several times as many where the CPU has that; and in int8, where that is asked for.

Each core computes a batch of its own, so the vectors do not depend on the number of cores.

The converted model is kept in the model cache (HF_HOME) under the digest of the model's files. OpenVINO's reader of
torch modules would report each use to its makers by the package openvino-telemetry, which `runtime` keeps from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
import xxhash

from embed.model.forward import CPUINFO, Engine, InFlight, cpu_field, padded_tokens
from embed.model.int8 import KEPT, SMOOTHING, QuantizationFailed, quantized
from embed.model.tokens import TASK, Features
from estiba.memory import available_memory_bytes

logger = logging.getLogger(__name__)

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
ROPE = ("rope_parameters", "rope_scaling")
"""Where a configuration names the kind of its rotary positions."""
CONVERTING_FACTOR, READING_FACTOR = 4, 2
"""Times the memory of its weights that a model takes while it is converted, or read from the cache."""


class NotConvertible(Exception):
    """Why a model cannot be run by OpenVINO here."""


class EngineError(Exception):
    """What OpenVINO said of a batch that it cannot compute: a traced model may hold the length of its sample."""


def is_installed(package: str = "openvino") -> bool:
    with contextlib.suppress(PackageNotFoundError):
        return bool(version(package))
    return False


def runtime() -> Any:
    """The module `openvino`, which takes a moment to import, without its telemetry."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing it now raises ImportError
    import openvino

    return openvino


def compiled(model: Any, precision: str, *, threads: int, streams: int) -> Any:
    """The model for this CPU. `precision` is that of the products: float32, bfloat16 or int8."""
    hints = {"float32": "f32", "bfloat16": "bf16"}
    if precision == "int8":  # the graph says which products; the rest is computed as without them
        precision = "bfloat16" if has_bfloat16() and is_bfloat16_faster() else "float32"
    settings = {
        "INFERENCE_PRECISION_HINT": hints[precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": streams,
        "ENABLE_CPU_PINNING": False,  # two processes would pin themselves to the same core
    }
    return runtime().Core().compile_model(model, "CPU", settings)


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    openvino = runtime()
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def is_bfloat16_faster(cpuinfo: Path = CPUINFO) -> bool:
    """Whether a CPU that multiplies bfloat16 does so faster than float32. A timing could end otherwise in each attempt.

    AMX does, and AMD's AVX512-BF16. Intel's without AMX (seen in virtual machines that hide it) has half the rate of
    float32: 169 against 325 GFLOP/s on the matrices of MiniLM-L6.
    """
    is_intel = cpu_field("vendor_id", cpuinfo) == "GenuineIntel"
    return not is_intel or "amx_bf16" in cpu_field("flags", cpuinfo).split()


@dataclass(frozen=True, kw_only=True)
class Requested:
    """A batch that a stream computes."""

    rows: np.ndarray
    padded_tokens: int
    finish: Callable[[], torch.Tensor]
    tokens: None = None

    def wait(self) -> np.ndarray:
        """Wait for the stream. Raises EngineError."""
        return self.finish().numpy()


class OpenVinoEngine(Engine):
    """The same modules as the torch engine that it is made from, compiled for this CPU, with one stream per core."""

    kind = "openvino"

    def __init__(
        self,
        torch_engine: Engine,
        sample: Features,
        digest: str,
        precision: str,
        calibration: Sequence[Features] = (),
    ) -> None:
        """`sample` is one batch, `digest` that of the model's files, `precision` float32, bfloat16 or int8.

        Products in int8 get their ranges from the batches in `calibration`. Raises NotConvertible.
        """
        super().__init__(torch_engine.model, torch_engine.device, torch_engine.dtype, **torch_engine.settings)
        self.reference = torch_engine
        self.precision = precision
        self.version = f"openvino {version('openvino')}"
        self.threads = 1
        streams = torch.get_num_threads()
        self.depth = streams + 1  # the one that waits starts as soon as a stream is free
        try:
            calibration = calibration if precision == "int8" else ()
            self.ranges = _digest_of(calibration)
            model = _converted(self.model, sample, digest, calibration)
            self._compiled = compiled(model, precision, threads=streams, streams=streams)
            self._idle = [self._compiled.create_infer_request() for _ in range(self.depth)]
        except NotConvertible:
            raise
        except Exception as error:  # any operation of any model may be one that OpenVINO does not have
            raise NotConvertible(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error

    @property
    def is_exact(self) -> bool:
        return self.precision == "float32"

    def launch(self, features: Features, rows: np.ndarray) -> InFlight:
        inputs = [features[name].numpy() for name in INPUTS if name in features]
        request = self._idle.pop() if self._idle else self._compiled.create_infer_request()
        failed: RuntimeError | None = None
        try:
            request.start_async(inputs, share_inputs=True)
        except RuntimeError as error:
            failed = error

        def finish() -> torch.Tensor:
            try:
                if failed is not None:
                    raise failed
                request.wait()
                output_BD = torch.from_numpy(request.get_output_tensor(0).data.copy())  # the next batch overwrites it
            except RuntimeError as error:
                raise EngineError(" ".join(str(error).split())[:200]) from error
            finally:
                self._idle.append(request)
            return self.finished(output_BD)

        return Requested(rows=rows, padded_tokens=padded_tokens(features), finish=finish)


class _Traced(torch.nn.Module):
    """The modules with tensors as arguments; `constants` are the other values that they read."""

    def __init__(self, model: torch.nn.Module, constants: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.constants = constants

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        features = {"input_ids": input_ids, "attention_mask": attention_mask, **self.constants}
        if token_type_ids is not None:
            features["token_type_ids"] = token_type_ids
        return self.model(features, task=TASK)["sentence_embedding"]  # type: ignore[no-any-return]


def _converted(model: Any, sample: Features, digest: str, calibration: Sequence[Features] = ()) -> Any:
    """The OpenVINO model, from the cache or made now; with int8 products if there are batches for their ranges."""
    tensors = {name: value for name, value in sample.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in sample.items() if name not in tensors}
    if not set(tensors) <= set(INPUTS) or not {"input_ids", "attention_mask"} <= set(tensors):
        raise NotConvertible(f"the model reads {', '.join(sorted(tensors))}")
    config = getattr(getattr(model, "transformers_model", None), "config", None)
    if re.search(r"'(dynamic|longrope)'", repr([getattr(config, name, None) for name in ROPE])):
        raise NotConvertible("its positions depend on the length of the text")
    libraries = ("openvino", "torch", "transformers", "sentence-transformers")
    key = [digest, *map(version, libraries), repr(sorted(tensors)), repr(sorted(constants.items()))]
    weights = sum(item.numel() * item.element_size() for item in model.parameters())

    name = xxhash.xxh3_128_hexdigest("\0".join(key).encode())

    def in_float32() -> Any:
        return _kept(name, lambda _: _convert(model, tensors, constants), weights)

    if not calibration:
        return in_float32()
    batches = [{name: batch[name].numpy() for name in tensors} for batch in calibration]
    ranges = xxhash.xxh3_128_hexdigest(f"{_digest_of(calibration)} {version('nncf')} {SMOOTHING} {KEPT}".encode())

    def in_int8(folder: Path) -> Any:
        logger.info("quantising the model on %d texts", sum(len(batch["input_ids"]) for batch in batches))
        return quantized(in_float32(), batches, folder)

    try:
        made = _kept(f"{name}-int8-{ranges}", in_int8, weights)
    except QuantizationFailed as error:
        raise NotConvertible(f"its products cannot be quantised ({error})") from error
    _forget_others(name, ranges)
    return made


def _digest_of(batches: Sequence[Features]) -> str:
    digest = xxhash.xxh3_64()
    for array in (value.numpy() for batch in batches for value in batch.values() if isinstance(value, torch.Tensor)):
        digest.update(f"{array.shape}".encode() + array.tobytes())
    return digest.hexdigest() if batches else ""


def _folder() -> Path:
    return Path(huggingface_hub.constants.HF_HOME) / "estiba-openvino"


def _kept(name: str, make: Callable[[Path], Any], weights: int) -> Any:
    """The model that the cache has under a name, or that `make` returns; that gets a folder for files on the way."""
    path = _folder() / f"{name}.xml"
    with _only_one(path):  # of several workers, the others find the conversion of the first
        if path.is_file():
            _check_memory(weights * READING_FACTOR)
            with contextlib.suppress(Exception):  # a damaged one is made again
                return runtime().Core().read_model(path)
        _check_memory(weights * CONVERTING_FACTOR)
        with _work_folder(path) as folder:
            model = make(folder)
        return _saved(model, path, weights)


def _forget_others(name: str, ranges: str) -> None:
    """Remove int8 forms of a model for other texts, of which every input would leave one. What is mapped lives on."""
    for path in _folder().glob(f"{name}-int8-*"):
        if ranges not in path.name:
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def _work_folder(path: Path) -> Iterator[Path]:
    """An empty folder, if possible beside the model, where the next attempt removes what a killed one left."""
    with contextlib.ExitStack() as stack:
        beside = path.with_suffix(".new")
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            stack.callback(shutil.rmtree, beside, ignore_errors=True)
        except OSError:
            beside = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield beside


def _convert(model: Any, tensors: Features, constants: dict[str, Any]) -> Any:
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with _silent(), torch.no_grad():
        decoder = TorchScriptPythonDecoder(_Traced(model, constants).eval(), example_input=tensors)
        reader = FrontEndManager().load_by_framework("pytorch")
        made = reader.convert(reader.load(decoder))
    order = [name for name in INPUTS if name in tensors]
    if [item.get_any_name() for item in made.inputs] != order:
        raise NotConvertible("its inputs changed their order")
    return made


def _saved(model: Any, path: Path, size_bytes: int) -> Any:
    """The model as it is read back, which may differ in the last bits of a vector, so that every run has the same bits.

    It stays where it may survive, if there is room; otherwise it is made again next time.
    """
    openvino = runtime()
    with contextlib.suppress(OSError, RuntimeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free > 3 * size_bytes:
            beside = path.with_suffix(".new")
            shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
            beside.mkdir()
            openvino.save_model(model, beside / path.name, compress_to_fp16=False)
            for suffix in (".bin", ".xml"):  # the one that is looked for last
                os.replace((beside / path.name).with_suffix(suffix), path.with_suffix(suffix))
            beside.rmdir()
            return openvino.Core().read_model(path)
    with tempfile.TemporaryDirectory() as folder:  # the file is mapped, and its blocks live as long as the model
        openvino.save_model(model, Path(folder) / path.name, compress_to_fp16=False)
        return openvino.Core().read_model(Path(folder) / path.name)


def _check_memory(needed: int) -> None:
    """Raises NotConvertible if fewer bytes than needed are left to this machine or container."""
    free = available_memory_bytes()
    if free is not None and needed > free:
        raise NotConvertible(f"it needs about {needed >> 20} MiB, and {free >> 20} are free")


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """One process at a time, where the directory of the cache can be written."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide what tracing prints: advice to the authors of the model."""
    loggers = [logging.getLogger(name) for name in ("sentence_transformers", "transformers", "torch")]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
