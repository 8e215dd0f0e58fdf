"""A job file: a CreateTrainingJob request in YAML (or JSON) with `${VARIABLES}`.

Every plain scalar is read as the text in the file; the service model, not YAML, says what is a number. So `lr: 1e-4`
stays `1e-4`, `on` stays `on`, and `VolumeSizeInGB: ${GB}` is a number once it is filled in.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import json
import os
import re
import stat as modes
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from estiba_launch.errors import InvalidJob, LaunchError, Problem
from estiba_launch.request import advice, secrets, validation
from estiba_launch.request.address import TargetAddress
from estiba_launch.request.validation.view import View
from estiba_launch.request.variables import Undefined, expand, read_env_file

MAX_FILE_BYTES = 1 << 20
MAX_VALUES = 20_000
MAX_DEPTH = 50
TIMESTAMP = "ESTIBA_TIMESTAMP"
AWS_ONLY = ("RoleArn", "VpcConfig", "Tags", "ExperimentConfig", "MlflowConfig", "ModelPackageConfig")
"""Members that only AWS reads. Other targets drop them before their variables are filled in."""


class _TextLoader(yaml.SafeLoader):
    """Safe YAML whose plain scalars stay text (only null and merge keys are resolved) and whose keys are unique.

    Values are counted during parsing, with aliases expanded, because the library expands merge keys before its caller
    sees anything.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0
        self._sizes: dict[int, int] = {}
        """Number of values per node, with its aliases expanded."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._nodes, self._depth = self._nodes + 1, self._depth + 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"nested deeper than {MAX_DEPTH} levels")
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            self._refuse("an alias (*name) refers to what contains it")
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        size = self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in children)
        if max(size, self._nodes) > MAX_VALUES:
            self._refuse(f"holds more than {MAX_VALUES} values, with its aliases (*name) expanded")
        return node

    def _refuse(self, problem: str) -> NoReturn:
        raise yaml.composer.ComposerError(None, None, problem, self.get_mark())


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _unique_mapping(loader: _TextLoader, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "not a mapping, as its tag says", node.start_mark)
    names: set[str] = set()
    for key, _ in node.value:
        name = _name(key)
        if name in names and name != "<<":
            raise yaml.constructor.ConstructorError(None, None, f"{name!r} appears twice", key.start_mark)
        names.add(name)
    loader.flatten_mapping(node)
    return {_name(key): loader.construct_object(value, deep=True) for key, value in node.value}


def _name(key: yaml.Node) -> str:
    """A name as it is in the file, also `null` and `~`."""
    if not isinstance(key, yaml.ScalarNode) or key.tag not in NAME_TAGS:
        raise yaml.constructor.ConstructorError(None, None, "a name must be plain text", key.start_mark)
    return str(key.value)


YAML_TAG = "tag:yaml.org,2002:"
NAME_TAGS = {f"{YAML_TAG}{name}" for name in ("str", "null", "merge")}
# Tags with a meaning outside the API (!!binary, !!set, ...) are refused like unknown ones.
_TextLoader.yaml_constructors = {
    **{
        f"{YAML_TAG}{name}": yaml.SafeLoader.construct_yaml_str for name in ("str", "int", "float", "bool", "timestamp")
    },
    f"{YAML_TAG}null": yaml.SafeLoader.construct_yaml_null,
    f"{YAML_TAG}seq": yaml.SafeLoader.construct_yaml_seq,
    f"{YAML_TAG}map": _unique_mapping,
    None: yaml.SafeLoader.construct_undefined,
}


@dataclass(frozen=True)
class Upload:
    """A file to upload to S3 before the job starts."""

    file: Path
    address: str
    """s3:// prefix that receives the file under its own name."""
    stamp: tuple[int, int] | None = None
    """Size and time of change of a file whose digest is in the address: it is sent once. None is always sent."""


@dataclass(frozen=True)
class JobFile:
    path: Path
    target: TargetAddress
    request: dict[str, Any]
    """The CreateTrainingJob request, typed as the API expects."""
    uploads: tuple[Upload, ...] = ()
    notes: tuple[str, ...] = ()
    """What was filled in or ignored; shown to the user before the job starts."""

    @property
    def name(self) -> str:
        return str(self.request["TrainingJobName"])


