"""Do answers come in time? First answers, steps against one call, deadlines under load.

`python benchmarks/anytime.py` measures, for the CIFAR ensembles and the MobileNetV2 one at 224:
the first answer against the base model; the sum of all steps against one call; and, for
deadlines spread evenly from the first leaf's calibrated time to that of going straight to all
leaves, how often the answer came in time and how many leaves it had, against the most that would
have fitted. Deadlines are for one image, the machine idle or one core kept busy by another
process (then with two threads and with one), and calibrated so each time.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import common
import torch
from torch import Tensor

import treeify
from treeify.anytime.deadline import Slowdown, advance_until
from treeify.engine import timing

CASES = (*common.CIFAR, common.IMAGENET[0])
BATCHES = (1, 8, 32)
DEADLINES = 40
COLUMNS = (
    *("base", "first", "first_vs_base", "steps", "one_call", "steps_vs_call"),
    *("hits_%", "misses_by_ms", "leaves", "leaves_in_hindsight", "leaves_%"),
)


@contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """Another process that computes all the time, if wanted."""
    if not wanted:
        yield
        return
    # It ends with this process, however that one ends.
    work = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(1000))"
    other = subprocess.Popen([sys.executable, "-c", work])
    try:
        time.sleep(0.5)
        yield
    finally:
        other.kill()
        other.wait()


def all_steps(hne: treeify.HierarchicalEnsemble, x: Tensor) -> None:
    """A session from the first leaf to the last."""
    for _ in hne.anytime(x):
        pass


def latencies(report: common.Report, case: common.Case, count: int, budget: float) -> None:
    """The first answer, and all steps against one call."""
    row = f"{case.name}, batch {count}, steps"
    if not report.wanted(row):
        return
    base = case.base()
    hne = case.ensemble(base)
    x = case.images(count)
    hne.tune(x, repeats=5)
    actions = {
        "base": lambda: base(x),
        "first": lambda: hne.session(x).advance(),
        "steps": partial(all_steps, hne, x),
        "one_call": lambda: hne.predict(x),
    }
    with torch.no_grad():
        times = timing.alternate(actions, x.device, repeats=101, budget=budget)
    typical = timing.medians(times)
    report.add(
        row,
        **{name: common.milliseconds(own) for name, own in times.items()},
        first_vs_base=typical["first"] / typical["base"],
        steps_vs_call=typical["steps"] / typical["one_call"],
        seconds={name: common.spread(own) for name, own in times.items()},
    )


def deadlines(
    report: common.Report, case: common.Case, budget: float, *, state: str, load: bool
) -> None:
    """How often deadlines are kept, and with how many leaves."""
    row = f"{case.name}, deadlines, {state}"
    if not report.wanted(row):
        return
    hne = case.ensemble(case.base())
    x = case.images(1)
    hne.tune(x)
    with busy(load):
        known = hne.calibrate(x, repeats=200, budget=budget)
        first, full = known.slow[0, 1], known.slow[0, hne.leaves]
        # Rare slow calls may meet the first leaf more than all of them.
        low, high = min(first, full), max(first, full)
        wanted = [low + (high - low) * i / (DEADLINES - 1) for i in range(DEADLINES)]
        random.Random(0).shuffle(wanted)
        slowdown = Slowdown()
        late, leaves, best = [], [], []
        begin = time.perf_counter()
        while time.perf_counter() - begin < 3 * budget:
            for deadline in wanted:
                start = time.perf_counter()
                session = hne.session(x)
                advance_until(session, known, deadline, start, slowdown=slowdown)
                late.append(time.perf_counter() - start - deadline)
                leaves.append(session.leaves)
                best.append(most_in(hne, x, deadline))
    hits = sum(own <= 0 for own in late) / len(late)
    over = [own for own in late if own > 0]
    report.add(
        row,
        **{
            "hits_%": 100 * hits,
            "misses_by_ms": 1e3 * common.median(over) if over else 0.0,
            "leaves": sum(leaves) / len(leaves),
            "leaves_in_hindsight": sum(best) / len(best),
            "leaves_%": 100 * sum(leaves) / sum(best),
        },
        worst_miss_ms=1e3 * max(over, default=0.0),
        first_ms=1e3 * first,
        full_ms=1e3 * full,
        typical_first_ms=1e3 * known.typical[0, 1],
        typical_full_ms=1e3 * known.typical[0, hne.leaves],
        margins=[min(known.margins.values()), max(known.margins.values())],
        margin_full=known.margins[0, hne.leaves],
        answers=len(late),
    )


def most_in(hne: treeify.HierarchicalEnsemble, x: Tensor, deadline: float) -> int:
    """The largest nested size that ends within a deadline, straight or step by step.

    Seen by trying: straight calls from the largest size down until one fits, then all steps as far
    as they fit.
    """
    straight = stepwise = 1
    for size in reversed(hne.tree.nested_sizes):
        start = time.perf_counter()
        hne.session(x).advance(to=size)
        if time.perf_counter() - start <= deadline:
            straight = size
            break
    start = time.perf_counter()
    session = hne.session(x)
    while not session.done:
        step = session.advance()
        if time.perf_counter() - start > deadline:
            break
        stepwise = step.leaves
    return max(straight, stepwise)


def main() -> None:
    """Measure what is asked for and print the table."""
    options = common.arguments(__doc__ or "").parse_args()
    common.prepare()
    report = common.Report("anytime", COLUMNS, options)
    for case in CASES:
        for count in BATCHES:
            latencies(report, case, count, options.budget)
        deadlines(report, case, options.budget, state="idle", load=False)
        deadlines(report, case, options.budget, state="one core busy", load=True)
        with timing.threads(1):
            state = "one core busy, one thread"
            deadlines(report, case, options.budget, state=state, load=True)
    report.show()


if __name__ == "__main__":
    main()
