"""How long trees will take on this machine, from measured times of the base model's parts.

The model is run as 1, 2, 4 and 8 networks side by side, fused and tuned as ensembles are, with a
clock around every operation. That gives the time of everything behind each split point for so many
branches; between and beyond these numbers it grows in a straight line. A level then takes what lies
behind its split less what lies behind the next one, both for its number of branches, and a tree the
sum over its levels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import inf
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from treeify.conversion.assemble import assemble
from treeify.conversion.initialize import initial_weights
from treeify.conversion.levels import INPUT, Dependencies
from treeify.engine import timing
from treeify.engine.memory import free_bytes
from treeify.engine.packed_tensors import named_tensors
from treeify.fusion.fuser import FusedTwin
from treeify.planning.costs import nodes_behind
from treeify.tracing.trace import Traced
from treeify.tree import Span

Floats = NDArray[np.float64]

# Numbers of networks that are run side by side, where memory allows.
_MEASURED = (1, 2, 4, 8)
# Of free memory, the part that networks side by side may take.
_MEMORY = 1 / 2
# Rounds, and the seconds after which none begins.
_ROUNDS, _BUDGET, _TUNING = 15, 2.0, 1.0


@dataclass(frozen=True)
class Forecast:
    """Seconds for one image of what lies behind split points, by the number of branches.

    Args:
        whole: of the base model.
        behind: by the number of branches, behind each of `P` points, `[P]`.
        measured: the numbers of branches that were run.
        machine: what they belong to.
    """

    whole: float
    behind: dict[int, Floats]
    measured: tuple[int, ...]
    machine: str

    def of_tree(self, splits: Sequence[int], counts: NDArray[np.int64]) -> tuple[float, ...]:
        """Seconds of some answers of a tree.

        Args:
            splits: positions of its points.
            counts: branches that each answer runs at each level, `[answers, levels]`; answers of
                more leaves come later.
        """
        answers = []
        for branches in counts.tolist():
            seconds = self.whole
            for point, (above, here) in zip(splits, pairwise(branches), strict=True):
                seconds += float(self.behind[here][point] - self.behind[above][point])
            answers.append(seconds)
        # Whatever noise says, no answer takes longer than one of more leaves.
        return tuple(np.minimum.accumulate(answers[::-1])[::-1].tolist())


def forecast(
    base: nn.Module, traced: Traced, names: Sequence[str], sizes: Sequence[int]
) -> Forecast:
    """Measure the parts of a model between its split points.

    Args:
        base: the base model. Not modified.
        traced: the same, traced.
        names: of `P` split points.
        sizes: numbers of branches to know times for.
    """
    dependencies = Dependencies(traced.graphs[False])
    masks = [nodes_behind(dependencies, name) for name in names]
    position = {node.name: index for index, node in enumerate(dependencies.nodes)}
    inside = np.array(
        [[mask >> index & 1 for index in position.values()] for mask in masks], np.float64
    ).reshape(len(names), len(position))
    whole, behind = 0.0, {}
    for branches in _numbers(base, sizes):
        networks = _SideBySide(base, traced, branches)
        times = np.zeros(len(position))
        for name, seconds in networks.seconds().items():
            times[_origin(name, position)] += seconds
        behind[branches] = inside @ times
        if branches == 1:
            whole = float(times.sum())
    return Forecast(
        whole=whole,
        behind=_at_all(behind, sizes),
        measured=tuple(behind),
        machine=timing.describe(_device(base)),
    )


def _numbers(base: nn.Module, sizes: Sequence[int]) -> list[int]:
    """Numbers of networks to run side by side: as many as are needed and fit into memory."""
    one = sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(base))
    # Weights are there twice: fused operations prepare theirs.
    most = _MEMORY * free_bytes(_device(base)) / (2 * one) if one else inf
    return [1, *(count for count in _MEASURED[1:] if count <= min(most, max(sizes)))]


class _SideBySide:
    """So many networks as an ensemble that shares nothing, and the times of its operations.

    Args:
        base: the base model, whose weights all have.
        traced: the same, traced.
        branches: how many networks.
    """

    def __init__(self, base: nn.Module, traced: Traced, branches: int) -> None:
        self._branches = branches
        splits = [f"{INPUT}:{branches}"] if branches > 1 else []
        source = initial_weights(base, None, "copy", 0)
        self._hne = assemble(base, None, splits, source, traced=traced).eval()
        self._batch = traced.batch
        self._images = self._hne.example_images(self._batch)
        self._plan = self._hne.tune(self._images, training=False, repeats=5, budget=_TUNING).plan
        device = self._images.device
        # The program that answers, with a clock around every operation.
        program = self._hne.evaluation_program
        if self._plan.fuse:
            program = FusedTwin(program).usable()
        segments: list[Any] = [
            replace(segment, module=_TimedSegment(segment.module, device, self._add))  # type: ignore[arg-type]
            for segment in program.segments
        ]
        self._timed = replace(program, segments=tuple(segments))
        self._rounds: list[dict[str, float]] = []

    @torch.no_grad()
    def seconds(self) -> dict[str, float]:
        """The median seconds of every operation for one image: its part of those of the batch.

        Together they take what whole answers do: clocks take time themselves, and operations in a
        row are faster than one by one.
        """
        device = self._images.device
        # One after the other, since in turns they would drive one another's weights out of caches.
        answer = partial(self._hne.predict, self._images)
        whole = _median_seconds(answer, device) / self._batch
        _median_seconds(self._answer_in_parts, device)
        rounds = self._rounds[1:]  # the first only warms up
        parts = {name: median(times[name] for times in rounds) for name in rounds[0]}
        return {name: seconds * whole / sum(parts.values()) for name, seconds in parts.items()}

    def _answer_in_parts(self) -> None:
        self._rounds.append({})
        images, span = self._plan.arrange(self._images), Span(0, self._branches)
        self._timed.run(images, span, self._plan.execution)

    def _add(self, name: str, seconds: float) -> None:
        """An operation took so long; looped ones are called several times in a round."""
        latest = self._rounds[-1]
        latest[name] = latest.get(name, 0.0) + seconds


def _device(base: nn.Module) -> torch.device:
    """Where a model computes."""
    return next((tensor.device for _, tensor in named_tensors(base)), torch.device("cpu"))


def _median_seconds(action: Callable[[], Any], device: torch.device) -> float:
    """The median seconds of an action."""
    times = timing.alternate({"": action}, device, repeats=_ROUNDS, budget=_BUDGET)
    return median(times[""])


class _TimedSegment(fx.Interpreter):
    """Runs a segment operation by operation, as a graph module of it would."""

    def __init__(
        self, module: fx.GraphModule, device: torch.device, add: Callable[[str, float], None]
    ) -> None:
        super().__init__(module)
        self._device, self._add = device, add

    def __call__(self, span: Span, *inputs: Tensor) -> Any:
        """The segment's outputs."""
        return self.run(span, *inputs)

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        timing.synchronize(self._device)
        start = time.perf_counter()
        result = super().run_node(n)
        timing.synchronize(self._device)
        self._add(n.name, time.perf_counter() - start)
        return result


def _origin(name: str, position: dict[str, int]) -> int:
    """The node of the base graph that an operation stems from, by the beginning of its name."""
    return next(position[part] for part in _beginnings(name) if part in position)


def _beginnings(name: str) -> Iterator[str]:
    """`relu_1_packed_fused` -> itself, `relu_1_packed`, `relu_1`, `relu`."""
    while name:
        yield name
        name = name.rpartition("_")[0]


def _at_all(behind: dict[int, Floats], sizes: Sequence[int]) -> dict[int, Floats]:
    """Times for every number of branches, in straight lines between and beyond the measured."""
    known = sorted(behind)
    if len(known) == 1:  # nothing but proportion is left
        return {count: count * behind[1] for count in sizes}
    # More branches never take less time, whatever noise says.
    table = np.maximum.accumulate(np.stack([behind[count] for count in known]), axis=0)
    times = {}
    for count in sizes:
        upper = min(max(int(np.searchsorted(known, count)), 1), len(known) - 1)
        low, high = known[upper - 1], known[upper]
        slope = (table[upper] - table[upper - 1]) / (high - low)
        times[count] = table[upper - 1] + slope * (count - low)
    return times
