"""Links to the AWS web console of each partition."""

from __future__ import annotations

import functools
from urllib.parse import quote

from estiba_launch.targets.sagemaker.logs import GROUP

HOSTS = {
    "aws": "console.aws.amazon.com",
    "aws-cn": "console.amazonaws.cn",
    "aws-us-gov": "console.amazonaws-us-gov.com",
    "aws-eusc": "console.amazonaws-eusc.eu",
}


def links(name: str, region: str, output_path: str | None) -> dict[str, str]:
    """Where a browser shows the job, its log and its output; empty in a partition without a public console."""
    host = HOSTS.get(_partition(region))
    if host is None:
        return {}
    base = f"https://{region}.{host}"
    found = {
        "job": f"{base}/sagemaker/home?region={region}#/jobs/{name}",
        "logs": f"{base}/cloudwatch/home?region={region}#logsV2:log-groups/log-group/{_twice(GROUP)}"
        f"{_twice('?logStreamNameFilter=')}{_twice(f'{name}/')}",
    }
    if output_path:
        bucket, _, prefix = output_path.removeprefix("s3://").partition("/")
        folder = f"{prefix.rstrip('/')}/{name}/".lstrip("/")
        found["output"] = f"{base}/s3/buckets/{quote(bucket, safe='')}?region={region}&prefix={quote(folder)}"
    return found


@functools.cache
def _partition(region: str) -> str:
    # Cached: each session reads its data files again, and a listing asks for every job.
    import botocore.session
    from botocore.exceptions import UnknownRegionError

    try:
        return str(botocore.session.get_session().get_partition_for_region(region))
    except UnknownRegionError:
        return "aws"


def _twice(text: str) -> str:
    """Text as CloudWatch's page expects it after the #: percent signs written `$`, slashes encoded twice."""
    return quote(quote(text, safe="?=")).replace("%3F", "$3F").replace("%3D", "$3D").replace("%25", "$25")
