"""A request against botocore's service model, offline: types, unknown and missing members, enums, patterns, limits.

botocore's own ParamValidator checks types, required members and minima; this checks all of the model's metadata. The
model, not the look of a value, also sets its type: `max_length: 0512` under HyperParameters stays the text `0512`,
`VolumeSizeInGB: 30` becomes a number.
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass, field
from typing import Any

from botocore.loaders import create_loader
from botocore.model import ListShape, MapShape, ServiceModel, Shape, StringShape, StructureShape

from estiba_launch.errors import Problem, did_you_mean

MAX_DIGITS = 100
"""Python converts no number of thousands of digits."""
BOOLEANS = {"true": True, "false": False}
URI_SHAPE = "S3Uri"
UNICODE_CLASSES = {r"\p{Alnum}": "a-zA-Z0-9", r"\p{L}": r"\w", r"\p{N}": r"\d", r"\p{Z}": r"\s", r"\p{M}": ""}
"""Classes in the API's patterns that `re` lacks, with the nearest equivalent."""
CONTAINERS: dict[str, tuple[Any, str]] = {
    "structure": (dict, "a mapping of named members"),
    "map": (dict, "a mapping of names to text"),
    "list": (list, "a list"),
}
REMEDIES = {"RoleArn": "pass --role NAME or its ARN, or set ROLE_ARN, to a role that SageMaker may assume"}
"""For required members that flags set."""
TYPE_NAMES = {dict: "a mapping", list: "a list", bool: "true/false", int: "a number", float: "a number", str: "text"}


@functools.cache
def create_training_job() -> StructureShape:
    """The input shape of SageMaker's CreateTrainingJob, from botocore's bundled model."""
    # Without a Session, which reads the user's AWS settings and stops at those it cannot use.
    model = ServiceModel(create_loader().load_service_model("sagemaker", "service-2"), "sagemaker")
    shape = model.operation_model("CreateTrainingJob").input_shape
    assert isinstance(shape, StructureShape)
    return shape


@functools.cache
def compiled(pattern: str) -> re.Pattern[str]:
    """An API pattern as a Python one."""
    for api_class, python_class in UNICODE_CLASSES.items():
        pattern = pattern.replace(api_class, python_class)
    return re.compile(pattern)


