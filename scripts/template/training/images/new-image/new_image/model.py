"""The network. Shapes: B sequences, T bytes, H hidden, V = 256 values of a byte."""

from __future__ import annotations

import torch
from torch import nn

BYTES = 256


class ByteModel(nn.Module):
    """Predicts the next byte."""

    def __init__(self, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, hidden_size)
        self.recurrent = nn.GRU(hidden_size, hidden_size, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, BYTES)

    def forward(self, bytes_BT: torch.Tensor) -> torch.Tensor:
        """int64[B, T] -> logits [B, T, V]."""
        hidden_BTH, _ = self.recurrent(self.embedding(bytes_BT))
        logits_BTV: torch.Tensor = self.head(self.dropout(hidden_BTH))
        return logits_BTV
