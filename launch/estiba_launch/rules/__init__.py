"""The rules between fields that the service model does not hold: what CreateTrainingJob refuses, before it is sent.

Sources: the API reference's member descriptions (botocore 1.44 carries them) and, where said, Estiba's own care.
Each rule is a function that yields problems; a rule only reads what it needs and stays silent about missing parts,
which the service model reports.
"""

from __future__ import annotations

from ..errors import Problem
from ..target import Target
from . import hosts, image, inputs
from .parts import Request, Rule, s3_uris

RULES: tuple[Rule, ...] = (
    image.image,
    image.metrics,
    inputs.channels,
    hosts.resources,
    hosts.stopping,
    inputs.checkpoints,
    inputs.addresses,
    image.role,
    image.tags,
    image.profiler,
    image.serverless,
)

__all__ = ["RULES", "find", "s3_uris"]


def find(request: Request, target: Target) -> list[Problem]:
    """Every broken rule of a request that has already been typed by `shapes.read`."""
    return [problem for rule in RULES for problem in rule(request, target)]
