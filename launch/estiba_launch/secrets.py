"""Secrets do not belong in a job request: it is stored, logged, and readable by anyone who may describe the job."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .errors import Problem

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
ENDINGS = {"password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials"}
KEY_KINDS = {"api", "access", "secret", "private", "auth", "encryption", "signing", "account"}
TOKEN_KINDS = {
    "hf",
    "hub",
    "huggingface",
    "auth",
    "access",
    "api",
    "bearer",
    "refresh",
    "github",
    "gitlab",
    "wandb",
    "session",
    "security",
    "identity",
    "id",
    "oauth",
    "slack",
    "comet",
    "secret",
    "user",
    "login",
    "push",
    "read",
    "write",
}
REFERENCES = re.compile(r"arn:aws[a-z-]*:(?:secretsmanager|ssm|kms):|(?:s3|file)://|/run/secrets/", re.ASCII)
REMEDY = (
    "keep it in AWS Secrets Manager and pass its ARN, or give the role access; "
    "for a local run pass it by --env-file, which is never written to the job"
)


def secret_name(name: str) -> bool:
    """True for names that hold secrets: HF_TOKEN, db-password, apiKey; not for eos_token, max_tokens or tokenizer."""
    words = [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    if not words:
        return False
    last = words[-1]
    before = words[-2] if len(words) > 1 else None
    if last in ENDINGS or last == "apikey":
        return True
    if last in ("key", "keys"):
        return before in KEY_KINDS
    return last == "token" and (before is None or before in TOKEN_KINDS)


def secret_value(value: str) -> str | None:
    """What kind of secret `value` holds, or None."""
    return next((what for what, pattern in VALUE_PATTERNS.items() if pattern.search(value)), None)


def find(request: dict[str, Any]) -> list[Problem]:
    """Every field of the request that holds a secret. The value is never part of the problem."""
    problems: list[Problem] = []
    for path, name, value in _texts(request, ""):
        what = secret_value(value)
        if what is None and name and value and secret_name(name) and not REFERENCES.match(value):
            what = f"a secret by its name ({name})"
        if what is not None:
            problems.append(Problem(field=path, secret=True, rule=f"looks like {what}", remedy=REMEDY))
    return problems


def _texts(node: Any, path: str) -> Iterator[tuple[str, str | None, str]]:
    """(path, name by which people choose what goes in, text) of every text in the request."""
    if isinstance(node, dict):
        if path.startswith("Tags[") and isinstance(node.get("Key"), str) and isinstance(node.get("Value"), str):
            yield f"{path}.Value", node["Key"], node["Value"]
            yield f"{path}.Key", None, node["Key"]
            return
        named = path in ("HyperParameters", "Environment")
        for key, value in node.items():
            inner = f"{path}.{key}" if path else str(key)
            if isinstance(value, str | int | float) and not isinstance(value, bool):
                yield inner, str(key) if named else None, str(value)
            else:
                yield from _texts(value, inner)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            inner = f"{path}[{index}]"
            if isinstance(value, str):
                yield inner, None, value
            else:
                yield from _texts(value, inner)
