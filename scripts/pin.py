"""Write the digests that the base-image tags in docker-bake.hcl point to today.

    make pin                  # AWS_REGION chooses the account registry's region

Asks each registry through `docker buildx imagetools inspect`; nothing is pulled. If a registry does not
answer, its pin stays unchanged and the reason is printed; the exit status is then 1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BAKE = Path(__file__).resolve().parent.parent / "docker-bake.hcl"
INSPECT_S = 60


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One base image of docker-bake.hcl."""

    slot: str
    """Prefix of its three variables: <slot>_REPOSITORY, _TAG and _DIGEST."""
    reference: str
    """The image: registry/repository:tag."""
    digest: str
    """The digest in the file; "" if it was never pinned."""


def default(text: str, variable: str) -> str:
    """The default of an HCL variable of `text`. Raises ValueError when there is none."""
    match = re.search(rf'variable "{variable}" {{ default = "([^"]*)" }}', text)
    if match is None:
        raise ValueError(f"{BAKE.name}: no variable {variable} with a default on one line")
    return match[1]


def pins(text: str, region: str) -> list[Pin]:
    """All pins of the file. A repository without a registry is in AWS's account registry in `region`."""
    slots = re.findall(r'variable "(\w+)_DIGEST"', text)
    result = []
    for slot in slots:
        repository = default(text, f"{slot}_REPOSITORY")
        if "/" not in repository:
            repository = f"{default(text, 'DLC_ACCOUNT')}.dkr.ecr.{region}.amazonaws.com/{repository}"
        result.append(
            Pin(
                slot=slot,
                reference=f"{repository}:{default(text, f'{slot}_TAG')}",
                digest=default(text, f"{slot}_DIGEST"),
            )
        )
    return result


def digest_of(reference: str) -> str:
    """The digest that a tag points to now. Raises OSError with the registry's message if there is none."""
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", reference]
    try:
        done = subprocess.run(command, text=True, capture_output=True, timeout=INSPECT_S)
    except subprocess.TimeoutExpired:
        raise OSError(f"no answer within {INSPECT_S} s") from None
    digest = done.stdout.strip()
    if done.returncode != 0 or not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise OSError((done.stderr or done.stdout).strip().removeprefix("ERROR: ") or "no digest in the answer")
    return digest


def with_digest(text: str, slot: str, digest: str) -> str:
    """`text` with one digest replaced."""
    return re.sub(rf'(variable "{slot}_DIGEST" {{ default = ")[^"]*', rf"\g<1>{digest}", text)


def main() -> int:
    """Resolve every pin, write the digests, and print what changed and what failed."""
    text = original = BAKE.read_text()
    failed = False
    for pin in pins(text, os.environ.get("AWS_REGION", "us-east-1")):
        try:
            digest = digest_of(pin.reference)
        except OSError as error:
            failed = True
            print(f"pin: {pin.reference}: left unchanged: {error}", file=sys.stderr)
            continue
        text = with_digest(text, pin.slot, digest)
        print(f"pin: {pin.reference}: {'unchanged' if digest == pin.digest else digest}")
    if text != original:
        BAKE.write_text(text)
    if failed:
        print(
            "pin: the account registry needs a login (aws ecr get-login-password | docker login); see buildspec.yml",
            file=sys.stderr,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
