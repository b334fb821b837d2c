"""`treeify.plan`: a model and a budget in, the trees that no other beats out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from treeify.arguments import require_flag, require_integer
from treeify.conversion.assemble import trace_model
from treeify.conversion.resolve import resolve
from treeify.errors import SplitError
from treeify.evaluation.cost import Cost
from treeify.models.architecture import Architecture
from treeify.models.recognise import recognise
from treeify.planning.candidates import candidates
from treeify.planning.costs import MACS, PARAMETERS, SplitCosts, split_costs
from treeify.planning.forecast import Forecast, forecast
from treeify.planning.limits import (
    DEFAULT_FANOUTS,
    DEFAULT_LEAVES,
    Budget,
    limits,
    numbers_of_leaves,
)
from treeify.planning.measure import measured
from treeify.planning.split_plan import SplitPlan
from treeify.tracing.trace import Traced

# How many of the best are run where times are measured.
_MEASURED = 3


def plan(
    model: nn.Module | str | Architecture,
    *,
    max_macs: float | None = None,
    max_ms: float | None = None,
    max_params: float | None = None,
    max_mb: float | None = None,
    first_macs: float | None = None,
    first_ms: float | None = None,
    leaves: int | Sequence[int] = DEFAULT_LEAVES,
    fanouts: Iterable[int] = DEFAULT_FANOUTS,
    pick: int = 1,
    all_points: bool = False,
    measure: bool = False,
    example_input: Tensor | None = None,
) -> SplitPlan:
    """Choose where to split a model, and into how many branches, by what that costs.

    Of all trees over the model's split points those are found that no other beats: none has as
    many leaves and as high a mean own fraction for less. They are ranked by leaves times mean own
    fraction (`treeify.planning.split_plan.RANKING`), since accuracy is not known before training.

    Args:
        model: as in `treeify.hierarchicalize`; not modified.
        max_macs: the most MACs per image for all leaves; without a budget four times the base
            model's.
        max_ms: the most milliseconds for one image on this machine, forecast from measured times
            of the base model's parts (`treeify.planning.forecast`).
        max_params: the most parameters.
        max_mb: the most megabytes, of 10^6 bytes, of parameters and buffers.
        first_macs: the most MACs of the first answer, which costs one base model.
        first_ms: the most milliseconds of the first answer.
        leaves: how many, or the fewest and the most.
        fanouts: children per split to choose from.
        pick: which of the candidates to take, from 1 on.
        all_points: search points that several tensors cross, too, as inside of residual blocks,
            and those that part a batch norm from the layer that it could be folded into.
        measure: convert the best few, run them on this machine, and forecast times beside.
        example_input: an image of the size the model expects, `[1, C, H, W]`; found if not given.

    Returns:
        The trees, their costs and the pick; prints as a list.

    Raises:
        ModelError: the name is unknown.
        TraceError: the model cannot be traced.
        SplitError: the model has no point to split at.
        InputError: a budget is impossible (the nearest possible is named), or an argument is wrong.
    """
    require_flag("all_points", all_points)
    require_flag("measure", measure)
    require_integer("pick", pick, 1)
    asked = limits((first_macs, first_ms), (max_macs, max_ms, max_params, max_mb), leaves, fanouts)
    base, architecture = resolve(model)
    architecture = architecture or recognise(base)
    traced = trace_model(base, architecture, example_input)
    costs = split_costs(traced, all_points=all_points)
    macs = int(costs.whole[MACS])
    _require_points(costs, type(base).__name__)
    asked.check_first(macs, None)
    sizes = numbers_of_leaves(asked.fanouts, asked.leaves[1])
    times = None
    if asked.timed or measure:
        times = forecast(base, traced, [point.name for point in costs.points], sizes)
        asked.check_first(macs, times.whole)
    trees, optimal = candidates(costs, asked, times)
    budget = asked.budget_for(macs)
    result = SplitPlan(
        model=type(base).__name__ if architecture is None else str(architecture),
        architecture=architecture,
        input=traced.example,
        base=Cost(1, macs, int(costs.whole[PARAMETERS])),
        budget=budget,
        points=len(costs.points),
        optimal=optimal,
        candidates=tuple(trees),
        notes=tuple(_notes(budget, costs, times, traced.batch)),
    ).pick(pick)
    return _with_measured(result, base, traced) if measure else result


def _with_measured(result: SplitPlan, base: nn.Module, traced: Traced) -> SplitPlan:
    """The plan with the measured times of its best trees, and of the one picked."""
    trees = list(result.candidates)
    for position in sorted({*range(min(_MEASURED, len(trees))), result.picked - 1}):
        seconds = measured(base, traced, result.architecture, trees[position].splits)
        trees[position] = replace(trees[position], measured=seconds)
    return replace(result, candidates=tuple(trees))


def _notes(budget: Budget, costs: SplitCosts, times: Forecast | None, batch: int) -> Iterator[str]:
    """What a user should know of a plan."""
    if not budget.asked:
        ratio = budget.most / costs.whole[MACS]
        yield f"No budget was given: at most {ratio:g} times the base model's MACs."
    if costs.left_out:
        yield (
            f"{costs.left_out} more split points were left out, which several tensors cross or a"
            " batch norm begins; all_points (--all-points) searches them, too."
        )
    if times is not None:
        numbers = ", ".join(map(str, times.measured))
        yield (
            f"Times are forecast for one image from {numbers} networks side by side, measured on"
            f" {times.machine}."
        )
        if batch > 1:
            yield (
                f"The model answers {batch} images at once: times for one image are those of"
                f" {batch} divided by {batch}."
            )


def _require_points(costs: SplitCosts, model: str) -> None:
    if not costs.points:
        raise SplitError(
            f"{model} has no split points with MACs on both sides.",
            expected="a point that a single tensor crosses"
            if costs.left_out
            else "layers before and after some point",
            next_step="Search all points: all_points=True, --all-points."
            if costs.left_out
            else "List what there is: treeify splits NAME",
        )
