"""Generated Spanish text, the same for the same seed, with enough words to fill a vocabulary."""

from __future__ import annotations

import random

_WHO = (
    "El contramaestre,La capitana,Un marinero viejo,La niña,El cocinero,Mi abuela,El piloto,Nadie,La tripulación".split(
        ","
    )
)
_DID = "revisó,olvidó,buscó,perdió,encontró,pintó,arrió,izó,contó,vigiló,remendó,aborreció,añoró,midió".split(",")
_WHAT = "las trincas,el ancla,la vela mayor,los cabos,la bodega,el timón,la brújula,las cuadernas,el pingüino".split(
    ","
)
_WHEN = "al alba,con la marea,dos veces,a las 12:45,sin decir palabra,en 1909,entre la niebla,por 12,40 €".split(",")
_END = (".", ".", ".", "!", "…", "; nadie preguntó.", ", ¿verdad?", " («siempre igual», decía).")


def sentence(chance: random.Random) -> str:
    made = "".join(chance.choices("bcdfglmnprst", k=1)) + "".join(chance.choices("aeiouáñ", k=2))
    words = [chance.choice(_WHO), chance.choice(_DID), chance.choice(_WHAT), chance.choice(_WHEN)]
    if chance.random() < 0.4:
        words.insert(3, f"de {made.capitalize()}{chance.choice(('res', 'ñón', 'lba', 'güé'))}")
    return " ".join(words) + chance.choice(_END)


def paragraphs(size_bytes: int, seed: int = 1) -> str:
    """Return running text: one paragraph per line, and some blank lines."""
    chance = random.Random(seed)
    parts: list[str] = []
    size = 0
    while size < size_bytes:
        text = " ".join(sentence(chance) for _ in range(chance.randrange(1, 8)))
        parts.append(text + ("\n\n" if chance.random() < 0.2 else "\n"))
        size += len(parts[-1].encode())
    return "".join(parts)


def lines(count: int, seed: int = 1) -> list[str]:
    """Return one-line documents."""
    chance = random.Random(seed)
    return [" ".join(sentence(chance) for _ in range(chance.randrange(1, 12))) for _ in range(count)]
