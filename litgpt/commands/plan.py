"""`litgpt plan`: the memory that a run will need, by rank and by what it holds, and the time that it will take."""

import json

from litgpt.plan.build_spec import build_spec
from litgpt.plan.ranks import plan_run
from litgpt.plan.table import describe_plan, format_plan
from litgpt.recipe.plan import RunToPlan


def run(planned: RunToPlan) -> None:
    """Print the plan of a run."""
    settings = planned.settings
    spec = build_spec(planned.command, planned.recipe)
    plan = plan_run(planned.recipe, spec, settings.figures, routing_skew=settings.routing_skew)
    if settings.json:
        print(json.dumps(describe_plan(plan, settings), indent=1))
    else:
        print(format_plan(plan, settings))
