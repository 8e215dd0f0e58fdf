"""Which legacy code page a text is in: the one whose language makes its bytes most probable.

A few words are often all there is, too few for charset-normalizer, which takes short Japanese or Chinese for Korean.
Each model gives a character a probability: by its rank among a language's letters, or by the part of a national
character set that it is in. Where two models with different texts are about equally probable, there is no answer.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

_SAMPLE_BYTES = 6000
_MARGIN = math.log(10)
"""The best model must be this much more probable than the best one with another text."""
_UNKNOWN_SHARE = 0.15
"""The largest share of characters that a language does not have."""
_RARE = 1e-6
_ASCII = 1 / 40
_MISFIT = 0.02
"""How much rarer a letter is where it does not fit: a capital after a small one, thrice in a row, alone at a number."""
_SIGN_IN_PLACE = 0.15
_REPEATED = 1e-3
"""A character that stands twice in a row tells little of the language."""
_AT_NUMBERS = "€£°²³½¼¾±"
_FRACTIONS = "½¼¾"
_AFTER_OE = "uUiI"
"""What nearly always follows œ, which has the place of a fraction in ISO-8859-15."""
_SIGNS = "’“”–—…‘„«»¿¡€°£©®™ºª·•²³×±§½¼¾\u00a0、。，！？・「」"

# Letters by frequency; upper-case ones follow from them.
_LETTERS = {
    "French": "éèàêçùâîôœûïëüæ",
    "Spanish": "óáéíñúüç",
    "Portuguese": "ãçáéóíêõúâôàü",
    "German": "üäößé",
    "Italian": "èàùòìé",
    "Nordic": "äåöøæéüðþíáóúý",
    "Danish or Norwegian": "øåæé",
    "Icelandic": "áíðóúöæéþý",
    "Dutch": "ëéïèöüêç",
    "Estonian": "äõüöšž",
    "Lithuanian": "ėšąųžūįčę",
    "Latvian": "āīšēļņūžģķč",
    "Polish": "łąęóżśćńź",
    "Czech or Slovak": "íáéěřžšýčůúťďňóľĺŕäô",
    "Hungarian": "áéöóőüíúű",
    "Romanian": "ăîâşţ",
    "Croatian or Slovene": "čšžćđ",
    "Turkish": "ıüşğöçİâîû",
    "Russian": "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъёіїє",
    "Greek": "αοιετσνηυρπκμλςωδγίόχάέθήφύβώξζψϊ",
    "Hebrew": "יוהלאתרבשמםדנןחקעפגכךטזסצףץ",
    "Arabic": "الينمورتبةعدسفهكقحجشصطخىضذثئءغؤظزأإآ",
    "Thai": "านรกเงอมยลวดทสต่ะ้ปับคิหีแจ์พืชขุใไูโผถึศซณ็ำธภษฟญ",
}
_WESTERN = ("French", "Spanish", "Portuguese", "German", "Italian", "Nordic")
_CENTRAL = ("Polish", "Czech or Slovak", "Hungarian", "Romanian", "Croatian or Slovene")
_NORTHERN = ("Danish or Norwegian", "Icelandic", "Dutch", "Estonian")
_BALTIC = ("Lithuanian", "Latvian", "Estonian")
_MIXED = {"Western European": _WESTERN, "Central European": _CENTRAL}
"""Names and cities of many countries."""
_PAGES: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("cp1252", (*_WESTERN, *_NORTHERN, "Western European"), 1),
    ("iso8859_15", (*_WESTERN, *_NORTHERN), 0.02),
    ("cp850", _WESTERN, 0.01),
    ("mac_roman", _WESTERN, 0.01),
    ("cp1250", (*_CENTRAL, "Central European"), 0.05),
    ("iso8859_2", _CENTRAL, 0.03),
    ("cp852", _CENTRAL, 0.01),
    ("cp1257", _BALTIC, 0.05),
    ("iso8859_13", ("Lithuanian", "Latvian"), 0.02),
    ("iso8859_4", ("Lithuanian", "Latvian"), 0.005),
    ("cp1254", ("Turkish",), 0.5),
    ("cp857", ("Turkish",), 0.01),
    ("cp1251", ("Russian",), 0.5),
    ("koi8_r", ("Russian",), 0.1),
    ("koi8_u", ("Russian",), 0.05),
    ("cp866", ("Russian",), 0.1),
    ("iso8859_5", ("Russian",), 0.01),
    ("cp855", ("Russian",), 0.01),
    ("mac_cyrillic", ("Russian",), 0.01),
    ("cp1253", ("Greek",), 0.2),
    ("iso8859_7", ("Greek",), 0.01),
    ("cp737", ("Greek",), 0.01),
    ("cp1255", ("Hebrew",), 0.2),
    ("cp862", ("Hebrew",), 0.01),
    ("cp1256", ("Arabic",), 0.2),
    ("iso8859_6", ("Arabic",), 0.01),
    ("cp874", ("Thai",), 0.2),
)
"""Code page, its languages, and how common the page is."""
_KANA = (0.5, 170)


def _gb18030(code: int) -> tuple[float, int]:
    return (0.93, 3755) if 0xB0A1 <= code <= 0xD7FE and code & 0xFF > 0xA0 else (0.03, 20_000)


def _big5(code: int) -> tuple[float, int]:
    return (0.95, 5401) if 0xA440 <= code <= 0xC67E else (0.02, 8000)


def _korean(code: int) -> tuple[float, int]:
    return (0.97, 2350) if 0xB0A1 <= code <= 0xC8FE and code & 0xFF > 0xA0 else (0.01, 10_000)


def _euc_jp(code: int) -> tuple[float, int]:
    return _KANA if code >> 8 in (0xA4, 0xA5) else (0.45, 2965) if 0xB0A1 <= code <= 0xCFFE else (0.02, 4000)


def _shift_jis(code: int) -> tuple[float, int]:
    if 0xA1 <= code <= 0xDF:  # half-width katakana
        return 0.01, 63
    return _KANA if 0x829F <= code <= 0x8396 else (0.45, 2965) if 0x889F <= code <= 0x9872 else (0.02, 4000)


_WIDE_PAGES: tuple[tuple[str, str, Callable[[int], tuple[float, int]], float], ...] = (
    ("gb18030", "Chinese", _gb18030, 1),
    ("big5hkscs", "Chinese", _big5, 0.5),
    ("cp949", "Korean", _korean, 0.5),
    ("cp932", "Japanese", _shift_jis, 1),
    ("euc_jp", "Japanese", _euc_jp, 0.3),
)
"""Code page, language, code -> (probability of its part of the set, characters in it), how common the page is."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    codec: str
    language: str
    score: float
    text: str


