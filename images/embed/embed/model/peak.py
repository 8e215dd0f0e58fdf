"""How fast this machine multiplies the model's own matrices, by the same engine: what its speed is measured against.

A forward pass does more: attention, normalisation, activations. So a model reaches a share of this rate, and not all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from embed.model.openvino import compiled, runtime

Products = Sequence[tuple[int, int]]
"""Inputs and outputs of each matrix that a token is multiplied with, in order."""
INT8_RANGE = np.float32(4)
MOST_WEIGHTS = 2**25
"""Of a model with more, only one matrix of each shape is used."""


class MatrixProducts:
    """The model without all but its linear layers. `run` multiplies `tokens` rows with each matrix."""

    def __init__(self, products: Products, tokens: int, *, engine: str, precision: str, device: str) -> None:
        """`engine` is torch or openvino, `precision` as in `Engine.precision`."""
        total = sum(inputs * outputs for inputs, outputs in products)
        used = list(products) if total <= MOST_WEIGHTS else list(dict.fromkeys(products))
        self.flops_per_token = 2 * sum(inputs * outputs for inputs, outputs in used)
        self.tokens = tokens
        """Tokens of one run, over all its requests."""
        if engine == "openvino":
            self._choose_streams(used, tokens, precision)
        else:
            self._run = _by_torch(used, tokens, getattr(torch, precision), torch.device(device))

    def run(self) -> None:
        self._run()

    def flops_per_s(self, seconds: float) -> float:
        """Over at least `seconds`, after one run to warm up."""
        self.run()
        began, runs = time.perf_counter(), 0
        while (taken := time.perf_counter() - began) < seconds:
            self.run()
            runs += 1
        return runs * self.tokens * self.flops_per_token / taken

    def _choose_streams(self, products: Products, tokens: int, precision: str) -> None:
        """One batch on all cores, or one batch per core: the faster of the two."""
        threads = torch.get_num_threads()
        rates = {}
        for streams in dict.fromkeys([1, threads]):
            self._run, self.tokens = _by_openvino(products, tokens, precision, threads, streams), tokens * streams
            rates[streams] = self.flops_per_s(0.1), self._run, self.tokens
        _, self._run, self.tokens = max(rates.values(), key=lambda each: each[0])


def _by_torch(products: Products, tokens: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    layers = [torch.nn.Linear(*each, bias=False, dtype=dtype, device=device) for each in products]
    inputs = {width: torch.randn(tokens, width, dtype=dtype, device=device) for width, _ in products}

    def run() -> None:
        values = dict(inputs)
        with torch.inference_mode():
            for layer in layers:
                values[layer.out_features] = layer(values[layer.in_features])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _by_openvino(products: Products, tokens: int, precision: str, threads: int, streams: int) -> Callable[[], None]:
    openvino = runtime()
    from openvino import opset13 as ops

    inputs: dict[int, Any] = {}
    values: dict[int, Any] = {}
    unread: dict[int, Any] = {}
    results = []
    for width, outputs in products:
        if width not in values:
            values[width] = inputs[width] = ops.parameter([tokens, width], openvino.Type.f32)
        unread.pop(width, None)
        weights = ops.constant((torch.randn(width, outputs) / width**0.5).numpy())
        pair = (values[width], weights)
        made = ops.matmul(*(map(_in_int8, pair) if precision == "int8" else pair), False, False)
        if outputs in unread:  # a branch that joins another one by a sum or a product
            results.append(unread[outputs])
        values[outputs] = unread[outputs] = made
    graph = openvino.Model([*results, *unread.values()], list(inputs.values()), "matrices")
    model = compiled(graph, precision, threads=threads, streams=streams)
    requests = [model.create_infer_request() for _ in range(streams)]
    for request in requests:
        for position, width in enumerate(inputs):
            request.set_input_tensor(position, openvino.Tensor(torch.randn(tokens, width).numpy()))

    def run() -> None:
        for request in requests:
            request.start_async()
        for request in requests:
            request.wait()

    return run


def _in_int8(value: Any) -> Any:
    from openvino import opset13 as ops

    low, high = ops.constant(-INT8_RANGE), ops.constant(INT8_RANGE * 127 / 128)
    return ops.fake_quantize(value, low, high, low, high, 256)
