"""A converted model with its matrix products in int8: NNCF quantises weights and activations on texts of the input.

    python -P int8.py MODEL.xml BATCHES.npz QUANTIZED.xml

`quantized` runs this file as a program: NNCF writes to standard output, changes the class of every logger and keeps
memory. -P, since the directory of this file has an `openvino` too.

The range of an activation is fixed here and is not a batch's own, so a vector does not depend on the other rows of its
batch. Two settings differ from NNCF's (MiniLM-L6, 800 Spanish texts, recall@10 against float32: with both 0.946, with
neither 0.918): SmoothQuant moves less of an activation's range into the weights, and some matrices stay as they are,
the first ones that narrow a row, which read the widest ranges.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SMOOTHING = 0.8
KEPT = 1 / 3
"""Part of the matrices that narrow a row which is not quantised."""


class QuantizationFailed(Exception):
    """Why NNCF did not quantise a model."""


def quantized(model: Any, batches: Sequence[dict[str, np.ndarray]], folder: Path) -> Any:
    """The OpenVINO model with int8 products. `folder` is for files on the way. Raises QuantizationFailed."""
    import openvino

    from estiba.processes import die_with_parent, exit_report

    given, arrays, made = (folder / name for name in ("given.xml", "batches.npz", "made.xml"))
    openvino.save_model(model, given, compress_to_fp16=False)
    numbered = [(f"{number:04d} ", batch) for number, batch in enumerate(batches)]
    np.savez(arrays, **{number + name: array for number, batch in numbered for name, array in batch.items()})
    done = subprocess.run(
        [sys.executable, "-P", __file__, str(given), str(arrays), str(made)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,  # a stop is this process's to handle
        preexec_fn=die_with_parent,
    )
    if done.returncode < 0:
        raise QuantizationFailed(exit_report("NNCF", done.returncode).partition("; its last")[0])
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"it ended with {done.returncode}"
        raise QuantizationFailed(" ".join(said.splitlines()[-1].split())[:200])
    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file is removed
    return core.read_model(made)


def _quantize(given: Path, arrays: Path, made: Path) -> None:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing it now raises ImportError
    import nncf
    import openvino

    graph = openvino.Core().read_model(given)
    batches: dict[str, dict[str, np.ndarray]] = {}
    with np.load(arrays, allow_pickle=False) as file:
        for key in file:
            number, name = key.split(" ")
            batches.setdefault(number, {})[name] = file[key]
    smoothing = nncf.AdvancedSmoothQuantParameters(matmul=SMOOTHING)
    result = nncf.quantize(
        graph,
        nncf.Dataset(list(batches.values())),
        subset_size=len(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=_kept(graph), validate=False),
        advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smoothing),
    )
    openvino.save_model(result, made, compress_to_fp16=False)


def _kept(graph: Any) -> list[str]:
    """The first matrices with more inputs than outputs."""
    narrowing = []
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul" or len(node.input(1).get_partial_shape()) != 2:
            continue
        outputs, inputs = node.input(1).get_partial_shape()
        if not node.get_attributes()["transpose_b"]:
            inputs, outputs = outputs, inputs
        if inputs.is_static and outputs.is_static and inputs.get_length() > outputs.get_length():
            narrowing.append(node.get_friendly_name())
    return narrowing[: round(len(narrowing) * KEPT)]


if __name__ == "__main__":
    _quantize(*map(Path, sys.argv[1:]))
