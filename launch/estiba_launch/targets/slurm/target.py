"""A Slurm cluster. `estiba plan` prints the batch file; `sbatch` submits it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request.jobfile import JobFile
from estiba_launch.targets.base import Capability, Submission, Target
from estiba_launch.targets.printed import with_notes
from estiba_launch.targets.slurm.script import batch_file


class SlurmTarget(Target):
    kind = "slurm"
    capabilities = frozenset()
    by_hand: ClassVar[Mapping[Capability, str]] = {
        Capability.SUBMIT: "`estiba plan JOB --target slurm | sbatch`",
        Capability.POLL: "`squeue --name NAME`",
        Capability.LIST: "`squeue --me`",
        Capability.LOGS: "`tail -f NAME-JOBID.log` on the cluster",
        Capability.STOP: "`scancel --name NAME`",
        Capability.INTERRUPT: "`scontrol requeue JOBID`, which is what a preemption looks like",
        Capability.RESUME: "`scontrol requeue JOBID`",
        Capability.DOWNLOAD: "`cp` from the folder hosts/ of the job's work folder",
    }

    def prepare(self, job: JobFile, options: SubmitOptions) -> Submission:
        return Submission(job=with_notes(job), options=options, script=batch_file(job, options))
