"""Timing on this machine: what measured times belong to, and how they are measured."""

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
    """A device, the settings that its speed depends on, and the torch version, as text."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


@cache
def processor() -> str:
    """The processor's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its queue of work; a CPU has none."""
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
    """Let PyTorch compute with `count` threads for a while; None changes nothing."""
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
    at_least: int = 3,
    warm_up: bool = True,
) -> Times:
    """Time several actions in turns, so that a change of the machine's load concerns all of them.

    There are at most `repeats` rounds, and after `at_least` none begins that is past `budget`
    seconds. Returned are the seconds of every round, by name.
    """
    # The first call allocates memory, chooses kernels and prepares weights.
    for action in actions.values() if warm_up else ():
        action()
    times: Times = {name: [] for name in actions}
    start = time.perf_counter()
    for count in range(repeats):
        if count >= at_least and time.perf_counter() - start > budget:
            break
        for name, action in actions.items():
            times[name].append(timed(action, device))
    return times


def medians(times: Times) -> dict[str, float]:
    """The median of each action's times, in seconds."""
    return {name: median(seconds) for name, seconds in times.items()}
