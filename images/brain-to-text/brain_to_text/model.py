"""The reference decoder: an input layer per day, patches in time, a stack of GRUs, logits.

Source: Neuroprosthetics-Lab/nejm-brain-to-text, model_training (Card et al. 2024, doi:10.1056/NEJMoa2314132).
Parameters have upstream's names, so weights can be exchanged both ways. `bidirectional` comes from the guide.

Shapes: B trials, T bins of 20 ms, C features, N patches, K classes, H units, U distinct days in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softsign

from estiba.errors import ConfigError

PREFIXES = ("_orig_mod.", "module.")
"""What torch.compile and data-parallel wrappers prepend to parameter names."""


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The sizes of a decoder."""

    n_features: int = 512
    n_units: int = 768
    n_layers: int = 5
    n_classes: int = 41
    n_days: int
    """Number of input layers; a single one is shared by all days."""
    patch_size: int = 14
    """Bins per patch; 0 turns patches off."""
    patch_stride: int = 4
    rnn_dropout: float = 0.4
    input_dropout: float = 0.2
    bidirectional: bool = False

    def frames(self, n_bins: int) -> int:
        """Return the number of output frames for a trial of `n_bins`; 0 or less if it is shorter than a patch."""
        return output_frames(n_bins, self.patch_size, self.patch_stride)


def output_frames(n_bins: int, patch_size: int, patch_stride: int) -> int:
    return (n_bins - patch_size) // patch_stride + 1 if patch_size else n_bins


class GRUDecoder(nn.Module):
    """Maps smoothed features float32[B, T, C] to logits[B, N, K]."""

    def __init__(self, shape: DecoderShape, *, seed: int | None = None) -> None:
        """With `seed`, initialise the weights without touching the global generator; without, draw from it."""
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self._build()
        self._network: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = self._decode

    def _build(self) -> None:
        shape = self.shape
        eye = torch.eye(shape.n_features)
        # One parameter per day instead of a stacked tensor: a day that is not in the batch then has no gradient, so the
        # optimizer leaves its weights and moments unchanged, as in upstream.
        self.day_weights = nn.ParameterList([nn.Parameter(eye.clone()) for _ in range(shape.n_days)])
        self.day_biases = nn.ParameterList(
            [nn.Parameter(torch.zeros(1, shape.n_features)) for _ in range(shape.n_days)]
        )
        self.day_layer_dropout = nn.Dropout(shape.input_dropout)
        self.gru = nn.GRU(
            input_size=shape.n_features * max(1, shape.patch_size),
            hidden_size=shape.n_units,
            num_layers=shape.n_layers,
            dropout=shape.rnn_dropout if shape.n_layers > 1 else 0.0,
            batch_first=True,
            bidirectional=shape.bidirectional,
        )
        for name, parameter in self.gru.named_parameters():
            if "weight_hh" in name:
                nn.init.orthogonal_(parameter)
            elif "weight_ih" in name:
                nn.init.xavier_uniform_(parameter)
        self.directions = 2 if shape.bidirectional else 1
        self.out = nn.Linear(shape.n_units * self.directions, shape.n_classes)
        nn.init.xavier_uniform_(self.out.weight)
        self.h0 = nn.Parameter(nn.init.xavier_uniform_(torch.zeros(1, 1, shape.n_units)))

    def compile_network(self) -> None:
        """torch.compile everything except the selection of days, with sizes that may change from batch to batch.

        torch compiles again for one trial, for one day, and for an evaluation, which makes six graphs. With static
        sizes first it would be more than its limit of eight, behind which the rest is not compiled.
        """
        self._network = torch.compile(self._decode, dynamic=True)

    def forward(self, features_BTC: Tensor, days: Sequence[int], day_index_B: Tensor) -> Tensor:
        """`days` are the distinct days of the batch. Trial b was recorded on day `days[day_index_B[b]]`."""
        weights_UCC = torch.stack([self.day_weights[day] for day in days])
        biases_UC = torch.cat([self.day_biases[day] for day in days])
        return self._network(features_BTC, weights_UCC, biases_UC, day_index_B)

    def _decode(self, x_BTC: Tensor, weights_UCC: Tensor, biases_UC: Tensor, day_index_B: Tensor) -> Tensor:
        # Not weights[index]: on a CPU, several threads add up its gradient in an order that varies.
        weights_BCC = weights_UCC.index_select(0, day_index_B)
        biases_BC = biases_UC.index_select(0, day_index_B)
        x_BTC = torch.bmm(x_BTC, weights_BCC) + biases_BC.unsqueeze(1)
        x_BTC = self.day_layer_dropout(softsign(x_BTC))
        if self.shape.patch_size > 0:
            # In the order of time, which is the GRU's own: in the order of trials it would copy all patches once more.
            patches_NBCP = x_BTC.transpose(0, 1).unfold(0, self.shape.patch_size, self.shape.patch_stride)
            x_BTC = patches_NBCP.transpose(2, 3).flatten(2).transpose(0, 1)  # [B, N, P * C], bin after bin
        states = self.h0.expand(self.shape.n_layers * self.directions, x_BTC.shape[0], -1).contiguous()
        if x_BTC.is_cuda and torch.get_autocast_dtype("cuda") == torch.bfloat16:
            # cuDNN would compute in float16, in which small gradients are lost without a scaled loss.
            with torch.autocast("cuda", enabled=False):
                output_BNH, _ = self.gru(x_BTC.float(), states.float())
        else:
            output_BNH, _ = self.gru(x_BTC, states)
        logits: Tensor = self.out(output_BNH)
        return logits


def load_weights(model: GRUDecoder, weights: Mapping[str, Tensor], name: str) -> None:
    """Load weights in upstream's form or the guide's (days stacked). Raises ConfigError if they do not fit."""
    try:
        model.load_state_dict(canonical(weights))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise ConfigError(
            f"{name}: the weights belong to another decoder ({lines[0][:300]}); give the sizes, classes and sessions "
            "that they were trained with"
        ) from None


def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the parameter names of upstream's uncompiled model."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if name == "day_weights":
            renamed |= {f"day_weights.{day}": weight for day, weight in enumerate(tensor)}
        elif name == "day_biases":
            renamed |= {f"day_biases.{day}": bias.reshape(1, -1) for day, bias in enumerate(tensor)}
        else:
            renamed[name] = tensor
    return renamed
