"""Rules about the image, its metrics, and who may run it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..errors import Problem
from ..target import Target
from .parts import Request, part, parts, twice

ECR_IMAGE = re.compile(
    r"\d{12}\.dkr\.ecr(-fips)?\.[a-z0-9-]+\.(amazonaws\.com(\.cn)?|on\.aws)/[a-z0-9._/-]+([:@][\w.:-]+)?"
)
IMAGE = re.compile(
    r"(?:[A-Za-z0-9.-]+(?::\d+)?/)?[a-z0-9]+(?:(?:[._]|__|-+|/)[a-z0-9]+)*(?::\w[\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
PLACEHOLDER_ACCOUNTS = ("000000000000", "111122223333", "123456789012")
PROFILING_INTERVALS_MS = (100, 200, 500, 1000, 5000, 60_000)


def image(request: Request, target: Target) -> Iterator[Problem]:
    spec = part(request, "AlgorithmSpecification")
    at = "AlgorithmSpecification"
    if not spec and not request.get("ServerlessJobConfig"):
        yield Problem(field=at, rule="required and missing", remedy="add TrainingImage and TrainingInputMode under it")
        return
    uri, name = spec.get("TrainingImage"), spec.get("AlgorithmName")
    if uri and name:
        yield Problem(
            field=f"{at}.AlgorithmName", value=name, rule="not together with TrainingImage", remedy="remove one of them"
        )
    if spec and not uri and not name:
        yield Problem(field=f"{at}.TrainingImage", rule="required and missing", remedy="name the image to run")
    if name and not target.is_sagemaker:
        yield Problem(
            field=f"{at}.AlgorithmName",
            value=name,
            rule=f"target {target.kind} runs images",
            remedy="use TrainingImage",
        )
    access = part(spec, "TrainingImageConfig").get("TrainingRepositoryAccessMode")
    if uri and not IMAGE.fullmatch(uri):
        yield Problem(
            field=f"{at}.TrainingImage",
            value=uri,
            rule="not an image reference",
            remedy="write [REGISTRY/]NAME[:TAG][@sha256:DIGEST], the name in lower case",
        )
    elif uri and target.is_sagemaker and access != "Vpc" and not ECR_IMAGE.fullmatch(uri):
        yield Problem(
            field=f"{at}.TrainingImage",
            value=uri,
            rule="SageMaker pulls from a private ECR repository",
            remedy="push it (make push) and give ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG",
        )
    auth = f"{at}.TrainingImageConfig.TrainingRepositoryAuthConfig"
    if access == "Vpc" and target.is_sagemaker and not request.get("VpcConfig"):
        yield Problem(
            field="VpcConfig", rule="required with TrainingRepositoryAccessMode Vpc", remedy="add subnets and groups"
        )
    if access == "Platform" and part(spec, "TrainingImageConfig").get("TrainingRepositoryAuthConfig"):
        yield Problem(field=auth, rule="only with TrainingRepositoryAccessMode Vpc", remedy="remove it")


def metrics(request: Request, _target: Target) -> Iterator[Problem]:
    definitions = parts(part(request, "AlgorithmSpecification"), "MetricDefinitions")
    at = "AlgorithmSpecification.MetricDefinitions"
    for name in twice([d.get("Name") for d in definitions]):
        yield Problem(field=at, value=name, rule="each metric name once", remedy="rename one of them")
    for index, definition in enumerate(definitions):
        regex = definition.get("Regex")
        if not isinstance(regex, str):
            continue
        field = f"{at}[{index}].Regex"
        try:
            groups = re.compile(regex).groups
        except re.error as error:
            yield Problem(field=field, value=regex, rule=f"not a regular expression ({error})", remedy="correct it")
            continue
        if groups == 0:
            yield Problem(
                field=field,
                value=regex,
                rule="must capture the number",
                remedy="put ( ) around it, as in loss=([0-9.]+)",
            )


def role(request: Request, target: Target) -> Iterator[Problem]:
    arn = request.get("RoleArn")
    if target.is_sagemaker and isinstance(arn, str) and any(f"::{account}:" in arn for account in PLACEHOLDER_ACCOUNTS):
        yield Problem(
            field="RoleArn",
            value=arn,
            rule="a documentation account, not yours",
            remedy="give your role: aws iam get-role --role-name NAME --query Role.Arn",
        )


def tags(request: Request, _target: Target) -> Iterator[Problem]:
    all_tags = parts(request, "Tags")
    for key in twice([tag.get("Key") for tag in all_tags]):
        yield Problem(field="Tags", value=key, rule="each Key once", remedy="remove one of them")
    for index, tag in enumerate(all_tags):
        if str(tag.get("Key", "")).lower().startswith("aws:"):
            yield Problem(field=f"Tags[{index}].Key", value=tag["Key"], rule="aws: is reserved", remedy="rename it")


def profiler(request: Request, _target: Target) -> Iterator[Problem]:
    config = part(request, "ProfilerConfig")
    interval = config.get("ProfilingIntervalInMilliseconds")
    if interval is not None and interval not in PROFILING_INTERVALS_MS:
        yield Problem(
            field="ProfilerConfig.ProfilingIntervalInMilliseconds",
            value=interval,
            rule=f"one of {', '.join(map(str, PROFILING_INTERVALS_MS))}",
            remedy="use one of them",
        )
    if config.get("DisableProfiler") and request.get("ProfilerRuleConfigurations"):
        yield Problem(
            field="ProfilerRuleConfigurations",
            rule="not with ProfilerConfig.DisableProfiler",
            remedy="remove one of them",
        )


def serverless(request: Request, _target: Target) -> Iterator[Problem]:
    if "ServerlessJobConfig" in request:
        yield Problem(
            field="ServerlessJobConfig",
            rule="serverless jobs run AWS's recipes, not an image",
            remedy="remove it and give AlgorithmSpecification.TrainingImage",
        )
