"""Text in a manifest: what reads it must find the same characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml


class Quoted(str):
    """Always quoted: readers of YAML differ in what they take for a number (1e3, 0o17, yes)."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, False)


class Block(str):
    """Over several lines where YAML allows it."""


_Dumper.add_representer(Quoted, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))
_Dumper.add_representer(Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))


def literal(text: str) -> str:
    """`text` for an env value or an argument, where Kubernetes replaces `$(NAME)` and `$$`."""
    return Quoted(text.replace("$", "$$"))


def shell(text: str) -> str:
    """A script for `sh -c`, with the same care."""
    return Block(text.replace("$", "$$"))


def dump(documents: Sequence[Any]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, explicit_start=True)
