"""`${VARIABLES}` in the text of a job file, with the shell's `:-` and `:?`.

    ${NAME}            the value; undefined is an error
    ${NAME:-default}   the default when NAME is undefined or empty; it may hold more ${VARIABLES}
    ${NAME:?message}   an error with this message when NAME is undefined or empty
    $${NAME}           the text ${NAME} itself

Anything else with a dollar sign stays as it is. Values come from `--set`, then the environment, then `.env` files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import LaunchError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Undefined:
    """A variable that nothing defines, or whose `${...}` cannot be read."""

    name: str
    message: str | None = None


@dataclass
class Variables:
    """Where names get their values, first source first."""

    sources: list[Mapping[str, str]]
    used: dict[str, str] = field(default_factory=dict)
    """Every name that was looked up and found."""

    def get(self, name: str) -> str | None:
        for source in self.sources:
            if name in source:
                self.used[name] = source[name]
                return source[name]
        return None

    def expand(self, text: str, undefined: list[Undefined]) -> str:
        """Fill in every `${...}` of `text`; what cannot be filled in is added to `undefined`."""
        out: list[str] = []
        position = 0
        while (start := text.find("${", position)) >= 0:
            if start > 0 and text[start - 1] == "$" and start - 1 >= position:
                end = closing_brace(text, start)
                stop = len(text) if end is None else end + 1
                out.append(text[position : start - 1] + text[start:stop])
                position = stop
                continue
            out.append(text[position:start])
            end = closing_brace(text, start)
            if end is None:
                undefined.append(Undefined(text[start : start + 24], "the closing } is missing"))
                return "".join(out)
            out.append(self._one(text[start + 2 : end], undefined))
            position = end + 1
        out.append(text[position:])
        return "".join(out)

    def _one(self, inside: str, undefined: list[Undefined]) -> str:
        match = NAME.match(inside)
        rest = inside[match.end() :] if match else inside
        if match is None or (rest and not rest.startswith((":-", ":?"))):
            undefined.append(
                Undefined(f"${{{inside}}}", "not a variable: write ${NAME}, ${NAME:-default} or ${NAME:?message}")
            )
            return ""
        value = self.get(match.group())
        if value or (value is not None and not rest):
            return value
        if rest.startswith(":-"):
            return self.expand(rest[2:], undefined)
        undefined.append(Undefined(match.group(), rest[2:] or None))
        return ""


def closing_brace(text: str, start: int) -> int | None:
    """Index of the `}` that closes the `${` at `start`, or None; nested `${` are counted."""
    depth = 0
    position = start
    while position < len(text):
        if text.startswith("${", position):
            depth += 1
            position += 2
            continue
        if text[position] == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def parse_settings(settings: Iterable[str]) -> dict[str, str]:
    """`["A=1", "B=x=y"]` -> `{"A": "1", "B": "x=y"}`. Raises LaunchError naming the first that is not NAME=VALUE."""
    values: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not NAME.fullmatch(name):
            raise LaunchError(f"--set {setting!r}: not NAME=VALUE; write for example --set IMAGE=estiba/embed:local")
        values[name] = value
    return values


def read_env_file(path: Path) -> dict[str, str]:
    """Read a `.env` file: `NAME=VALUE` lines, `#` comments, optional `export` and quotes. A missing file is empty."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"{path}: cannot be read ({error}); put it right or remove it") from None
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip().removeprefix("export ").strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        name, value = name.strip(), value.strip()
        if not equals or not NAME.fullmatch(name):
            # The line is not shown: .env files are where secrets live.
            raise LaunchError(f"{path}:{number}: not NAME=VALUE; write one per line, comments start with #")
        quoted = re.fullmatch(r"""(['"])(.*?)\1\s*(?:#.*)?""", value)
        value = quoted.group(2) if quoted else re.split(r"(?:^|\s)#", value, maxsplit=1)[0].rstrip()
        values[name] = value
    return values
