"""A training state as flat tensors and a JSON skeleton, and back: exact, without pickle.

A state is what `state_dict()` methods give: dicts (keys str, int or bool), lists, tuples, numbers, strings, None, bytes
and tensors. Floats come back bit by bit (JSON's shortest round trip), NaN and infinities too.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

import torch

from estiba.errors import CheckpointError

Skeleton = Any
"""JSON: a plain value, or {"dict": [[key, skeleton], ...]}, {"list": ...}, {"tuple": ...}, {"tensor": name}, ..."""


def flatten(state: Any) -> tuple[dict[str, torch.Tensor], Skeleton]:
    """Every tensor by its path (`model/layers.0.weight`), and the rest with the tensors' names in their places.

    Raises CheckpointError for a value of another kind, naming its path.
    """
    tensors: dict[str, torch.Tensor] = {}

    def visit(value: Any, path: str) -> Skeleton:
        if isinstance(value, torch.Tensor):
            name = path
            # {1: tensor, "1": tensor}; and the one name that safetensors keeps for itself
            while name in tensors or name.removeprefix("model/") == "__metadata__":
                name += "'"
            if value.layout is not torch.strided or value.is_quantized or value.device.type == "meta":
                kind = "quantized" if value.is_quantized else f"{value.layout} on {value.device}"
                raise CheckpointError(f"state {path}: a tensor that is {kind} cannot be saved; make it dense first")
            tensors[name] = value.detach()
            return {"tensor": name}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, bytes):
            return {"bytes": base64.b64encode(value).decode()}
        if isinstance(value, Mapping):
            items = []
            for key, item in value.items():
                if not isinstance(key, (str, int, bool)):
                    raise CheckpointError(f"state {path}: a key of type {type(key).__name__}; use str or int keys")
                items.append([key, visit(item, f"{path}/{key}" if path else str(key))])
            return {"dict": items}
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [visit(item, f"{path}/{index}" if path else str(index)) for index, item in enumerate(value)]}
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a numpy scalar
            number = value.item()
            if isinstance(number, (bool, int, float, str)):  # and not complex, nor a date
                return number
        raise CheckpointError(
            f"state {path}: a {type(value).__name__} cannot be saved; turn it into tensors, numbers, strings, "
            "lists and dicts in state_dict()"
        )

    return tensors, visit(state, "")


def restore(skeleton: Skeleton, tensor_of: Callable[[str], torch.Tensor]) -> Any:
    """The state again. `tensor_of` gives a tensor by its name."""
    if isinstance(skeleton, list):
        raise CheckpointError("a skeleton with a bare list; this is not a checkpoint of ours")
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensor_of(content)
    if kind == "dict":
        return {key: restore(item, tensor_of) for key, item in content}
    if kind == "list":
        return [restore(item, tensor_of) for item in content]
    if kind == "tuple":
        return tuple(restore(item, tensor_of) for item in content)
    if kind == "bytes":
        return base64.b64decode(content)
    raise CheckpointError(f"a skeleton with {kind!r}; it was written by a newer version")