def find_code_page(sample: bytes, fits: Callable[[str], bool]) -> Verdict | list[Verdict]:
    """Return the code page of a sample, or those between which it does not decide. `fits`: whether all data decodes."""
    verdicts = sorted(_verdicts(sample[:_SAMPLE_BYTES]), key=lambda verdict: -verdict.score)
    best = next((verdict for verdict in verdicts if fits(verdict.codec)), None)
    if best is None:
        return []
    rivals = (other for other in verdicts if other.text != best.text and other.score > best.score - _MARGIN)
    rival = next((other for other in rivals if fits(other.codec)), None)
    return best if rival is None else [best, rival]


def _verdicts(sample: bytes) -> Iterator[Verdict]:
    for codec, languages, weight in _PAGES:
        if (text := _decoded(sample, codec)) is not None:
            for language in languages:
                score, unknown = _narrow_score(text, _probabilities(language))
                if unknown <= _UNKNOWN_SHARE:
                    yield Verdict(codec=codec, language=language, score=score + math.log(weight), text=text)
    for codec, language, region, weight in _WIDE_PAGES:
        if (text := _decoded(sample, codec)) is not None:
            score, unknown = _wide_score(text, codec, region)
            if unknown <= 2 * _UNKNOWN_SHARE:
                yield Verdict(codec=codec, language=language, score=score + math.log(weight), text=text)


def _decoded(sample: bytes, codec: str) -> str | None:
    """Return the sample's text, or None. Its last character may be cut short."""
    try:
        return codecs.getincrementaldecoder(codec)().decode(sample)
    except UnicodeDecodeError:
        return None


