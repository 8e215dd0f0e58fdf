"""Hosts watch each other where PID 1 does not do it, as under a `torchrun` that somebody else started, or a script did
on a host that knew of no others.

The first rank of each host runs the host agent. Once ranks of another host are gone, it writes ESTIBA_LOST_FILE for the
ranks of its own host. They save what they hold (`survivors.py`) and end; one that does not is ended after the grace
period, wherever it waits.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from estiba.distributed import DistContext
from estiba.errors import Interrupted, RanksLost, first_line
from estiba.log import get_logger
from estiba.platform.contract import Job
from estiba.platform.failure import read_failure, remove_failure, write_failure
from estiba.platform.host_agent import LOST_S, HostAgent
from estiba.platform.outcomes import CONSEQUENCE, Failure, kind_of
from estiba.platform.stop import Stop, seconds
from estiba.platform.supervisor import LOST_FILE, RESERVE_S, WATCHED, describe, tell_ranks

logger = get_logger(__name__)
POLL_S = 0.5
HEARD_S = 10.0
"""How long the start waits for the other hosts' agents: only a host that was heard can be lost."""


@contextlib.contextmanager
def watched_hosts(job: Job, dist: DistContext, stop: Stop) -> Iterator[None]:
    """Watch the other hosts during the block. All ranks call it together. On one host, and where PID 1 does it, it does
    nothing.

    Raises what the block raises, but RanksLost for a stop that a loss asked for.
    """
    is_needed = job.host_count > 1 and WATCHED not in os.environ and os.environ.get("ESTIBA_HOST_AGENT") != "0"
    if dist.world_size == 1 or not all(dist.all_gather(is_needed)):
        yield
        return
    watch = _HostWatch(job, dist, stop)
    of_pid_1 = os.environ.get(LOST_FILE)
    os.environ[LOST_FILE] = str(watch.path)
    failure: Failure | None = None
    try:
        yield
    except Interrupted as error:  # all ranks stop together
        if watch.loss is None or stop.reason != watch.loss:
            raise
        raise RanksLost(str(error).removeprefix("stopped by ")) from error
    except Exception as error:
        text = first_line(error)
        code = getattr(error, "exit_code", 1)
        failure = Failure(text=text, host=job.cluster.current, at=time.time(), code=code, kind=kind_of(text))
        raise
    finally:
        del os.environ[LOST_FILE]
        if of_pid_1 is not None:
            os.environ[LOST_FILE] = of_pid_1
        watch.close(failure)


class _HostWatch:
    """One rank's part. The first rank of the host has the agent."""

    def __init__(self, job: Job, dist: DistContext, stop: Stop) -> None:
        self._failure_path, self._stop = job.failure_path, stop
        self.loss: str | None = None
        """Why this rank is to stop, if ranks of another host are gone."""
        hosts = dist.all_gather(job.cluster.current)
        self._agent = _start_agent(hosts, dist)
        own = ""
        if self._agent is not None:
            own = tempfile.mkdtemp(prefix="estiba-run-")
            remove_failure(self._failure_path)  # an earlier attempt's
            for host in self._agent.wait_until_heard(HEARD_S):
                logger.warning("%s does not answer to this host's agent, so this host does not watch it", host)
        folders = dist.all_gather(own)
        self.path = Path(folders[hosts.index(job.cluster.current)]) / "lost"
        self._finished = threading.Event()
        threading.Thread(target=self._watch, name="estiba-host-watch", daemon=True).start()

    def close(self, failure: Failure | None) -> None:
        """Tell the other hosts how this one ended, and hear from them why."""
        self._finished.set()
        if self._agent is None:
            return
        reason = self._agent.finish(failure)
        self._agent.close()
        if failure is not None and reason is not None and reason != failure:
            logger.error("%s", describe(reason))
            self._write_failure(reason, failure.text)
        shutil.rmtree(self.path.parent, ignore_errors=True)

    def _write_failure(self, reason: Failure, *more: str) -> None:
        """Write why this host ends, above what its ranks wrote. A consequence does not hide what one of them wrote."""
        written = (read_failure(self._failure_path) or "").strip()
        is_told = written.startswith(describe(reason)) or (written and reason.kind == CONSEQUENCE)
        parts = ["" if is_told else describe(reason), written, *(text for text in more if text not in written)]
        write_failure(self._failure_path, "\n\n".join(filter(None, parts)))

    def _watch(self) -> None:
        while not self.path.exists():
            if self._agent is not None and (loss := self._agent.loss()) is not None:
                self._write_failure(loss)
                tell_ranks(self.path, loss)
            if self._finished.wait(POLL_S):
                return
        self.loss = reason = self._told()
        self._stop.request(reason)
        if not self._finished.wait(max(0.0, self._stop.grace_s - RESERVE_S)):
            logger.error("%s; this rank did not end within %.0f s", reason, self._stop.grace_s - RESERVE_S)
            os._exit(RanksLost.exit_code)

    def _told(self) -> str:
        with contextlib.suppress(OSError):  # the host's first rank removes the file when it ends
            return self.path.read_text()
        return "ranks of another host are gone"


def _start_agent(hosts: Sequence[str], dist: DistContext) -> HostAgent | None:
    """Start the agent of this host on its first rank. `hosts` are by rank. The main rank tells the port of its own one.

    The main rank's host comes first, whatever the platform's order: MASTER_ADDR is its address.
    """
    token = dist.broadcast(uuid.uuid4().hex)
    lost_s = seconds(os.environ, "ESTIBA_HOST_LOST_S") or LOST_S
    names = list(dict.fromkeys(hosts))

    def started(port: int) -> HostAgent:
        address = os.environ["MASTER_ADDR"]
        return HostAgent(names, hosts[dist.rank], token=token, port=port, lost_s=lost_s, first_address=address).start()

    agent = started(port=0) if dist.is_main else None
    port = dist.broadcast(agent.addresses.port if agent is not None else None)
    if agent is None and hosts.index(hosts[dist.rank]) == dist.rank:
        agent = started(port)
    return agent
