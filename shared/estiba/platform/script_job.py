"""A user's script from its code to its end: bring it, install its requirements, start it with its environment.

AWS's toolkit is not used, except where the request asks for a launcher that only it has: it reads the script's output
until the last process closes it, loses exit statuses and signals, and installs nothing for a shell script. On several
hosts the script starts when all of them are ready, and ends everywhere when it fails on one.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from estiba.errors import ConfigError, EstibaError, Interrupted
from estiba.platform.contract import Job, root_of
from estiba.platform.host_agent import HostAgent, start_agent, stopped
from estiba.platform.outcomes import Failure, Outcomes
from estiba.platform.peers import TELL_EVERY_S, WAIT_S
from estiba.platform.process_tree import next_signal
from estiba.platform.script_environment import Script
from estiba.platform.script_supervisor import ScriptSupervisor
from estiba.platform.steps import NAME as STEP_FILE
from estiba.platform.steps import STALL_S, StepWatch
from estiba.platform.stop import seconds
from estiba.platform.supervisor import (
    LOST_FILE,
    RESERVE_S,
    STOPPING,
    Command,
    Supervisor,
    code_for,
    describe,
    run_staged,
    stage_command,
)

_PREPARE = (sys.executable, "-m", "estiba.platform.script_mode")
REFUSED_S = 180.0
"""A host whose machine answers for so long that no agent listens has another image. An image is pulled in this time."""


class ScriptJob:
    """One host's part of a script job."""

    def __init__(self, environ: MutableMapping[str, str], failure_path: Path, grace_s: float) -> None:
        self.environ = environ
        self.failure_path = failure_path
        self.grace_s = grace_s
        self.script = Script.read(root_of(environ), environ)

    def run(self) -> int:
        """Run the script to its end. Returns the exit status. Raises EstibaError."""
        if self.script.needs_toolkit():
            toolkit = Command((*_PREPARE, "toolkit"), is_toolkit=True)
            return run_staged(toolkit, self.environ, self.failure_path, self.grace_s)
        agent = start_agent(Job.read(self.environ).cluster, self.environ)
        folder = Path(tempfile.mkdtemp(prefix="estiba-run-"))
        try:
            for command in filter(None, [stage_command(self.environ), Command(_PREPARE)]):
                prepare = PrepareSupervisor(command, self.failure_path, self.grace_s, environ=self.environ, agent=agent)
                if code := prepare.run():
                    return code
            if agent is not None:
                wait_until_ready(agent, self.environ)
            return self._run_script(folder, agent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if agent is not None:
                agent.close()

    def _run_script(self, folder: Path, agent: HostAgent | None) -> int:
        command = Command(self.script.command())
        environment = self.script.environment(self.environ, stop_s=max(1.0, self.grace_s - RESERVE_S))
        steps = folder / "step"
        return ScriptSupervisor(
            command,
            self.failure_path,
            self.grace_s,
            environ={
                **environment,
                "ESTIBA_RUN_DIR": str(folder),
                STEP_FILE: str(steps),
                LOST_FILE: str(folder / "lost"),
            },
            code=self.script.code,
            outcomes=Outcomes(folder, self.script.current_host),
            steps=StepWatch(steps, seconds(self.environ, "ESTIBA_STALL_S") or STALL_S),
            hosts=len(self.script.hosts),
            agent=agent,
        ).run()


class PrepareSupervisor(Supervisor):
    """The other hosts hear of the preparation only if it fails."""

    def _explain_with_others(self, code: int) -> int:
        return super()._explain_with_others(code) if code or self.verdict is not None else 0


def wait_until_ready(agent: HostAgent, environ: Mapping[str, str]) -> None:
    """Wait at the start barrier. Raises EstibaError: the reason why this host will not start."""
    wait_s = seconds(environ, "ESTIBA_HOSTS_WAIT_S") or WAIT_S

    def pause(seconds_: float) -> None:
        signum = next_signal(STOPPING, seconds_)
        if signum is not None:
            agent.finish(stopped(signum.name, agent.current))
            raise Interrupted(f"stopped by {signum.name} while waiting for the other hosts", signum)

    try:
        agent.wait_for_all(pause, wait_s=wait_s, refused_s=min(REFUSED_S, wait_s), tell_s=TELL_EVERY_S)
    except TimeoutError as error:
        text = f"{error} did not start within {wait_s:.0f} s"
        agent.finish(Failure(text=text, host=agent.current, at=time.time(), code=2))
        raise ConfigError(
            f"{text}; start every host of the job, with an image that has a host agent, and let TCP port "
            f"{agent.addresses.port} pass between them, or set ESTIBA_HOST_AGENT=0 on all"
        ) from None
    if (verdict := agent.verdict()) is not None:
        agent.finish(None)
        raise HostFailed(verdict)


class HostFailed(EstibaError):
    """Another host failed before the script started here."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(describe(failure))
        self.exit_code = code_for(failure)
