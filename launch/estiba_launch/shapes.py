"""A request against botocore's own service model, offline: types, unknown and missing members, enums, patterns, limits.

botocore's ParamValidator checks only types, required members and minima; this walks the whole model. The model says
what type each member has, so a job file's text is read by it: `max_length: 0512` under HyperParameters stays the text
`0512`, `VolumeSizeInGB: 30` becomes a number. Nothing is guessed from how a value looks.
"""

from __future__ import annotations

import difflib
import functools
import re
from typing import Any

from botocore.model import ListShape, MapShape, Shape, StringShape, StructureShape
from botocore.session import Session

from .errors import Problem

TRUE_WORDS = {"true": True, "false": False}
FILE_URI_SHAPES = {"S3Uri"}


@functools.cache
def create_training_job() -> StructureShape:
    """The input shape of SageMaker's CreateTrainingJob, from botocore's bundled model."""
    shape = Session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape
    assert isinstance(shape, StructureShape)
    return shape


@functools.cache
def compiled(pattern: str) -> re.Pattern[str]:
    """An API pattern as a Python one. The API uses Unicode classes that `re` lacks; \\w and \\s stand in for them."""
    for theirs, ours in (
        (r"\p{Alnum}", "a-zA-Z0-9"),
        (r"\p{L}", r"\w"),
        (r"\p{N}", r"\d"),
        (r"\p{Z}", r"\s"),
        (r"\p{M}", ""),
    ):
        pattern = pattern.replace(theirs, ours)
    return re.compile(pattern)


def read(
    value: Any, shape: Shape, path: str, problems: list[Problem], *, allow_file: bool = False, missing_ok: set[str]
) -> Any:
    """Return `value` typed as `shape` asks, adding what is wrong to `problems`.

    `allow_file` lets `file://` stand where an S3 URI does. `missing_ok` holds paths of required members that this
    target does not need.
    """
    known: dict[str, Any] = {"allow_file": allow_file, "missing_ok": missing_ok}
    if value is None:
        problems.append(Problem(field=path, rule="empty", remedy="give it a value or remove the line"))
        return None
    if isinstance(shape, StructureShape):
        if not isinstance(value, dict):
            return _wrong_type(value, "a mapping of named members", path, problems)
        return _structure(value, shape, path, problems, known)
    if isinstance(shape, MapShape):
        if not isinstance(value, dict):
            return _wrong_type(value, "a mapping of names to text", path, problems)
        _size(len(value), shape, path, problems, "entries")
        for key in value:
            _text(key, shape.key, f"{path}.{key}", problems, what="name")
        return {k: read(v, shape.value, f"{path}.{k}", problems, **known) for k, v in value.items()}
    if isinstance(shape, ListShape):
        if not isinstance(value, list):
            return _wrong_type(value, "a list", path, problems)
        _size(len(value), shape, path, problems, "entries")
        return [read(v, shape.member, f"{path}[{i}]", problems, **known) for i, v in enumerate(value)]
    if isinstance(value, dict | list):
        remedy = "write it as quoted JSON text" if path.startswith(("HyperParameters.", "Environment.")) else None
        return _wrong_type(value, "a single value", path, problems, remedy)
    return _scalar(value, shape, path, problems, allow_file)


def _structure(value: dict[str, Any], shape: StructureShape, path: str, problems: list[Problem], known: Any) -> Any:
    out: dict[str, Any] = {}
    prefix = f"{path}." if path else ""
    for name, member in value.items():
        if name not in shape.members:
            close = difflib.get_close_matches(str(name), shape.members, 1, 0.6)
            remedy = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(shape.members))}"
            problems.append(Problem(field=f"{prefix}{name}", rule="no such member in the API", remedy=remedy))
            continue
        out[name] = read(member, shape.members[name], f"{prefix}{name}", problems, **known)
    for name in shape.required_members:
        if name not in value and f"{prefix}{name}" not in known["missing_ok"]:
            problems.append(Problem(field=f"{prefix}{name}", rule="required and missing", remedy="add it"))
    return out


def _scalar(value: Any, shape: Shape, path: str, problems: list[Problem], allow_file: bool) -> Any:
    kind = shape.type_name
    if kind == "string":
        if isinstance(value, bool):
            value = "true" if value else "false"
        text = str(value)
        if shape.name in FILE_URI_SHAPES and text.startswith("file://") and allow_file:
            return text
        _text(text, shape, path, problems)
        return text
    if kind == "boolean":
        if isinstance(value, bool):
            return value
        if str(value).lower() in TRUE_WORDS:
            return TRUE_WORDS[str(value).lower()]
        return _wrong_type(value, "true or false", path, problems)
    if kind in ("integer", "long"):
        if isinstance(value, int) and not isinstance(value, bool):
            number = value
        elif isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value):
            number = int(value)
        else:
            return _wrong_type(value, "a whole number", path, problems)
        low, high = shape.metadata.get("min"), shape.metadata.get("max")
        if low is not None and number < low:
            problems.append(Problem(field=path, value=number, rule=f"at least {low}", remedy=f"raise it to {low}"))
        if high is not None and number > high:
            problems.append(Problem(field=path, value=number, rule=f"at most {high}", remedy=f"lower it to {high}"))
        return number
    raise AssertionError(f"{path}: type {kind} is not in the CreateTrainingJob model this was written for")


def _text(text: str, shape: Shape, path: str, problems: list[Problem], *, what: str = "value") -> None:
    _size(len(text), shape, path, problems, f"characters in the {what}", seen=text)
    if isinstance(shape, StringShape) and shape.enum:
        if text not in shape.enum:
            close = difflib.get_close_matches(text, shape.enum, 3, 0.6)
            known = close or (sorted(shape.enum) if len(shape.enum) <= 12 else [])
            remedy = f"use {' or '.join(known)}" if known else "see the API's list for this field"
            problems.append(Problem(field=path, value=text, rule="not one the API knows", remedy=remedy))
        return
    pattern = shape.metadata.get("pattern")
    if pattern and not compiled(pattern).fullmatch(text):
        if shape.name in FILE_URI_SHAPES and text.startswith("file://"):
            rule, remedy = "file:// is for --target local and ssh", "upload it and give its s3:// address"
        elif shape.name in FILE_URI_SHAPES:
            rule, remedy = "not an address", "write s3://BUCKET/PREFIX, or file://DIRECTORY for --target local and ssh"
        else:
            rule, remedy = f"the {what} must match {pattern}", "use only what the pattern allows"
        problems.append(Problem(field=path, value=text, rule=rule, remedy=remedy))


def _size(size: int, shape: Shape, path: str, problems: list[Problem], unit: str, seen: str | None = None) -> None:
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    if high is not None and size > high:
        rule, remedy = f"{size} {unit}, at most {high}", f"shorten it to {high}"
    elif low is not None and size < low:
        rule, remedy = f"{size} {unit}, at least {low}", "add what is missing"
    else:
        return
    problems.append(Problem(field=path, value=seen, rule=rule, remedy=remedy))


def _wrong_type(value: Any, wanted: str, path: str, problems: list[Problem], remedy: str | None = None) -> None:
    kinds = {dict: "a mapping", list: "a list", bool: "true/false", int: "a number", float: "a number", str: "text"}
    shown = value if not isinstance(value, dict | list) else None
    found = kinds.get(type(value), type(value).__name__)
    problems.append(
        Problem(field=path, value=shown, rule=f"found {found}, the API wants {wanted}", remedy=remedy or "change it")
    )
