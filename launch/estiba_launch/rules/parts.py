"""Looking into a request that may lack any part of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import Problem
from ..target import Target

Request = dict[str, Any]
Rule = Callable[[Request, Target], Iterator[Problem]]


def part(request: Request, name: str) -> dict[str, Any]:
    value = request.get(name)
    return value if isinstance(value, dict) else {}


def parts(request: Request, name: str) -> list[dict[str, Any]]:
    value = request.get(name)
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def twice(values: list[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def s3_uris(request: Request) -> Iterator[tuple[str, str]]:
    """(field, address) of every place in the request where data is read or written."""
    for index, channel in enumerate(parts(request, "InputDataConfig")):
        uri = part(part(channel, "DataSource"), "S3DataSource").get("S3Uri")
        if isinstance(uri, str):
            yield f"InputDataConfig[{index}].DataSource.S3DataSource.S3Uri", uri
    for block, member in (
        ("OutputDataConfig", "S3OutputPath"),
        ("CheckpointConfig", "S3Uri"),
        ("DebugHookConfig", "S3OutputPath"),
        ("TensorBoardOutputConfig", "S3OutputPath"),
        ("ProfilerConfig", "S3OutputPath"),
    ):
        uri = part(request, block).get(member)
        if isinstance(uri, str):
            yield f"{block}.{member}", uri
