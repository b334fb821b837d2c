"""Is every multiply-accumulate of an exported ensemble as cheap as in its base model? ONNX Runtime.

`python benchmarks/deploy.py` measures, in one process per row and in turns: the base model exported
by itself, the first answer of the ensemble, all its steps one after the other, and one call of a
file that computes all leaves at once. E is (T_base * MACs_hne / MACs_base) / T. PyTorch, tuned, is
measured in another process: two pools of threads that spin in one slow each other. Deadlines are
those of `benchmarks/anytime.py`.
"""

from __future__ import annotations

import multiprocessing
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
from treeify.deploy.runtime import Anytime, OnnxRuntimeGraph, Threads
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
BATCHES = (1, 8, 32)
# By how a row calls them; two threads are those of each step, or of all.
POOLS = {"1": Threads(1), "2": Threads(2), "2 shared": Threads(2, shared=True)}
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


def measure(report: common.Report, case: common.Case, budget: float) -> None:
    """One row per batch size and pool of threads."""
    rows = {
        (batch, pool): f"{case.name}, batch {batch}, threads {threads}"
        for threads, pool in POOLS.items()
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
    for (batch, pool), row in rows.items():
        if not report.wanted(row):
            continue
        x = np.random.default_rng(0).normal(size=(batch, 3, case.size, case.size))
        images = x.astype(np.float32)
        # A process of its own: PyTorch's threads are not there, and sharing is settled once in it.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            times = process.submit(onnx_times, folder, images, pool, budget).result()
        typical = timing.medians(times)
        torch_time = pytorch(hne, torch.from_numpy(images), pool.number or 1, budget)
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


def onnx_times(folder: Path, images: Any, pool: Threads, budget: float) -> timing.Times:
    """Seconds of the base model and of all ways to answer, in turns."""
    base = OnnxRuntimeGraph(str(folder / "base.onnx"), pool)
    chain, call = (
        Anytime(folder / name, threads=pool.number, preload="all", shared_threads=pool.shared)
        for name in ("steps", "call")
    )
    actions: dict[str, Callable[[], Any]] = {
        "base": lambda: base.run({base.inputs[0]: images}, base.outputs),
        "first": lambda: chain.session(images).advance(),
        "steps": lambda: list(chain.anytime(images)),
        "call": lambda: call.predict(images),
    }
    cpu = torch.device("cpu")
    return timing.alternate(actions, cpu, repeats=_ROUNDS, budget=budget, at_least=5)


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
    report: common.Report, case: common.Case, budget: float, *, pool: Threads, load: bool
) -> None:
    """How often deadlines of one image are kept, and with how many of the leaves that would fit."""
    row = f"{case.name}, deadlines, {'one core busy' if load else 'idle'}, threads {pool.number}"
    if not report.wanted(row):
        return
    hne = case.ensemble(case.base())
    folder = Path(tempfile.mkdtemp()) / "steps"
    export(hne, folder, verify=False)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        report.add(row, **process.submit(kept, folder, pool, budget, load=load).result())


def kept(folder: Path, pool: Threads, budget: float, *, load: bool) -> dict[str, Any]:
    """What became of many deadlines."""
    model = Anytime(folder, threads=pool.number, preload="all", shared_threads=pool.shared)
    _, *shape = model.shape
    x = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
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
    return {
        "hits_%": 100 * sum(each <= 0 for each in late) / len(late),
        "leaves_%": 100 * sum(leaves) / sum(best),
        "misses_by_ms": 1e3 * median(over) if over else 0.0,
        "worst_miss_ms": 1e3 * max(over, default=0.0),
        "first_ms": 1e3 * first,
        "full_ms": 1e3 * full,
        "answers": len(late),
        "threads": pool._asdict(),
        "onnxruntime": onnxruntime.__version__,
    }


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
        deadlines(report, case, options.budget, pool=POOLS["2 shared"], load=False)
        deadlines(report, case, options.budget, pool=POOLS["1"], load=True)
    report.show()


if __name__ == "__main__":
    main()
