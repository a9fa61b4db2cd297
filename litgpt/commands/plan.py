"""`litgpt plan`: the memory that a run will need and its time, and better layouts; or a check of its step."""

import json
from dataclasses import asdict

from litgpt.errors import UserError
from litgpt.files import check_writable, write_text
from litgpt.parallel.processes import count_processes
from litgpt.plan.build_spec import build_spec
from litgpt.plan.out_of_memory import NO_CURE
from litgpt.plan.own_machine import find_own_machine
from litgpt.plan.page import write_plan_page
from litgpt.plan.ranks import plan_run
from litgpt.plan.savings import format_savings, list_savings
from litgpt.plan.search import search_layouts
from litgpt.plan.search_table import describe_search, format_search
from litgpt.plan.step_check import check_run_steps
from litgpt.plan.step_findings import Finding
from litgpt.plan.table import compute_largest, describe_plan, format_plan
from litgpt.recipe.plan import RunToPlan
from litgpt.recipe.to_yaml import format_yaml
from litgpt.recipe.training import Training


def run(planned: RunToPlan) -> None:
    """Print the plan of a run, those of its layouts, or what is found in its step."""
    settings = planned.settings
    if settings.page_file is not None:
        check_writable(settings.page_file, "page_file", is_file=True)
    if settings.search:
        return search(planned)
    spec = build_spec(planned.command, planned.recipe, settings.row_media)
    if settings.check_step:
        return print_findings(check_run_steps(planned.recipe, spec))
    skew, rank = settings.routing_skew, settings.rank
    plan = plan_run(planned.recipe, spec, settings.figures, routing_skew=skew, rank=rank)
    savings = list_savings(planned.command, planned.recipe, plan, spec.row_media) if settings.savings else None
    if settings.page_file is not None:
        write_plan_page(settings.page_file, planned.recipe, spec.config.name, plan, settings)
    if settings.json:
        changes = {} if savings is None else {"savings": [asdict(saving) for saving in savings]}
        print(json.dumps(describe_plan(plan, settings) | changes, indent=1))
    else:
        print(format_plan(plan, settings))
        if savings is not None:
            print("\n".join(["", *format_savings(savings)]))
    return None


def run_dry(command: str, recipe: Training) -> None:
    """Print the plan of a run on this machine.

    Args:
        command: that would start it.

    Raises:
        UserError: if it does not fit, with the changed setting that saves most.
    """
    machine = find_own_machine(recipe)
    plan = plan_run(recipe, build_spec(command, recipe), machine.figures)
    print(format_plan(plan, machine))
    missing = compute_largest(plan) - machine.available_memory
    if missing <= 0:
        return
    savings = list_savings(command, recipe, plan)[:1]
    cures = [f"set {best.key}: {best.value}, with which it needs {best.memory:.2f} GiB" for best in savings]
    raise UserError(
        f"dry_run: rank {plan.worst} needs {missing:.2f} GiB more than the {machine.available_memory:g} GiB of "
        f"{machine.gpu_label}; {cures[0] if cures else NO_CURE}"
    )


def search(planned: RunToPlan) -> None:
    """Print the layouts of a run that fit, and write the settings of the fastest one.

    Raises:
        UserError: if none fits and its settings should be written.
    """
    settings, recipe, gpu = planned.settings, planned.recipe, planned.settings.figures
    if settings.layout_file is not None:
        check_writable(settings.layout_file, "layout_file", is_file=True)
    assert gpu is not None
    gpus = settings.gpus or count_processes(recipe.devices, recipe.num_nodes)
    spec = build_spec(planned.command, recipe, settings.row_media)
    result = search_layouts(recipe, spec, gpu, gpus)
    if settings.json:
        print(json.dumps(describe_search(result), indent=1))
    else:
        print(format_search(result, f"{gpus} x {settings.gpu_label}", gpu.memory))
    if settings.page_file is not None:
        fastest = result.fitting[0][0].recipe if result.fitting else None
        plan = None if fastest is None else plan_run(fastest, spec, gpu)
        write_plan_page(settings.page_file, fastest or recipe, spec.config.name, plan, settings, result)
    if settings.layout_file is not None:
        if not result.fitting:
            raise UserError(
                f"layout_file: {settings.layout_file} is not written, because no layout fits; set more gpus"
            )
        write_text(settings.layout_file, format_yaml(result.fitting[0][0].as_tree()))


def print_findings(findings: dict[Finding, int]) -> None:
    """Print what was found in a step, a line each, with the rank.

    Raises:
        UserError: if anything was found.
    """
    for finding, rank in findings.items():
        print(f"rank {rank}: {finding}")
    if findings:
        raise UserError(
            f"check_step: {len(findings)} operation(s) of the step fail on a GPU or make it wait; see the lines above"
        )
    print("The step runs on a GPU, and waits for it only where it has to.")
