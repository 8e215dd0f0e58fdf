"""Is this machine ready? Runs all checks at once and yields them in a fixed order, each within a time limit."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from estiba_launch.doctor import cuda, machine
from estiba_launch.errors import LaunchError
from estiba_launch.jobs.check import Check, Requirements
from estiba_launch.request import contract, jobfile, prices
from estiba_launch.request.address import TargetAddress
from estiba_launch.request.validation.view import View, uris
from estiba_launch.targets import registry

CHECK_S = 45.0
"""Time limit of one check."""

Checks = Callable[[], Iterable[Check]]


def run(needs: Requirements | None = None, *, network: bool = True) -> Iterator[Check]:
    """Every check; those that ask another machine only with `network`."""
    needs = needs or Requirements()
    groups: dict[str, Checks] = {
        "python": lambda: [machine.python()],
        "docker": machine.docker,
        "buildx": lambda: [machine.plugin("buildx", "building images")],
        "compose": lambda: [machine.plugin("compose", "the local S3 server of compose/ and AWS's local mode")],
        "gpu": partial(cuda.checks, needs.image),
        "disk": lambda: [machine.disk()],
    }
    if image := needs.image:
        groups["image"] = lambda: [machine.image(image, network=network)]
    groups |= {kind: partial(_target_checks, kind, needs, network) for kind in registry.TARGETS}
    for name, results in [(name, _start(name, checks)) for name, checks in groups.items()]:
        yield from _collect(name, results)


def _target_checks(kind: str, needs: Requirements, network: bool) -> Iterable[Check]:
    return registry.target_of(TargetAddress(kind)).checks(needs, network=network)


Results = queue.Queue[Check | None]


def _start(name: str, checks: Checks) -> Results:
    """Run checks in a daemon thread, which does not keep the program alive if it hangs."""
    results: Results = queue.Queue()

    def put_results() -> None:
        try:
            for check in checks():
                results.put(check)
        except Exception as error:
            seen = f"{type(error).__name__}: {str(error)[: machine.CHARS_SHOWN]}"
            results.put(Check(name=name, status="unknown", seen=seen))
        results.put(None)

    threading.Thread(target=put_results, name=f"doctor {name}", daemon=True).start()
    return results


def _collect(name: str, results: Results) -> Iterator[Check]:
    try:
        while check := results.get(timeout=CHECK_S):
            yield check
    except queue.Empty:
        remedy = "a program or machine does not answer; try it by hand"
        yield Check(name=name, status="unknown", seen=f"no answer within {CHECK_S:g} s", remedy=remedy)


def requirements_of(job: Path, settings: dict[str, str], role: str | None, region: str | None) -> Requirements:
    """What a job file needs on the first target that accepts it. Raises LaunchError if none does."""
    for address in sorted(registry.addresses(), key=lambda address: not address.on_aws):
        try:
            request = jobfile.load(job, address, settings).request
            break
        except LaunchError as error:
            rejection = error
    else:
        raise rejection
    return Requirements(
        image=request["AlgorithmSpecification"].get("TrainingImage"),
        role=role or request.get("RoleArn") or settings.get("ROLE_ARN") or os.environ.get("ROLE_ARN"),
        instances=tuple(one for hosts in prices.choices_of(request) for one in hosts),
        spot=bool(request.get("EnableManagedSpotTraining")),
        max_run_s=contract.max_runtime_s(request),
        keep_alive_s=request["ResourceConfig"].get("KeepAlivePeriodInSeconds"),
        addresses=tuple(uris(View(request))),
        region=region,
    )