def load(
    path: Path,
    target: TargetAddress,
    settings: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    now: datetime.datetime | None = None,
    resolve_role: Callable[[str], str] | None = None,
) -> JobFile:
    """Read, fill in and check a job file for `target`; `resolve_role` turns a role's name into its ARN.

    Raises InvalidJob with every problem at once, LaunchError when the file is not readable YAML.
    """
    tree = read_tree(path)
    if not target.on_aws:
        tree = {name: value for name, value in tree.items() if name not in AWS_ONLY}
    notes: list[str] = []
    moment = now or datetime.datetime.now(datetime.UTC)
    variables: dict[str, str] = {
        TIMESTAMP: timestamp(moment),
        **read_env_file(path.parent / ".env", notes),
        **(read_env_file(Path(".env"), notes) if path.parent.resolve() != Path.cwd() else {}),
        **(os.environ if environ is None else environ),
        **(settings or {}),
    }
    if target.on_aws and "RoleArn" not in tree and variables.get("ROLE_ARN"):
        tree["RoleArn"] = variables["ROLE_ARN"].replace("${", "$${")
    problems: list[Problem] = []
    written: dict[str, str] = {}
    folder = path.resolve().parent.name if path.stem == "job" else path.stem
    name_text = tree.get("TrainingJobName", f"{slug(folder)}-${{{TIMESTAMP}}}")
    name = fill_in(name_text, "TrainingJobName", variables, problems, written)
    # The running job sees the same name, so a TRAINING_JOB_NAME in the environment must not override it.
    variables["TRAINING_JOB_NAME"] = str(name)
    filled = fill_in({**tree, "TrainingJobName": name}, "", variables, problems, written)
    role = filled.get("RoleArn")
    if resolve_role and isinstance(role, str) and re.fullmatch(r"[\w+=,.@-]{1,64}", role, re.ASCII):
        filled["RoleArn"] = resolve_role(role)
    return check(path, filled, target, written=written, undefined=problems, notes=notes)


def check(
    path: Path,
    filled: dict[str, Any],
    target: TargetAddress,
    *,
    written: Mapping[str, str] | None = None,
    undefined: Sequence[Problem] = (),
    uploads: tuple[Upload, ...] = (),
    notes: Sequence[str] = (),
) -> JobFile:
    """Check a filled-in request for `target` and type it. Raises InvalidJob with every problem, also `undefined`.

    `written` holds each field's text before its variables were filled in.
    """
    filled, assumed = with_data_types(filled)
    request, invalid = validation.check(filled, target)
    hidden = secrets.hidden(filled, written or {})
    undefined = [_without_text(problem) if problem.field in hidden else problem for problem in undefined]
    problems: list[Problem] = []
    for group in (undefined, secrets.find(filled), invalid):
        # An undefined field has no value to check, and a secret must not be shown by another problem.
        reported = {problem.field for problem in problems}
        problems += [problem for problem in group if problem.field not in reported]
    if problems:
        texts = {
            field: text
            for field, text in (written or {}).items()
            if field not in {one.field for one in undefined} | hidden
        }
        shown = [dataclasses.replace(problem, written=texts.get(problem.field)) for problem in problems]
        raise InvalidJob(str(path), sorted(shown, key=lambda problem: problem.field))
    return JobFile(path, target, request, uploads, (*notes, *assumed, *advice.notes(request)))


def _without_text(problem: Problem) -> Problem:
    """A problem of a field with a secret, without the field's text, of which its rule and remedy may hold parts."""
    rule = "a variable is not defined" if secrets.secret_value(problem.rule) else problem.rule
    remedy = f"correct that, and take the secret out of this field: {secrets.REMEDY}"
    return dataclasses.replace(problem, secret=True, rule=rule, remedy=remedy)


