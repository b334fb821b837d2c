"""What checksums cost: their part of `treeify.load`, and of an epoch of the digits run.

    python benchmarks/checksums.py

Prints medians; loads with and without checksums alternate in one process.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import treeify
from treeify.conversion import checksums
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train

ROUNDS = 15
NETWORKS = {"test_resnet": 32, "resnet18": 224, "resnet50": 224}
RECIPE = Path(__file__).parents[1] / "recipes" / "digits_hne.yaml"


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def loads(name: str, size: int, folder: Path) -> str:
    """Loading an ensemble of two leaves, with and without checksums."""
    path = folder / name
    example = torch.zeros(1, 3, size, size)
    treeify.save(treeify.hierarchicalize(name, 1, example_input=example), path)
    size = sum(file.stat().st_size for file in path.iterdir())
    treeify.load(path)
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for verify in times:
            times[verify].append(seconds(lambda verify=verify: treeify.load(path, verify=verify)))
    ratios = sorted(
        100 * (new / old - 1) for new, old in zip(times[True], times[False], strict=True)
    )
    quarter = len(ratios) // 4
    return (
        f"{name}: {size / 1e6:.0f} MB load in {statistics.median(times[False]):.2f} s; with"
        f" checksums {statistics.median(ratios):+.1f} % (quartiles {ratios[quarter]:+.1f} to"
        f" {ratios[-1 - quarter]:+.1f})"
    )


@contextmanager
def timed(names: tuple[str, ...]) -> Iterator[list[float]]:
    """The seconds that functions of `checksums` take within."""
    times: list[float] = []

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                times.append(time.perf_counter() - start)

        return call

    values = {name: wrapped(getattr(checksums, name)) for name in names}
    with mock.patch.multiple(checksums, **values):
        yield times


def epochs(folder: Path) -> str:
    """Training on the digits, with every epoch's state saved."""
    recipe = load_recipe(RECIPE, ["schedule.epochs=3"])
    with timed(("checksums", "seal")) as times:
        whole = seconds(lambda: train(recipe, out=folder / "run"))
    return (
        f"digits_hne: three epochs {whole:.1f} s, checksums {1e3 * sum(times):.1f} ms,"
        f" {100 * sum(times) / whole:.2f} %"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name, size in NETWORKS.items():
            print(loads(name, size, Path(folder)))
        print(epochs(Path(folder)))
