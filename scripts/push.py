"""Push images to their registry, and list the URI and digest of each.

    python scripts/push.py ACCOUNT.dkr.ecr.REGION.amazonaws.com/estiba/embed:0.1.0 ...

A tag that already holds the same image is skipped, so a push to a registry with immutable tags can be repeated. A
failed push does not stop the others. Each pushed manifest is read back, since SageMaker refuses an image index.

stdout: "URI@DIGEST pushed" or "URI@DIGEST unchanged" for each image. Exit status 1 if any push failed.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LOGIN = "log in: aws ecr get-login-password | docker login --username AWS --password-stdin {host}"
REMEDIES = {
    "immutable": "the tag holds another image and cannot be changed; raise the number in the file VERSION",
    "no basic auth credentials": LOGIN,
    "authorization token has expired": LOGIN,
    "does not exist in the registry": "create it: aws ecr create-repository --repository-name {repository}",
}
"""Part of a registry's message -> what to do."""


class PushError(Exception):
    """An image was not pushed, or not as SageMaker needs it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a tag points to in its registry."""

    digest: str
    content: dict[str, Any]

    def is_index(self) -> bool:
        return "manifests" in self.content

    def holds(self, image_id: str) -> bool:
        """An engine's image ID is the digest of the config, or with the containerd image store, of the manifest."""
        return not self.is_index() and image_id in (self.digest, self.content["config"]["digest"])


def docker(*arguments: str) -> bytes:
    """The output of a docker command. Raises PushError with its last line of error."""
    done = subprocess.run(["docker", *arguments], capture_output=True)
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise PushError(lines[-1].removeprefix("ERROR: "))
    return done.stdout


def manifest_of(reference: str) -> Manifest:
    """Raises PushError if the registry does not have the tag."""
    raw = docker("buildx", "imagetools", "inspect", "--raw", reference)
    return Manifest(digest=f"sha256:{hashlib.sha256(raw).hexdigest()}", content=json.loads(raw))


def push(reference: str) -> tuple[str, bool]:
    """Push one image. Returns its digest, and whether anything was sent."""
    image_id = docker("image", "inspect", "--format", "{{.Id}}", reference).decode().strip()
    try:
        there = manifest_of(reference)
    except PushError:
        there = None  # not pushed yet; if the registry does not answer, the push says why
    if there and there.holds(image_id):
        return there.digest, False
    docker("push", "--quiet", reference)
    pushed = manifest_of(reference)
    if pushed.is_index():
        raise PushError(
            "the registry holds an image index, which SageMaker refuses; `make build` builds without attestations"
        )
    return pushed.digest, True


def remedy_for(message: str, reference: str) -> str:
    host, _, path = reference.partition("/")
    found = [text for part, text in REMEDIES.items() if part in message]
    return f"; {found[0].format(host=host, repository=path.rpartition(':')[0])}" if found else ""


def main(references: Sequence[str]) -> int:
    listing, failed = [], 0
    for reference in references:
        print(f"push: {reference}", file=sys.stderr, flush=True)
        try:
            digest, was_sent = push(reference)
        except PushError as error:
            failed += 1
            print(f"push: {reference}: {error}{remedy_for(str(error), reference)}", file=sys.stderr, flush=True)
            continue
        listing.append(f"{reference}@{digest} {'pushed' if was_sent else 'unchanged'}")
    for line in listing:
        print(line)
    if failed:
        print(f"push: {failed} of {len(references)} failed (the reasons are above)", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
