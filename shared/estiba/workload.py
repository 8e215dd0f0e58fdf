"""One run of a workload: read the job and its configuration, do the work, end with the right code and failure file."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from estiba.config import C, load
from estiba.contract import Job
from estiba.errors import EstibaError, Interrupted
from estiba.failure import write_failure
from estiba.stop import Stop, say


def run(config_class: type[C], work: Callable[[C, Job, Stop], None]) -> NoReturn:
    """What a workload's `__main__` calls. Never returns: the process ends with the job's exit status.

    A mistake a person made ends in one message; anything else is a defect of ours and keeps its traceback in the log.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # file names need not be UTF-8
    failure_path: Path | None = None
    try:
        job = Job.read()
        failure_path = job.failure_path
        config = load(config_class, argv=sys.argv[1:], environ=os.environ, hyperparameters=job.hyperparameters)
        work(config, job, Stop.from_environment().install())
    except EstibaError as error:
        say(str(error) if isinstance(error, Interrupted) else f"error: {error}")
        _end(failure_path, str(error), error.exit_code)
    except MemoryError:
        text = "out of memory; give the container more, or lower --batch-size"
        say(f"error: {text}")
        _end(failure_path, text, 1)
    except Exception as error:
        traceback.print_exc()
        _end(failure_path, f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}", 1)
    _end(None, "", 0)


def _end(failure_path: Path | None, text: str, code: int) -> NoReturn:
    if text:
        from estiba.contract import root_of

        write_failure(failure_path or root_of() / "output/failure", text)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a reader that left (`| head`) does not change what the job did
            stream.flush()
    os._exit(code)  # threads that are stuck in a read or an upload must not keep a decided job alive