@lru_cache
def _probabilities(language: str) -> dict[str, float]:
    if language in _MIXED:
        models = [_probabilities(one) for one in _MIXED[language]]
        all_letters = {letter for model in models for letter in model}
        return {letter: sum(model.get(letter, 0) for model in models) / len(models) for letter in all_letters}
    letters = _LETTERS[language]
    total = sum(1 / (rank + 2) for rank in range(len(letters)))
    found = {sign: 0.06 / len(_SIGNS) for sign in _SIGNS}
    for rank, letter in enumerate(letters):
        found[letter] = 0.8 / (rank + 2) / total
        if len(letter.upper()) == 1 and letter.upper() != letter:
            found[letter.upper()] = 0.1 / (rank + 2) / total
    return found


def _narrow_score(text: str, probabilities: dict[str, float]) -> tuple[float, float]:
    """Return the logarithm of a text's probability, and the share of unknown characters among those above ASCII."""
    score, above, unknown = 0.0, 0, 0
    is_italian = probabilities is _probabilities("Italian")
    is_latin = any("ß" <= letter < "ɐ" for letter in probabilities)
    for at, (before, character, after) in enumerate(zip(" " + text, text, text[1:] + " ", strict=False)):
        if character < "\x80":
            score += math.log(_ASCII)
            continue
        above += 1
        probability = probabilities.get(character)
        if probability is None:
            unknown += 1
            probability = _RARE
        elif _is_in_place(before, character, after) or (character in _AT_NUMBERS and _is_by_number(text, at)):
            probability = _SIGN_IN_PLACE
        elif character.isalpha():
            does_not_fit = (character.isupper() and before.islower()) or before == character == after
            does_not_fit |= character in "œŒ" and after not in _AFTER_OE
            # its accents are at the ends of words
            does_not_fit |= is_italian and after.isalpha()
            does_not_fit |= not is_latin and (_is_ascii_letter(before) or _is_ascii_letter(after))
            unknown += does_not_fit
            is_alone = not before.isalpha() and not after.isalpha() and (before.isdigit() or after.isdigit())
            probability *= _MISFIT if does_not_fit or is_alone else 1
        elif character not in "–—" and (before.isalpha() or (character == "’" and not is_latin)) and after.isalpha():
            probability *= _MISFIT  # a sign within a word
        elif character in _FRACTIONS and after in _AFTER_OE:
            probability *= _MISFIT
        score += math.log(probability)
    return score, unknown / max(1, above)


def _is_in_place(before: str, sign: str, after: str) -> bool:
    """Whether a sign stands where such signs do: quotes around words, dashes between them, units at numbers."""
    if sign in _AT_NUMBERS:
        is_apart = not before.isalpha() and not after.isalpha()
        return before.isdigit() or after.isdigit() or (sign in _FRACTIONS and is_apart)
    if sign in "“‘„«":
        return not before.isalnum() and after.isalnum()
    if sign == "’" and before.isalpha():
        return True
    return (sign in "”»’…" and not after.isalnum()) or (sign in "–—" and not before.isalnum() and not after.isalnum())


def _is_by_number(text: str, at: int) -> bool:
    """Whether a blank is between a unit and its number, as in "5 €" and "£ 7"."""
    before, after = text[max(0, at - 2) : at], text[at + 1 : at + 3]
    is_apart = not before[-1:].isalpha() and not after[:1].isalpha()
    return is_apart and (before.rstrip(" \u00a0")[-1:].isdigit() or after.lstrip(" \u00a0")[:1].isdigit())


def _wide_score(text: str, codec: str, region: Callable[[int], tuple[float, int]]) -> tuple[float, float]:
    score, above, unknown = 0.0, 0, 0
    for before, character in zip(" " + text, text, strict=False):
        if character < "\x80":
            score += math.log(_ASCII)
            continue
        above += 1
        # big5hkscs decodes four codes to two characters, which do not encode one by one
        code = int.from_bytes(character.encode(codec, "ignore"), "big")
        share, size = (0.06, len(_SIGNS)) if character in _SIGNS else region(code)
        unknown += share < 0.05
        score += math.log(_REPEATED if character == before else share / size)
    return score, unknown / max(1, above)


def _is_ascii_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()
