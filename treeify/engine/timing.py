"""This machine and its clock: what measured times belong to, and how they are taken."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

Times = dict[str, list[float]]


def describe(device: torch.device) -> str:
    """A device, its speed-relevant settings and the torch version, e.g. to compare measurements.

    Args:
        device: a CPU or an accelerator.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


@cache
def _processor() -> str:
    """The processor's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; nothing to wait for on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds an action takes on a device."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let PyTorch compute with so many threads, then with as many as before; None changes none."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alternate(
    actions: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    repeats: int = 15,
    budget: float = float("inf"),
    least: int = 3,
    warm_up: bool = True,
) -> Times:
    """Time several actions in turns, so that a change of the machine's load meets all of them.

    Args:
        actions: what to time, by name.
        device: where they run.
        repeats: rounds at most.
        budget: seconds for all rounds; no new one starts after it.
        least: rounds at least, whatever they take.
        warm_up: run each once beforehand, untimed.

    Returns:
        Seconds of every round, by name.
    """
    for action in actions.values() if warm_up else ():
        action()
    times: Times = {name: [] for name in actions}
    start = time.perf_counter()
    for done in range(repeats):
        if done >= least and time.perf_counter() - start > budget:
            break
        for name, action in actions.items():
            times[name].append(timed(action, device))
    return times


def medians(times: Times) -> dict[str, float]:
    """The median of each action's times, in seconds."""
    return {name: median(found) for name, found in times.items()}
