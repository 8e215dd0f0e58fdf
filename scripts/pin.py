"""Write the digests that the base-image tags in docker-bake.hcl stand for today.

    make pin                  # AWS_REGION chooses the account registry's region

Asks each registry through `docker buildx imagetools inspect`; nothing is pulled. A registry that does not answer leaves
its pin as it is, with the reason; exit 1 if any did not.
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
    """What to ask for: registry/repository:tag."""
    digest: str
    """What the file says now; "" when it was never pinned."""


def default(text: str, variable: str) -> str:
    """The default of an HCL variable of `text`. Raises ValueError when there is none."""
    found = re.search(rf'variable "{variable}" {{ default = "([^"]*)" }}', text)
    if found is None:
        raise ValueError(f"{BAKE.name}: no variable {variable} with a default on one line")
    return found[1]


def pins(text: str, region: str) -> list[Pin]:
    """All pins of the file; a repository without a registry is AWS's account registry in `region`."""
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
    """The digest a tag stands for in its registry now. Raises OSError, in the registry's words, if there is none."""
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", reference]
    try:
        done = subprocess.run(command, text=True, capture_output=True, timeout=INSPECT_S)
    except subprocess.TimeoutExpired:
        raise OSError(f"no answer within {INSPECT_S} s") from None
    digest = done.stdout.strip()
    if done.returncode != 0 or not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise OSError((done.stderr or done.stdout).strip().removeprefix("ERROR: ") or "no digest in the answer")
    return digest


def written(text: str, slot: str, digest: str) -> str:
    """`text` with one digest replaced."""
    return re.sub(rf'(variable "{slot}_DIGEST" {{ default = ")[^"]*', rf"\g<1>{digest}", text)


def main() -> int:
    """Ask for every pin, write what was answered, say what changed and what could not be asked."""
    text = original = BAKE.read_text()
    failed = False
    for pin in pins(text, os.environ.get("AWS_REGION", "us-east-1")):
        try:
            digest = digest_of(pin.reference)
        except OSError as error:
            failed = True
            print(f"pin: {pin.reference}: left as it is: {error}", file=sys.stderr)
            continue
        text = written(text, pin.slot, digest)
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
