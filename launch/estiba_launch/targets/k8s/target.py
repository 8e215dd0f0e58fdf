"""A Kubernetes cluster. `estiba plan` prints the manifest; `kubectl apply` submits it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.request.jobfile import JobFile
from estiba_launch.targets.base import Capability, Submission, Target
from estiba_launch.targets.k8s.manifest import render
from estiba_launch.targets.printed import with_notes


class KubernetesTarget(Target):
    kind = "k8s"
    capabilities = frozenset()
    by_hand: ClassVar[Mapping[Capability, str]] = {
        Capability.SUBMIT: "`estiba plan JOB --target k8s | kubectl apply -f -`",
        Capability.POLL: "`kubectl get job NAME`",
        Capability.LIST: "`kubectl get jobs -l app.kubernetes.io/managed-by=estiba`",
        Capability.LOGS: "`kubectl logs -f --prefix -l batch.kubernetes.io/job-name=NAME`",
        Capability.STOP: "`kubectl delete job NAME`",
        Capability.INTERRUPT: "`kubectl delete pod NAME-0-xxxxx`, which is what a lost node looks like",
        Capability.RESUME: "`kubectl apply` again",
        Capability.DOWNLOAD: "`aws s3 sync` from the S3OutputPath",
    }

    def prepare(self, job: JobFile, options: SubmitOptions) -> Submission:
        return Submission(job=with_notes(job), options=options, manifest=render(job, options))
