"""Hosts watch each other where PID 1 does not do it, as under a `torchrun` that somebody else started.

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
from collections.abc import Iterator
from pathlib import Path

from estiba.distributed import DistContext
from estiba.errors import Interrupted, RanksLost, first_line
from estiba.log import get_logger
from estiba.platform.contract import Job
from estiba.platform.failure import write_failure
from estiba.platform.host_agent import LOST_S, HostAgent
from estiba.platform.hosts import Hosts
from estiba.platform.outcomes import Failure, kind_of
from estiba.platform.stop import Stop, seconds
from estiba.platform.supervisor import LOST_FILE, RESERVE_S, describe, tell_ranks

logger = get_logger(__name__)
POLL_S = 0.5


@contextlib.contextmanager
def watched_hosts(job: Job, dist: DistContext, stop: Stop) -> Iterator[None]:
    """Watch the other hosts during the block. All ranks call it together; on one host and below PID 1 it does nothing.

    Raises what the block raises.
    """
    is_needed = job.host_count > 1 and LOST_FILE not in os.environ and os.environ.get("ESTIBA_HOST_AGENT") != "0"
    if dist.world_size == 1 or not all(dist.all_gather(is_needed)):
        yield
        return
    watch = _HostWatch(job, dist, stop)
    os.environ[LOST_FILE] = str(watch.path)
    failure: Failure | None = None
    try:
        yield
    except Interrupted:  # all ranks stop together
        raise
    except Exception as error:
        text = first_line(error)
        code = getattr(error, "exit_code", 1)
        failure = Failure(text=text, host=job.cluster.current, at=time.time(), code=code, kind=kind_of(text))
        raise
    finally:
        del os.environ[LOST_FILE]
        watch.close(failure)


class _HostWatch:
    """One rank's part. The first rank of the host has the agent."""

    def __init__(self, job: Job, dist: DistContext, stop: Stop) -> None:
        self._failure_path, self._stop = job.failure_path, stop
        self._agent = _start_agent(job.cluster, dist)
        own = tempfile.mkdtemp(prefix="estiba-run-") if self._agent is not None else ""
        folders = dict(pair for pair in dist.all_gather((job.cluster.index, own)) if pair[1])
        self.path = Path(folders[job.cluster.index]) / "lost"
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
            write_failure(self._failure_path, f"{describe(reason)}\n\n{failure.text}")
        shutil.rmtree(self.path.parent, ignore_errors=True)

    def _watch(self) -> None:
        while not self.path.exists():
            if self._agent is not None and (loss := self._agent.loss()) is not None:
                write_failure(self._failure_path, describe(loss))
                tell_ranks(self.path, loss)
            if self._finished.wait(POLL_S):
                return
        reason = self.path.read_text()
        self._stop.request(reason)
        if not self._finished.wait(max(0.0, self._stop.grace_s - RESERVE_S)):
            logger.error("%s; this rank did not end within %.0f s", reason, self._stop.grace_s - RESERVE_S)
            os._exit(RanksLost.exit_code)


def _start_agent(hosts: Hosts, dist: DistContext) -> HostAgent | None:
    """Start the agent of this host on its first rank. The main rank tells the port of its own one."""
    token = dist.broadcast(uuid.uuid4().hex)
    lost_s = seconds(os.environ, "ESTIBA_HOST_LOST_S") or LOST_S

    def started(port: int) -> HostAgent:
        address = os.environ["MASTER_ADDR"]
        return HostAgent(
            hosts.names, hosts.current, token=token, port=port, lost_s=lost_s, first_address=address
        ).start()

    agent = started(port=0) if dist.is_main else None
    port = dist.broadcast(agent.addresses.port if agent is not None else None)
    if dist.local_rank == 0 and agent is None:
        agent = started(port)
    return agent
