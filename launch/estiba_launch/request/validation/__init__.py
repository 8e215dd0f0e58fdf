"""Find what CreateTrainingJob would refuse before anything is sent: walk the service model, then apply the rules."""

from __future__ import annotations

from typing import Any

from estiba_launch.errors import Problem
from estiba_launch.request.address import TargetAddress
from estiba_launch.request.validation import data_rules, rules
from estiba_launch.request.validation.service_model import Walk, create_training_job
from estiba_launch.request.validation.view import View


def check(filled: dict[str, Any], target: TargetAddress) -> tuple[dict[str, Any], list[Problem]]:
    """(the request typed as the API expects, every problem), each field reported by the model or by rules, not both."""
    walk = Walk(allow_file=not target.on_aws, optional=frozenset() if target.on_aws else frozenset({"RoleArn"}))
    request = walk.read(filled, create_training_job())
    view, reported = View(request), {problem.field for problem in walk.problems}
    broken_rules = [
        Problem(field=field, value=value, rule=rule, remedy=remedy)
        for field, value, rule, remedy in (*rules.find(view, target), *data_rules.find(view, target))
        if field not in reported
    ]
    return request, [*walk.problems, *broken_rules]
