"""The trained model as one Hugging Face directory, in the dtype of its base.

Each weight is merged in float32 and cast once. A 4-bit base is dequantised first: merging inside 4-bit layers, or into
the original base, gives another model than the one that was trained (KL 1.73 and 0.17 a token on SmolLM2, against 0.002
here).
Weights are merged and written one by one, so a merge needs no second copy of the model in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import PreTrainedModel

SHARD_BYTES = 2 << 30


def write_merged(model: torch.nn.Module, folder: Path, *, dtype: torch.dtype) -> None:
    """Write config.json, generation_config.json and safetensors of the merged model. Raises OSError."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    total, index = 0, {}
    shards: list[Path] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        path = folder / f"model-{len(shards) + 1:05d}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
        index.update(dict.fromkeys(pending, path))
        shards.append(path)
        pending.clear()

    for name, tensor in merged_tensors(inner, dtype):
        if pending and sum(one.nbytes for one in pending.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        pending[name] = tensor
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
    else:
        names = {
            path: f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number, path in enumerate(shards, start=1)
        }
        for path, name in names.items():
            path.rename(folder / name)
        weight_map = {key: names[path] for key, path in index.items()}
        document = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n")
    _write_config(inner, folder, dtype)


def merged_tensors(inner: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight once, on the CPU, under the name it has in the base model."""
    layers: dict[str, Any] = {name: part for name, part in inner.named_modules() if isinstance(part, LoraLayer)}
    for name, part in inner.named_modules():  # of 4 bits, and without an adapter
        if _is_quantized(part) and not any(name.startswith(f"{layer}.") for layer in layers):
            layers[name] = part
    for name, layer in layers.items():
        has_adapter = isinstance(layer, LoraLayer)
        base: Any = layer.get_base_layer() if has_adapter else layer
        merged = _merged_weight(layer, base) if has_adapter else _dequantized(base.weight)
        yield f"{name}.weight", merged.to(dtype).cpu().contiguous()
        if getattr(base, "bias", None) is not None:
            yield f"{name}.bias", base.bias.detach().to(dtype).cpu().contiguous()
    tied = {f"{name}" for name in (inner._tied_weights_keys or {})} if inner.config.tie_word_embeddings else set()
    seen: set[int] = set()
    for name, tensor in inner.state_dict().items():
        if any(name.startswith(f"{layer}.") for layer in layers) or name in tied or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        yield name, (tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()).cpu().contiguous()


def _merged_weight(layer: LoraLayer, base: Any) -> torch.Tensor:
    """float32[out, in]: the base's weight and what the adapter adds."""
    weight_32 = _dequantized(base.weight) if _is_quantized(base) else base.weight.detach().float()
    if layer.use_dora.get("default"):
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().float()
        directed = weight_32 + layer.get_delta_weight("default").float()  # type: ignore[operator]
        return magnitude[:, None] * directed / directed.norm(dim=1, keepdim=True)
    return weight_32 + layer.get_delta_weight("default").float()  # type: ignore[operator]


def _is_quantized(layer: torch.nn.Module) -> bool:
    return hasattr(getattr(layer, "weight", None), "quant_state")


def _dequantized(weight: Any) -> torch.Tensor:
    """float32[out, in] of a 4-bit weight."""
    import bitsandbytes as bnb

    dequantized: torch.Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return dequantized


def _write_config(inner: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write the configurations without anything of this machine or of the quantised base."""
    document = json.loads(inner.config.to_json_string(use_diff=False))
    for name in ("quantization_config", "_name_or_path", "_attn_implementation_autoset", "_attn_implementation"):
        document.pop(name, None)
    document["dtype"] = document["torch_dtype"] = str(dtype).removeprefix("torch.")
    document["use_cache"] = True
    document["architectures"] = [type(inner).__name__]
    (folder / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    if inner.generation_config is not None:
        inner.generation_config.save_pretrained(folder)


def write_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter as peft loads it; its base is named as the user named it."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    path = folder / "adapter_config.json"
    document = json.loads(path.read_text())
    for name in ("target_modules", "exclude_modules"):  # sets, which peft writes in any order
        if isinstance(document.get(name), list):
            document[name] = sorted(document[name])
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
