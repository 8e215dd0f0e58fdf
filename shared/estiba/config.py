"""One typed configuration per workload: every field is a flag, an environment variable and a hyperparameter.

A workload declares a `Config` with a docstring under each field. `load` fills it, in this order of precedence:
flag, environment variable, hyperparameter, default. Unknown names are errors, and all errors are
reported at once. pydantic checks types; the three sources are read here.
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
    ESTIBA_PRICE_USD_PER_H ESTIBA_IMAGE ESTIBA_VERSION ESTIBA_IMAGE_REVISION ESTIBA_LOG_INTERVAL_S
    ESTIBA_STAGING_PORT ESTIBA_STAGING_TOKEN ESTIBA_HOST_COUNT ESTIBA_HOST_SERVICE
    ESTIBA_HOST_AGENT ESTIBA_AGENT_PORT ESTIBA_HOST_LOST_S ESTIBA_HOSTS_WAIT_S ESTIBA_JOB_TOKEN ESTIBA_STALL_S
    ESTIBA_STEP_FILE ESTIBA_LOST_FILE ESTIBA_HOSTS_WATCHED ESTIBA_RUN_DIR ESTIBA_GPU_COUNT ESTIBA_RANK_OWNER""".split()
)
"""Variables of the job layer; every other ESTIBA_… must be a field."""
STAGED_CHANNEL = "ESTIBA_STAGE_"
"""What a variable begins with that names a channel to stage (`platform.staged_channels`)."""
AMBIENT_ENV = frozenset({"COLUMNS", "LINES", "HOME", "USER", "PATH", "PWD", "SHELL", "TERM", "LANG", "HOSTNAME"})
"""Set by shells and terminals, so read as a field only with the ESTIBA_ prefix."""


class Config(BaseModel):
    """Base class of every workload's configuration. Frozen; rejects unknown fields; uses docstrings as help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )
    see_also: ClassVar[str] = ""
    """The end of --help, such as the image's other commands."""

    spans_hosts: ClassVar[bool] = False
    """Whether the ranks of all hosts of a job form one run. Without it each host works alone."""

    def preflight(self) -> None:
        """Check input paths and the like, before any slow import. Raises EstibaError."""

    def rank_count(self) -> int:
        """Return the number of ranks on this host."""
        return 1


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class _Setting:
    """A value and its source, as the user named it."""

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
    """Build the configuration. Raises ConfigError with all mistakes, one per line.

    A source that is None is not read, and --help does not mention it. `prog` is the command's name in --help,
    by default the workload's.
    """
    problems: list[str] = []
    parser = parser_of(
        cls,
        prog or os.environ.get("ESTIBA_WORKLOAD"),
        environment=environ is not None,
        hyperparameters=hyperparameters is not None,
    )
    settings: dict[str, _Setting] = {}
    for source in (
        lambda: _from_hyperparameters(cls, hyperparameters or {}, problems),
        lambda: _from_environment(cls, environ or {}, problems),
        lambda: _from_flags(cls, parser, argv, problems),
    ):
        settings |= source()
    values = {name: _prepare(cls.model_fields[name], item.value) for name, item in settings.items()}
    try:
        config = cls.model_validate(values)
    except ValidationError as error:
        problems += [_explain(cls, settings, detail) for detail in error.errors()]
        config = None
    if problems or config is None:
        raise ConfigError("\n".join(problems))
    return config


def flag_of(name: str) -> str:
    """Return the flag of a field: text_column -> --text-column."""
    return "--" + name.replace("_", "-")


# --- sources -------------------------------------------------------------------------------------------------------


def _from_hyperparameters(cls: type[Config], values: Mapping[str, str], problems: list[str]) -> dict[str, _Setting]:
    settings: dict[str, _Setting] = {}
    for key, raw in values.items():
        if key.startswith("sagemaker_") or key == "_tuning_objective_metric":
            continue  # for the toolkit, not the workload
        name = key.replace("-", "_")
        if name not in cls.model_fields:
            problems.append(_unknown("hyperparameter", key, cls, lambda n: n.replace("_", "-")))
            continue
        value = _unquote(raw)
        if name in settings and settings[name].value != value:
            problems.append(
                f"{settings[name].origin} and {key!r} are the same setting with different values; give one of them"
            )
        settings[name] = _Setting(value, f"hyperparameter {key!r}")
    return settings