@dataclass(kw_only=True)
class Walk:
    """One walk of a request along the model; `problems` collects what is wrong."""

    allow_file: bool
    """Accept `file://` where the model requires an S3 URI."""
    optional: frozenset[str] = frozenset()
    """Paths of required members that the target does not need."""
    problems: list[Problem] = field(default_factory=list)

    def read(self, value: Any, shape: Shape, path: str = "") -> Any:
        """`value` converted to the type of `shape`; None if it has another type."""
        container, expected = CONTAINERS.get(shape.type_name, (object, ""))
        if value is None:
            self._problem(path, None, "empty", "give it a value or remove the line")
        elif not isinstance(value, container):
            self._wrong_type(path, value, expected)
        elif isinstance(shape, StructureShape):
            return self._structure(value, shape, f"{path}." if path else "")
        elif isinstance(shape, MapShape):
            self._size(len(value), shape, path, "entries")
            for key in value:
                self._text(key, shape.key, f"{path}.{key}", "name")
            return {key: self.read(one, shape.value, f"{path}.{key}") for key, one in value.items()}
        elif isinstance(shape, ListShape):
            self._size(len(value), shape, path, "entries")
            return [self.read(one, shape.member, f"{path}[{index}]") for index, one in enumerate(value)]
        elif isinstance(value, dict | list):
            in_text = path.startswith(("HyperParameters.", "Environment."))
            self._wrong_type(path, value, "a single value", "write it as quoted JSON text" if in_text else "change it")
        else:
            return self._scalar(value, shape, path)
        return None

    def _structure(self, value: dict[str, Any], shape: StructureShape, prefix: str) -> dict[str, Any]:
        typed: dict[str, Any] = {}
        for name, member in value.items():
            if name in shape.members:
                typed[name] = self.read(member, shape.members[name], f"{prefix}{name}")
                continue
            remedy = did_you_mean(str(name), shape.members, f"known here: {', '.join(sorted(shape.members))}")
            self._problem(f"{prefix}{name}", None, "no such member in the API", remedy)
        for name in shape.required_members:
            if name not in value and f"{prefix}{name}" not in self.optional:
                self._problem(
                    f"{prefix}{name}", None, "required and missing", REMEDIES.get(f"{prefix}{name}", "add it")
                )
        return typed

    def _scalar(self, value: Any, shape: Shape, path: str) -> Any:
        kind = shape.type_name
        if kind == "string":
            text = str(value).lower() if isinstance(value, bool) else str(value)
            if not (self.allow_file and shape.name == URI_SHAPE and text.startswith("file://")):
                self._text(text, shape, path, "value")
            return text
        if kind == "boolean":
            flag = BOOLEANS.get(str(value).lower())
            if flag is None:
                self._wrong_type(path, value, "true or false")
            return flag
        assert kind in ("integer", "long"), f"{path}: unexpected type {kind} in the service model"
        if isinstance(value, bool | float) or not re.fullmatch(rf"[+-]?\d{{1,{MAX_DIGITS}}}", str(value)):
            self._wrong_type(path, value, "a whole number")
            return None
        number = int(value)
        low, high = shape.metadata.get("min"), shape.metadata.get("max")
        if low is not None and number < low:
            self._problem(path, number, f"at least {low}", f"raise it to {low}")
        if high is not None and number > high:
            self._problem(path, number, f"at most {high}", f"lower it to {high}")
        return number

    def _text(self, text: str, shape: Shape, path: str, what: str) -> None:
        if not text.isascii() and any("\ud800" <= one <= "\udfff" for one in text):
            self._problem(path, text, f"the {what} is not Unicode text", "write it as UTF-8")
            return
        self._size(len(text), shape, path, f"characters in the {what}", text)
        if isinstance(shape, StringShape) and shape.enum:
            if text not in shape.enum:
                close = difflib.get_close_matches(text, shape.enum, 3, 0.6)
                known = close or (sorted(shape.enum) if len(shape.enum) <= 12 else [])
                remedy = f"use {' or '.join(known)}" if known else "see the API's list for this field"
                self._problem(path, text, "not a value that the API knows", remedy)
            return
        pattern = shape.metadata.get("pattern")
        if not pattern or compiled(pattern).fullmatch(text):
            return
        if shape.name != URI_SHAPE:
            one_line = " in one line" if "\n" in text and compiled(pattern).fullmatch(text.replace("\n", "")) else ""
            self._problem(path, text, f"the {what} must match {pattern}{one_line}", "use only what the pattern allows")
        elif text.startswith("file://"):
            self._problem(path, text, "file:// is for --target local and ssh", "upload it and use its s3:// address")
        else:
            remedy = "write s3://BUCKET/PREFIX, or file://DIRECTORY for --target local and ssh"
            self._problem(path, text, "not an address", remedy)

    def _size(self, size: int, shape: Shape, path: str, unit: str, value: str | None = None) -> None:
        low, high = shape.metadata.get("min"), shape.metadata.get("max")
        if high is not None and size > high:
            self._problem(path, value, f"{size} {unit}, at most {high}", f"shorten it to {high}")
        elif low is not None and size < low:
            self._problem(path, value, f"{size} {unit}, at least {low}", "add what is missing")

    def _wrong_type(self, path: str, value: Any, expected: str, remedy: str = "change it") -> None:
        actual = TYPE_NAMES.get(type(value), type(value).__name__)
        shown = None if isinstance(value, dict | list) else value
        self._problem(path, shown, f"found {actual}, the API expects {expected}", remedy)

    def _problem(self, path: str, value: Any, rule: str, remedy: str) -> None:
        self.problems.append(Problem(field=path, value=value, rule=rule, remedy=remedy))
