"""Signals, the clock and the spot notice set one flag; the second signal ends at once."""

from __future__ import annotations

import http.server
import json
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from estiba.errors import ConfigError, EstibaError, Interrupted
from estiba.platform import stop as stop_module
from estiba.platform.stop import GRACE_S, SPOT_NOTICE_S, Stop, seconds

WAITING = """
import sys
from estiba.errors import Interrupted
from estiba.platform.stop import Stop
stop = Stop.from_environment().install()
print("ready", flush=True)
while not stop.wait(1):
    pass
print(stop.reason, round(stop.seconds_left() or 0), flush=True)
if "stay" in sys.argv:
    import time
    while True:
        time.sleep(0.05)
sys.exit(stop.interrupted("all of it").exit_code)
"""


# --- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_sets_the_flag_and_wakes_waiters(place: Any, signum: signal.Signals, code: int) -> None:
    process = place.start(sys.executable, place.script(WAITING), env={"ESTIBA_STOP_GRACE_S": "60"})
    assert process.stdout.readline() == b"ready\n"
    sent = time.monotonic()
    process.send_signal(signum)
    done = place.run(process)
    assert time.monotonic() - sent < 5
    assert done.stdout == f"{signum.name} 60\n".encode()
    assert done.returncode == code
    assert b"at most 60 s" in done.stderr


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_ends_at_once(place: Any, signum: signal.Signals, code: int) -> None:
    process = place.start(sys.executable, place.script(WAITING), "stay")
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline().startswith(b"SIGTERM")
    sent = time.monotonic()
    process.send_signal(signum)
    assert place.run(process).returncode == code
    assert time.monotonic() - sent < 5


def test_a_signal_in_the_middle_of_a_wait_never_hangs(place: Any) -> None:
    """A handler that takes a lock held by the interrupted code would deadlock."""
    script = place.script(
        """
        import os, random, signal, threading, time
        from estiba.platform.stop import Stop
        random.seed(1)
        def send(delay_s):
            time.sleep(delay_s)
            os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(60):
            stop = Stop().install()
            sender = threading.Thread(target=send, args=(random.random() / 200,))
            sender.start()
            while not stop.wait(0):
                pass
            sender.join()
        print("all 60 came through")
        """
    )
    process = place.start(sys.executable, script, stderr=None)
    assert place.run(process).stdout == b"all 60 came through\n"


def test_a_closed_log_does_not_turn_a_stop_into_a_crash(place: Any) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = place.start(sys.executable, place.script(WAITING), stderr=writing)
    os.close(writing)
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    assert place.run(process).returncode == 143


# --- the flag ------------------------------------------------------------------------------------------------------


def test_without_a_request_there_is_no_stop_and_no_deadline() -> None:
    stop = Stop()
    assert not stop()
    assert stop.seconds_left() is None
    assert not stop.wait(0.01)


def test_the_first_reason_is_kept_and_time_runs() -> None:
    stop = Stop(grace_s=50)
    stop.request("the first", signum=signal.SIGINT)
    stop.request("the second", seconds_left=1)
    assert stop()
    assert stop.wait(10)
    assert stop.reason == "the first"
    left = stop.seconds_left()
    assert left is not None
    assert 49 < left < 50
    time.sleep(0.02)
    assert (stop.seconds_left() or 0) < left


def test_the_time_left_is_never_negative() -> None:
    stop = Stop()
    stop.request("the job ended", seconds_left=0)
    time.sleep(0.01)
    assert stop.seconds_left() == 0


def test_the_closing_error_says_why_and_what_is_safe() -> None:
    stop = Stop()
    stop.request("SIGINT", signum=signal.SIGINT)
    error = stop.interrupted("4 of 9 files are written")
    assert isinstance(error, EstibaError)
    assert str(error) == "stopped by SIGINT: 4 of 9 files are written; run the same command again to resume"
    assert error.exit_code == 130


def test_a_stop_without_a_signal_counts_as_term() -> None:
    stop = Stop()
    stop.request("the runtime limit")
    assert stop.interrupted("all").exit_code == 143


# --- the clock -----------------------------------------------------------------------------------------------------


def in_process(**settings: Any) -> Stop:
    """A Stop with its watchers, and this process's handlers put back."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        return Stop(**settings).install()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_the_runtime_limit_stops_a_grace_period_before_the_end() -> None:
    stop = in_process(grace_s=0.5, max_runtime_s=1.0)
    assert not stop.wait(0.2)
    assert stop.wait(5)
    assert stop.reason == "the runtime limit"
    assert 0.2 < (stop.seconds_left() or 0) <= 0.5


def test_a_runtime_limit_below_the_grace_period_leaves_time_to_work() -> None:
    stop = in_process(grace_s=120, max_runtime_s=1.0)
    assert not stop.wait(0.2)
    assert stop.wait(5)
    assert 0.2 < (stop.seconds_left() or 0) <= 0.5


def test_a_signal_after_the_clock_sets_the_exit_status_and_does_not_end_at_once(place: Any) -> None:
    process = place.start(
        sys.executable,
        place.script(WAITING),
        "stay",
        env={"ESTIBA_MAX_RUNTIME_S": "0.2", "ESTIBA_STOP_GRACE_S": "0.1"},
    )
    assert process.stdout.readline() == b"ready\n"
    assert process.stdout.readline().startswith(b"the runtime limit")
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)  # now it is the second signal
    assert place.run(process).returncode == 130


# --- the spot notice -----------------------------------------------------------------------------------------------


class Metadata(http.server.BaseHTTPRequestHandler):
    """EC2's instance metadata, version 2: a token by PUT, and nothing without it."""

    notice: bytes | None = None
    asked = 0
    status_line = "HTTP/1.1"

    def do_PUT(self) -> None:
        if self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]:
            self.answer(200, b"the-token")
        else:
            self.answer(400)

    def do_GET(self) -> None:
        type(self).asked += 1
        if self.headers["X-aws-ec2-metadata-token"] != "the-token":
            self.answer(401)
        elif self.path == "/latest/meta-data/spot/instance-action" and self.notice is not None:
            self.answer(200, self.notice)
        else:
            self.answer(404)

    def answer(self, status: int, body: bytes = b"") -> None:
        if self.status_line != "HTTP/1.1":
            self.wfile.write(f"{self.status_line}\r\n\r\n".encode())
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Metadata]]:
    class Own(Metadata):
        pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(stop_module, "SPOT_POLL_S", 0.05)
    yield Own
    server.shutdown()
    server.server_close()


