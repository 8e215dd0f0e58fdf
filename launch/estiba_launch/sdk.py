"""Jobs from Python, with our argument names or those of the SageMaker SDK's estimators.

    from estiba_launch import launch_training_job

    job = launch_training_job(
        image_uri="estiba/embed:local",
        hyperparameters={"model": "/opt/ml/input/data/model"},
        channels={"dataset": "file://data", "model": "file://model"},
        output_path="file://runs",
        checkpoint_s3_uri="file://runs/checkpoints",
        use_spot=True,
    )
    job.wait()

`Estimator` takes the same arguments and starts its job at `fit`:

    Estimator(image_uri="estiba/embed:local", entry_point="train.py", source_dir="src").fit({"train": "file://data"})

The arguments become the CreateTrainingJob request that a job file holds, checked by the same rules. Progress goes to
the logger `estiba_launch` at INFO, arguments that are ignored at WARNING.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from estiba_launch.errors import JobFailed, LaunchError
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request import prices
from estiba_launch.request.address import TargetAddress
from estiba_launch.request.arguments import Channel, Channels, EstimatorArguments, canonical
from estiba_launch.request.build import build_job
from estiba_launch.request.estimate import estimate, refuse_over
from estiba_launch.request.options import HostOptions, read_options
from estiba_launch.targets import operations, registry
from estiba_launch.targets.base import Submission
from estiba_launch.targets.registry import parse

__all__ = ["Channel", "Estimator", "HostOptions", "Job", "SubmitOptions", "launch_training_job"]
log = logging.getLogger("estiba_launch")
SDK_LOCAL = ("local", "local_gpu")
"""The SDK's values of instance_type for a job on the user's own machine."""


@dataclass(frozen=True)
class Job:
    name: str
    target: TargetAddress
    request: Mapping[str, Any]
    """The CreateTrainingJob request."""

    def status(self) -> dict[str, Any]:
        """The job as DescribeTrainingJob returns it, plus our own fields under `Estiba`."""
        return operations.status(self.name).to_json()

    def wait(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Wait for the job to end and return its status. Raises JobFailed if it failed, LaunchError on a timeout."""
        status = operations.wait(self.name, timeout_s)
        if status.status == "Failed":
            raise JobFailed(f"{self.name}: {status.reason or 'failed'}; see `estiba logs {self.name}`")
        return status.to_json()

    def fit(self, inputs: Channels | None = None, wait: bool = True, logs: bool = True) -> None:
        """Wait for this job, as the guides' `estimator.fit(wait=True)` does. Never starts another one.

        Raises LaunchError for `inputs`, since the job already has its own, and JobFailed as `wait` does.
        """
        if inputs is not None:
            raise LaunchError(f"{self.name}: already started with its channels; call fit() without inputs")
        if wait and logs:
            for line in self.logs(follow=True):
                print(line, flush=True)
        if wait:
            self.wait()

    def logs(self, *, follow: bool = False) -> Iterator[str]:
        """Yield the log lines of all attempts; with `follow`, until the job ends."""
        yield from operations.log_lines(self.name, follow=follow)

    def stop(self) -> None:
        """Send TERM, then KILL after 120 s; return at once. Raises LaunchError when the job has ended."""
        operations.stop(self.name)

    def fetch(self, into: str | Path) -> dict[str, int]:
        """Unpack model and output into `into`/model and `into`/output. Returns the number of files of each."""
        return dict(operations.download(self.name, Path(into)))


def launch_training_job(
    *,
    target: str | None = None,
    region: str | None = None,
    options: SubmitOptions | None = None,
    fallback: str | None = None,
    max_cost_usd: float | None = None,
    wait: bool = False,
    **arguments: Unpack[EstimatorArguments],
) -> Job:
    """Start a training job and return it; with `wait`, after it has ended.

    `target` is `local`, `sagemaker` or `ssh://user@host[:port]`; the default is $ESTIBA_TARGET, else `local`. `region`
    is for SageMaker (default: AWS's own configuration); `options` say how a machine runs the job (default: on its GPUs,
    if any); `fallback="local"` runs it on this machine when AWS is unreachable or refuses; `Arguments` describes the
    rest. On SageMaker `role` may be a name. Raises InvalidJob with every problem at once, BudgetError for a job that
    may cost more than `max_cost_usd`, LaunchError when the job cannot be started, and with `wait` JobFailed.
    """
    job = _start(_Launch(target, region, options, fallback, max_cost_usd), arguments)
    if wait:
        job.wait()
    return job


