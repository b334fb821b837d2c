"""What does a conversion cost? Time and peak memory of `hierarchicalize`.

`python benchmarks/conversion.py` converts six backbones to 16 leaves with fresh weights, and builds
the same number of base models and traces one, each in a process of its own. Peak memory is the
process's largest resident set less what it had after its imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import common

NAMES = (
    *("mobilenetv2_140", "torchvision/resnet18", "torchvision/resnet50", "convnext_atto"),
    *("efficientnet_b0", "vit_tiny_patch16_224"),
)
LEAVES = 16
ROUNDS = 3
COLUMNS = (
    *("converted", "built", "traced", "time_ratio", "result_MB", "base_MB", "peak_MB"),
    "peak_ratio",
)


def child(task: str, name: str) -> dict[str, float]:
    """Seconds and peak memory in bytes of one task, in this process."""
    import torch

    import treeify
    from treeify.conversion.assemble import trace_model
    from treeify.conversion.resolve import resolve

    torch.set_num_threads(2)
    # The libraries that a first model imports are no part of the cost.
    base, architecture = resolve(name)
    trace_model(base, architecture)
    before = _resident()
    _reset_peak()
    begin = time.perf_counter()
    size = 0
    if task == "convert":
        hne = treeify.hierarchicalize(name, 4, init="fresh")
        size = _bytes(hne)
    elif task == "build":
        for seed in range(LEAVES):
            base, _ = resolve(name, seed)
        size = _bytes(base)
    else:
        trace_model(base, architecture)
    return {"seconds": time.perf_counter() - begin, "peak": _peak() - before, "size": size}


def _bytes(module: object) -> int:
    from torch import nn

    assert isinstance(module, nn.Module)
    return sum(
        own.numel() * own.element_size() for own in (*module.parameters(), *module.buffers())
    )


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _run(task: str, name: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", task, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(report: common.Report, name: str) -> None:
    """One row per backbone; the three tasks take turns."""
    row = f"{name}, {LEAVES} leaves"
    if not report.wanted(row):
        return
    tasks = ("convert", "build", "trace")
    found: dict[str, list[dict[str, float]]] = {task: [] for task in tasks}
    for _ in range(ROUNDS):
        for task in tasks:
            found[task].append(_run(task, name))
    times = {task: [own["seconds"] for own in runs] for task, runs in found.items()}
    converted, built, traced = (common.median(times[task]) for task in tasks)
    result, base = found["convert"][0]["size"], found["build"][0]["size"]
    peak = common.median([own["peak"] for own in found["convert"]])
    report.add(
        row,
        converted=common.milliseconds(times["convert"]),
        built=common.milliseconds(times["build"]),
        traced=common.milliseconds(times["trace"]),
        time_ratio=converted / (built + traced),
        result_MB=result / 1e6,
        base_MB=base / 1e6,
        peak_MB=peak / 1e6,
        peak_ratio=peak / (result + 2 * base),
        seconds={task: common.spread(own) for task, own in times.items()},
    )


def main() -> None:
    """Measure what is asked for and print the table."""
    if sys.argv[1:2] == ["--child"]:
        sys.stdout.write(json.dumps(child(sys.argv[2], sys.argv[3])) + "\n")
        return
    options = common.arguments(__doc__ or "").parse_args()
    report = common.Report("conversion", COLUMNS, options)
    for name in NAMES:
        measure(report, name)
    report.show()


if __name__ == "__main__":
    main()
