"""Read a request in which any part may be missing or have the wrong type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Finding = tuple[str, Any, str, str]
"""(field, value, rule, remedy) of a broken rule."""


class View:
    """A request or a part of one, read by path: `view("DataSource.S3DataSource")` is None if a part is missing."""

    def __init__(self, node: Any, path: str = "") -> None:
        self._node = node
        self.path = path
        """The path of this part in the request, for messages."""

    def __call__(self, path: str) -> Any:
        node = self._node
        for name in path.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    def each(self, path: str) -> list[View]:
        """The mappings of the list at `path`, each with its own path."""
        parent, found = self.field(path), self(path)
        if not isinstance(found, list):
            return []
        return [View(one, f"{parent}[{i}]") for i, one in enumerate(found) if isinstance(one, dict)]

    def field(self, path: str) -> str:
        """`path` below this part, for messages."""
        return f"{self.path}.{path}" if self.path else path


def uris(request: View) -> Iterator[tuple[str, str]]:
    """(field, address) of everything that the job reads or writes."""
    places = [(channel, "DataSource.S3DataSource.S3Uri") for channel in request.each("InputDataConfig")]
    blocks = ("OutputDataConfig", "DebugHookConfig", "TensorBoardOutputConfig", "ProfilerConfig")
    places += [(request, "CheckpointConfig.S3Uri"), *((request, f"{block}.S3OutputPath") for block in blocks)]
    for place, path in places:
        if isinstance(place(path), str):
            yield place.field(path), place(path)
    for path in ("Environment.SAGEMAKER_SUBMIT_DIRECTORY", "HyperParameters.sagemaker_submit_directory"):
        # Often a path in the container.
        if "://" in str(request(path)):
            yield path, request(path)
