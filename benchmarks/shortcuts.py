"""Does each shortcut of the engine pay? With and without it, everything else being equal.

`python benchmarks/shortcuts.py` takes one shortcut away at a time, in one process and in turns, and
shows how many times slower that is. The allocator's setting cannot be taken back in a process: its
two sides run in processes of their own, in turns. `torch.compile` is not used: its rows show how
many times faster the engine is than levels that are compiled, and an eager base model than a
compiled one, which is what a looped level runs.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import common
import torch
import torchvision
from torch import Tensor

import treeify
from treeify import losses
from treeify.engine import timing
from treeify.engine.forms import children, pack, unpack
from treeify.engine.plan import Plan
from treeify.engine.program import LOOPED, PACKED, Walk
from treeify.fusion import FusedConv, FusedLinear, conv
from treeify.rules.operations import patches

SMALL, LARGE = common.CIFAR
RESNET = common.Case("resnet18 at 64x64", torchvision.models.resnet18, 64)
MOBILE = common.IMAGENET[0]
VIT = next(case for case in common.IMAGENET if case.name == "vit_tiny_patch16_224")
COLUMNS = ("with", "without", "gain")


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute with another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def replicate(span: Any, ratio: int, x: Tensor, known: Any) -> tuple[int, Tensor]:
    """`packing.read_once` without its point: every child gets a copy of its parent's value."""
    parents = span.parents(ratio)
    return span.size, pack(children(unpack(x, known, parents.size), span, ratio), known)


@contextmanager
def plain_kernels(hne: treeify.HierarchicalEnsemble) -> Iterator[None]:
    """Fused layers by PyTorch's own calls: weights are laid out anew at each."""
    layers = [
        module
        for segment in hne._fused.program.segments
        for module in segment.module.modules()
        if isinstance(module, FusedConv | FusedLinear)
    ]
    before = [own.has_onednn for own in layers]
    for own in layers:
        own.has_onednn = False
    try:
        yield
    finally:
        for own, value in zip(layers, before, strict=True):
            own.has_onednn = value


@dataclass(frozen=True)
class Shortcut:
    """One thing to take away.

    Args:
        name: of the row.
        case: the ensemble.
        batches: their sizes.
        way: how all levels run.
        without: what takes it away while it is entered.
        training: whether training steps are timed.
    """

    name: str
    case: common.Case
    batches: Sequence[int]
    way: str
    without: Callable[[treeify.HierarchicalEnsemble], Any]
    training: bool = False


SHORTCUTS = (
    Shortcut(
        *("siblings read their parent's value once", SMALL, (1, 32), PACKED),
        lambda hne: changed(conv, "read_once", replicate),
    ),
    Shortcut("weights laid out once", SMALL, (1, 32), PACKED, plain_kernels),
    Shortcut("weights laid out once", MOBILE, (1,), PACKED, plain_kernels),
    Shortcut("weights laid out once", VIT, (8,), LOOPED, plain_kernels),
    Shortcut(
        *("small 1x1 convolutions as products", SMALL, (1, 8), LOOPED),
        lambda hne: changed(conv, "SMALL", 0.0),
    ),
    Shortcut(
        *("depth-first through looped levels", LARGE, (8, 32), LOOPED),
        lambda hne: changed(Walk, "_stage_end", lambda walk, level: level),
    ),
    Shortcut(
        *("convolutions of few pixels as products", RESNET, (8, 128), PACKED),
        lambda hne: changed(patches, "pays", lambda conv, branches, x: False),
        training=True,
    ),
    Shortcut(
        *("convolutions of few pixels as products", RESNET, (8, 128), LOOPED),
        lambda hne: changed(patches, "pays", lambda conv, branches, x: False),
        training=True,
    ),
)


def compare(
    report: common.Report,
    row: str,
    actions: dict[str, Callable[[], Any]],
    budget: float,
) -> None:
    """One row of `with` and `without`."""
    times = timing.alternate(actions, torch.device("cpu"), repeats=21, budget=budget)
    add(report, row, times)


def add(report: common.Report, row: str, times: timing.Times) -> None:
    """Keep the row."""
    typical = timing.medians(times)
    report.add(
        row,
        **{name: common.milliseconds(own) for name, own in times.items()},
        gain=typical["without"] / typical["with"],
        seconds={name: common.spread(own) for name, own in times.items()},
    )


def action(
    hne: treeify.HierarchicalEnsemble, x: Tensor, plan: Plan, context: Callable[[], Any]
) -> Callable[[], None]:
    """Inference, or a training step of the hierarchical-distillation loss."""
    labels = torch.zeros(len(x), dtype=torch.long)

    def infer() -> None:
        with context(), torch.no_grad():
            hne.run(x, hne.leaves, plan)

    def step() -> None:
        with context():
            logits = hne.run(x, hne.leaves, plan)
            losses.hierarchical_distillation(logits, labels, hne.tree).backward()  # type: ignore[no-untyped-call]
        hne.zero_grad()

    return step if hne.training else infer


