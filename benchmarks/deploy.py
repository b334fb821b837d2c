"""Is every multiply-accumulate of an exported ensemble as cheap as in its base model? ONNX Runtime.

`python benchmarks/deploy.py` measures, in one process and in turns: the base model exported by
itself, the first answer of the ensemble, all its steps one after the other, and one call of a file
that computes all leaves at once. E is (T_base * MACs_hne / MACs_base) / T. PyTorch, tuned, is
measured after that: two pools of threads that spin in one process slow each other. Deadlines are
those of `benchmarks/anytime.py`.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import anytime
import common
import numpy as np
import onnxruntime
import torch
from torch import nn

from treeify.deploy import export
from treeify.deploy.runtime import Anytime
from treeify.engine import timing

CASES = (*common.CIFAR, *common.IMAGENET)
NAMES = (
    "HNE_small",
    "HNE",
    "MobileNetV2 HNE",
    "resnet18",
    "vit_tiny_patch16_224",
    "efficientnet_b0",
)
BATCHES, THREADS = (1, 8, 32), (1, 2)
# Forms are chosen by measuring at these sizes; every row runs the same files.
_ROUNDS = 200


def base_graph(base: nn.Module, size: int, file: Path) -> None:
    """The base model as its user would export it."""
    x = torch.zeros(2, 3, size, size)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program: Any = torch.onnx.export(
        base.to(memory_format=torch.contiguous_format),
        (x,),
        dynamo=True,
        dynamic_shapes=shapes,
        opset_version=18,
        verbose=False,
    )
    program.save(file)


def session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    """A file in the runtime, with the options of `Anytime`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def in_turns(
    actions: dict[str, Callable[[], Any]], budget: float, rounds: int = _ROUNDS
) -> dict[str, list[float]]:
    """Seconds of actions that take turns."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    begin = perf_counter()
    while len(times["base"]) < rounds and (
        perf_counter() - begin < budget or len(times["base"]) < 5
    ):
        for name, action in actions.items():
            start = perf_counter()
            action()
            times[name].append(perf_counter() - start)
    return times


def measure(report: common.Report, case: common.Case, budget: float) -> None:
    """One row per batch size and number of threads."""
    rows = {
        (batch, threads): f"{case.name}, batch {batch}, threads {threads}"
        for threads in THREADS
        for batch in BATCHES
    }
    if not any(report.wanted(row) for row in rows.values()):
        return
    base = case.base()
    hne = case.ensemble(base)
    ratio = hne.count_macs() / hne.count_macs(1)
    folder = Path(tempfile.mkdtemp())
    base_graph(base, case.size, folder / "base.onnx")
    steps = export(hne, folder / "steps", verify=False)
    export(hne, folder / "call", sizes=[hne.leaves], verify=False)
    size = sum(row["bytes"] for row in steps.manifest["steps"])
    for (batch, threads), row in rows.items():
        if not report.wanted(row):
            continue
        x = np.random.default_rng(0).normal(size=(batch, 3, case.size, case.size))
        images = x.astype(np.float32)
        alone = session(folder / "base.onnx", threads)
        (name,) = (each.name for each in alone.get_inputs())
        chain = Anytime(folder / "steps", threads=threads, preload="all")
        call = Anytime(folder / "call", threads=threads, preload="all")
        actions: dict[str, Callable[[], Any]] = {
            "base": lambda: alone.run(None, {name: images}),  # noqa: B023 - called at once
            "first": lambda: chain.session(images).advance(),  # noqa: B023
            "steps": lambda: list(chain.anytime(images)),  # noqa: B023
            "call": lambda: call.predict(images),  # noqa: B023
        }
        times = in_turns(actions, budget)
        typical = {key: median(each) for key, each in times.items()}
        torch_time = pytorch(hne, torch.from_numpy(images), threads, budget)
        report.add(
            row,
            macs_ratio=ratio,
            MB=size / 1e6,
            **{key: common.milliseconds(each) for key, each in times.items()},
            first_vs_base=typical["first"] / typical["base"],
            E_steps=typical["base"] * ratio / typical["steps"],
            E_call=typical["base"] * ratio / typical["call"],
            steps_vs_call=typical["steps"] / typical["call"],
            torch_vs_call=torch_time / typical["call"],
            torch=f"{1e3 * torch_time:.2f}",
            forms=[each["forms"] for each in steps.manifest["steps"]],
            onnxruntime=onnxruntime.__version__,
            seconds={key: common.spread(each) for key, each in times.items()},
        )


def pytorch(hne: Any, x: torch.Tensor, threads: int, budget: float) -> float:
    """Median seconds of one call in PyTorch, tuned for these images."""
    torch.set_num_threads(threads)
    try:
        hne.tune(x, budget=budget / 4)
        with torch.inference_mode():
            times = timing.alternate({"torch": lambda: hne(x)}, x.device, repeats=30, budget=budget)
    finally:
        hne.tunings.clear()
    return median(times["torch"])


def deadlines(
    report: common.Report, case: common.Case, budget: float, *, threads: int, load: bool
) -> None:
    """How often deadlines of one image are kept, and with how many of the leaves that would fit."""
    state = f"{'one core busy' if load else 'idle'}, threads {threads}"
    row = f"{case.name}, deadlines, {state}"
    if not report.wanted(row):
        return
    hne = case.ensemble(case.base())
    folder = Path(tempfile.mkdtemp()) / "steps"
    export(hne, folder, verify=False)
    x = np.random.default_rng(0).normal(size=(1, 3, case.size, case.size)).astype(np.float32)
    model = Anytime(folder, threads=threads, preload="all")
    with anytime.busy(load):
        known = model.calibrate(x, repeats=200, budget=budget)
        first, full = known.slow[0, 1], known.slow[0, model.leaves]
        low, high = min(first, full), max(first, full)
        count = anytime.DEADLINES
        wanted = [low + (high - low) * index / (count - 1) for index in range(count)]
        random.Random(0).shuffle(wanted)
        late, leaves, best = [], [], []
        begin = perf_counter()
        while perf_counter() - begin < 3 * budget:
            for deadline in wanted:
                start = perf_counter()
                answer = model.predict(x, deadline=deadline)
                late.append(perf_counter() - start - deadline)
                leaves.append(int(answer.leaves[0]))
                best.append(most_in(model, x, deadline))
    over = [each for each in late if each > 0]
    report.add(
        row,
        **{
            "hits_%": 100 * sum(each <= 0 for each in late) / len(late),
            "leaves_%": 100 * sum(leaves) / sum(best),
            "misses_by_ms": 1e3 * median(over) if over else 0.0,
        },
        worst_miss_ms=1e3 * max(over, default=0.0),
        first_ms=1e3 * first,
        full_ms=1e3 * full,
        answers=len(late),
        onnxruntime=onnxruntime.__version__,
    )


def most_in(model: Anytime, x: Any, deadline: float) -> int:
    """The most leaves that end within a deadline, seen by trying."""
    start = perf_counter()
    session, most = model.session(x), 1
    while not session.done:
        leaves = session.advance().leaves
        if perf_counter() - start > deadline:
            break
        most = leaves
    return most


COLUMNS = (
    *("base", "first", "steps", "call", "torch"),
    *("first_vs_base", "E_steps", "E_call", "steps_vs_call", "torch_vs_call"),
    *("hits_%", "leaves_%", "misses_by_ms"),
)


def main() -> None:
    """Measure every row that is not there yet."""
    options = common.arguments(__doc__ or "").parse_args()
    common.prepare()
    report = common.Report("deploy", COLUMNS, options)
    for case in CASES:
        if case.name in NAMES:
            measure(report, case, options.budget)
    for case in common.CIFAR:
        deadlines(report, case, options.budget, threads=2, load=False)
        deadlines(report, case, options.budget, threads=1, load=True)
    report.show()


if __name__ == "__main__":
    main()
