"""`${VARIABLES}` in the text of a job file, with the shell's `:-` and `:?`; docs/cli.md lists the forms.

Any other dollar sign is plain text. Values come from `--set`, then the environment, then `.env` files.
python-dotenv reads those files, but its own expansion lacks `:?`, escapes and nested defaults.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from estiba_launch.errors import LaunchError

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
BRACE = re.compile(r"\$\{|\}")
MAX_NESTED = 50
"""Nesting depth of defaults."""
MAX_ENV_BYTES = 1 << 20
UNDECODABLE = "\ufffd"
ENV_LINE = re.compile(r"(?:export[ \t]+)?([^\s=]+)[ \t]*=[ \t]*(.*)")
QUOTED = re.compile(r"""(["'])((?:(?!\1).)*)\1[ \t]*(?:#.*)?""")
ENV_LINES = """\
env_lines() {  # NAME=VALUE lines as Docker reads them: no quotes, comments or `export`
  LC_ALL=C sed -e "1s/^$(printf '\\357\\273\\277')//" -e "s/$(printf '\\r')\\$//" -e 's/^[[:blank:]]*//' -e '/^#/d' \\
    -e 's/^export[[:blank:]]\\{1,\\}//' -e 's/[[:blank:]]*=[[:blank:]]*/=/' -e tq -e :q \\
    -e 's/^\\([^=]*=\\)"\\([^"]*\\)".*/\\1\\2/' -e t -e "s/^\\([^=]*=\\)'\\([^']*\\)'.*/\\1\\2/" -e t \\
    -e 's/[[:blank:]]\\{1,\\}#.*//' -e 's/[[:blank:]]*$//' "$1"
}"""
"""`read_container_env` for the scripts that Estiba prints."""


@dataclass(frozen=True)
class Undefined:
    """An undefined variable, or a `${...}` that cannot be parsed."""

    name: str
    message: str | None = None


def expand(text: str, values: Mapping[str, str], undefined: list[Undefined], nested: int = 0) -> str:
    """Fill in every `${...}` in `text`; add those that cannot be filled in to `undefined`."""
    out: list[str] = []
    position = 0
    while (start := text.find("${", position)) >= 0:
        escaped = start > position and text[start - 1] == "$"
        end = closing_brace(text, start)
        out.append(text[position : start - escaped])
        if escaped:
            position = len(text) if end is None else end + 1
            out.append(text[start:position])
        elif end is None:
            undefined.append(Undefined(text[start : start + 24], "the closing } is missing"))
            return "".join(out)
        else:
            out.append(_value(text[start + 2 : end], values, undefined, nested))
            position = end + 1
    return "".join([*out, text[position:]])


def _value(inside: str, values: Mapping[str, str], undefined: list[Undefined], nested: int) -> str:
    match = re.fullmatch(rf"({NAME})(?:(:-|:\?)(.*))?", inside, re.DOTALL)
    if match is None:
        usage = "not a variable: write ${NAME}, ${NAME:-default} or ${NAME:?message}"
        undefined.append(Undefined(f"${{{inside}}}", usage))
        return ""
    name, operator, rest = match.groups()
    value = values.get(name)
    if value or (value is not None and operator is None):
        return value
    if operator == ":-" and nested < MAX_NESTED:
        return expand(rest, values, undefined, nested + 1)
    if operator == ":-":
        rest = f"its defaults are nested more than {MAX_NESTED} deep"
    undefined.append(Undefined(name, rest or None))
    return ""


def closing_brace(text: str, start: int) -> int | None:
    """Index of the `}` that closes the `${` at `start`, or None; nested `${` are counted."""
    depth = 0
    for brace in BRACE.finditer(text, start):
        depth += 1 if brace.group() == "${" else -1
        if depth == 0:
            return brace.start()
    return None


def parse_settings(
    settings: Iterable[str] | None, flag: str = "--set", example: str = "IMAGE=estiba/embed:local", name: str = NAME
) -> dict[str, str]:
    """`["A=1", "B=x=y"]` -> `{"A": "1", "B": "x=y"}`. Raises LaunchError naming the first that is not NAME=VALUE."""
    values: dict[str, str] = {}
    for setting in settings or ():
        match = re.fullmatch(rf"({name})=(.*)", setting, re.DOTALL)
        if match is None:
            raise LaunchError(f"{flag} {setting!r}: not NAME=VALUE; write for example {flag} {example}")
        values[match[1]] = match[2]
    return values


def read_env_file(path: Path, notes: list[str]) -> dict[str, str]:
    """The assignments of a `.env` file; empty when there is no such file.

    Names may contain dashes, and a quoted value may span lines. `.env` files serve other programs too, so an invalid
    line is skipped and reported in `notes`, without its text, which may be a secret.
    """
    from dotenv.parser import parse_stream

    try:
        data = _read_bounded(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        notes.append(f"{path}: ignored, cannot be read ({error.strerror or error})")
        return {}
    # PowerShell's `>` writes UTF-16.
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    values: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(data.decode(encoding, "replace"))):
        source = binding.original.string
        problem = f"not {encoding[:6].upper()} text" if UNDECODABLE in source else None
        if binding.key is not None and binding.value is not None and problem is None:
            values[binding.key] = binding.value
        elif binding.error or binding.key is not None:
            line = binding.original.line + source[: len(source) - len(source.lstrip())].count("\n")
            problem = problem or "not NAME=VALUE; write one per line, comments start with #"
            notes.append(f"{path}:{line}: ignored, {problem}")
    return values


def read_container_env(path: Path) -> dict[str, str]:
    """The variables of --env-file, as Docker reads them from the output of `ENV_LINES`, the same in shell.

    Unlike `.env`, the file is only for this job, so an invalid line raises LaunchError with its number.
    """
    try:
        text = _read_bounded(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise LaunchError(f"--env-file {path}: cannot be read ({reason}); pass a file of NAME=VALUE lines") from None
    values: dict[str, str] = {}
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        line = line.strip(" \t")
        if not line or line.startswith("#"):
            continue
        match = ENV_LINE.fullmatch(line)
        if match is None or "\0" in line:
            raise LaunchError(f"--env-file {path}:{number}: not NAME=VALUE; write one per line, comments start with #")
        name, value = match.groups()
        quoted = QUOTED.fullmatch(value)
        if quoted is None and value[:1] in ("'", '"'):
            remedy = "Docker reads one line per variable, so encode longer values (base64)"
            raise LaunchError(f"--env-file {path}:{number}: {name}: unclosed or misplaced quotes; {remedy}")
        values[name] = quoted[2] if quoted else re.sub(r"[ \t]+#.*", "", value).rstrip(" \t")
    return values


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_ENV_BYTES + 1)
    if len(data) > MAX_ENV_BYTES:
        raise OSError(f"more than {MAX_ENV_BYTES} bytes")
    return data
