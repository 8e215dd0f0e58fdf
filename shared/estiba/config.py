"""One typed configuration per workload: every field is a flag, an environment variable and a hyperparameter.

A workload declares a `Config` with a docstring under each field. `load` fills it, a flag before an environment
variable before a hyperparameter before the default, and refuses what it does not know by name, everything at once.
Typing and messages are pydantic's; the three sources are ours.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from estiba.errors import ConfigError

ENV_PREFIX = "ESTIBA_"
RESERVED_ENV = frozenset(
    """ESTIBA_ROOT ESTIBA_WORKLOAD ESTIBA_INSTANCE_TYPE ESTIBA_STOP_GRACE_S ESTIBA_MAX_RUNTIME_S ESTIBA_SPOT_NOTICE
    ESTIBA_PRICE_USD_PER_H ESTIBA_IMAGE ESTIBA_VERSION ESTIBA_IMAGE_REVISION ESTIBA_LOG_INTERVAL_S""".split()
)
"""Variables of the job layer itself; any other ESTIBA_… must be a field."""
AMBIENT_ENV = frozenset({"COLUMNS", "LINES", "HOME", "USER", "PATH", "PWD", "SHELL", "TERM", "LANG", "HOSTNAME"})
"""Set by shells and terminals for themselves, so never read as a field without the ESTIBA_ prefix."""


class Config(BaseModel):
    """Base of every workload's configuration: frozen, nothing unknown, docstrings as help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )
    see_also: ClassVar[str] = ""
    """What --help ends with, such as other commands."""


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class _Given:
    """One value and where it came from, in the user's words."""

    value: Any
    origin: str


def load(
    cls: type[C],
    *,
    argv: Sequence[str],
    environ: Mapping[str, str] | None,
    hyperparameters: Mapping[str, str] | None,
    prog: str | None = None,
) -> C:
    """Build the configuration. Raises ConfigError with every mistake found, one a line.

    None is no source, and --help does not speak of it; `prog` is the command's name there, usually the workload's.
    """
    problems: list[str] = []
    parser = parser_of(
        cls,
        prog or os.environ.get("ESTIBA_WORKLOAD"),
        environment=environ is not None,
        hyperparameters=hyperparameters is not None,
    )
    given: dict[str, _Given] = {}
    for source in (
        lambda: _from_hyperparameters(cls, hyperparameters or {}, problems),
        lambda: _from_environment(cls, environ or {}, problems),
        lambda: _from_flags(cls, parser, argv, problems),
    ):
        given |= source()
    values = {name: _prepare(cls.model_fields[name], item.value) for name, item in given.items()}
    try:
        config = cls.model_validate(values)
    except ValidationError as error:
        problems += [_explain(cls, given, detail) for detail in error.errors()]
        config = None
    if problems or config is None:
        raise ConfigError("\n".join(problems))
    return config


def flag_of(name: str) -> str:
    """The flag of a field: text_column -> --text-column."""
    return "--" + name.replace("_", "-")


# --- sources -------------------------------------------------------------------------------------------------------


