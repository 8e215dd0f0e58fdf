"""A workload's entry point: read the job and its configuration, run it, end with its exit status and failure file.

if __name__ == "__main__":
    workload.main(MyConfig, "my_image.train:train", commands="my_image.commands:COMMANDS")
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from estiba.config import C, Config, load
from estiba.errors import ConfigError, EstibaError, Interrupted
from estiba.log import get_logger
from estiba.platform.contract import Job, root_of
from estiba.platform.failure import write_failure
from estiba.platform.network import MASTER_PORT
from estiba.platform.outcomes import CONSEQUENCE, kind_of
from estiba.platform.stop import Stop
from estiba.platform.supervisor import CHILD_ENVIRONMENT

logger = get_logger(__name__)

Commands = Mapping[str, Callable[[list[str]], None]]
"""Functions by command, such as "tokenizer train", called with the arguments after it."""


def main(config_class: type[Config], target: str, *, commands: str | None = None) -> NoReturn:
    """Run an image. `target` is its "module:function", called with (config, job, stop). Never returns.

    `commands` is the "module:name" of the image's other commands. One of them runs instead if the first argument is not
    a flag. Modules are imported late: torch takes seconds, and a mistake in the flags is reported first.
    """
    for name, value in CHILD_ENVIRONMENT.items():  # without the image's entry point; OpenMP reads it when torch loads
        os.environ.setdefault(name, value)
    arguments = sys.argv[1:]
    module = target.partition(":")[0].partition(".")[0]
    if commands is not None and arguments and not arguments[0].startswith("-"):
        _end(None, "", run_command(_import(commands), arguments, prog=module.replace("_", "-")))
    run(config_class, lambda config, job, stop: _import(target)(config, job, stop), module=module)


def run_command(commands: Commands, arguments: Sequence[str], *, prog: str) -> int:
    """Run one command and return its exit status. A user's mistake ends in one message."""
    name = next((name for name in commands if list(arguments[: len(name.split())]) == name.split()), None)
    try:
        if name is None:
            available = ", ".join(f"{prog} {name}" for name in commands)
            raise ConfigError(f"unknown command {arguments[0]!r}; available: {available}; to train, pass only flags")
        commands[name](list(arguments[len(name.split()) :]))
    except EstibaError as error:
        logger.error("%s", error)
        return error.exit_code
    return 0


def run(config_class: type[C], job_function: Callable[[C, Job, Stop], None], *, module: str | None = None) -> NoReturn:
    """Run `job_function` and end the process with the job's exit status. Never returns.

    A user's mistake ends in one message. Any other exception is a bug and keeps its traceback in the log. `module` is
    what `python -m` runs again for each rank, if there are several.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # file names need not be UTF-8
    failure_path: Path | None = None
    try:
        job = Job.read()
        failure_path = job.failure_path
        config = load(config_class, argv=sys.argv[1:], environ=os.environ, hyperparameters=job.hyperparameters)
        config.preflight()
        host_count = job.host_count if config.spans_hosts and "WORLD_SIZE" not in os.environ else 1
        if module is not None and ((count := config.rank_count()) > 1 or host_count > 1):
            from estiba.processes import run_ranks

            if host_count > 1:
                cluster = job.cluster
                run_ranks(
                    module,
                    sys.argv[1:],
                    count,
                    host_count=host_count,
                    host_index=cluster.index,
                    master=os.environ.get("MASTER_ADDR") or cluster.main_address or cluster.names[0],
                    port=os.environ.get("MASTER_PORT") or MASTER_PORT,
                )
            run_ranks(module, sys.argv[1:], count)
        job_function(config, job, Stop.from_environment().install())
    except EstibaError as error:
        logger.log(logging.INFO if isinstance(error, Interrupted) else logging.ERROR, "%s", error)
        _end(failure_path, str(error), error.exit_code)
    except MemoryError:
        text = "out of memory; give the container more, or lower --batch-size"
        logger.error(text)
        _end(failure_path, text, 1)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            text = f"out of GPU memory ({' '.join(str(error).split())[:300]}); lower --batch-size, or take a larger GPU"
            logger.error(text)
            _end(failure_path, text, 1)
        traceback.print_exc()
        _end(failure_path, f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}", 1)
    _end(None, "", 0)


def _import(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _end(failure_path: Path | None, text: str, code: int) -> NoReturn:
    path = failure_path or root_of() / "output/failure"
    if text and not (path.exists() and kind_of(text) == CONSEQUENCE):  # another rank told why it left
        write_failure(path, text)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a closed pipe (`| head`) does not change the result
            stream.flush()
    os._exit(code)  # threads that are stuck in a read or an upload must not keep a finished job alive
