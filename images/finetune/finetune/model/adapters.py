"""LoRA adapters, 4-bit bases, and which of a model's parameters train."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from estiba.errors import ConfigError, first_line

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig

ALL_LINEAR = "all-linear"


def quantization_config(config: FinetuneConfig, device: torch.device, compute_dtype: torch.dtype) -> Any:
    """Return how the base is quantised, or None. Raises ConfigError if bitsandbytes does not work on the device."""
    if config.method != "qlora":
        return None
    from transformers import BitsAndBytesConfig

    _check_bitsandbytes(device)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def add_adapters(model: PreTrainedModel, config: FinetuneConfig, base_name: str) -> PeftModel:
    """Freeze the base and add LoRA adapters in float32. Raises ConfigError if a target module does not exist."""
    targets: str | list[str] = list(config.lora_targets) if config.lora_targets else ALL_LINEAR
    model.requires_grad_(False)
    torch.manual_seed(config.seed)
    try:
        wrapped = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=config.lora_rank,
                lora_alpha=config.lora_alpha or 2 * config.lora_rank,
                lora_dropout=config.lora_dropout,
                target_modules=targets,
                exclude_modules=_outside_the_decoder(model),
                use_rslora=config.rslora,
                use_dora=config.dora,
                bias="none",
            ),
            autocast_adapter_dtype=True,
        )
    except ValueError as error:
        names = sorted(
            {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
        )
        raise ConfigError(
            f"--lora-targets {','.join(config.lora_targets or (ALL_LINEAR,))}: {first_line(error)}; the "
            f"linear layers are {', '.join(names)}"
        ) from None
    assert isinstance(wrapped, PeftModel)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.get_text_config().tie_word_embeddings and any(isinstance(part, LoraLayer) for part in ends):
        raise ConfigError(
            f"--lora-targets {','.join(config.lora_targets or ())}: the base's embeddings and head are one matrix, "
            "which an adapter on one of them would split; leave both out, or pass --method full"
        )
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise AssertionError(f"adapter {name} is {parameter.dtype}")
    # The adapter's own file must not point at a path of this machine.
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    return wrapped


def freeze_other_inputs(model: PreTrainedModel) -> None:
    """Freeze what reads images or sounds, if the model has that: text gives it no gradient."""
    if (pattern := _outside_the_decoder(model)) is None:
        return
    head = model.get_output_embeddings()
    kept = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    for name, parameter in model.named_parameters():
        if re.fullmatch(pattern, name) and id(parameter) not in kept:
            parameter.requires_grad_(False)


def _outside_the_decoder(model: PreTrainedModel) -> str | None:
    """Return a pattern of the modules that text does not pass through, or None for a model of text alone."""
    if model.config.get_text_config() is model.config:
        return None
    decoder = model.get_decoder()
    name = next(name for name, part in model.named_modules() if part is decoder)
    return rf"(?!{re.escape(name)}\.).*" if name else None


def trainable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained tensors by name: the adapters, or with full fine-tuning the whole model."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trainable_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load what `trainable_state` returned. Every tensor must have its place."""
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if own.keys() != state.keys():
        missing = sorted(own.keys() ^ state.keys())
        raise ConfigError(
            f"the checkpoint holds other trained tensors than this run ({missing[0]}, ...): another model or rank"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def untrained_adapters(model: torch.nn.Module) -> Iterable[str]:
    """Yield the trained parameters that a backward pass left without a gradient."""
    return (name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None)


def _check_bitsandbytes(device: torch.device) -> None:
    """Quantise and multiply a small matrix, since a wrong CUDA library is found only then."""
    remedy = "pass --method lora, which keeps the base in half precision, or use the image's own versions"
    try:
        import bitsandbytes as bnb

        weight = torch.randn(64, 64, device=device)
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
        error = float((bnb.functional.dequantize_4bit(packed, state) - weight).abs().max())
    except Exception as error_:
        raise ConfigError(
            f"--method qlora: bitsandbytes does not work on {device} ({first_line(error_)}); {remedy}"
        ) from None
    if not error < 1.0:
        raise ConfigError(f"--method qlora: bitsandbytes gives wrong values on {device} (off by {error:.3g}); {remedy}")
