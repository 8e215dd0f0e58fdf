"""Convert SentencePiece models to `tokenizers`, checking that both give the same ids."""

from __future__ import annotations

from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from estiba.errors import ConfigError

_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_NEVER = -1e6
"""Score of a piece that text must not produce, such as </s>, which SentencePiece excludes from its search."""
_PROBES = (
    "Zarpamos al alba, con la bodega bien estibada.",
    "  ¿Cuántos   nudos hacía?  ¡Veintidós! ",
    "Compré 250 g de queso; costó 12,40 €.\n\nY pan.",
    "ÑANDÚ\tpingüino — «cigüeña» ﬁn 中文 🚢",
    "",
)


def convert(path: Path, name: str) -> tuple[Tokenizer, dict[str, str]]:
    """Return the tokenizer and its special tokens (eos_token, bos_token, pad_token, unk_token).

    Raises ConfigError if the file is not a SentencePiece model, or if the converted one gives different ids.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    original = sentencepiece.SentencePieceProcessor()
    try:
        data = path.read_bytes()
        proto.ParseFromString(data)
        original.LoadFromSerializedProto(data)
    except Exception as error:  # protobuf and SentencePiece raise their own types
        raise ConfigError(
            f"tokenizer {name!r}: {path.name} is not a SentencePiece model; give a directory with tokenizer.json, or "
            "the .model file that SentencePiece wrote"
        ) from error
    if proto.trainer_spec.model_type not in (_UNIGRAM, _BPE) or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ConfigError(
            f"tokenizer {name!r}: a SentencePiece model of words or characters, or with spaces as suffixes, is not "
            "supported; train one with --model_type=unigram or bpe"
        )
    backend = _convert(proto)
    symbols = [f"Uno {piece.piece} dos{piece.piece}" for piece in proto.pieces if piece.type == _USER_DEFINED]
    for probe in (*_PROBES, *symbols[:20]):
        if backend.encode(probe, add_special_tokens=False).ids != original.EncodeAsIds(probe):
            raise ConfigError(
                f"tokenizer {name!r}: its rules have no equivalent in fast tokenizers (they differ on {probe!r}); "
                "train one with SentencePiece's default rules, or use `aura tokenizer train`"
            )
    named = {"eos_token": original.eos_id(), "bos_token": original.bos_id(), "pad_token": original.pad_id()}
    specials = {role: original.IdToPiece(id_) for role, id_ in named.items() if id_ >= 0}
    return backend, specials | {"unk_token": proto.pieces[original.unk_id()].piece}


def _convert(proto: sentencepiece_model_pb2.ModelProto) -> Tokenizer:
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    unknown = next(index for index, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
    if trainer.model_type == _UNIGRAM:
        words = (_NORMAL, _USER_DEFINED)
        vocabulary = [(piece.piece, piece.score if piece.type in words else _NEVER) for piece in proto.pieces]
        model = models.Unigram(vocabulary, unk_id=unknown, byte_fallback=trainer.byte_fallback)
    else:
        ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        model = models.BPE(
            ids,
            _merges(proto, ids),
            unk_token=proto.pieces[unknown].piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    backend = Tokenizer(model)
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    added = [piece for piece in proto.pieces if piece.type in (_CONTROL, _USER_DEFINED)]
    # The dummy prefix goes before the stripped text. Where user-defined symbols split the text, a normalizer would put
    # one before every part.
    prefix = "never" if not rules.add_dummy_prefix else "normalizer"
    if prefix == "normalizer" and any(piece.type == _USER_DEFINED for piece in added):
        prefix = "first"
    if prefix == "normalizer":
        steps.append(normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    # If no piece spans a space, words can be looked up one by one, which is many times faster.
    is_by_word = not any(_SPACE in piece.piece[1:] for piece in proto.pieces)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="first" if prefix == "first" else "never", split=is_by_word
    )
    backend.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL) for piece in added])
    backend.encode_special_tokens = True
    end = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    return backend


def _merges(proto: sentencepiece_model_pb2.ModelProto, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return BPE merges from SentencePiece's scores: each piece's halves, in the order of the scores."""
    merges: list[tuple[float, int, int, str, str]] = []
    for piece in proto.pieces:
        if piece.type != _NORMAL:
            continue
        text = piece.piece
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if left in ids and right in ids:
                merges.append((-piece.score, ids[left], ids[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]
