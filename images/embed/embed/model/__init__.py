"""The model: texts to vectors.

Read `encoder` first. `batches` decides which rows share a batch, `tokens` and `prefix` turn texts into token ids,
`passages` and `borders` cut long texts, `forward` runs one batch by torch and `openvino` by OpenVINO, `engines` chooses
between the two, `loading` finds and loads a model, `fallbacks` loads it again where it cannot compute a row, `resolve`
applies the settings to it.
"""

from embed.data.chunks import STATUS_WORDS, Encoded, ModelInfo, Status
from embed.model.batches import BatchDone, BatchLimits, Stopped
from embed.model.encoder import Encoder

__all__ = ["STATUS_WORDS", "BatchDone", "BatchLimits", "Encoded", "Encoder", "ModelInfo", "Status", "Stopped"]