def _from_environment(cls: type[Config], environ: Mapping[str, str], problems: list[str]) -> dict[str, _Setting]:
    settings: dict[str, _Setting] = {}
    for name in cls.model_fields:
        upper = name.upper()
        candidates = [ENV_PREFIX + upper, f"SM_HP_{upper}", f"SM_HP_{upper.replace('_', '-')}"]
        if candidates[0] in RESERVED_ENV:  # a field named `version` is not ESTIBA_VERSION, which is the image's
            del candidates[0]
        if upper not in AMBIENT_ENV:
            candidates.append(upper)
        for variable in candidates:
            if environ.get(variable, "") != "":
                settings[name] = _Setting(_unquote(environ[variable]), f"environment variable {variable}")
                break
    known = RESERVED_ENV | {ENV_PREFIX + name.upper() for name in cls.model_fields}
    for variable in sorted(environ):
        if variable.startswith(ENV_PREFIX) and variable not in known and not variable.startswith(STAGED_CHANNEL):
            problems.append(
                _unknown(
                    "environment variable", variable, cls, lambda name: ENV_PREFIX + name.upper(), extra=RESERVED_ENV
                )
            )
    return settings


def _from_flags(
    cls: type[Config], parser: argparse.ArgumentParser, argv: Sequence[str], problems: list[str]
) -> dict[str, _Setting]:
    items = _normalized(argv)
    while True:
        try:
            known, rest = parser.parse_known_args(items)
            break
        except argparse.ArgumentError as error:  # a flag without its value: report it and read the others
            at = _valueless(items, error.argument_name)
            if at is None:
                problems.append(f"{error}; --help lists every flag")
                return {}
            problems.append(f"flag {items.pop(at)} needs a value; one that begins with a dash is written --name=-value")
    problems += [_unknown("flag", item, cls, flag_of) for item in rest if item.startswith("-")]
    stray = [item for item in rest if not item.startswith("-")]
    if stray and not any(item.startswith("-") for item in rest):
        problems.append(f"argument {stray[0]!r} belongs to no flag; write --name value")
    # argparse turns --prompt=-- into an empty list.
    values = {name: "--" if value == [] else value for name, value in vars(known).items()}
    return {name: _Setting(value, f"flag {flag_of(name)}") for name, value in values.items()}


def _valueless(items: Sequence[str], flag: str | None) -> int | None:
    """Return the index of `flag` where no value follows it."""
    for index, item in enumerate(items):
        if item == flag and (index + 1 == len(items) or items[index + 1].startswith("-")):
            return index
    return None


def parser_of(
    cls: type[Config], prog: str | None = None, *, environment: bool = True, hyperparameters: bool = True
) -> argparse.ArgumentParser:
    """Return the parser of a configuration's flags. Its help shows each field's docstring and default."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=_wrapped(cls.__doc__ or ""),
        epilog=_wrapped(_epilog(cls, environment=environment, hyperparameters=hyperparameters)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        exit_on_error=False,
    )
    for name, info in _fields_in_help_order(cls):
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


def _fields_in_help_order(cls: type[Config]) -> list[tuple[str, FieldInfo]]:
    """Return the fields, a workload's own before the inherited ones."""
    own = list(cls.__annotations__)
    return sorted(cls.model_fields.items(), key=lambda item: own.index(item[0]) if item[0] in own else len(own))


