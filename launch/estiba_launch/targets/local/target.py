"""Jobs in Docker on this machine, each with a supervisor process of its own. All state is on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from estiba_launch.errors import LaunchError
from estiba_launch.jobs import artifacts, control, directory, inputs
from estiba_launch.jobs.control import Fault
from estiba_launch.jobs.directory import REQUEST, TARGET, job_dir
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.jobs.record import Record, recorded_document
from estiba_launch.jobs.status import JobStatus
from estiba_launch.request import contract
from estiba_launch.request.jobfile import JobFile
from estiba_launch.request.validation.view import View, uris
from estiba_launch.targets.base import Artifacts, Capability, ListFilters, Report, Submission, Target
from estiba_launch.targets.local.engine_address import VARIABLES, pinned
from estiba_launch.targets.local.script import local_script


class LocalTarget(Target):
    """This machine's Docker engine as a SageMaker host."""

    kind = "local"
    capabilities = frozenset(Capability) - {Capability.LIST_ACCOUNT}
    poll_interval_s = 0.2
    records_polls = False

    def prepare(self, job: JobFile, options: SubmitOptions) -> Submission:
        return Submission(job=job, options=options, script=local_script(job, options))

    def submit(self, submission: Submission, *, report: Report) -> None:
        # The Docker library loads only when a job starts.
        from estiba_launch.targets.local.engine import Engine

        engine = Engine()
        engine.ping()
        engine.check_gpus(submission.options.host)
        for channel in contract.channels(submission.request):
            inputs.check(channel)
        engine.ensure_image(submission.request["AlgorithmSpecification"]["TrainingImage"], report)
        request = with_absolute_paths(submission.request)
        self._refuse_shared_checkpoints(request)
        with directory.creating(submission.name) as folder:
            submission.options.write(folder)
            directory.write_json(folder / TARGET, {"target": str(self), "engine": pinned()})
            Record.create(folder, request)
            directory.write_json(folder / REQUEST, request)
        supervise(folder)

    def poll(self, name: str) -> JobStatus:
        folder = job_dir(name)
        # Read before the record: a supervisor that ends in between has recorded the end.
        supervised = control.supervised(folder)
        return JobStatus.from_json(recorded_document(folder, Supervised=supervised))

    def list(self, filters: ListFilters) -> Iterator[JobStatus]:
        for name in filters.names:
            yield self.poll(name)

    def stop(self, name: str, reason: str) -> None:
        control.request_stop(job_dir(name), reason)
        self.resume(name)

    def interrupt(self, name: str, fault: Fault) -> None:
        control.request_fault(job_dir(name), fault)

    def hold_sync(self, name: str, held: bool) -> None:
        control.hold_sync(job_dir(name), held)

    def resume(self, name: str) -> bool:
        if not self.poll(name).is_orphaned:
            return False
        supervise(job_dir(name))
        return True

    def download(self, name: str, into: Path) -> Artifacts:
        status = self.poll(name)
        addresses = {"model": status.model_uri, "output": status.output_uri}
        found = {what: artifacts.download(uri, into / what) for what, uri in addresses.items() if uri}
        return {what: count or 0 for what, count in found.items()}

    def pin_image(self, image: str, report: Report) -> str:
        from estiba_launch.targets.local.engine import Engine

        engine = Engine()
        engine.ensure_image(image, report)
        return engine.image_id(image)

    def _refuse_shared_checkpoints(self, request: dict[str, Any]) -> None:
        """Two jobs that sync to one address, or to one below the other, overwrite each other's checkpoints.

        Raises LaunchError naming the other job.
        """
        uri = request.get("CheckpointConfig", {}).get("S3Uri", "").rstrip("/")
        for name in directory.job_names() if uri else ():
            folder = directory.jobs_root() / name
            other = directory.read_json(folder / REQUEST, {}).get("CheckpointConfig", {}).get("S3Uri", "").rstrip("/")
            overlap = bool(other) and (f"{uri}/".startswith(f"{other}/") or f"{other}/".startswith(f"{uri}/"))
            if overlap and control.supervised(folder) and not self.poll(name).is_terminal:
                raise LaunchError(
                    f"{uri}: {name} is still running with these checkpoints; follow it with `estiba logs -f {name}`, "
                    f"end it with `estiba stop {name}`, or use another CheckpointConfig"
                )


def with_absolute_paths(request: dict[str, Any]) -> dict[str, Any]:
    """The request with absolute file:// addresses."""
    found = {uri for _, uri in uris(View(request)) if uri.startswith("file://")}

    def change(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: change(value) for name, value in node.items()}
        if isinstance(node, list):
            return [change(value) for value in node]
        return f"file://{contract.file_path(node)}" if isinstance(node, str) and node in found else node

    changed: dict[str, Any] = change(request)
    return changed


def supervise(folder: Path) -> None:
    """Start a supervisor that outlives this process, its terminal and its session."""
    package = Path(__file__).resolve().parents[3]
    engine = directory.read_target(folder).get("engine", {})
    environment = {name: value for name, value in os.environ.items() if not engine or name not in VARIABLES}
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / "supervisor.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "estiba_launch.targets.local.supervisor", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env={**environment, **engine, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
