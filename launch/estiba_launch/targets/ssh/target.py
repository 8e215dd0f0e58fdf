"""Jobs on a remote host with a shell. Each runs there on its own; this machine records the last poll."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from estiba_launch.errors import HostError, LaunchError
from estiba_launch.jobs import directory, inputs
from estiba_launch.jobs.check import Check, Requirements
from estiba_launch.jobs.directory import REQUEST, TARGET, job_dir, read_json, read_target, write_json
from estiba_launch.jobs.logs import METRICS, JobLog, Metrics, copy_output
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.jobs.record import Record, enter, keep_status, new_document, recorded_document
from estiba_launch.jobs.status import JobStatus
from estiba_launch.request import contract
from estiba_launch.request.jobfile import JobFile
from estiba_launch.targets.base import Artifacts, Capability, ListFilters, Report, Submission, Target
from estiba_launch.targets.docker_command import STOP_S, network_of
from estiba_launch.targets.ssh import bootstrap, credentials, observe, provision
from estiba_launch.targets.ssh.connection import RemoteError, RemoteHost
from estiba_launch.targets.ssh.links import settle_script
from estiba_launch.targets.ssh.script import ME, START, USERS, WATCH, container_names, ssh_script, sync_name, work_dir
from estiba_launch.targets.ssh.script import REQUEST as REQUEST_THERE
from estiba_launch.targets.ssh.send import send_lines
from estiba_launch.targets.ssh.watch import watch_script

log = logging.getLogger("estiba_launch")
POLL_TIMEOUT_S = 60.0
PULL = ("-rt", "--partial")
"""rsync from the host. Follows no link on either machine."""


class SshTarget(Target):
    """A machine that the system's ssh can reach. Docker is installed where it is missing."""

    kind = "ssh"
    capabilities = frozenset(Capability) - {Capability.INTERRUPT}
    resumes_on_poll = True

    @property
    def host(self) -> RemoteHost:
        return RemoteHost(self.address)

    def prepare(self, job: JobFile, options: SubmitOptions) -> Submission:
        script = ssh_script(job, options.host, send_lines(job, options.host), watch_script(job))
        return Submission(job=job, options=options, script=script)

    def submit(self, submission: Submission, *, report: Report) -> None:
        host, job, request = self.host, submission.job, submission.request
        local = [channel for channel in contract.channels(request) if channel.uri.startswith("file://")]
        for channel in local:
            inputs.check(channel)
        environment, warnings = credentials.environment_of(job, submission.options.host.env_file)
        for warning in warnings:
            report(f"warning: {warning}")
        host.connect()
        store = request.get("CheckpointConfig", {}).get("S3Uri", "")
        equipment = bootstrap.bootstrap(host, report, needs_rsync=bool(local) or store.startswith("file://"))
        check_gpus(submission.options, equipment, report)
        provision.image(host, request["AlgorithmSpecification"]["TrainingImage"], report)
        work = work_dir(job.name)
        # What a broken transfer left behind is no job.
        clean = f"[ -e {work}/start.sh ] || rm -rf {work}"
        created = host.run(f"mkdir -p estiba/data estiba/jobs; {clean}; mkdir {work} {work}/data", check=False)
        if created.returncode:
            error = host.failed(f"making ~/{work}", created.stderr.strip()[:300])
            raise RemoteError(f"{error}; pass --set JOB_NAME=OTHER" if "exists" in str(error) else str(error))
        try:
            provision.data(host, job, report)
        except BaseException:
            # Not a job yet. The host keeps data already sent for the next try.
            self._try(f"rm -rf {work}")
            raise
        self._record(request, submission.options)
        sent = False
        try:
            send = f"cat > {work}/start.sh && : > {work}/start.lock"
            if store.startswith("file://"):
                send += f" && echo {job.name} > {provision.last_job_file(contract.file_path(store))}"
            host.run(send, input=submission.render())
            report(f"{job.name}: starting on {self}")
            sent = True
            host.run(f"sh {work}/start.sh {START}", input=environment, timeout_s=None, what="the start")
        except HostError as error:
            if sent and error.transient:
                report(f"{error}; {job.name} may be running, `estiba status {job.name}` asks again")
                return
            names = shlex.join([*container_names(job.name, request), sync_name(job.name)])
            self._try(f"docker rm --force {names}; docker network rm {network_of(job.name)}")
            if self._was_stopped(job.name):
                return
            document = self._document(job.name)
            enter(document, "Failed", f"could not be started: {error}")
            keep_status(JobStatus.from_json(document))
            raise

    def _was_stopped(self, name: str) -> bool:
        """Whether the start failed because the job was stopped, or its time was up, while data was downloaded."""
        with contextlib.suppress(HostError):
            return self.poll(name).is_terminal
        return False

    def _record(self, request: dict[str, Any], options: SubmitOptions) -> None:
        with directory.creating(request["TrainingJobName"]) as folder:
            write_json(folder / TARGET, {"target": str(self), "usd_per_h": options.usd_per_h})
            options.write(folder)
            Record.create(folder, request).begin_attempt([one.name for one in contract.hosts(request)])
            write_json(folder / REQUEST, request)

    def find(self, name: str, region: str | None = None) -> None:  # noqa: ARG002
        path = shlex.quote(f"{work_dir(name)}/{REQUEST_THERE}")
        found = self.host.run(f"cat {path}", check=False)
        if found.returncode or "/" in name:
            raise LaunchError(f"{name}: no such job on {self}; `estiba list --target {self}` shows those there are")
        self._record(json.loads(found.stdout), SubmitOptions())

    def _try(self, command: str) -> None:
        with contextlib.suppress(HostError):
            self.host.run(command, check=False)

    def _document(self, name: str, **extra: Any) -> dict[str, Any]:
        """The document on record, with the metrics that were read from the log."""
        folder = job_dir(name)
        usd_per_h = read_target(folder).get("usd_per_h")
        extra = {"Supervised": True, "Target": str(self), "UsdPerHour": usd_per_h, **extra}
        document = recorded_document(folder, **extra)
        document["FinalMetricDataList"] = read_json(folder / METRICS, [])
        return document

    def recorded(self, name: str, unreachable: str | None = None) -> JobStatus:
        extra = {"Unreachable": unreachable} if unreachable else {}
        return JobStatus.from_json(self._document(name, **extra))

    def poll(self, name: str) -> JobStatus:
        return self._poll([name])[name]

    def list(self, filters: ListFilters) -> Iterator[JobStatus]:
        if filters.account:
            newest = f"ls -t {work_dir('*')}/{REQUEST_THERE} 2>/dev/null | head -n {filters.limit}"
            show = 'while read -r file; do date -u -r "$file" +%Y-%m-%dT%H:%M:%SZ; cat "$file"; done'
            lines = self.host.run(f"{newest} | {show}").stdout.split("\n")
            jobs = {}
            for created, text in zip(lines[::2], lines[1::2], strict=False):
                document = {**new_document(json.loads(text)), "CreationTime": created}
                document["Estiba"] = {"Attempts": [{"Number": 1, "StartTime": created}], "Target": str(self)}
                jobs[document["TrainingJobName"]] = document
            yield from self._observe(jobs).values()
            return
        try:
            yield from self._poll(filters.names).values()
        except HostError as error:
            for name in filters.names:
                known = self.recorded(name)
                yield known if known.is_terminal else self.recorded(name, unreachable=str(error))

    def _poll(self, names: Iterable[str]) -> dict[str, JobStatus]:
        """Status of jobs. The host is asked once for all that have not ended."""
        return self._observe({name: self._document(name) for name in names})

    def _observe(self, documents: Mapping[str, dict[str, Any]]) -> dict[str, JobStatus]:
        statuses = {name: JobStatus.from_json(document) for name, document in documents.items()}
        running = [name for name, status in statuses.items() if not status.is_terminal]
        if running:
            asked = [documents[name] for name in running]
            script = observe.command(asked)
            text = self.host.run("sh", input=script, timeout_s=POLL_TIMEOUT_S, what="polling the jobs").stdout
            for name, seen in observe.parse(text, asked).items():
                document = observe.advance(documents[name], seen, str(self))
                document["Estiba"]["Supervised"] = seen.watched or not seen.containers or seen.ended
                statuses[name] = JobStatus.from_json(document)
        return statuses

    def finalize(self, status: JobStatus) -> JobStatus:
        for _ in self.logs(status.name, to_the_end=True):
            pass
        metrics = read_json(job_dir(status.name) / METRICS, [])
        return JobStatus.from_json({**status.document, "FinalMetricDataList": metrics})

    def copy_log(self, name: str, folder: Path) -> None:
        request = read_json(folder / REQUEST)
        hosts = contract.hosts(request)
        log = JobLog(folder, len(hosts) > 1)
        metrics = Metrics(request, partial(write_json, folder / METRICS))
        for host, container in zip(hosts, container_names(name, request), strict=True):

            def stream(since: float | None, container: str = container) -> Iterator[bytes]:
                words = ["docker", "logs", "--timestamps"]
                words += ["--since", f"{since:.6f}"] if since is not None else []
                yield from self.host.stream(
                    f"if docker inspect {container} >/dev/null 2>&1; then {shlex.join([*words, container])} 2>&1; "
                    f"else cat {work_dir(name)}/{container}.log 2>/dev/null; fi"
                )

            copy_output(host.name, folder / f"{host.name}.log", log, metrics, stream)
        metrics.flush()

    def stop(self, name: str, reason: str) -> None:
        request = read_json(job_dir(name) / REQUEST)
        names = shlex.join(container_names(name, request))
        # On a full disk the file is made, and stays empty.
        self.host.run(
            # The containers end, whatever became of the folder and its disk.
            f"{{ mkdir -p {work_dir(name)}; cd {work_dir(name)} && echo {shlex.quote(reason)} > stopped; }}; "
            f"{{ setsid nohup docker stop --time {STOP_S} {names} >/dev/null 2>&1 </dev/null & }}"
        )

    def resume(self, name: str) -> bool:
        if not self.poll(name).is_orphaned:
            return False
        self.host.run(f'work="$HOME/{work_dir(name)}"; {WATCH}')
        return True

    def download(self, name: str, into: Path) -> Artifacts:
        """Also brings checkpoints back to their own address when that is file://."""
        folder, host, work = job_dir(name), self.host, work_dir(name)
        request = read_json(folder / REQUEST)
        image = shlex.quote(request["AlgorithmSpecification"]["TrainingImage"])
        looked_up = host.run("sh", input=settle_script(request, work), check=False, timeout_s=None)
        for line in [*looked_up.stdout.splitlines(), *looked_up.stderr.splitlines()]:
            log.warning("%s: %s; not fetched", name, line)
        # Files made by containers belong to root, maybe closed to others. A full disk has no room for a container.
        host.run(
            f'[ "$(id -u)" = 0 ] || {{ work="$HOME/{work}"; cd "$work" || exit\n'
            '[ -z "$(find . ! -user "$(id -u)" -print -quit)" ] ||\n'
            'sudo -n chown -R "$(id -u):$(id -g)" . 2>/dev/null ||\n'
            f'{{ {USERS}\n{ME}\nown {image} -R "$me" /host; }}; }}',
            timeout_s=600,
            what="taking ownership of the files",
        )
        found: dict[str, int] = {}
        for what, source in (("model", "model"), ("output", "output/data")):
            place = into / what
            place.mkdir(parents=True, exist_ok=True)
            for index, one in enumerate(contract.hosts(request)):
                # Where two hosts wrote the same name, the first host's file is kept.
                how = ["--links", "--safe-links", *(["--ignore-existing"] if index else [])]
                host.rsync([*PULL, *how, f"{host.rsync_destination}:{work}/{one.name}/{source}/", f"{place}/"])
            found[what] = sum(1 for path in place.rglob("*") if path.is_symlink() or not path.is_dir())
        store = request.get("CheckpointConfig", {}).get("S3Uri", "")
        if store.startswith("file://"):
            place = contract.file_path(store)
            place.mkdir(parents=True, exist_ok=True)
            host.rsync([*PULL, "--no-links", f"{host.rsync_destination}:{work}/checkpoints/", f"{place}/"])
            host.run(f"touch {work}/{provision.FETCHED}", check=False)
        for _ in self.logs(name):
            pass
        return found

    def checks(self, needs: Requirements, *, network: bool) -> Iterable[Check]:  # noqa: ARG002
        for tool in ("ssh", "rsync"):
            path = shutil.which(tool)
            remedy = "" if path else f"install {tool} for --target ssh://... (apt install openssh-client rsync)"
            yield Check(name=tool, status="ok" if path else "warn", seen=path or "not found", remedy=remedy)


def check_gpus(options: SubmitOptions, found: bootstrap.Equipment, report: Report) -> None:
    """Raise LaunchError when GPUs were asked for and the host has none. The script checks again when it runs."""
    if not options.host.gpus or found.gpu_in_docker:
        return
    if not options.host.gpus_if_any:
        raise LaunchError(
            f"--gpus {options.host.gpus}: the host has {'a GPU that docker cannot use' if found.gpu else 'no GPU'}; "
            "see `nvidia-smi` there, or pass --gpus none"
        )
    report("the host has no GPU: the job runs on its CPU")
