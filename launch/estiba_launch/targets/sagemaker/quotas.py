"""Checks of the account's quotas against a job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from estiba_launch.jobs.check import Check, Requirements
from estiba_launch.jobs.s3 import aws_errors
from estiba_launch.targets.sagemaker.client import DENIED, code_of

LONGEST_RUN = "Longest run time for a training job"


def checks(needs: Requirements, client: Any) -> Iterator[Check]:
    """Hosts at once, hosts in warm pools, and the longest run."""
    wanted: dict[str, tuple[int, str]] = {}
    counts: Counter[str] = Counter()
    for kind, count in needs.instances:
        counts[kind] += count
    for kind, count in counts.items():
        wanted[f"{kind} for {'spot ' if needs.spot else ''}training job usage"] = count, ""
        if needs.keep_alive_s:
            wanted[f"{kind} for training warm pool usage"] = count, ""
    if needs.max_run_s:
        wanted[LONGEST_RUN] = needs.max_run_s, " s"
    if not wanted:
        return
    values: dict[str, float] = {}
    try:
        # Quotas that were never changed are only in the second list.
        for call in ("list_service_quotas", "list_aws_default_service_quotas"):
            if wanted.keys() - values.keys():
                pages = client.get_paginator(call).paginate(ServiceCode="sagemaker")
                values = {one["QuotaName"]: one["Value"] for page in pages for one in page["Quotas"]} | values
    except aws_errors() as error:
        missing = ", ".join(f"'{name}'" for name in wanted)
        why = "your login needs servicequotas:ListServiceQuotas" if code_of(error) in DENIED else "AWS did not answer"
        yield Check(name="aws quota", status="unknown", seen=f"{missing}: {str(error)[:120]}", remedy=why)
        return
    for name, (needed, unit) in wanted.items():
        yield _check(name, values.get(name), needed, unit)


def _check(name: str, value: float | None, needed: int, unit: str) -> Check:
    if value is None:
        seen = f"{name}: AWS lists no such quota in this region"
        return Check(name="aws quota", status="unknown", seen=seen, remedy="see whether the region has this type")
    seen = f"{name}: {value:g}{unit}, the job needs {needed}{unit}"
    more = f"ask for more: Service Quotas > Amazon SageMaker > '{name}'"
    remedy = f"lower MaxRuntimeInSeconds, or {more}" if name == LONGEST_RUN else more
    good = value >= needed
    return Check(name="aws quota", status="ok" if good else "fail", seen=seen, remedy="" if good else remedy)
