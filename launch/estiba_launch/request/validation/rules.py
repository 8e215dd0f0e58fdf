"""What CreateTrainingJob refuses beyond the service model: rules between fields, and a few limits.

Sources: the API reference's member descriptions (in botocore 1.44) and, where noted, Estiba's own rules. A rule
ignores missing and mistyped parts, which the walk of the model reports.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from estiba_launch.request.address import TargetAddress
from estiba_launch.request.contract import DEFAULT_MAX_RUNTIME_S, metric_pattern
from estiba_launch.request.forecast import loss_without_saving
from estiba_launch.request.validation.view import Finding, View

MAX_RUNTIME_S = 28 * 86_400
PROFILING_INTERVALS_MS = (100, 200, 500, 1000, 5000, 60_000)
PLACEHOLDER_ACCOUNTS = ("000000000000", "111122223333", "123456789012")
ECR_IMAGE = re.compile(
    r"\d{12}\.dkr\.ecr(-fips)?\.[a-z0-9-]+\.(amazonaws\.com(\.cn)?|on\.aws)/[a-z0-9._/-]+([:@][\w.:-]+)?"
)
IMAGE = re.compile(
    r"(?:[A-Za-z0-9.-]+(?::\d+)?/)?[a-z0-9]+(?:(?:[._]|__|-+|/)[a-z0-9]+)*(?::\w[\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
# Families without NVMe disks must say how big their EBS volume is.
EBS_ONLY = re.compile(r"ml\.(m4|m5|m6i|m7i|c4|c5|c5n|c6i|c7i|r5|r7i|t3|p2|p3)\.")
NVME = re.compile(r"ml\.(g4dn|g5|g6|g6e|p4d|p4de|p5|p5e|p5en|trn1)\.")


Rule = tuple[str, Callable[[View, bool], Any], str, str]
"""(field, broken, rule, remedy); `broken` takes the request and whether AWS runs the job."""


def _spot(r: View) -> Any:
    return r("EnableManagedSpotTraining")


A, R, S = "AlgorithmSpecification", "ResourceConfig", "StoppingCondition"
TABLE: tuple[Rule, ...] = (
    (A, lambda r, _: not r(A) and not r("ServerlessJobConfig"),
         "required and missing", "add TrainingImage and TrainingInputMode under it"),
    (f"{A}.TrainingImage", lambda r, _: r(A) and not r(f"{A}.TrainingImage") and not r(f"{A}.AlgorithmName"),
         "required and missing", "name the image to run"),
    (f"{A}.AlgorithmName", lambda r, _: r(f"{A}.TrainingImage") and r(f"{A}.AlgorithmName"),
         "not together with TrainingImage", "remove one of them"),
    (f"{A}.AlgorithmName", lambda r, on_aws: r(f"{A}.AlgorithmName") and not on_aws,
         "AWS's algorithms run only on SageMaker", "use TrainingImage"),
    (f"{A}.TrainingImage", lambda r, _: r(f"{A}.TrainingImage") and not IMAGE.fullmatch(r(f"{A}.TrainingImage")),
         "not an image reference", "write [REGISTRY/]NAME[:TAG][@sha256:DIGEST], the name in lower case"),
    (f"{A}.TrainingImage", lambda r, on_aws: on_aws and _outside_ecr(r),
         "SageMaker pulls from a private ECR repository",
         "push it (make push) and use ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG"),
    ("VpcConfig", lambda r, on_aws: on_aws and _access_mode(r) == "Vpc" and not r("VpcConfig"),
         "required with TrainingRepositoryAccessMode Vpc", "add subnets and security groups"),
    (f"{A}.TrainingImageConfig.TrainingRepositoryAuthConfig",
         lambda r, _: _access_mode(r) == "Platform" and r(f"{A}.TrainingImageConfig.TrainingRepositoryAuthConfig"),
         "only with TrainingRepositoryAccessMode Vpc", "remove it"),
    ("RoleArn", lambda r, on_aws: on_aws and any(f"::{one}:" in str(r("RoleArn")) for one in PLACEHOLDER_ACCOUNTS),
         "an account from AWS's documentation", "use your role: aws iam get-role --role-name NAME --query Role.Arn"),
    ("ProfilerConfig.ProfilingIntervalInMilliseconds",
         lambda r, _: r("ProfilerConfig.ProfilingIntervalInMilliseconds") not in (None, *PROFILING_INTERVALS_MS),
         f"one of {', '.join(map(str, PROFILING_INTERVALS_MS))}", "use one of them"),
    ("ProfilerRuleConfigurations",
         lambda r, _: r("ProfilerConfig.DisableProfiler") and r("ProfilerRuleConfigurations"),
         "not with ProfilerConfig.DisableProfiler", "remove one of them"),
    ("ServerlessJobConfig", lambda r, _: r("ServerlessJobConfig") is not None,
         "serverless jobs run AWS's recipes, not an image", f"remove it and set {A}.TrainingImage"),
    (R, lambda r, _: not r(R) and not r("ServerlessJobConfig"),
         "required and missing", "add InstanceType, InstanceCount, VolumeSizeInGB"),
    (f"{R}.InstanceType", lambda r, _: _one_kind_of_host(r) and r(f"{R}.InstanceType") is None,
         "required and missing", "add it"),
    (f"{R}.InstanceCount", lambda r, _: _one_kind_of_host(r) and r(f"{R}.InstanceCount") is None,
         "required and missing", "add it"),
    (f"{R}.InstanceGroups",
         lambda r, _: r(f"{R}.InstanceGroups") and (r(f"{R}.InstanceType") or r(f"{R}.InstanceCount") is not None),
         "not together with InstanceType and InstanceCount", "keep one form"),
    (f"{R}.InstancePreferences",
         lambda r, _: r(f"{R}.InstancePreferences") and (r(f"{R}.InstanceGroups") or r(f"{R}.InstanceType")),
         "not together with InstanceType or InstanceGroups", "keep one form"),
    (f"{R}.InstancePreferences", lambda r, on_aws: on_aws and r(f"{R}.InstancePreferences") and _spot(r),
         "not with managed spot training, as preferences run on-demand",
         "set EnableManagedSpotTraining: false, or use InstanceType"),
    (f"{R}.InstancePlacementConfig",
         lambda r, _: r(f"{R}.InstancePreferences") and r(f"{R}.InstancePlacementConfig"),
         "not together with InstancePreferences", "remove it"),
    (f"{R}.InstanceCount",
         lambda r, _: r(f"{R}.InstanceCount") is not None and any(_preferred_counts(r)),
         "counted twice, here and in InstancePreferences", "keep it here or on every preference"),
    (f"{R}.InstancePreferences",
         lambda r, _: r(f"{R}.InstanceCount") is None and not all(_preferred_counts(r)),
         "InstanceCount on every preference, or once in ResourceConfig", "add what is missing"),
    (f"{R}.InstancePreferences", lambda r, on_aws: r(f"{R}.InstancePreferences") and not on_aws,
         "only SageMaker can choose an instance type", "use InstanceType"),
    *((f"{R}.{name}", lambda r, _, name=name: r(f"{R}.{name}") is not None,
          "read-only: AWS returns it for a job that it has started, and accepts it in no request", "remove it")
         for name in ("SelectedInstanceType", "SelectedInstanceCount")),
    (f"{R}.KeepAlivePeriodInSeconds", lambda r, _: r(f"{R}.KeepAlivePeriodInSeconds") and _spot(r),
         "not with managed spot training", "remove it or set EnableManagedSpotTraining: false"),
    (S, lambda r, _: r(S) is None and not r("ServerlessJobConfig"),
         "required and missing", "add MaxRuntimeInSeconds, which limits the cost"),
    (f"{S}.MaxRuntimeInSeconds", lambda r, _: (r(f"{S}.MaxRuntimeInSeconds") or 0) > MAX_RUNTIME_S,
         f"at most {MAX_RUNTIME_S} (28 days)", "shorten it; a later job can resume from the checkpoint"),
    (f"{S}.MaxWaitTimeInSeconds", lambda r, _: r(f"{S}.MaxWaitTimeInSeconds") is not None and not _spot(r),
         "only with managed spot training", "remove it or set EnableManagedSpotTraining: true"),
    (f"{S}.MaxWaitTimeInSeconds", lambda r, _: r(f"{S}.MaxWaitTimeInSeconds") is None and _spot(r),
         "required with managed spot training", "set it to MaxRuntimeInSeconds or more"),
)  # fmt: skip


def _preferred_counts(r: View) -> list[bool]:
    """Whether each of InstancePreferences has its own count."""
    return [one("InstanceCount") is not None for one in r.each(f"{R}.InstancePreferences")]


def _access_mode(r: View) -> Any:
    return r(f"{A}.TrainingImageConfig.TrainingRepositoryAccessMode")


def _outside_ecr(r: View) -> bool:
    uri = r(f"{A}.TrainingImage")
    return bool(uri and IMAGE.fullmatch(uri) and _access_mode(r) != "Vpc" and not ECR_IMAGE.fullmatch(uri))


def _one_kind_of_host(r: View) -> bool:
    return bool(r(R) and not r(f"{R}.InstanceGroups") and not r(f"{R}.InstancePreferences"))


def find(request: View, target: TargetAddress) -> Iterator[Finding]:
    """Every broken rule except those about data."""
    for field, broken, rule, remedy in TABLE:
        if broken(request, target.on_aws):
            value = request(field)
            yield field, None if isinstance(value, dict | list) else value, rule, remedy
    for path, name in (
        (f"{A}.MetricDefinitions", "Name"),
        (f"{R}.InstanceGroups", "InstanceGroupName"),
        (f"{R}.InstancePreferences", "InstanceType"),
        ("InputDataConfig", "ChannelName"),
        ("Tags", "Key"),
    ):
        counts = Counter(one(name) for one in request.each(path))
        for value in (value for value, count in counts.items() if count > 1):
            yield path, value, f"each {name} once", "rename or remove one of them"
    yield from _metrics(request)
    yield from _instances(request)
    yield from _waiting(request)
    yield from _node_number(request)
    for tag in request.each("Tags"):
        if str(tag("Key")).lower().startswith("aws:"):
            yield tag.field("Key"), tag("Key"), "aws: is reserved", "rename it"


def _metrics(request: View) -> Iterator[Finding]:
    for metric in request.each(f"{A}.MetricDefinitions"):
        regex = metric("Regex")
        try:
            if regex is not None and not metric_pattern(regex).groups:
                yield metric.field("Regex"), regex, "must capture the number", "put ( ) around it, as in loss=([0-9.]+)"
        except (re.error, OverflowError, RecursionError) as error:
            yield metric.field("Regex"), regex, f"not a regular expression ({error})", "correct it"


def _instances(request: View) -> Iterator[Finding]:
    """Counts, disks and their keys, for a single kind of host, each group and each preference."""
    size, key = request(f"{R}.VolumeSizeInGB"), request(f"{R}.VolumeKmsKeyId")
    several = [*request.each(f"{R}.InstanceGroups"), *request.each(f"{R}.InstancePreferences")]
    for at in [View(request(R), R), *several]:
        kind = str(at("InstanceType"))
        if at("InstanceCount") == 0:
            yield at.field("InstanceCount"), 0, "at least 1", "set it to 1 or more"
        if size == 0 or (size is None and EBS_ONLY.match(kind)):
            rule = f"at least 1 GB; {kind} has no local disk" if EBS_ONLY.match(kind) else "at least 1 GB"
            yield f"{R}.VolumeSizeInGB", size, rule, "set it, for example to 30"
        if key and NVME.match(kind):
            yield f"{R}.VolumeKmsKeyId", key, f"not with {kind}, whose local disk is encrypted in hardware", "remove it"


def _node_number(request: View) -> Iterator[Finding]:
    """Scripts in the style of AWS's samples read the number of hosts from NODE_NUMBER and wait for as many."""
    text = request("Environment.NODE_NUMBER")
    groups = request.each(f"{R}.InstanceGroups")
    counts = [one("InstanceCount") for one in groups] if groups else [request(f"{R}.InstanceCount")]
    if text is None or not all(isinstance(count, int) for count in counts) or str(text).strip() == str(sum(counts)):
        return
    remedy = f"set it to {sum(counts)}, or change the count"
    where = "InstanceGroups" if groups else "InstanceCount"
    yield "Environment.NODE_NUMBER", text, f"the job has {sum(counts)} hosts ({R}.{where})", remedy


def _waiting(request: View) -> Iterator[Finding]:
    """Managed spot: the wait must cover the run, and checkpoints are required."""
    if not request("EnableManagedSpotTraining"):
        return
    run, wait = request(f"{S}.MaxRuntimeInSeconds"), request(f"{S}.MaxWaitTimeInSeconds")
    limit_s = DEFAULT_MAX_RUNTIME_S if run is None else run
    if wait is not None and wait < limit_s:
        rule = f"at least MaxRuntimeInSeconds ({limit_s}{', its default' if run is None else ''})"
        remedy = f"raise it to {limit_s} or more; it includes waiting and running"
        yield f"{S}.MaxWaitTimeInSeconds", wait, rule, remedy
    if not request("CheckpointConfig"):
        rule = f"spot without a checkpoint location: {loss_without_saving(limit_s)}"
        remedy = "add CheckpointConfig with an S3Uri (checkpoints are restored from it) or turn spot off"
        yield "CheckpointConfig", None, rule, remedy
