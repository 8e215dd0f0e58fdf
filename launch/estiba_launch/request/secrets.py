"""Find secrets in a job request, which is stored, logged, and readable by anyone who may describe the job."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from estiba_launch.errors import Problem
from estiba_launch.request.validation.view import View

VALUE_PATTERNS: dict[str, re.Pattern[str]] = {
    "an AWS access key": re.compile(r"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),
    "an AWS secret key": re.compile(r"(?=.*[A-Z])(?=.*[a-z])(?=.*\d)(?<![^\s=:])[A-Za-z0-9/+]{40}\Z"),
    "a Hugging Face token": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    "a GitHub token": re.compile(r"\b(?:gh[opusr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})"),
    "an API key": re.compile(r"\b(?:sk-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{35})"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a signed token (JWT)": re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"),
    "a password in a URL": re.compile(r"\b[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@"),
}
MAX_VALUE_CHARS = 4096
PLAIN_VARIABLE = re.compile(r"\$\{\w+\}")
VARIABLE_PARTS = re.compile(r"\$\{(?:\w+(?=[:}?-]):?[?-]?)?|\}")
ENDINGS = ("password", "passwd", "passphrase")
"""Also of one word, as in PGPASSWORD."""
LAST_WORDS = {"pwd", "secret", "secrets", "credential", "credentials", "apikey"}
KEY_KINDS = {"api", "access", "secret", "private", "auth", "encryption", "signing", "account", "kaggle"}
PASS_KINDS = {"db", "database", "user", "admin", "root", "login", "postgres", "pg", "mysql", "redis", "smtp"}
PAT_KINDS = {"gh", "github", "gitlab", "azure", "ado", "databricks"}
TOKEN_KINDS = set(
    "hf hub huggingface auth access api bearer refresh github gitlab wandb session security identity id oauth slack "
    "comet secret user login push read write tracking mlflow databricks gh".split()
)
REFERENCES = re.compile(r"arn:aws[a-z-]*:(?:secretsmanager|ssm|kms):|(?:s3|file)://|/run/secrets/", re.ASCII)
REMEDY = (
    "keep it in AWS Secrets Manager and pass its ARN, or give the role access; "
    "for a local run use --env-file, which is never stored with the job"
)


def secret_name(name: str) -> bool:
    """True for names that hold secrets: HF_TOKEN, db-password, apiKey; not for eos_token, max_tokens or tokenizer."""
    words = [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    if not words:
        return False
    last = words[-1]
    before = words[-2] if len(words) > 1 else None
    if last in LAST_WORDS or last.endswith(ENDINGS):
        return True
    kinds = {"key": KEY_KINDS, "keys": KEY_KINDS, "pass": PASS_KINDS, "pat": PAT_KINDS}.get(last)
    if kinds is not None:
        return before in kinds
    return last == "token" and (before is None or before in TOKEN_KINDS)


def secret_value(value: str) -> str | None:
    """The kind of secret in `value`, or None."""
    # The API refuses longer values, of which a problem shows less; some patterns take quadratic time.
    text = value[:MAX_VALUE_CHARS]
    return next((what for what, pattern in VALUE_PATTERNS.items() if pattern.search(text)), None)


def secret_template(text: str) -> str | None:
    """The kind of secret in the text of a field with `${VARIABLES}`, also in their defaults and messages; or None."""
    return next((what for part in (text, *VARIABLE_PARTS.split(text)) if (what := secret_value(part))), None)


def find(request: dict[str, Any]) -> list[Problem]:
    """A problem for every field with a secret, without its value."""
    problems: list[Problem] = []
    names = _names(request)
    for path, value in _leaves(request):
        name = names(path)
        what = secret_value(value)
        if what is None and isinstance(name, str) and value and secret_name(name) and not REFERENCES.match(value):
            what = f"a secret by its name ({name})"
        if what is not None:
            problems.append(Problem(field=path, secret=True, rule=f"looks like {what}", remedy=REMEDY))
    return problems


def hidden(request: dict[str, Any], written: Mapping[str, str]) -> set[str]:
    """The fields of which no text may be shown; `written` holds each field's text before its variables are known."""
    names = _names(request)
    fields = {problem.field for problem in find(request)}
    for path, text in written.items():
        name = names(path)
        is_named = isinstance(name, str) and secret_name(name) and not PLAIN_VARIABLE.fullmatch(text)
        if is_named or secret_template(text):
            fields.add(path)
    return fields


def _names(request: dict[str, Any]) -> Callable[[str], Any]:
    """Path of a value -> the name that its author gave it, if any."""
    tags = {f"{tag.path}.Value": tag("Key") for tag in View(request).each("Tags")}

    def name(path: str) -> Any:
        block, _, key = path.partition(".")
        return key if block in ("HyperParameters", "Environment") else tags.get(path)

    return name


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of every string and number."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}[{index}]")
    elif isinstance(node, str | int | float) and not isinstance(node, bool):
        yield path, str(node)
