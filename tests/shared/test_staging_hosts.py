"""Staging on several hosts, which are processes with addresses: each byte leaves S3 once, whatever befalls a host."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from estiba.staging.assignments import Assignments
from estiba.staging.files import StagedFiles
from estiba.staging.peers import Identity, Link, NotYet, OtherVersion, Server, Status
from estiba.staging.pieces import PieceTable
from estiba.storage import Entry
from shaped_endpoint import ShapedEndpoint, shaped_endpoint

SHARED = Path(__file__).resolve().parents[2] / "shared"
PIECE = 2**16
SIZE_BYTES = 6 * 2**20
PROGRAM = """
import os, sys
from estiba.errors import EstibaError
from estiba.staging import peers, session, stage
session.DEAD_AFTER_S, session.ABSENT_AFTER_S, peers.TIMEOUT_S = 2.0, 20.0, 2.0
try:
    {body}
    stage("s3://bucket/model", sys.argv[1], piece_bytes={piece}, connections=2)
except EstibaError as error:
    print(error, file=sys.stderr)
    os._exit(error.exit_code)
os._exit(0)
"""


class Hosts:
    """Hosts named 127.0.0.1, 127.0.0.2, …, and the endpoint that they share."""

    def __init__(self, folder: Path, endpoint: ShapedEndpoint, count: int) -> None:
        self.folder, self.endpoint, self.count = folder, endpoint, count
        self.names = [f"127.0.0.{number + 1}" for number in range(count)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.processes: list[subprocess.Popen[str]] = []

    def target(self, host: int) -> Path:
        return self.folder / f"host-{host}/model"

    def start(self, host: int, body: str = "pass", **environ: str) -> subprocess.Popen[str]:
        """Start a host's process, which runs `body` before it stages."""
        root = self.folder / f"host-{host}/ml"
        (root / "input/config").mkdir(parents=True, exist_ok=True)
        config = {"current_host": self.names[host], "hosts": self.names}
        (root / "input/config/resourceconfig.json").write_text(json.dumps(config))
        program = PROGRAM.format(body=textwrap.indent(textwrap.dedent(body), "    ").strip(), piece=PIECE)
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(self.target(host))],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **self.endpoint.environ,
                "PYTHONPATH": str(SHARED),
                "ESTIBA_ROOT": str(root),
                "ESTIBA_STAGING_PORT": str(self.port),
                **environ,
            },
        )
        self.processes.append(process)
        return process

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()

    def ratio(self) -> float:
        """Return what left the endpoint, as a multiple of the model."""
        time.sleep(0.1)  # the endpoint logs a request when its last pause has passed
        return self.endpoint.sent_bytes() / SIZE_BYTES

    def is_whole(self, host: int) -> bool:
        source = self.endpoint.folder / "bucket/model"
        return {path.name: path.read_bytes() for path in self.target(host).iterdir()} == {
            path.name: path.read_bytes() for path in source.iterdir()
        }


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Three hosts; 6 MB in three objects, at 1 MB/s a connection and two connections a host: a second of staging."""
    folder = tmp_path / "served"
    (folder / "bucket/model").mkdir(parents=True)
    for name in "abc":
        (folder / "bucket/model" / name).write_bytes(os.urandom(SIZE_BYTES // 3))
    with shaped_endpoint(folder, tmp_path / "log", "--mb-per-s", "1", "--latency-ms", "5") as endpoint:
        found = Hosts(tmp_path, endpoint, 3)
        yield found
        found.end()


def ended(process: subprocess.Popen[str], timeout_s: float = 60) -> tuple[int, str]:
    _, text = process.communicate(timeout=timeout_s)
    return process.returncode, text


def test_each_byte_leaves_the_source_once_for_three_hosts(hosts: Hosts) -> None:
    processes = [hosts.start(host) for host in range(3)]
    results = [ended(process) for process in processes]
    assert [code for code, _ in results] == [0, 0, 0], results
    assert [hosts.is_whole(host) for host in range(3)] == [True] * 3
    assert hosts.ratio() == 1.0


@pytest.mark.parametrize("victim", [0, 2])
def test_a_host_that_is_killed_half_way_costs_only_what_it_had_not_passed_on(
    victim: int, hosts: Hosts, until: Callable[[Callable[[], Any]], Any]
) -> None:
    processes = [hosts.start(host) for host in range(3)]
    until(lambda: hosts.endpoint.sent_bytes() > SIZE_BYTES / 2)
    processes[victim].send_signal(signal.SIGKILL)
    results = [ended(process) for host, process in enumerate(processes) if host != victim]
    assert [code for code, _ in results] == [0, 0], results
    assert all(hosts.is_whole(host) for host in range(3) if host != victim)
    assert re.search(rf"{hosts.names[victim]} (is silent|ended); its part is read", results[0][1])
    assert hosts.ratio() <= 1.1


def test_a_host_that_is_killed_and_started_again_takes_the_rest_from_its_peers(
    hosts: Hosts, until: Callable[[Callable[[], Any]], Any]
) -> None:
    processes = [hosts.start(host) for host in range(3)]
    until(lambda: hosts.endpoint.sent_bytes() > SIZE_BYTES / 2)
    processes[1].send_signal(signal.SIGKILL)
    processes[1].wait()
    processes[1] = hosts.start(1)
    results = [ended(process) for process in processes]
    assert [code for code, _ in results] == [0, 0, 0], results
    assert [hosts.is_whole(host) for host in range(3)] == [True] * 3
    assert hosts.ratio() <= 1.1


def test_a_late_host_gets_everything_from_its_peers(hosts: Hosts, until: Callable[[Callable[[], Any]], Any]) -> None:
    """Its own pieces too: they were waited for in vain, and the next host took them over."""
    early = [hosts.start(0, "session.ABSENT_AFTER_S = 2.0"), hosts.start(1)]
    until(lambda: hosts.endpoint.sent_bytes() >= SIZE_BYTES)
    late = hosts.start(2)
    results = [ended(process) for process in (*early, late)]
    assert [code for code, _ in results] == [0, 0, 0], results
    assert [hosts.is_whole(host) for host in range(3)] == [True] * 3
    assert hosts.ratio() <= 1.02


def test_a_host_that_never_comes_is_given_up_and_named(hosts: Hosts) -> None:
    processes = [hosts.start(host, "session.ABSENT_AFTER_S = 3.0") for host in range(2)]
    results = [ended(process) for process in processes]
    assert [code for code, _ in results] == [0, 0], results
    assert "127.0.0.3 did not answer for 3 s" in results[0][1]
    assert hosts.is_whole(0) and hosts.is_whole(1)


@pytest.mark.slow
def test_a_frozen_host_does_not_hold_the_others_and_finishes_when_it_wakes(
    hosts: Hosts, until: Callable[[Callable[[], Any]], Any]
) -> None:
    processes = [hosts.start(host) for host in range(3)]
    until(lambda: hosts.endpoint.sent_bytes() > SIZE_BYTES / 3)
    processes[2].send_signal(signal.SIGSTOP)
    results = [ended(process) for process in processes[:2]]
    assert [code for code, _ in results] == [0, 0], results
    processes[2].send_signal(signal.SIGCONT)
    assert ended(processes[2])[0] == 0
    assert [hosts.is_whole(host) for host in range(3)] == [True] * 3


def test_a_flipped_byte_between_hosts_is_found_and_costs_one_more_transfer(hosts: Hosts) -> None:
    flip = """
        from estiba.staging.peers import Link
        original, flipped = Link._chunks, []
        def chunks(self, size_bytes):
            for view in original(self, size_bytes):
                if not flipped:
                    flipped.append(1)
                    view[100] ^= 1
                yield view
        Link._chunks = chunks
    """
    processes = [hosts.start(0), hosts.start(1, flip), hosts.start(2)]
    results = [ended(process) for process in processes]
    assert [code for code, _ in results] == [0, 0, 0], results
    assert "differ from its digest; they are fetched again" in results[1][1]
    assert hosts.is_whole(1)
    assert hosts.ratio() == 1.0


def test_a_peer_whose_disk_lies_is_not_believed_a_second_time(hosts: Hosts) -> None:
    lie = """
        import os
        from estiba.staging.files import StagedFiles
        original = StagedFiles.location
        zeros = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
        os.ftruncate(zeros, 2**24)
        def location(self, piece):
            return (zeros if piece.index == 0 else original(self, piece)[0]), piece.start, piece.size_bytes
        StagedFiles.location = location
    """
    processes = [hosts.start(0, lie), hosts.start(1), hosts.start(2)]
    results = [ended(process) for process in processes]
    assert [code for code, _ in results] == [0, 0, 0], results
    assert hosts.is_whole(1) and hosts.is_whole(2)
    assert 1.0 < hosts.ratio() <= 1.1


def test_a_full_disk_ends_its_host_and_the_others_finish_and_say_why(hosts: Hosts) -> None:
    full = """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        from estiba.staging.files import StagedFiles
        os.ftruncate = lambda descriptor, size: None
    """
    processes = [hosts.start(0), hosts.start(1, full), hosts.start(2)]
    results = [ended(process) for process in processes]
    assert [code for code, _ in results] == [0, 1, 0], results
    assert f"{hosts.target(1)}: File too large" in results[1][1]
    assert "127.0.0.2 failed: " in results[0][1]
    assert hosts.is_whole(0) and hosts.is_whole(2)


def test_an_object_that_changes_ends_every_host_with_that_reason(
    hosts: Hosts, until: Callable[[Callable[[], Any]], Any]
) -> None:
    processes = [hosts.start(host) for host in range(3)]
    until(lambda: hosts.endpoint.sent_bytes() > SIZE_BYTES / 3)
    (hosts.endpoint.folder / "bucket/model/c").write_bytes(os.urandom(SIZE_BYTES // 3))
    results = [ended(process) for process in processes]
    assert [code for code, _ in results] == [1, 1, 1], results
    assert all("bucket/model/c: it was replaced or deleted while it was staged" in text for _, text in results)
    published = [path for host in range(3) for path in hosts.target(host).iterdir() if path.suffix != ".estiba-tmp"]
    assert published == []


@pytest.mark.slow
def test_hosts_with_different_tokens_exchange_nothing_and_say_so(hosts: Hosts) -> None:
    processes = [hosts.start(host, ESTIBA_STAGING_TOKEN=f"secret-{host}") for host in range(3)]
    results = [ended(process) for process in processes]
    assert [code for code, _ in results] == [1, 1, 1], results
    assert all("ESTIBA_STAGING_TOKEN" in text and "secret" not in text for _, text in results)


# --- the protocol --------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    table = PieceTable("s3://b/m", [Entry("x", 100, "etag")])
    files = StagedFiles(table, tmp_path)
    files.open(())
    (piece,) = table.pieces
    digests = {0: files.write(piece, [b"1" * 100])}
    serving = Server(
        ("127.0.0.1", 0),
        identity("etag"),
        Assignments(table, {0}, host_count=2, me=0),
        files,
        digests,
        lambda theirs: Status(host=0, held=theirs.held),
    )
    yield serving
    serving.shutdown()
    serving.server_close()
    files.close()


def identity(fingerprint: str, source: str = "s3://b/m") -> Identity:
    return Identity.of(source=source, fingerprint=fingerprint, job="job", hosts=("a", "b"), token="")


def address(server: Server) -> tuple[str, int]:
    host, port = server.server_address[:2]
    return str(host), int(port)


def test_a_piece_and_a_status_travel_over_one_connection(server: Server) -> None:
    link = Link(address(server), identity("etag"))
    assert link.exchange(Status(host=1, held="f")).held == "f"
    _, chunks = link.piece(0, 100)
    assert b"".join(map(bytes, chunks)) == b"1" * 100
    with pytest.raises(NotYet):
        link.piece(1, 100)
    link.close()


def test_another_version_of_the_source_or_another_job_is_refused(server: Server) -> None:
    with pytest.raises(OtherVersion):
        Link(address(server), identity("another etag"))


def test_another_source_of_the_same_job_is_not_served_yet(server: Server) -> None:
    with pytest.raises(NotYet):
        Link(address(server), identity("etag", source="s3://b/other"))


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"source": 1}\n', b"\xff\n", b""])
def test_a_stranger_gets_no_byte_of_a_piece(line: bytes, server: Server) -> None:
    with socket.create_connection(address(server), timeout=5) as stranger:
        reply = b""
        with contextlib.suppress(OSError):  # the server hung up
            stranger.sendall(line + b"G\0\0\0\0")
            stranger.shutdown(socket.SHUT_WR)
            while chunk := stranger.recv(65536):
                reply += chunk
    assert b"1" * 100 not in reply
    Link(address(server), identity("etag")).close()
