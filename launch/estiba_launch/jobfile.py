"""A job file: a CreateTrainingJob request in YAML (or JSON) with `${VARIABLES}`.

Every plain scalar is read as the text that stands in the file; the service model, not YAML, says what is a number.
So `lr: 1e-4` arrives as `1e-4`, `on` stays `on`, and `VolumeSizeInGB: ${GB}` is a number once it is filled in.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import rules, secrets, shapes
from .errors import InvalidJob, LaunchError, Problem
from .target import SAGEMAKER_ONLY, Target
from .variables import Undefined, Variables, read_env_file

MAX_FILE_BYTES = 1 << 20
MAX_VALUES = 20_000
TIMESTAMP = "ESTIBA_TIMESTAMP"


class _TextLoader(yaml.SafeLoader):
    """Safe YAML whose plain scalars stay text (only null and merge keys are resolved) and whose keys are unique."""


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _unique_mapping(loader: _TextLoader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a name must be plain text", key.start_mark)
        if key.value in seen and key.value != "<<":
            raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
        seen.add(key.value)
    loader.flatten_mapping(node)
    return {str(loader.construct_object(k)): loader.construct_object(v, deep=True) for k, v in node.value}


_TextLoader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


@dataclass(frozen=True)
class JobFile:
    """One job, checked for one target."""

    path: Path
    target: Target
    request: dict[str, Any]
    """The CreateTrainingJob request, typed as the API wants it."""
    variables: dict[str, str]
    """Every variable that was used, by name."""

    @property
    def name(self) -> str:
        return str(self.request["TrainingJobName"])


def load(
    path: Path,
    target: Target,
    settings: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    now: datetime.datetime | None = None,
    resolve_role: Callable[[str], str] | None = None,
) -> JobFile:
    """Read, fill in and check a job file for `target`; `resolve_role` makes an ARN of a RoleArn that is only a name.

    Raises InvalidJob with every problem at once, LaunchError when the file is not readable YAML.
    """
    tree = read_tree(path)
    if not target.is_sagemaker:
        tree = {name: value for name, value in tree.items() if name not in SAGEMAKER_ONLY}
    moment = now or datetime.datetime.now(datetime.UTC)
    built_in = {TIMESTAMP: moment.strftime("%Y%m%d-%H%M%S")}
    variables = Variables(
        [
            dict(settings or {}),
            dict(os.environ if environ is None else environ),
            read_env_file(Path(".env")),
            read_env_file(path.parent / ".env"),
            built_in,
        ]
    )
    problems: list[Problem] = []
    written: dict[str, str] = {}
    name_text = tree.get("TrainingJobName", f"{default_name(path)}-${{{TIMESTAMP}}}")
    name = fill_in(name_text, "TrainingJobName", variables, problems, written)
    # The running job sees the same name, so a TRAINING_JOB_NAME left in the environment must not win over it.
    variables.sources.insert(0, {"TRAINING_JOB_NAME": str(name)})
    filled = fill_in({**tree, "TrainingJobName": name}, "", variables, problems, written)
    role = filled.get("RoleArn")
    if resolve_role and isinstance(role, str) and re.fullmatch(r"[\w+=,.@-]{1,64}", role, re.ASCII):
        filled["RoleArn"] = resolve_role(role)
    try:
        job = check(path, filled, target, variables.used, written)
    except InvalidJob as error:
        undefined = {problem.field for problem in problems}
        raise InvalidJob(str(path), [*problems, *(p for p in error.problems if p.field not in undefined)]) from None
    if problems:
        raise InvalidJob(str(path), problems)
    return job


def check(
    path: Path,
    filled: dict[str, Any],
    target: Target,
    variables: Mapping[str, str] | None = None,
    written: Mapping[str, str] | None = None,
) -> JobFile:
    """Check a filled-in request for `target` and type it. Raises InvalidJob with every problem at once."""
    hidden = secrets.find(filled)
    problems: list[Problem] = []
    missing_ok = set() if target.is_sagemaker else {"RoleArn"}
    shape = shapes.create_training_job()
    request = shapes.read(filled, shape, "", problems, allow_file=not target.is_sagemaker, missing_ok=missing_ok)
    if isinstance(request, dict):
        broken = {problem.field for problem in problems}
        problems += [p for p in rules.find(request, target) if p.field not in broken]
    hidden_fields = {problem.field for problem in hidden}
    problems = [p for p in problems if p.field not in hidden_fields] + hidden
    if problems:
        origin = written or {}
        shown = [Problem(**{**vars(p), "written": origin.get(p.field)}) for p in problems]
        raise InvalidJob(str(path), sorted(shown, key=lambda p: p.field))
    return JobFile(path, target, request, dict(variables or {}))


def read_tree(path: Path) -> dict[str, Any]:
    """The YAML of `path`, nothing filled in. Raises LaunchError when it cannot be read as a mapping."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise LaunchError(f"{path}: {path.stat().st_size} bytes, at most {MAX_FILE_BYTES}; is this the job file?")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise LaunchError(f"{path}: cannot be read ({reason}); give the path of a job.yaml") from None
    try:
        tree = yaml.load(text, _TextLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error)
        raise LaunchError(f"{path}{line}: not plain YAML ({what}); see images/embed/job.yaml for the form") from None
    except RecursionError:
        raise LaunchError(f"{path}: nested too deep; see images/embed/job.yaml for the form") from None
    if not isinstance(tree, dict):
        raise LaunchError(f"{path}: not a CreateTrainingJob request; see images/embed/job.yaml for the form")
    _count(tree, path)
    return tree


def _count(tree: dict[str, Any], path: Path) -> None:
    """Refuse aliases that unfold into more than a request can hold (or into themselves)."""
    left = MAX_VALUES
    pending: list[Any] = [tree]
    while pending:
        node = pending.pop()
        left -= 1
        if left < 0:
            raise LaunchError(f"{path}: unfolds to more than {MAX_VALUES} values; write out its aliases (*name)")
        if isinstance(node, dict):
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)


def fill_in(node: Any, path: str, variables: Variables, problems: list[Problem], written: dict[str, str]) -> Any:
    """`node` with every `${...}` filled in; what is undefined goes to `problems`, original texts to `written`."""
    if isinstance(node, dict):
        out = {}
        for key, value in node.items():
            inner = f"{path}.{key}" if path else key
            out[key] = fill_in(value, inner, variables, problems, written)
        return out
    if isinstance(node, list):
        return [fill_in(value, f"{path}[{i}]", variables, problems, written) for i, value in enumerate(node)]
    if not isinstance(node, str) or "${" not in node:
        return node
    undefined: list[Undefined] = []
    text = variables.expand(node, undefined)
    written[path] = node
    for one in undefined:
        if one.name.startswith("${"):
            problems.append(Problem(field=path, value=node, rule=one.message or "", remedy="see docs/cli.md"))
            continue
        remedy = f"{one.message + '; ' if one.message else ''}pass --set {one.name}=VALUE or put it in .env"
        problems.append(Problem(field=path, value=node, rule=f"{one.name} is not defined", remedy=remedy))
    return text


def default_name(path: Path) -> str:
    """A job name from the file's place: images/embed/job.yaml -> embed."""
    name = path.resolve().parent.name if path.stem == "job" else path.stem
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "job"
