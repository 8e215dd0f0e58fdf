"""The commands beside training.

brain-to-text evaluate --model out/model --dataset-dir data --output-dir evaluation
brain-to-text generate --out data --sessions 4 --trials 60
brain-to-text index s3://bucket/prefix
brain-to-text show-config --config-file rnn_args.yaml
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from estiba.config import load
from estiba.contract import Job
from estiba.errors import ConfigError, EstibaError
from estiba.stop import Stop, say


def run(arguments: Sequence[str]) -> NoReturn:
    """Run one command and end the process. A mistake ends in one message."""
    command = COMMANDS.get(arguments[0])
    code = 0
    if command is None:
        known = ", ".join(f"brain-to-text {name}" for name in COMMANDS)
        say(f"error: unknown command {arguments[0]!r}; known: {known}; flags alone train")
        code = ConfigError.exit_code
    else:
        try:
            code = command(list(arguments[1:])) or 0
        except EstibaError as error:
            say(f"error: {error}")
            code = error.exit_code
    sys.stdout.flush()
    os._exit(code)


def _evaluate(arguments: list[str]) -> None:
    from brain_to_text.evaluate import EvaluateConfig, evaluate

    config = load(EvaluateConfig, argv=arguments, environ=None, hyperparameters=None, prog="brain-to-text evaluate")
    evaluate(config, Stop.from_environment().install())


def _generate(arguments: list[str]) -> int:
    from brain_to_text.generator import command

    return command(arguments)


def _index(arguments: list[str]) -> int:
    from brain_to_text.indexing.index import command

    return command(arguments)


def _show_config(arguments: list[str]) -> None:
    """What a training with these flags, here, would be set to, as a file that --config-file takes."""
    from brain_to_text.arguments import nested, of_this_run
    from brain_to_text.config import BrainConfig

    class ShowConfig(BrainConfig):
        """Print what a training would be set to by these flags, the environment and hyperparameters."""

    config = load(
        ShowConfig,
        argv=arguments,
        environ=os.environ,
        hyperparameters=Job.read().hyperparameters,
        prog="brain-to-text show-config",
    )
    content = nested(config, config.sessions or [])
    content["dataset"]["sessions"] = config.sessions
    values, remarks = of_this_run(config)
    print(_yaml(content) + "\n# Places, reading, and what is kept.\n" + _yaml(values), end="")
    print("# The machine's own; a training elsewhere finds its own.")
    print("".join(f"# {line}\n" for line in _yaml(remarks).splitlines()), end="")


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(values, sort_keys=False)) if values else ""


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "evaluate": _evaluate,
    "generate": _generate,
    "index": _index,
    "show-config": _show_config,
}
