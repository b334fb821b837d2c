"""Sections on accuracy: the trade-off, single leaves, and how much leaves differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from math import sqrt
from operator import attrgetter, mul

from treeify.evaluation.metrics import Score
from treeify.report.chart import Chart
from treeify.report.figures.leaves import leaf_accuracy, logit_std
from treeify.report.figures.trade_off import Unit, trade_off
from treeify.report.results import GridResult, LatencyTable, Result, Variant
from treeify.report.sections.section import Contents, Draft, Section, only_of_runs
from treeify.report.series import BaseModel, BudgetPoint, Curve, Spread

_Value = Callable[[Score], float]


def trade_off_section(contents: Contents) -> Section:
    """Accuracy against MACs, and against milliseconds where they were measured."""
    draft = Draft("trade-off", "The trade-off")
    draft.warnings += mixed(contents)
    curves = _curves(contents, attrgetter("accuracy"), draft.missing)
    if curves:
        draft.charts.append(_against_macs(contents, curves))
        if contents.published:
            draft.charts.append(_beside_published(contents, curves))
    if contents.beside is not None:
        draft.missing.append(contents.beside)
    timed = [each for each in contents.results if each.times is not None and each.scores]
    if timed:
        draft.charts.append(_against_time(timed))
        draft.missing += [
            contents.say(_why_no_budgets_in_time(result), result)
            for result in timed
            if result.budgets and _single_images_here(result) is None
        ]
    draft.missing += [
        contents.say(result.missing["times"], result)
        for result in contents.results
        if "times" in result.missing and result.scores
    ]
    if contents.grids:
        draft.missing.append("Grids are not timed: give one of a grid's runs for milliseconds.")
    draft.missing += [
        contents.say(result.missing["base"], result)
        for result in contents.results
        if "base" in result.missing and result.scores
    ]
    return draft.section()


def leaves_section(contents: Contents) -> Section:
    """Accuracy of nested sizes over single leaves."""
    draft = Draft("leaves", "Single leaves")
    for result in contents.results:
        answers = result.answers
        if answers is None:
            draft.missing.append(contents.say(why_no_answers(result), result))
            continue
        nested = [Spread.of([score.accuracy]) for score in answers.scores]
        single = [Spread.of([accuracy]) for accuracy in answers.leaf_accuracy]
        sizes = [score.leaves for score in answers.scores]
        chart = leaf_accuracy(sizes, nested, single, note=f"{answers.split}.")
        draft.charts.append(contents.mark(chart, result))
    draft.missing += only_of_runs(contents, "The accuracy of every leaf")
    return draft.section()


def spread_section(contents: Contents) -> Section:
    """Accuracy and the deviation of logits against MACs."""
    draft = Draft("spread", "Accuracy and how much leaves differ")
    draft.warnings += mixed(contents)
    accuracies = _curves(contents, attrgetter("accuracy"), draft.missing)
    deviations = _curves(contents, attrgetter("logit_std"), draft.missing)
    if accuracies:
        draft.charts.append(
            trade_off(accuracies, name="accuracy_of_sizes", title="Accuracy of the nested sizes")
        )
        draft.charts.append(logit_std(deviations))
    return draft.section()


def mixed(contents: Contents) -> list[str]:
    """Says so where accuracies do not compare."""
    if len(set(contents.data_sets.values())) < 2:
        return []
    sets = ", ".join(f"{name}: {data}" for name, data in contents.data_sets.items())
    return [f"These were measured on different data, so their accuracies do not compare: {sets}."]


def why_no_answers(result: Result) -> str:
    """Why nothing was measured on held-out images."""
    return result.missing.get("answers", "Nothing was measured on held-out images.")


def _against_macs(contents: Contents, curves: Sequence[Curve]) -> Chart:
    macs = {
        each.base.macs for each in contents.owners if each.base is not None and _has_scores(each)
    }
    base, note = None, ""
    if len(macs) == 1:
        base = BaseModel("base model", macs.pop(), _base_accuracy(contents))
    elif macs:
        note = "The base models cost differently, so they are left out."
    budgets = [
        BudgetPoint(result.name, budget.macs, 100 * budget.accuracy)
        for result in contents.results
        for budget in result.budgets
        if budget.images
    ]
    if budgets:
        note += " Budgets: as treeify calibrate reported them on the half not chosen on."
    note += _where_from(contents)
    return trade_off(curves, base=base, budgets=budgets, note=note.strip())


def _beside_published(contents: Contents, curves: Sequence[Curve]) -> Chart:
    counts = dict.fromkeys(series.macs_are for series in contents.published)
    names = {
        count: [each.name for each in contents.published if each.macs_are == count]
        for count in counts
    }
    whose = "; ".join(f"{count} ({', '.join(names[count])})" for count in counts)
    return trade_off(
        curves,
        published=contents.published,
        name="published",
        title="Beside what was published",
        note=f"Their MACs: {whose}.",
    )


def _where_from(contents: Contents) -> str:
    if any(result.answers is None and result.epochs for result in contents.results):
        return " Scores that were not measured here are those of the run's last epoch."
    measured = [result.answers for result in contents.results if result.answers is not None]
    if not measured:
        return ""
    splits = sorted({answers.split for answers in measured})
    errors = [
        sqrt(score.accuracy * (100 - score.accuracy) / len(answers.target))
        for answers in measured
        for score in answers.scores
    ]
    return (
        f" Images: {'; '.join(splits)}; the standard error of an accuracy is up to"
        f" {max(errors):.2f} points."
    )


def _against_time(results: Sequence[Result]) -> Chart:
    curves, machines, bases = [], [], []
    for result in results:
        assert result.times is not None
        milliseconds = {size: 1e3 * time for size, time in result.times.seconds.items()}
        scores = [score for score in result.scores if score.leaves in milliseconds]
        curves.append(
            Curve(
                result.name,
                tuple(score.leaves for score in scores),
                tuple(milliseconds[score.leaves] for score in scores),
                tuple(Spread.of([score.accuracy]) for score in scores),
            )
        )
        machines.append(result.times.machine)
        if 0 in milliseconds:
            bases.append(milliseconds[0])
    budgets = [point for result in results for point in _budgets_in_time(result)]
    note = f"Medians for one image, measured for this page: {'; '.join(dict.fromkeys(machines))}."
    if budgets:
        note += " Of budgets: means of the times that treeify calibrate measured."
    unit: Unit = "ms"
    return trade_off(
        curves,
        unit=unit,
        base=BaseModel("base model", bases[0], _accuracy_of_base(results[0]))
        if len(results) == len(bases) == 1
        else None,
        budgets=budgets,
        name="trade_off_ms",
        title="Accuracy against time",
        note=note,
    )


def _budgets_in_time(result: Result) -> Iterator[BudgetPoint]:
    """The mean milliseconds of images that stop by confidence, at every size on the way."""
    table = _single_images_here(result)
    if table is None:
        return
    typical = {(row.start, row.stop): row.typical for row in table.transitions}
    for budget in result.budgets:
        steps = [typical.get(step) for step in pairwise((0, *budget.sizes))]
        if budget.images and None not in steps:
            times = accumulate(step for step in steps if step is not None)
            seconds = sum(map(mul, budget.fractions, times))
            yield BudgetPoint(result.name, 1e3 * seconds, 100 * budget.accuracy)


def _single_images_here(result: Result) -> LatencyTable | None:
    """What was calibrated for one image on the machine that answers were timed on for the page."""
    here = None if result.times is None else result.times.machine
    fitting = (each for each in result.latencies if each.batch == 1 and each.machine == here)
    return next(fitting, None)


def _why_no_budgets_in_time(result: Result) -> str:
    if not result.latencies:
        found = "nothing was calibrated"
    elif all(table.batch > 1 for table in result.latencies):
        batches = sorted({table.batch for table in result.latencies})
        found = f"only {', '.join(map(str, batches))} images together were calibrated"
    else:
        machines = dict.fromkeys(each.machine for each in result.latencies if each.batch == 1)
        found = f"single images were calibrated elsewhere ({'; '.join(machines)})"
    return (
        f"Budgets have no milliseconds per image: {found}."
        f" treeify calibrate {result.path} measures one image here, if it takes a single one."
    )


def _curves(contents: Contents, value: _Value, missing: list[str]) -> list[Curve]:
    """A curve for every result and every variant whose scores and costs are known."""
    curves = []
    for result in contents.results:
        if result.scores:
            macs = {cost.leaves: cost.macs for cost in result.sizes}
            curves.append(_curve(result.name, [result.scores], macs, value))
        else:
            missing.append(contents.say(why_no_answers(result), result))
    for grid in contents.grids:
        for variant in grid.variants:
            name = f"{grid.name}, {variant.name}" if contents.are_several else variant.name
            if variant.sizes:
                curves.append(_of_variant(name, variant, value))
        missing += [contents.say(grid.missing[key], grid) for key in grid.missing]
    return curves


def _of_variant(name: str, variant: Variant, value: _Value) -> Curve:
    macs = {cost.leaves: cost.macs for cost in variant.sizes}
    return _curve(name, [run.held_out for run in variant.runs], macs, value)


def _curve(
    name: str, seeds: Sequence[Sequence[Score]], macs: dict[int, int], value: _Value
) -> Curve:
    sizes = [score.leaves for score in seeds[0] if score.leaves in macs]
    spreads = [
        Spread.of([value(score) for seed in seeds for score in seed if score.leaves == size])
        for size in sizes
    ]
    return Curve(name, tuple(sizes), tuple(float(macs[size]) for size in sizes), tuple(spreads))


def _base_accuracy(contents: Contents) -> float | None:
    """Of the base model, if it is known and one and the same."""
    known = {_accuracy_of_base(result) for result in contents.results if result.scores}
    return known.pop() if len(known) == 1 else None


def _accuracy_of_base(result: Result) -> float | None:
    base = None if result.answers is None else result.answers.base
    return None if base is None else base.accuracy


def _has_scores(each: Result | GridResult) -> bool:
    return bool(each.scores) if isinstance(each, Result) else any(v.sizes for v in each.variants)
