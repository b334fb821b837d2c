"""Sections on time: how the training went, and how fast answers are."""

from __future__ import annotations

from treeify.report.figures import latency, training
from treeify.report.sections.section import Contents, Draft, Section


def training_section(contents: Contents) -> Section:
    """Loss and accuracies of every epoch, rate, time, waiting."""
    draft = Draft("training", "Training")
    for result in contents.results:
        if "training" in result.missing:
            draft.missing.append(contents.say(result.missing["training"], result))
        if not result.epochs:
            continue
        charts = [
            training.loss({result.name: [result.epochs]}),
            training.accuracies(result.epochs),
        ]
        if result.rates:
            charts.append(training.rates([each.epoch for each in result.epochs], result.rates))
        charts.append(training.epoch_times(result.epochs))
        draft.charts += [contents.mark(chart, result) for chart in charts]
    for grid in contents.grids:
        runs = {
            variant.name: [run.epochs for run in variant.runs if run.epochs]
            for variant in grid.variants
        }
        runs = {name: seeds for name, seeds in runs.items() if seeds}
        if runs:
            draft.charts.append(contents.mark(training.loss(runs), grid))
        else:
            text = "The grid's runs are not there, and its results hold their last epoch only."
            draft.missing.append(contents.say(text, grid))
    return draft.section()


def latency_section(contents: Contents) -> Section:
    """The calibration as a picture, and what deadlines buy."""
    draft = Draft("latency", "Latency and deadlines")
    for result in contents.results:
        accuracies = {score.leaves: score.accuracy for score in result.scores}
        table = latency.first_of(result.latencies)
        if table is None:
            text = f"It was not calibrated: treeify calibrate {result.path} measures it."
            draft.missing.append(contents.say(text, result))
            continue
        charts = [latency.latencies(table), latency.deadlines(table, accuracies)]
        draft.charts += [contents.mark(chart, result) for chart in charts]
        if len(result.latencies) > 1:
            text = f"Of {len(result.latencies)} situations that were calibrated one is drawn."
            draft.missing.append(contents.say(text, result))
        if result.budgets:
            chart = latency.budgets(result.budgets)
            draft.charts.append(contents.mark(chart, result))
        else:
            text = f"No budget was chosen: treeify calibrate {result.path} --sweep chooses some."
            draft.missing.append(contents.say(text, result))
    if contents.grids:
        draft.missing.append("Grids are not calibrated: give one of a grid's runs.")
    return draft.section()
