"""How a training went: loss, accuracies, learning rate, time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from treeify.report import style
from treeify.report.chart import AnyColumn, Chart, Table
from treeify.report.series import Spread
from treeify.training.events import Epoch


@style.in_style
def loss(
    runs: Mapping[str, Sequence[Sequence[Epoch]]],
    *,
    name: str = "loss",
    title: str = "Training loss",
) -> Chart:
    """The mean training loss of every epoch.

    Args:
        runs: the epochs of every seed, by name.
        name: of the chart.
        title: of the chart.
    """
    figure, ax = style.axes(2.6)
    rows: list[tuple[str | int | float, ...]] = []
    for index, (run, seeds) in enumerate(runs.items()):
        numbers, values = _losses(seeds)
        look = {**style.line(index), "marker": _marker(numbers, index)}
        ax.plot(numbers, [value.mean for value in values], label=style.short(run), **look)
        if len(seeds) > 1:
            bounds = [value.low for value in values], [value.high for value in values]
            ax.fill_between(numbers, *bounds, color=style.colour(index), alpha=0.15, linewidth=0)
        rows += [(run, number, v.mean, v.seeds) for number, v in zip(numbers, values, strict=True)]
    _of_epochs(ax)
    ax.set_ylabel("loss")
    if all(row[2] > 0 for row in rows if isinstance(row[2], float)):
        ax.set_yscale("log")
        style.log_costs(ax.yaxis, style.number)
    style.legend_below(figure)
    headings: list[AnyColumn] = ["run", ("epoch", "d"), ("loss", ".4f"), ("runs", "d")]
    text = "Mean loss of the training images of each epoch (logarithmic)."
    if any(len(seeds) > 1 for seeds in runs.values()):
        text += " Lines are means over seeds, bands reach from the least to the most."
    return Chart(name, title, text, figure, Table.of(headings, rows))


@style.in_style
def accuracies(
    epochs: Sequence[Epoch], *, name: str = "accuracies", title: str = "Accuracy while training"
) -> Chart:
    """Accuracy of one leaf and of all, on the training and on the held-out images.

    Args:
        epochs: of one run.
        name: of the chart.
        title: of the chart.
    """
    figure, ax = style.axes(3.0)
    numbers = [epoch.epoch for epoch in epochs]
    leaves = epochs[-1].held_out[-1].leaves
    columns = {
        f"held out, {leaves} leaves": [epoch.held_out[-1].accuracy for epoch in epochs],
        "held out, 1 leaf": [epoch.held_out[0].accuracy for epoch in epochs],
        f"training, {leaves} leaves": [epoch.train[-1].accuracy for epoch in epochs],
        "training, 1 leaf": [epoch.train[0].accuracy for epoch in epochs],
    }
    if leaves == 1:
        columns = dict(list(columns.items())[1::2])
    for index, (label, values) in enumerate(columns.items()):
        look = {
            **style.line(index % 2),
            "marker": _marker(numbers, index),
            "linestyle": "-" if label.startswith("held") else (0, (2, 1.4)),
        }
        ax.plot(numbers, values, label=label, **look)
    _of_epochs(ax)
    ax.set_ylabel("accuracy, %")
    style.legend_below(figure)
    rows = zip(numbers, *columns.values(), strict=True)
    headings: list[AnyColumn] = [("epoch", "d"), *((f"{key} %", ".2f") for key in columns)]
    text = (
        "After each epoch. Training images are augmented, and answered while the weights still"
        " change: what they say is a little below what the epoch's last weights would."
    )
    return Chart(name, title, text, figure, Table.of(headings, rows))


@style.in_style
def rates(
    epochs: Sequence[int],
    rates: Sequence[float],
    *,
    name: str = "rates",
    title: str = "Learning rate",
) -> Chart:
    """The learning rate at the end of each epoch.

    Args:
        epochs: their numbers.
        rates: of the last step of each.
        name: of the chart.
        title: of the chart.
    """
    figure, ax = style.axes(2.2)
    look = {**style.line(0), "marker": _marker(epochs, 0)}
    ax.plot(epochs, rates, **look)
    _of_epochs(ax)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("learning rate")
    rows = zip(epochs, rates, strict=True)
    headings: list[AnyColumn] = [("epoch", "d"), ("learning rate", ".4g")]
    text = "In the last step of each epoch, as the recipe schedules it."
    return Chart(name, title, text, figure, Table.of(headings, rows))


@style.in_style
def epoch_times(
    epochs: Sequence[Epoch], *, name: str = "epoch_times", title: str = "Time for each epoch"
) -> Chart:
    """Seconds for each epoch, and the part that was spent waiting for images.

    Args:
        epochs: of one run.
        name: of the chart.
        title: of the chart.
    """
    figure, ax = style.axes(2.2)
    numbers = [epoch.epoch for epoch in epochs]
    seconds = [epoch.seconds for epoch in epochs]
    waiting = [epoch.seconds * epoch.waiting for epoch in epochs]
    ax.bar(numbers, seconds, width=0.9, color=style.SERIES[5], label="training and evaluation")
    ax.bar(numbers, waiting, width=0.9, color=style.SERIES[1], label="waiting for images")
    _of_epochs(ax)
    ax.set_xlim(numbers[0] - 0.6, numbers[-1] + 0.6)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("seconds")
    style.legend_below(figure)
    rows = [
        (epoch.epoch, epoch.step, epoch.seconds, 100 * epoch.waiting, epoch.skipped)
        for epoch in epochs
    ]
    headings: list[AnyColumn] = [
        ("epoch", "d"),
        ("steps so far", ",d"),
        ("seconds", ".2f"),
        ("waiting %", ".1f"),
        ("unreadable images", ",d"),
    ]
    total = sum(seconds)
    text = (
        f"Training and evaluation of {len(epochs)} epochs took {_duration(total)}. Waiting was"
        " measured as a fraction of the training time, and is drawn as that of the whole epoch."
    )
    return Chart(name, title, text, figure, Table.of(headings, rows))


def _losses(seeds: Sequence[Sequence[Epoch]]) -> tuple[list[int], list[Spread]]:
    """The epochs that a seed has, and the spread of losses over the seeds that have them."""
    by_epoch: dict[int, list[float]] = defaultdict(list)
    for seed in seeds:
        for epoch in seed:
            by_epoch[epoch.epoch].append(epoch.loss)
    numbers = sorted(by_epoch)
    return numbers, [Spread.of(by_epoch[number]) for number in numbers]


def _marker(numbers: Sequence[int], index: int) -> str:
    """Marks for a few epochs; of many they would be a thick line."""
    return style.MARKERS[index % len(style.MARKERS)] if len(numbers) <= 12 else ""


def _of_epochs(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    ax.set_xlabel("epoch")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"