def notice_in(seconds_ahead: float) -> bytes:
    at = datetime.now(UTC) + timedelta(seconds=seconds_ahead)
    return json.dumps({"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")}).encode()


def test_a_spot_notice_raises_the_flag_with_the_time_it_gives(metadata: type[Metadata], until: Any) -> None:
    stop = in_process(spot_notice=True)
    until(lambda: metadata.asked >= 2)
    assert not stop()
    metadata.notice = notice_in(60)
    assert stop.wait(5)
    assert stop.reason == "the EC2 spot notice"
    assert 50 < (stop.seconds_left() or 0) <= 60


@pytest.mark.parametrize("notice", [b'{"action": "hibernate"}', b"soon", b'{"time": "soon"}', b"[]"])
def test_a_notice_without_a_time_that_can_be_read_counts_two_minutes(metadata: type[Metadata], notice: bytes) -> None:
    metadata.notice = notice
    stop = in_process(spot_notice=True)
    assert stop.wait(5)
    assert SPOT_NOTICE_S - 5 < (stop.seconds_left() or 0) <= SPOT_NOTICE_S


def test_the_notice_is_asked_for_directly_whatever_proxy_is_set(
    metadata: type[Metadata], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it would remember the environment of an earlier call
    metadata.notice = notice_in(60)
    assert in_process(spot_notice=True).wait(5)


@pytest.mark.parametrize("status_line", ["nonsense", "HTTP/1.1 abc"])
def test_a_response_that_is_not_http_is_retried(
    metadata: type[Metadata], monkeypatch: pytest.MonkeyPatch, until: Any, status_line: str
) -> None:
    crashed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", crashed.append)
    monkeypatch.setattr(metadata, "status_line", status_line)
    stop = in_process(spot_notice=True)
    time.sleep(0.2)
    assert not stop()
    assert crashed == []
    monkeypatch.setattr(metadata, "status_line", "HTTP/1.1")
    metadata.notice = notice_in(60)
    assert stop.wait(5)


def test_the_notice_is_not_asked_for_unless_it_is_enabled(metadata: type[Metadata]) -> None:
    metadata.notice = notice_in(60)
    stop = in_process()
    assert not stop.wait(0.3)
    assert metadata.asked == 0


# --- the environment -----------------------------------------------------------------------------------------------


def test_the_environment_sets_grace_limit_and_notice() -> None:
    assert Stop.from_environment({}).grace_s == GRACE_S
    assert Stop.from_environment({"ESTIBA_STOP_GRACE_S": " 30 "}).grace_s == 30
    assert Stop.from_environment({"ESTIBA_STOP_GRACE_S": ""}).grace_s == GRACE_S


@pytest.mark.parametrize("text", ["soon", "-1", "0", "nan", "inf", "2 min"])
@pytest.mark.parametrize("name", ["ESTIBA_STOP_GRACE_S", "ESTIBA_MAX_RUNTIME_S"])
def test_a_time_that_is_not_a_positive_number_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Stop.from_environment({name: text})
    assert name in str(caught.value)
    assert repr(text) in str(caught.value)
    assert "120" in str(caught.value)


def test_an_absent_time_is_none() -> None:
    assert seconds({}, "ESTIBA_MAX_RUNTIME_S") is None
    assert seconds({"ESTIBA_MAX_RUNTIME_S": "1.5"}, "ESTIBA_MAX_RUNTIME_S") == 1.5


def test_a_line_to_a_full_log_is_lost_without_an_error(place: Any) -> None:
    script = place.script(
        "from estiba.log import get_logger; get_logger('estiba').info('a line'); print('alive', flush=True)"
    )
    with Path("/dev/full").open("wb") as full:
        process = place.start(sys.executable, script, stderr=full)
    assert place.run(process).stdout == b"alive\n"


def test_an_action_that_ends_just_after_the_wait_is_no_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Future):  # type: ignore[type-arg]
        def result(self, timeout: float | None = None) -> object:
            value = super().result()
            if timeout is not None:
                raise TimeoutError
            return value

    monkeypatch.setattr("estiba.platform.stop.Future", Late)
    assert Stop().unless_stopped(lambda: 7, "nothing") == 7


def test_an_error_after_the_stop_is_the_stop_and_one_before_is_an_error() -> None:
    """A child process of the action may have heard the signal first."""
    stop = Stop()

    def fails(stops: bool) -> None:
        if stops:
            stop.request("SIGTERM")
        raise ValueError("the converter was killed")

    with pytest.raises(ValueError, match="the converter was killed"):
        stop.unless_stopped(lambda: fails(False), "nothing was computed")
    with pytest.raises(Interrupted, match="nothing was computed"):
        stop.unless_stopped(lambda: fails(True), "nothing was computed")
