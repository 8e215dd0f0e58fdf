"""Whether activations fit into the GPU's memory beside a rank's shard."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from estiba.log import get_logger
from multinode.config import MultinodeConfig

logger = get_logger(__name__)
STATE_BYTES = 16
"""A parameter in float32, its gradient and AdamW's two moments."""
ACTIVATION_BYTES = 34
"""A token, layer and unit of width, in 16 bits and with fused attention (arXiv:2205.05198, section 4.1)."""
LOGIT_BYTES = 12
"""A token and entry of the vocabulary: 16 bits, float32, and its gradient."""
USABLE = 0.85


def needs_checkpointing(
    config: MultinodeConfig, model: PreTrainedModel, mesh: DeviceMesh, device: torch.device, length: int
) -> bool:
    """Return whether to recompute activations. `auto` compares an estimate with the GPU's memory; a CPU keeps them."""
    if config.activation_checkpointing != "auto":
        return config.activation_checkpointing == "on"
    if device.type != "cuda":
        return False
    text = model.config.get_text_config()
    tokens = config.batch_size * length
    shards = mesh.size(mesh.ndim - 1)
    state_bytes = STATE_BYTES * sum(parameter.numel() for parameter in model.parameters()) / shards
    activation_bytes = tokens * (
        ACTIVATION_BYTES * text.num_hidden_layers * text.hidden_size + LOGIT_BYTES * text.vocab_size
    )
    room_bytes = USABLE * torch.cuda.get_device_properties(device).total_memory
    needs = state_bytes + activation_bytes > room_bytes
    logger.info(
        f"about {state_bytes / 1e9:.1f} GB of state and {activation_bytes / 1e9:.1f} GB of activations on each GPU "
        f"with {room_bytes / 1e9:.1f} GB: activations are {'recomputed' if needs else 'kept'}"
    )
    return needs
