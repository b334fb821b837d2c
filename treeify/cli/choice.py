"""What `treeify calibrate` chooses on held-out images: thresholds, and the best way to answer."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from treeify.anytime.confidence import BUDGET, Budget
from treeify.anytime.deadline import Latencies
from treeify.cli.output import Column, table
from treeify.errors import InputError
from treeify.evaluation.halves import Halves, OperatingPoint, cheapest, most_accurate


@dataclass(frozen=True)
class Targets:
    """What was asked for: budgets of MACs, a mean time, an accuracy, a sweep; true if anything."""

    macs: Sequence[int]
    milliseconds: float | None
    accuracy: float | None
    sweep: bool

    def __bool__(self) -> bool:
        return bool(self.macs) or self.searches

    @property
    def searches(self) -> bool:
        """Whether a range of ways to answer has to be looked at."""
        return self.sweep or self.milliseconds is not None or self.accuracy is not None

    def check(self, data: Sequence[str], batch_size: int) -> None:
        """Raise InputError where options do not fit one another."""
        if data and not self:
            raise InputError(
                "--data was given, but nothing to choose on it.",
                expected="--target-macs, --target-ms, --target-accuracy or --sweep with it, e.g."
                " --target-macs 60M",
            )
        if self.milliseconds is not None and batch_size > 1:
            raise InputError(
                f"--target-ms is of one image at a time, --batch-size is {batch_size}.",
                expected="--batch-size 1 with it",
            )


class _Target(NamedTuple):
    """An option, its value, and the way to answer that it led to."""

    option: str
    value: float
    point: OperatingPoint


class Choice:
    """Ways to answer, chosen on one half of the held-out images and reported on the other.

    Args:
        halves: the held-out images' answers.
        targets: what was asked for; an accuracy is looked for now, a time once latencies are known.

    Raises:
        InputError: no way to answer reaches the accuracy.
    """

    def __init__(self, halves: Halves, targets: Targets) -> None:
        self.halves, self.targets = halves, targets
        self.fixed = halves.fixed()
        self.swept = halves.sweep() if targets.searches else []
        self.by_macs = [halves.point(target) for target in targets.macs]
        self.latencies: Latencies | None = None
        self._chosen: list[_Target] = []
        if targets.accuracy is not None:
            point = cheapest(self._all(), targets.accuracy / 100)
            self._chosen.append(_Target("--target-accuracy", targets.accuracy, point))

    def finish(self, latencies: Latencies | None) -> None:
        """Choose by time too; latencies are those of single images, if they were measured.

        Raises:
            InputError: no way to answer is fast enough.
        """
        self.latencies = latencies
        milliseconds = self.targets.milliseconds
        if milliseconds is not None and latencies is not None:
            point = most_accurate(self._all(), latencies, milliseconds / 1e3)
            self._chosen.append(_Target("--target-ms", milliseconds, point))

    def _all(self) -> list[OperatingPoint]:
        return [*self.swept, *self.by_macs]

    @property
    def points(self) -> list[OperatingPoint]:
        """The thresholds that are kept."""
        chosen = [target.point for target in self._chosen]
        points = [*self.by_macs, *(self.swept if self.targets.sweep else []), *chosen]
        by_target = {point.chosen.target_macs: point for point in points if point.leaves is None}
        return list(by_target.values())

    @property
    def budgets(self) -> dict[int, Budget]:
        """The same with what they give on the half to report on, by their mean MACs."""
        return {point.chosen.target_macs: point.reported for point in self.points}

    def report(self, split: str, skipped: Collection[str]) -> dict[str, Any]:
        """Everything the tables show; accuracies from 0 to 1."""
        chosen, reported = self.halves.images
        return {
            "split": split,
            "seed": self.halves.seed,
            "skipped": sorted(skipped),
            "images": {"chosen_on": chosen, "reported_on": reported},
            "fixed": [{"leaves": point.leaves, **self._figures(point)} for point in self.fixed],
            "budgets": [
                {
                    **BUDGET.dump_python(point.reported, mode="json", by_alias=True),
                    "milliseconds": self._milliseconds(point),
                }
                for point in self.points
            ],
            "targets": [
                {
                    "option": target.option,
                    "value": target.value,
                    "leaves": target.point.leaves,
                    "budget": _budget(target.point),
                    **self._figures(target.point),
                }
                for target in self._chosen
            ],
        }

    def _figures(self, point: OperatingPoint) -> dict[str, Any]:
        return {
            "macs": point.reported.macs,
            "milliseconds": self._milliseconds(point),
            "accuracy": point.reported.accuracy,
        }

    def _milliseconds(self, point: OperatingPoint) -> float | None:
        if self.latencies is None:
            return None
        return 1e3 * point.seconds(self.latencies, point.reported)

    def tables(self) -> list[Table]:
        """Fixed sizes and beside them thresholds; and when these stop images."""
        columns = [
            Column("answer"),
            Column("MACs", ",.0f"),
            Column("ms", ".2f"),
            Column("accuracy %", ".2f"),
        ]
        sections = [
            [
                (str(point), macs, "-" if time is None else time, 100 * accuracy)
                for point in sorted(points, key=lambda point: point.reported.macs)
                for macs, time, accuracy in (self._figures(point).values(),)
            ]
            for points in (self.fixed, self.points)
        ]
        caption = "mean MACs and ms per image, on images that nothing was chosen on"
        first = table(columns, *filter(None, sections), caption=caption)
        swept = {id(point) for point in self.swept} if self.targets.sweep else set()
        detailed = [point.reported for point in self.points if id(point) not in swept]
        return [first, *([_threshold_table(detailed)] if detailed else [])]

    def explanation(self, split: str, skipped: Collection[str]) -> str:
        """On which images what was done."""
        chosen, reported = self.halves.images
        left_out = ", ".join(sorted(skipped))
        return (
            f"Thresholds were chosen on {chosen:,} held-out images; accuracy, MACs and stops are"
            f" those of the {reported:,} others (seed {self.halves.seed}; {split})."
            + (f" Not read, and left out: {left_out}." if left_out else "")
        )

    def advice(self, path: Path) -> list[str]:
        """For every target, the way to answer and how `predict` is asked for it."""
        lines = []
        for option, value, point in self._chosen:
            number = f"--leaves {point.leaves}"
            if point.leaves is None:
                number = f"--budget {point.chosen.target_macs}"
            accuracy = f"{100 * point.reported.accuracy:.2f} %"
            lines.append(
                f"{option} {value:g}: {point}, {accuracy} right on the other half:"
                f" treeify predict {path} IMAGE {number}"
            )
        return lines


def _budget(point: OperatingPoint) -> int | None:
    return point.chosen.target_macs if point.leaves is None else None


def _threshold_table(budgets: Sequence[Budget]) -> Table:
    """The confidence that stops an image at each size, and how many it stops."""
    columns = [Column("leaves", "d")]
    columns += [Column(f"budget {budget.target_macs:,}", "") for budget in budgets]
    rows = [
        (size, *(_stop(budget, index) for budget in budgets))
        for index, size in enumerate(budgets[0].sizes)
    ]
    caption = "an image stops at this confidence: fraction of the images that do"
    return table(columns, rows, caption=caption)


def _stop(budget: Budget, index: int) -> str:
    fraction = f"{100 * budget.fractions[index]:.1f} %"
    if index == len(budget.thresholds):
        return f"the rest: {fraction}"
    threshold = budget.thresholds[index]
    return f"never: {fraction}" if threshold > 1 else f"{threshold:.4f}: {fraction}"
