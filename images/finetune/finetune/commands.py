"""All commands except training.

finetune check DATA [--json] [--write FILE.jsonl]
finetune ask --model-dir DIR "question"
"""

from __future__ import annotations

import sys

from estiba.platform.workload import Commands


def _check(arguments: list[str]) -> None:
    from finetune.data.check import run

    if code := run(arguments):
        sys.exit(code)


def _ask(arguments: list[str]) -> None:
    from finetune.ask import run

    run(arguments)


COMMANDS: Commands = {"check": _check, "ask": _ask}