def _epilog(cls: type[Config], *, environment: bool, hyperparameters: bool) -> str:
    """Describe the other sources. The example is the first field of two words, to show how each source spells it."""
    names = [name for name, _ in _fields_in_help_order(cls) if ENV_PREFIX + name.upper() not in RESERVED_ENV]
    example = next((name for name in names if "_" in name), names[0] if names else None)
    ways = []
    if environment and example:
        ways.append(f"an environment variable ({ENV_PREFIX}{example.upper()})")
    if hyperparameters and example:
        ways.append(f"a hyperparameter ({example.replace('_', '-')})")
    also = f"Each flag is also {' and '.join(ways)}." if ways else ""
    return f"{also} {cls.see_also}"


def _wrapped(text: str) -> str:
    """Wrap as argparse does, without breaking names at hyphens."""
    return textwrap.fill(
        " ".join(text.split()), max(shutil.get_terminal_size().columns - 2, 11), break_on_hyphens=False
    )


def _normalized(argv: Iterable[str]) -> list[str]:
    """Turn --text_column into --text-column. Values are unchanged."""
    result = []
    for item in argv:
        if item.startswith("--"):
            name, equals, value = item.partition("=")
            item = name.replace("_", "-") + equals + value
        result.append(item)
    return result


# --- values --------------------------------------------------------------------------------------------------------


def _unquote(raw: str) -> str:
    """Return a JSON-encoded string without its quotes. One AWS SDK sends "texto" as "\\"texto\\""."""
    if len(raw) >= 2 and raw[0] == raw[-1] == '"':
        try:
            value = json.loads(raw)
        except json.JSONDecodeError:
            return raw
        return value if isinstance(value, str) else raw
    return raw


def _prepare(info: FieldInfo, value: Any) -> Any:
    """Convert strings that pydantic does not convert: to None for an optional field, and to a list."""
    if not isinstance(value, str):
        return value
    kinds = _kinds(info.annotation)
    is_list = any(typing.get_origin(kind) in (list, tuple) for kind in kinds)
    if type(None) in kinds and value.strip().lower() in ("none", "null", *([] if is_list else [""])):
        return None  # an empty list is not an absent one
    if is_list:
        if value.lstrip().startswith("["):
            try:
                return json.loads(value)
            except json.JSONDecodeError:
                pass
        return [item.strip() for item in value.split(",") if item.strip()]
    value = value if kinds & {str} else value.strip()
    # A Literal[4, 8] gets the text "8".
    return next((choice for choice in _choices(info) if str(choice) == value), value)


def _kinds(annotation: Any) -> set[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_kinds(item) for item in typing.get_args(annotation)))
    return {annotation}


def _choices(info: FieldInfo) -> list[Any]:
    choices: list[Any] = []
    for kind in _kinds(info.annotation):
        if typing.get_origin(kind) is typing.Literal:
            choices += typing.get_args(kind)
    return choices


def _explain(cls: type[Config], settings: Mapping[str, _Setting], detail: Any) -> str:
    location = [str(part) for part in detail["loc"]]
    name = location[0] if location else ""
    item = settings.get(name)
    message = detail["msg"].removeprefix("Value error, ")
    if item is None:
        return f"{flag_of(name)}: {message}" if name else message
    info = cls.model_fields[name]
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    usual = "" if default is None else f" for {default!r}"  # a default of None is described in the help
    otherwise = "" if info.is_required() else f" or leave it out{usual}"
    return f"{item.origin} is {item.value!r}: {message[:1].lower()}{message[1:]}; give another value{otherwise}"


def _unknown(kind: str, item: str, cls: type[Config], spell: Any, extra: Iterable[str] = ()) -> str:
    names = [spell(name) for name in cls.model_fields] + sorted(extra)
    name = item.partition("=")[0]
    # Without the dashes and prefixes that all names of a kind have in common: --foo is not like --model.
    common = spell("")
    bare = {each.removeprefix(common): each for each in names}
    close = difflib.get_close_matches(name.removeprefix(common), list(bare), n=1, cutoff=0.6)
    hint = f"did you mean {bare[close[0]]}?" if close else f"known: {', '.join(names)}"
    return f"unknown {kind} {name!r}; {hint}"
