"""Wait until the names of a job's hosts resolve, which the sagemaker-training toolkit does without a word.

Standard library only.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from estiba.errors import ConfigError, Interrupted
from estiba.log import get_logger
from estiba.platform.process_tree import next_signal

logger = get_logger(__name__)
WAIT_S = 900.0
"""SageMaker's hosts start within minutes of each other; the toolkit waits as long."""
TELL_EVERY_S = 30.0
POLL_S = 1.0
_NETWORKS = Path("/sys/class/net")


def wait_for_hosts(hosts: Sequence[str], signals: frozenset[signal.Signals], wait_s: float = WAIT_S) -> None:
    """Return once every name resolves. Raises ConfigError when one does not, Interrupted on one of the `signals`.

    The signals must be blocked.
    """
    started = time.monotonic()
    told_at: float | None = None
    while missing := [host for host in hosts if not _resolves(host)]:
        names = ", ".join(missing)
        if not _has_network():
            raise ConfigError(
                f"this container has no network, so {names} of resourceconfig.json cannot be reached; put all hosts on "
                "one network (`docker network create`), or leave resourceconfig.json out for a job on one host"
            )
        waited_s = time.monotonic() - started
        if waited_s >= wait_s:
            raise ConfigError(
                f"{names} of resourceconfig.json did not resolve within {wait_s:.0f} s; start every host on one "
                "network with its name as --network-alias, or list only the hosts that there are"
            )
        if told_at is None or waited_s - told_at >= TELL_EVERY_S:
            told_at = waited_s
            logger.info("waiting for the name of %s to resolve: %.0f s of at most %.0f", names, waited_s, wait_s)
        signum = next_signal(signals, POLL_S)
        if signum is not None:
            raise Interrupted(f"stopped by {signum.name} while waiting for {names} to resolve", signum)


def _resolves(host: str) -> bool:
    try:
        socket.gethostbyname(host)
    except OSError:
        return False
    return True


def _has_network() -> bool:
    """Whether there is any interface but the loopback; True where that cannot be seen."""
    try:
        return any(name != "lo" for name in os.listdir(_NETWORKS))
    except OSError:
        return True
