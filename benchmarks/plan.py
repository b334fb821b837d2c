"""How far are forecasts of `treeify plan` from what its trees take?

`python benchmarks/plan.py` plans six models by four times their MACs, forecasts the time of every
nested size of the best three trees for one image, converts, tunes and runs these, and compares.
`error` is the median of |forecast / measured - 1| over them; the goal is at most 0.2 in the median
over the models. `of_all` is that of all leaves alone, `seconds_to_plan` the time of counting and
searching after tracing.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import common

import treeify
from treeify.conversion.assemble import trace_model
from treeify.planning.candidates import candidates
from treeify.planning.costs import split_costs
from treeify.planning.limits import DEFAULT_FANOUTS, DEFAULT_LEAVES, limits

NAMES = (
    *("HNE_small", "HNE", "MobileNetV2 HNE", "resnet18"),
    *("vit_tiny_patch16_224", "efficientnet_b0"),
)
CASES = [case for case in (*common.CIFAR, *common.IMAGENET) if case.name in NAMES]
COLUMNS = ("points", "optimal", "seconds_to_plan", "error", "of_all", "forecast_ms", "measured_ms")


def seconds_to_plan(case: common.Case) -> float:
    """Seconds of counting and searching, after tracing."""
    traced = trace_model(case.base(), None, case.images(1))
    begin = time.perf_counter()
    asked = limits((None, None), (None,) * 4, DEFAULT_LEAVES, DEFAULT_FANOUTS)
    candidates(split_costs(traced), asked, None)
    return time.perf_counter() - begin


def measure(report: common.Report, case: common.Case) -> None:
    """One row: forecast and measured times of every nested size of the trees that were run."""
    row = f"{case.name}, batch 1"
    if not report.wanted(row):
        return
    plan = treeify.plan(case.base(), example_input=case.images(1), measure=True)
    pairs: list[tuple[int, float, float]] = []
    trees = []
    for tree in plan.candidates:
        if tree.measured is None or tree.forecast is None:
            continue
        sizes = tree.tree.nested_sizes
        pairs += zip(sizes, tree.forecast, tree.measured, strict=True)
        trees.append({"splits": tree.splits, "forecast": tree.forecast, "measured": tree.measured})
    errors = [abs(forecast / measured - 1) for _, forecast, measured in pairs]
    best = trees[0]
    report.add(
        row,
        points=plan.points,
        optimal=plan.optimal,
        seconds_to_plan=seconds_to_plan(case),
        error=median(errors),
        of_all=median(abs(tree["forecast"][-1] / tree["measured"][-1] - 1) for tree in trees),
        forecast_ms=_milliseconds(best["forecast"]),
        measured_ms=_milliseconds(best["measured"]),
        trees=trees,
    )


def _milliseconds(seconds: tuple[float, ...]) -> str:
    return " / ".join(f"{1e3 * value:.1f}" for value in seconds)


def main() -> None:
    """Measure what is asked for and print the table, and the median over the models."""
    common.prepare()
    options: argparse.Namespace = common.arguments(__doc__ or "").parse_args()
    report = common.Report("plan", COLUMNS, options)
    for case in CASES:
        measure(report, case)
    report.show()
    if report.rows:
        typical = median(row["error"] for row in report.rows)
        report.console.print(f"median error over {len(report.rows)} models: {typical:.1%}")


if __name__ == "__main__":
    main()
