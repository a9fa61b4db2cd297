"""Search the layouts of a run on a number of GPUs for the fastest ones that fit."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from litgpt.plan.layout_guess import RunFigures, guess_memory, guess_seconds, guess_states
from litgpt.plan.layout_options import LayoutOption, list_legal_layouts
from litgpt.plan.ranks import plan_run
from litgpt.plan.repeated_layers import Estimate, estimate_run, read_plan
from litgpt.recipe.gpu import Gpu
from litgpt.recipe.training import Training
from litgpt.train.run_spec import RunSpec

PLANNED, WANTED = 14, 6  # at most so many layouts are planned, until so many fit
GUESSED_SHARE = 0.7  # of the guessed memory that a layout needs at least, before any is planned


@dataclass
class SearchResult:
    """The layouts of a run.

    Attributes:
        fitting: the layouts that fit, the fastest one first, and what they need.
        too_large: those that were planned and do not fit.
        legal: number of layouts that the recipe allows.
        refused: the errors of the others, and their number.
        skipped: why legal ones were not planned, and their number.
    """

    fitting: list[tuple[LayoutOption, Estimate]] = field(default_factory=list)
    too_large: list[tuple[LayoutOption, Estimate]] = field(default_factory=list)
    legal: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Outcome:
    """What was guessed of a layout, and whether its plan fits."""

    guess: Estimate
    fits: bool


class LayoutSearch:
    """Decides which layouts are planned, in the order of their guessed times.

    Attributes:
        result: what is known so far.
    """

    def __init__(self, memory: float) -> None:
        self.memory = memory
        self.result = SearchResult()
        self._ratios: dict[float, float] = {}
        self._outcomes: dict[Hashable, list[Outcome]] = {}

    def explain_skip(self, layout: LayoutOption, guess: Estimate, states: float) -> str | None:
        """Why a layout is not worth a plan; None if it is.

        Args:
            states: GiB of parameters, gradients and optimizer states of a rank, without which no run fits.
        """
        result = self.result
        if states > self.memory:
            return "parameters, gradients and optimizer states do not fit"
        if guess.memory * self._ratios.get(layout.recompute.kept, GUESSED_SHARE) > self.memory:
            return "by a rough guess they do not fit"
        if len(result.fitting) == WANTED or len(result.fitting) + len(result.too_large) == PLANNED:
            return "others were guessed to be faster"
        for outcome in self._outcomes.get(describe_variants(layout), []):
            if outcome.fits and guess.seconds >= outcome.guess.seconds:
                return "one with the same degrees fits, and was guessed to be as fast"
            if not outcome.fits and guess.memory >= outcome.guess.memory:
                return "one with the same degrees does not fit, and was guessed to need no more"
        return None

    def add(self, layout: LayoutOption, guess: Estimate, planned: Estimate) -> None:
        """Add the plan of a layout, which corrects the guess for others with the same recomputation."""
        fits = planned.memory <= self.memory
        self._ratios[layout.recompute.kept] = planned.memory / guess.memory
        self._outcomes.setdefault(describe_variants(layout), []).append(Outcome(guess, fits))
        (self.result.fitting if fits else self.result.too_large).append((layout, planned))


def describe_variants(layout: LayoutOption) -> Hashable:
    """What layouts have in common that differ in the schedule, sequence parallelism, recomputation and the loss."""
    return layout.dims, layout.base.parallel.zero, layout.base.train.micro_batch_size


def search_layouts(recipe: Training, spec: RunSpec, gpu: Gpu, gpus: int) -> SearchResult:
    """Search the layouts of a run.

    All legal ones are ordered by a rough guess of their time. The first of them that may fit are planned with a few of
    their layers, and the fastest one with all of them.

    Raises:
        UserError: if the GPUs do not make whole nodes.
    """
    search = LayoutSearch(gpu.memory)
    result = search.result
    layouts = list(list_legal_layouts(recipe, spec, gpus, result.refused))
    result.legal = len(layouts)
    if not layouts:
        return result
    figures = RunFigures.of_run(recipe, spec, gpu, layouts[0].length)
    guesses = [(Estimate(guess_memory(layout, figures), guess_seconds(layout, figures)), layout) for layout in layouts]
    for guess, layout in sorted(guesses, key=lambda pair: (pair[0].seconds, pair[0].memory)):
        reason = search.explain_skip(layout, guess, guess_states(layout, figures))
        if reason is None:
            search.add(layout, guess, estimate_run(layout.recipe, spec, gpu))
        else:
            result.skipped[reason] += 1
    plan_fastest(result, spec, gpu)
    return result


def plan_fastest(result: SearchResult, spec: RunSpec, gpu: Gpu) -> None:
    """Sort the layouts that fit by their time, and plan the fastest one with all of its layers.

    If it does not fit then, or is slower than the next one, that is planned too.
    """
    whole: list[LayoutOption] = []
    while result.fitting:
        result.fitting.sort(key=lambda pair: pair[1].seconds)
        layout, _ = result.fitting[0]
        if any(layout is other for other in whole):
            return
        whole.append(layout)
        planned = read_plan(plan_run(layout.recipe, spec, gpu))
        del result.fitting[0]
        (result.fitting if planned.memory <= gpu.memory else result.too_large).append((layout, planned))
