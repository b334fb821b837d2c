"""Held-out images in two halves: ways to answer are chosen on one, reported on the other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from treeify.anytime.confidence import Budget, budget
from treeify.anytime.deadline import Latencies
from treeify.arguments import LARGEST_SEED, require_integer, require_number
from treeify.conversion.ensemble import HierarchicalEnsemble, require_ensemble
from treeify.errors import DataError, InputError
from treeify.evaluation.metrics import Batch, pairs, placed, require_labels
from treeify.losses import nested_logits

# Budgets of a sweep, besides the nested sizes.
_BUDGETS = 12


@dataclass(frozen=True)
class OperatingPoint:
    """A way to answer, with what it gave on each half.

    Args:
        leaves: as many for every image; None where thresholds stop each image by itself.
        chosen: its thresholds, and what they gave on the half that ways are chosen on.
        reported: the same thresholds, and what they gave on the other half.
    """

    leaves: int | None
    chosen: Budget
    reported: Budget

    def __str__(self) -> str:
        """In words."""
        if self.leaves is None:
            return f"budget {self.chosen.target_macs:,}"
        return f"{self.leaves} {'leaf' if self.leaves == 1 else 'leaves'}, every image"

    def seconds(self, latencies: Latencies, half: Budget) -> float:
        """Mean time of an image of one half by itself.

        A fixed number of leaves is gone to straight; thresholds stop at every size on the way.
        """
        typical = latencies.typical
        if self.leaves is not None:
            return typical[0, self.leaves]
        steps = (typical[transition] for transition in pairwise((0, *half.sizes)))
        times = zip(half.fractions, accumulate(steps), strict=True)
        return sum(fraction * seconds for fraction, seconds in times)


class Halves:
    """The held-out images' answers: one half to choose on, the other to report on.

    Args:
        hne: the ensemble.
        batches: images `[N, 3, H, W]` and classes `[N]`.
        seed: of the halves.
    """

    def __init__(self, hne: HierarchicalEnsemble, batches: Iterable[Batch], seed: int) -> None:
        require_ensemble(hne)
        require_integer("seed", seed, 0, LARGEST_SEED)
        self.seed = seed
        self.sizes = hne.tree.nested_sizes
        self.macs = [hne.count_macs(size) for size in self.sizes]
        logits, labels = nested_answers(hne, batches)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        first, second = order.tensor_split(2)
        self.choose_on = logits[:, first], labels[first]
        self.report_on = logits[:, second], labels[second]

    @property
    def images(self) -> tuple[int, int]:
        """How many images ways are chosen on, and how many they are reported on."""
        return len(self.choose_on[1]), len(self.report_on[1])

    def point(self, target: int) -> OperatingPoint:
        """Thresholds chosen on one half for a mean of MACs per image."""
        return self._point(None, budget(*self.choose_on, self.sizes, self.macs, target))

    def fixed(self) -> list[OperatingPoint]:
        """Every nested size for all images."""
        count = len(self.sizes) - 1
        points = []
        for index, (size, macs) in enumerate(zip(self.sizes, self.macs, strict=True)):
            # Above every probability nobody stops, at 0 everybody does.
            thresholds = tuple(2.0 if before < index else 0.0 for before in range(count))
            stop = Budget(macs, tuple(self.sizes), thresholds, 0.0, 0.0, (), 0)
            points.append(self._point(size, stop.on(*self.choose_on, self.macs)))
        return points

    def sweep(self) -> list[OperatingPoint]:
        """Every nested size, and thresholds for budgets between the cheapest and the largest."""
        least, most = self.macs[0], self.macs[-1]
        ratio = (most / least) ** (1 / (_BUDGETS + 1)) if least else 1.0
        targets = {_three_digits(least * ratio**step) for step in range(1, _BUDGETS + 1)}
        within = sorted(target for target in targets if least < target < most)
        return [*self.fixed(), *(self.point(target) for target in within)]

    def _point(self, leaves: int | None, chosen: Budget) -> OperatingPoint:
        return OperatingPoint(leaves, chosen, chosen.on(*self.report_on, self.macs))


def _three_digits(number: float) -> int:
    """A number that is easily written on a command line."""
    return int(float(f"{number:.3g}"))


def cheapest(points: Sequence[OperatingPoint], accuracy: float) -> OperatingPoint:
    """The way with the fewest MACs that is right often enough on the half to choose on.

    Args:
        points: to choose from.
        accuracy: the fraction of images to be answered rightly, 0 to 1.

    Raises:
        InputError: none is.
    """
    require_number("accuracy", accuracy, expected="a fraction from 0 to 1")
    right = [point for point in points if point.chosen.accuracy >= accuracy]
    if not right:
        best = max(points, key=lambda point: point.chosen.accuracy)
        raise InputError(
            f"no way to answer is right for {100 * accuracy:g} % of the images.",
            expected=f"at most {100 * best.chosen.accuracy:.2f} % ({best}), as reached on the half"
            " of the held-out images that is chosen on",
        )
    return min(right, key=lambda point: (point.chosen.macs, -point.chosen.accuracy))


def most_accurate(
    points: Sequence[OperatingPoint], latencies: Latencies, seconds: float
) -> OperatingPoint:
    """The way that is right most often on the half to choose on and fast enough on average.

    Args:
        points: to choose from.
        latencies: of single images.
        seconds: mean time per image to be kept.

    Raises:
        InputError: none is.
    """
    require_number("seconds", seconds, 0, expected="mean seconds per image, of at least 0")
    times = [point.seconds(latencies, point.chosen) for point in points]
    fast = [(point, time) for point, time in zip(points, times, strict=True) if time <= seconds]
    if not fast:
        raise InputError(
            f"no way to answer takes a mean of {1e3 * seconds:g} ms here.",
            expected=f"at least {1e3 * min(times):.3g} ms",
        )
    return max(fast, key=lambda row: (row[0].chosen.accuracy, -row[1]))[0]


@torch.no_grad()
def nested_answers(hne: HierarchicalEnsemble, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Logits `[S, N, K]` of every nested size and classes `[N]`, of all images in the batches.

    Raises:
        DataError: there are none, or a class is out of range.
        InputError: `hne` is no ensemble, or the images do not fit it.
    """
    logits, labels = [], []
    require_ensemble(hne)
    for images, target in pairs(batches):
        if not len(images):  # none of them can be read
            continue
        nested = nested_logits(hne(placed(images, hne)).float(), hne.tree)
        require_labels(target, nested.shape[-1])
        logits.append(nested.transpose(0, 1).cpu())
        labels.append(target)
    if not labels:
        raise DataError(
            "there are no images to choose on.",
            expected="at least one batch",
            found="none",
            next_step="Check the data's held-out part.",
        )
    return torch.cat(logits, 1), torch.cat(labels)