def _from_hyperparameters(cls: type[Config], values: Mapping[str, str], problems: list[str]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for key, raw in values.items():
        if key.startswith("sagemaker_") or key == "_tuning_objective_metric":
            continue  # the toolkit's own, never the workload's
        name = key.replace("-", "_")
        if name not in cls.model_fields:
            problems.append(_unknown("hyperparameter", key, cls, lambda n: n.replace("_", "-")))
            continue
        value = _unquote(raw)
        if name in given and given[name].value != value:
            problems.append(
                f"{given[name].origin} and {key!r} are the same setting with different values; give one of them"
            )
        given[name] = _Given(value, f"hyperparameter {key!r}")
    return given


def _from_environment(cls: type[Config], environ: Mapping[str, str], problems: list[str]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for name in cls.model_fields:
        upper = name.upper()
        candidates = [ENV_PREFIX + upper, f"SM_HP_{upper}", f"SM_HP_{upper.replace('_', '-')}"]
        if candidates[0] in RESERVED_ENV:  # the image's own ESTIBA_VERSION is no workload's version
            del candidates[0]
        if upper not in AMBIENT_ENV:
            candidates.append(upper)
        for variable in candidates:
            if environ.get(variable, "") != "":
                given[name] = _Given(_unquote(environ[variable]), f"environment variable {variable}")
                break
    known = RESERVED_ENV | {ENV_PREFIX + name.upper() for name in cls.model_fields}
    for variable in sorted(environ):
        if variable.startswith(ENV_PREFIX) and variable not in known:
            problems.append(
                _unknown(
                    "environment variable", variable, cls, lambda name: ENV_PREFIX + name.upper(), extra=RESERVED_ENV
                )
            )
    return given


def _from_flags(
    cls: type[Config], parser: argparse.ArgumentParser, argv: Sequence[str], problems: list[str]
) -> dict[str, _Given]:
    items = _normalized(argv)
    while True:
        try:
            known, rest = parser.parse_known_args(items)
            break
        except argparse.ArgumentError as error:  # a flag without its value: say so, and look at the others all the same
            at = _valueless(items, error.argument_name)
            if at is None:
                problems.append(f"{error}; --help lists every flag")
                return {}
            problems.append(f"flag {items.pop(at)} needs a value; one that begins with a dash is written --name=-value")
    problems += [_unknown("flag", item, cls, flag_of) for item in rest if item.startswith("-")]
    stray = [item for item in rest if not item.startswith("-")]
    if stray and not any(item.startswith("-") for item in rest):
        problems.append(f"argument {stray[0]!r} belongs to no flag; write --name value")
    # argparse takes the two dashes out of --prompt=-- and leaves nothing in their place.
    values = {name: "--" if value == [] else value for name, value in vars(known).items()}
    return {name: _Given(value, f"flag {flag_of(name)}") for name, value in values.items()}


def _valueless(items: Sequence[str], flag: str | None) -> int | None:
    """Where a flag stands that is followed by another one or by nothing."""
    for index, item in enumerate(items):
        if item == flag and (index + 1 == len(items) or items[index + 1].startswith("-")):
            return index
    return None


def parser_of(
    cls: type[Config], prog: str | None = None, *, environment: bool = True, hyperparameters: bool = True
) -> argparse.ArgumentParser:
    """The flags of a configuration, with each field's docstring and default as help, and other ways to give it."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=_wrapped(cls.__doc__ or ""),
        epilog=_wrapped(_epilog(cls, environment=environment, hyperparameters=hyperparameters)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        exit_on_error=False,
    )
    for name, info in cls.model_fields.items():
        is_switch = _kinds(info.annotation) - {type(None)} == {bool}
        default = info.get_default(call_default_factory=True)
        shown = "required" if info.is_required() else "off" if default is None else default
        text = " ".join((info.description or "").split()) + f" [{shown}]"
        choices = [str(choice) for choice in _choices(info)]
        parser.add_argument(
            flag_of(name),
            dest=name,
            help=text.replace("%", "%%"),
            metavar="|".join(choices) if choices else ("true|false" if is_switch else name.upper()),
            nargs="?" if is_switch else None,
            const="true" if is_switch else None,
        )
    return parser


def _epilog(cls: type[Config], *, environment: bool, hyperparameters: bool) -> str:
    """The first field of two words is the example, since it shows how each is spelt."""
    names = [name for name in cls.model_fields if ENV_PREFIX + name.upper() not in RESERVED_ENV]
    example = next((name for name in names if "_" in name), names[0] if names else None)
    ways = []
    if environment and example:
        ways.append(f"an environment variable ({ENV_PREFIX}{example.upper()})")
    if hyperparameters and example:
        ways.append(f"a hyperparameter ({example.replace('_', '-')})")
    also = f"Each flag is also {' and '.join(ways)}." if ways else ""
    return f"{also} {cls.see_also}"


def _wrapped(text: str) -> str:
    """As argparse does, but names with a hyphen stay whole."""
    return textwrap.fill(
        " ".join(text.split()), max(shutil.get_terminal_size().columns - 2, 11), break_on_hyphens=False
    )


def _normalized(argv: Iterable[str]) -> list[str]:
    """--text_column is --text-column; values are left alone."""
    result = []
    for item in argv:
        if item.startswith("--"):
            name, equals, value = item.partition("=")
            item = name.replace("_", "-") + equals + value
        result.append(item)
    return result


# --- values --------------------------------------------------------------------------------------------------------


def _unquote(raw: str) -> str:
    """A JSON-encoded string without its quotes: an AWS SDK sends "texto" as "\\"texto\\"", another does not."""
    if len(raw) >= 2 and raw[0] == raw[-1] == '"':
        try:
            value = json.loads(raw)
        except json.JSONDecodeError:
            return raw
        return value if isinstance(value, str) else raw
    return raw


def _prepare(info: FieldInfo, value: Any) -> Any:
    """Turn a string into what pydantic cannot guess: None for an optional field, a list from text."""
    if not isinstance(value, str):
        return value
    kinds = _kinds(info.annotation)
    if type(None) in kinds and value.strip().lower() in ("", "none", "null"):
        return None
    if any(typing.get_origin(kind) in (list, tuple) for kind in kinds):
        if value.lstrip().startswith("["):
            try:
                return json.loads(value)
            except json.JSONDecodeError:
                pass
        return [item.strip() for item in value.split(",") if item.strip()]
    value = value if kinds & {str} else value.strip()
    return next((choice for choice in _choices(info) if str(choice) == value), value)  # Literal[4, 8] is told "8"


def _kinds(annotation: Any) -> set[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_kinds(item) for item in typing.get_args(annotation)))
    return {annotation}


def _choices(info: FieldInfo) -> list[Any]:
    found: list[Any] = []
    for kind in _kinds(info.annotation):
        if typing.get_origin(kind) is typing.Literal:
            found += typing.get_args(kind)
    return found


def _explain(cls: type[Config], given: Mapping[str, _Given], detail: Any) -> str:
    location = [str(part) for part in detail["loc"]]
    name = location[0] if location else ""
    item = given.get(name)
    message = detail["msg"].removeprefix("Value error, ")
    if item is None:
        return f"{flag_of(name)}: {message}" if name else message
    info = cls.model_fields[name]
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    usual = "" if default is None else f" for {default!r}"  # without a value of its own, its help says what is done
    otherwise = "" if info.is_required() else f" or leave it out{usual}"
    return f"{item.origin} is {item.value!r}: {message[:1].lower()}{message[1:]}; give another value{otherwise}"


def _unknown(what: str, seen: str, cls: type[Config], spell: Any, extra: Iterable[str] = ()) -> str:
    names = [spell(name) for name in cls.model_fields] + sorted(extra)
    name = seen.partition("=")[0]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"
    return f"unknown {what} {name!r}; {hint}"
