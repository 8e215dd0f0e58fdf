"""PID 1 of every image: start the right process, forward signals, enforce the deadline, report the exit and its cause.

    docker run IMAGE                         the workload, as SageMaker would start it
    docker run IMAGE train                   the same
    docker run IMAGE --flag value …          the workload with flags
    docker run IMAGE python other.py …       any command
    SAGEMAKER_PROGRAM=x.py, and `train`      the user's script: see `script_job`

TERM and INT reach the programs that can act on them: see `process_tree.receivers`, and `ranks` for a script. Before the
grace period ends, all remaining processes are killed, in time to write the failure file. Standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from estiba.errors import ConfigError, EstibaError
from estiba.log import get_logger
from estiba.platform.contract import Job, root_of
from estiba.platform.failure import remove_failure, write_failure
from estiba.platform.hosts import WRITTEN_BY_US, Hosts
from estiba.platform.peers import wait_for_hosts
from estiba.platform.stop import GRACE_S, seconds
from estiba.platform.supervisor import STOPPING, Command, run_staged

logger = get_logger("estiba.platform.entry")  # its __name__ is __main__


def main(argv: Sequence[str] | None = None) -> NoReturn:
    failure_path = root_of() / "output/failure"
    remove_failure(failure_path)
    try:
        command = command_for(sys.argv[1:] if argv is None else list(argv), os.environ)
        grace_s = seconds(os.environ, "ESTIBA_STOP_GRACE_S") or GRACE_S
        if command is None:
            from estiba.platform.script_job import ScriptJob

            code = ScriptJob(os.environ, failure_path, grace_s).run()
        elif os.environ.get("ESTIBA_HOST_AGENT") == "1" and command.is_workload:
            from estiba.platform.linked_workload import run_linked

            code = run_linked(command, os.environ, failure_path, grace_s)
        else:
            code = run_staged(command, os.environ, failure_path, grace_s)
    except EstibaError as error:
        logger.error("%s", error)
        write_failure(failure_path, str(error))
        code = error.exit_code
    sys.exit(code)


def command_for(argv: Sequence[str], environ: Mapping[str, str]) -> Command | None:
    """Return the command for the container's arguments; None for a user's script. Raises ConfigError."""
    if argv and argv[0] == "serve":
        raise ConfigError("this image runs jobs; it does not serve. Start it with `train`")
    if argv and argv[0] != "train" and not argv[0].startswith("-"):
        return Command(tuple(argv))
    flags = list(argv[1:] if argv[:1] == ["train"] else argv)
    if argv[:1] in ([], ["train"]) and (program := _script_of(environ)):
        if flags:
            raise ConfigError(
                f"flags {flags} were given together with the script {program!r} (SAGEMAKER_PROGRAM); "
                "pass the script's settings as hyperparameters"
            )
        hosts = Job.read(environ).cluster
        complete_tree(root_of(environ) / "input/config", hosts)
        # As PID 1 without a handler this process would not be ended by them.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        wait_for_hosts(hosts.resolvable, STOPPING)
        return None
    workload = environ.get("ESTIBA_WORKLOAD")
    if not workload:
        raise ConfigError(
            "ESTIBA_WORKLOAD is not set: this image names no workload; give a command or SAGEMAKER_PROGRAM"
        )
    return Command((sys.executable, "-m", workload, *flags), is_workload=True)


def complete_tree(config_dir: Path, hosts: Hosts | None = None) -> None:
    """Write the configuration files that the toolkit requires and a plain `docker run` lacks: the `hosts` of another
    scheduler, or one host, and no input.

    Raises ConfigError if one is missing and cannot be written.
    """
    try:
        socket.gethostbyname(host := socket.gethostname())
    except OSError:  # without a network the toolkit would try to resolve the name for fifteen minutes
        host = "localhost"
    is_cluster = hosts is not None and len(hosts.names) > 1
    defaults = {
        "resourceconfig.json": {
            "current_host": hosts.current if hosts and is_cluster else host,
            "hosts": list(hosts.names) if hosts and is_cluster else [host],
            "network_interface_name": "eth0",
            "written_by": WRITTEN_BY_US,
        },
        "hyperparameters.json": {},
        "inputdataconfig.json": {},
    }
    for name, content in defaults.items():
        path = config_dir / name
        if path.exists() and not _is_ours(path):
            continue
        try:
            config_dir.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        except OSError as error:
            raise ConfigError(
                f"{path} is missing and cannot be written ({error.strerror}); script mode needs it: "
                f"mount one that holds {json.dumps(content)}"
            ) from None


def _is_ours(path: Path) -> bool:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("written_by") == WRITTEN_BY_US


def _script_of(environ: Mapping[str, str]) -> str | None:
    """Return the user's script, from the environment or from the hyperparameter that the SDKs send."""
    if environ.get("SAGEMAKER_PROGRAM"):
        return environ["SAGEMAKER_PROGRAM"]
    try:
        value = json.loads((root_of(environ) / "input/config/hyperparameters.json").read_text())["sagemaker_program"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the workload reads the same file and reports the error
    return str(value).strip('"') or None


if __name__ == "__main__":
    main()
