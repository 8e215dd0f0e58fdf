"""An image's own workload on several hosts that need each other: ESTIBA_HOST_AGENT=1 in its Dockerfile.

Without it a workload's hosts stay strangers: embed's share files and lose nothing when one of them ends.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from estiba.platform.contract import Job
from estiba.platform.host_agent import start_agent
from estiba.platform.network import interface_to
from estiba.platform.peers import wait_for_hosts
from estiba.platform.script_environment import SOCKET_NAMES
from estiba.platform.script_job import PrepareSupervisor, wait_until_ready
from estiba.platform.steps import NAME as STEP_FILE
from estiba.platform.steps import STALL_S, StepWatch
from estiba.platform.stop import seconds
from estiba.platform.supervisor import LOST_FILE, STOPPING, Command, Supervisor, stage_command


def run_linked(command: Command, environ: MutableMapping[str, str], failure_path: Path, grace_s: float) -> int:
    """Run the workload once all hosts are there. Returns the exit status. Raises EstibaError."""
    hosts = Job.read(environ).cluster
    if len(hosts.names) > 1:
        # As PID 1 without a handler this process would not be ended by them.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        wait_for_hosts(hosts.resolvable, STOPPING)
    interface = interface_to([name for name in hosts.resolvable if name != hosts.current])
    sockets = dict.fromkeys(SOCKET_NAMES, interface) if interface is not None else {}
    agent = start_agent(hosts, environ)
    folder = Path(tempfile.mkdtemp(prefix="estiba-run-"))
    try:
        stage = stage_command(environ)
        if stage is not None:
            prepare = PrepareSupervisor(stage, failure_path, grace_s, environ=environ, agent=agent)
            if code := prepare.run():
                return code
        if agent is not None:
            wait_until_ready(agent, environ)
        steps = StepWatch(folder / "step", seconds(environ, "ESTIBA_STALL_S") or STALL_S)
        return Supervisor(
            command,
            failure_path,
            grace_s,
            environ={**sockets, **environ, STEP_FILE: str(steps.path), LOST_FILE: str(folder / "lost")},
            agent=agent,
            steps=steps if agent is not None else None,
        ).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if agent is not None:
            agent.close()
