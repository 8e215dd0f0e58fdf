"""A training state as flat tensors and a JSON tree spec, and back: exact, without pickle.

A state is what `state_dict()` methods return: dicts (keys str, int or bool), lists, tuples, numbers, strings, None,
bytes and tensors. Floats keep every bit (JSON's shortest round trip), as do NaN and infinities.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

import torch

from estiba.errors import CheckpointError, NewerFormatError

TreeSpec = Any
"""JSON: a plain value, or {"dict": [[key, spec], ...]}, {"list": ...}, {"tuple": ...}, {"tensor": name}, ..."""


def flatten(state: Any) -> tuple[dict[str, torch.Tensor], TreeSpec]:
    """Return every tensor by its path (`model/layers.0.weight`), and the tree with names in place of tensors.

    Raises CheckpointError for a value of an unsupported type, naming its path.
    """
    tensors: dict[str, torch.Tensor] = {}

    def visit(value: Any, path: str) -> TreeSpec:
        if isinstance(value, torch.Tensor):
            name = path
            # for {1: tensor, "1": tensor}, and for the name that safetensors reserves
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
            if isinstance(number, (bool, int, float, str)):  # not a complex number, not a date
                return number
        raise CheckpointError(
            f"state {path}: a {type(value).__name__} cannot be saved; turn it into tensors, numbers, strings, "
            "lists and dicts in state_dict()"
        )

    return tensors, visit(state, "")


def unflatten(spec: TreeSpec, tensor_of: Callable[[str], torch.Tensor]) -> Any:
    """Rebuild the state from a tree spec. `tensor_of` returns a tensor by its name."""
    if isinstance(spec, list):
        raise CheckpointError("its tree spec has a bare list; it was not written by this package")
    if not isinstance(spec, dict):
        return spec
    ((kind, content),) = spec.items()
    if kind == "tensor":
        return tensor_of(content)
    if kind == "dict":
        return {key: unflatten(item, tensor_of) for key, item in content}
    if kind == "list":
        return [unflatten(item, tensor_of) for item in content]
    if kind == "tuple":
        return tuple(unflatten(item, tensor_of) for item in content)
    if kind == "bytes":
        return base64.b64decode(content)
    raise NewerFormatError(f"its tree spec has {kind!r}; it was written by a newer version, so use that one")