def single(report: common.Report, shortcut: Shortcut, budget: float) -> None:
    """A shortcut's rows, one per batch size."""
    case = shortcut.case
    kind = f"{case.name}, {shortcut.way}{', training step' if shortcut.training else ''}"
    rows = {count: f"{shortcut.name}: {kind}, batch {count}" for count in shortcut.batches}
    if not any(report.wanted(row) for row in rows.values()):
        return
    hne = case.ensemble(case.base()).train(shortcut.training)
    hne.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = Plan((shortcut.way,) * hne.tree.levels, channels_last=True, fuse=not shortcut.training)
    for count, row in rows.items():
        if report.wanted(row):
            x = case.images(count)
            sides = {"with": nullcontext, "without": lambda: shortcut.without(hne)}
            actions = {name: action(hne, x, plan, side) for name, side in sides.items()}
            compare(report, row, actions, budget)


def folding(report: common.Report, budget: float) -> None:
    """Batch norms and activations inside the convolutions, and channels last in memory."""
    for case, count in ((SMALL, 1), (SMALL, 32), (MOBILE, 1)):
        rows = {
            "fuse": f"norms and activations fused: {case.name}, {PACKED}, batch {count}",
            "channels_last": f"channels last: {case.name}, {PACKED}, batch {count}",
        }
        if not any(report.wanted(row) for row in rows.values()):
            continue
        hne = case.ensemble(case.base())
        x, levels = case.images(count), hne.tree.levels
        hne.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        contiguous = copy.deepcopy(hne).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        plan = Plan((PACKED,) * levels, channels_last=True, fuse=True)
        best = action(hne, x, plan, nullcontext)
        others = {
            "fuse": action(hne, x, replace(plan, fuse=False), nullcontext),
            "channels_last": action(contiguous, x, replace(plan, channels_last=False), nullcontext),
        }
        for name, row in rows.items():
            if report.wanted(row):
                compare(report, row, {"with": best, "without": others[name]}, budget)


def compiled(hne: treeify.HierarchicalEnsemble, plan: Plan, x: Tensor) -> Callable[[], None]:
    """The plan with every level's segment compiled."""
    program = hne._programs[hne.training]
    segments = [
        replace(segment, module=torch.compile(segment.module)) for segment in program.segments
    ]
    whole = replace(program, segments=tuple(segments))

    def run() -> None:
        with torch.no_grad():
            whole.run(plan.arrange(x), treeify.tree.Span(0, hne.leaves), plan.execution)

    return run


def compiling(report: common.Report, budget: float) -> None:
    """The engine against levels compiled by Inductor, and the base model against itself."""
    for count in (1, 32):
        row = f"engine against compiled levels: {SMALL.name}, {PACKED}, batch {count}"
        base_row = f"eager against compiled base model: {SMALL.name}, batch {count}"
        if not any(report.wanted(name) for name in (row, base_row)):
            continue
        torch.compiler.reset()
        base, x = SMALL.base(), SMALL.images(count)
        hne = SMALL.ensemble(base)
        hne.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        plan = Plan((PACKED,) * hne.tree.levels, channels_last=True, fuse=True)
        engine = action(hne, x, plan, nullcontext)
        if report.wanted(row):
            compare(report, row, {"with": engine, "without": compiled(hne, plan, x)}, budget)
        if report.wanted(base_row):
            fast = torch.compile(base)
            with torch.no_grad():
                actions = {"with": partial(base, x), "without": partial(fast, x)}
                compare(report, base_row, actions, budget)


def child(setting: str, count: int, training: bool) -> None:
    """Seconds of some steps in this process, with or without the allocator's setting."""
    torch.set_num_threads(2)
    if setting == "with":
        treeify.tune_allocator()
    hne = LARGE.ensemble(LARGE.base()).train(training)
    hne.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = Plan((PACKED,) * hne.tree.levels, channels_last=True, fuse=not training)
    run = action(hne, LARGE.images(count), plan, nullcontext)
    times = timing.alternate({"": run}, torch.device("cpu"), repeats=5, budget=20, at_least=2)
    sys.stdout.write(json.dumps(times[""]) + "\n")


def allocator(report: common.Report) -> None:
    """`tune_allocator`, in processes of their own."""
    for count, training in ((32, False), (128, False), (32, True), (128, True)):
        kind = "training step" if training else "inference"
        row = f"memory kept by the allocator: {LARGE.name}, {PACKED}, {kind}, batch {count}"
        if not report.wanted(row):
            continue
        times: timing.Times = {"with": [], "without": []}
        for _ in range(3):
            for setting, found in times.items():
                command = [sys.executable, __file__, "--child", setting, str(count), str(training)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found += json.loads(done.stdout.splitlines()[-1])
        add(report, row, times)


def main() -> None:
    """Measure what is asked for and print the table."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True")
        return
    options = common.arguments(__doc__ or "").parse_args()
    common.prepare()
    report = common.Report("shortcuts", COLUMNS, options)
    for shortcut in SHORTCUTS:
        single(report, shortcut, options.budget)
    folding(report, options.budget)
    allocator(report)
    compiling(report, options.budget)
    report.show()


if __name__ == "__main__":
    main()