class Estimator:
    """The arguments of a job that `fit` starts, like an estimator of the SageMaker SDK."""

    latest_training_job: Job | None = None
    """The job that `fit` started last."""

    def __init__(
        self,
        image_uri: str | None = None,
        role: str | None = None,
        /,
        *,
        target: str | None = None,
        region: str | None = None,
        options: SubmitOptions | None = None,
        fallback: str | None = None,
        max_cost_usd: float | None = None,
        **arguments: Unpack[EstimatorArguments],
    ) -> None:
        """`target`, `region`, `options`, `fallback` and `max_cost_usd` are those of `launch_training_job`.

        Raises LaunchError for an unknown or unsupported argument.
        """
        if image_uri is not None:
            arguments["image_uri"] = image_uri
        if role is not None:
            arguments["role"] = role
        canonical(arguments)
        self._arguments = arguments
        self._launch = _Launch(target, region, options, fallback, max_cost_usd)

    def plan(
        self,
        inputs: Channels | None = None,
        job_name: str | None = None,
        experiment_config: Mapping[str, str] | None = None,
    ) -> Submission:
        """What `fit` would submit: `.render()` for people, `.to_json()` for machines. Starts nothing."""
        return self._launch.prepare(parse(self._launch.target), self._with(inputs, job_name, experiment_config))

    def _with(
        self, inputs: Channels | None, job_name: str | None, experiment_config: Mapping[str, str] | None
    ) -> EstimatorArguments:
        overrides = {"inputs": inputs, "job_name": job_name, "experiment_config": experiment_config}
        merged: Any = self._arguments | {name: value for name, value in overrides.items() if value is not None}
        return merged  # type: ignore[no-any-return]

    def fit(
        self,
        inputs: Channels | None = None,
        wait: bool = True,
        logs: bool = True,
        job_name: str | None = None,
        experiment_config: Mapping[str, str] | None = None,
    ) -> None:
        """Start the job; with `wait`, return when it has ended; with `logs`, print its log meanwhile.

        While a job of this estimator runs, `fit` only waits for it and starts no second one. Raises InvalidJob,
        LaunchError and JobFailed as `launch_training_job` does.
        """
        job = self.latest_training_job
        if job is not None and not operations.status(job.name).is_terminal:
            log.warning("%s: still running; fit waits for it and starts no second job", job.name)
        else:
            job = self.latest_training_job = _start(self._launch, self._with(inputs, job_name, experiment_config))
        job.fit(wait=wait, logs=logs)

    @property
    def model_data(self) -> str:
        """Address of the last job's model. Raises LaunchError before there is one."""
        if self.latest_training_job is None:
            raise LaunchError("model_data: no job was started; call fit() first")
        uri = operations.status(self.latest_training_job.name).model_uri
        if uri is None:
            raise LaunchError(f"model_data: {self.latest_training_job.name} has no model yet; wait for the job to end")
        return uri


@dataclass(frozen=True)
class _Launch:
    """Where and how a job is started."""

    given_target: str | None
    region: str | None
    options: SubmitOptions | None
    fallback: str | None
    max_cost_usd: float | None

    @property
    def target(self) -> str:
        return self.given_target or os.environ.get("ESTIBA_TARGET") or "local"

    def prepare(self, address: TargetAddress, arguments: EstimatorArguments) -> Submission:
        if arguments.get("instance_type") in SDK_LOCAL and not address.on_aws:
            arguments = arguments.copy()
            del arguments["instance_type"]
        target = registry.target_of(address)
        job = build_job(
            address,
            resolve_role=functools.partial(target.resolve_role, region=self.region),
            default_role=functools.partial(target.default_role, region=self.region),
            report=log.warning,
            **arguments,
        )
        options = self.options
        if options is None:
            remote = not address.runs_here and not address.on_aws
            options = SubmitOptions(host=read_options(remote=remote, env_file=os.environ.get("ESTIBA_ENV_FILE")))
        submission = operations.prepare(job, replace(options, region=self.region or options.region))
        for note in submission.job.notes:
            log.warning(note)
        return submission

    def refuse_over_budget(self, submission: Submission) -> None:
        if self.max_cost_usd is not None:
            region, usd_per_h = submission.options.region, submission.options.usd_per_h
            if submission.target.on_aws:
                region = prices.region_of(submission.request, region)
            table = prices.load(region or "us-east-1")
            refuse_over(estimate(submission.job, table, region=region, usd_per_h=usd_per_h), self.max_cost_usd)


def _start(launch: _Launch, arguments: EstimatorArguments) -> Job:
    def start(address: TargetAddress) -> Job:
        submission = launch.prepare(address, arguments)
        launch.refuse_over_budget(submission)
        operations.start(submission, log.info)
        return Job(submission.name, submission.target, submission.request)

    return operations.with_fallback(start, launch.target, launch.fallback, log.warning)