def with_data_types(request: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the request with the S3DataType that AWS requires and users leave out, a note for each one added)."""
    request, notes = copy.deepcopy(request), []
    for channel in View(request).each("InputDataConfig"):
        source = channel("DataSource.S3DataSource")
        if isinstance(source, dict) and "S3DataType" not in source:
            source["S3DataType"] = "S3Prefix"
            notes.append(f"{channel.field('DataSource.S3DataSource.S3DataType')}: not set, so S3Prefix is used")
    return request, notes


def read_text(path: Path) -> str:
    """The text of a job file. Raises LaunchError if it cannot be read."""
    try:
        stat = path.stat()
        # It is read more than once, so a pipe would be empty the second time, and a device never ends.
        if not modes.S_ISREG(stat.st_mode) and not modes.S_ISDIR(stat.st_mode):
            raise LaunchError(f"{path}: a pipe or device; write the job to a file and pass its path")
        if stat.st_size > MAX_FILE_BYTES:
            raise LaunchError(f"{path}: {stat.st_size} bytes, at most {MAX_FILE_BYTES}; is this the job file?")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise LaunchError(f"{path}: cannot be read ({reason}); pass the path of a job.yaml") from None


def _read_json(text: str) -> Any:
    """The tree in JSON text, with numbers and flags as text, like in YAML; None for other text, and for JSON at the
    limits, which the YAML reader counts. Raises ValueError for a name that appears twice."""
    try:
        tree = json.loads(
            text.removeprefix("\ufeff"), parse_int=str, parse_float=str, parse_constant=str, object_pairs_hook=_unique
        )
    except (json.JSONDecodeError, RecursionError):
        return None
    count = 0

    def plain(node: Any, depth: int = 1) -> Any:
        nonlocal count
        count += 1
        if count > MAX_VALUES // 2 or depth > MAX_DEPTH:
            raise OverflowError
        if isinstance(node, dict):
            return {name: plain(one, depth + 1) for name, one in node.items()}
        if isinstance(node, list):
            return [plain(one, depth + 1) for one in node]
        return str(node).lower() if isinstance(node, bool) else node

    with contextlib.suppress(OverflowError):
        return plain(tree)
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{name!r} appears twice")
    return dict(pairs)


def read_tree(path: Path) -> dict[str, Any]:
    """The YAML or JSON in `path`, before its variables are filled in. Raises LaunchError if it is not a mapping."""
    text = read_text(path)
    try:
        # Some JSON is no YAML: tabs, and escapes of characters in two halves.
        tree = _read_json(text)
        tree = yaml.load(text, _TextLoader) if tree is None else tree
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error)
        raise LaunchError(f"{path}{line}: not plain YAML ({what}); see images/embed/job.yaml for an example") from None
    if not isinstance(tree, dict):
        raise LaunchError(f"{path}: not a CreateTrainingJob request; see images/embed/job.yaml for an example")
    return tree


def fill_in(
    node: Any, path: str, variables: Mapping[str, str], problems: list[Problem], written: dict[str, str]
) -> Any:
    """`node` with every `${...}` filled in; adds undefined variables to `problems`, original texts to `written`."""
    if isinstance(node, dict):
        prefix = f"{path}." if path else ""
        for key in node:
            if "${" in key:
                rule = "variables are filled in only in values, not in names"
                problems.append(Problem(field=f"{prefix}{key}", rule=rule, remedy="write the name itself"))
        return {key: fill_in(value, f"{prefix}{key}", variables, problems, written) for key, value in node.items()}
    if isinstance(node, list):
        return [fill_in(value, f"{path}[{i}]", variables, problems, written) for i, value in enumerate(node)]
    if not isinstance(node, str) or "${" not in node:
        return node
    undefined: list[Undefined] = []
    text = expand(node, variables, undefined)
    written[path] = node
    for one in undefined:
        if one.name.startswith("${"):
            problems.append(Problem(field=path, value=node, rule=one.message or "", remedy="see docs/cli.md"))
            continue
        remedy = f"{one.message + '; ' if one.message else ''}pass --set {one.name}=VALUE or put it in .env"
        problems.append(Problem(field=path, value=node, rule=f"{one.name} is not defined", remedy=remedy))
    return text


def timestamp(moment: datetime.datetime) -> str:
    """20260927-123005-000123: with microseconds, so that jobs of one second have different names."""
    return f"{moment:%Y%m%d-%H%M%S-%f}"


def slug(text: str) -> str:
    """`text` as the start of a job name, in the characters that the API allows."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")[:40].strip("-") or "job"
