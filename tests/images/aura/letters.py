"""A tokenizer of single letters, for tests that need any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ALPHABET = " ,.abcdefghijklmnopqrstuvwxyzáéíóúñ"


class Letters:
    """Ids: 0 bos, 1 eos, 2 pad, 3 unknown, then ALPHABET."""

    vocab_size = 4 + len(ALPHABET)
    bos_id, eos_id, pad_id = 0, 1, 2

    def __init__(self) -> None:
        words = ["<s>", "</s>", "<pad>", "<unk>", *ALPHABET]
        self._fast = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
        self._fast.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
        self._fast.decoder = decoders.Fuse()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._fast.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._fast.decode(list(ids), skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        PreTrainedTokenizerFast(
            tokenizer_object=self._fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        ).save_pretrained(folder)
