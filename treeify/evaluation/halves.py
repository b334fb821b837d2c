"""Confidence thresholds for `treeify calibrate`: chosen on some images, reported on others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from treeify.anytime.confidence import BUDGET, Budget, budget
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data import Data
from treeify.losses import nested_logits
from treeify.training.loaders import Batch, held_out_loader, noting

_IMAGES_AT_ONCE = 128


class Halves:
    """The held-out images' answers: one half to choose thresholds on, the other to report on.

    Args:
        hne: the ensemble.
        images: held-out images and their classes.
        seed: of the halves.
        skip: leave out images that cannot be read; else they are an error.
    """

    def __init__(
        self, hne: HierarchicalEnsemble, images: Data, seed: int, *, skip: bool = False
    ) -> None:
        self.split, self.seed = images.split, seed
        self.skipped: set[str] = set()
        self.sizes = hne.tree.nested_sizes
        self.macs = [hne.count_macs(size) for size in self.sizes]
        batches = held_out_loader(images.held_out, _IMAGES_AT_ONCE, skip=skip)
        logits, labels = _answers(hne, noting(batches, self.skipped))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        first, second = order.tensor_split(2)
        self.choose_on = logits[:, first], labels[first]
        self.report_on = logits[:, second], labels[second]

    def budget(self, target: int) -> Budget:
        """Thresholds chosen on one half, with what they give on the other."""
        chosen = budget(*self.choose_on, self.sizes, self.macs, target)
        return chosen.on(*self.report_on, self.macs)

    @property
    def fixed(self) -> list[float]:
        """Accuracy of every nested size for all images, 0 to 1."""
        logits, labels = self.report_on
        return (logits.argmax(-1) == labels).double().mean(1).tolist()

    def explanation(self) -> str:
        """On which images what was done."""
        chosen, reported = (len(labels) for _, labels in (self.choose_on, self.report_on))
        left_out = ", ".join(sorted(self.skipped))
        return (
            f"Thresholds were chosen on {chosen:,} held-out images; accuracy, MACs and stops are"
            f" those of the {reported:,} others (seed {self.seed}; {self.split})."
            + (f" Not read, and left out: {left_out}." if left_out else "")
        )

    def accuracy_table(self, budgets: Sequence[Budget]) -> Table:
        """Fixed sizes, and beside them thresholds."""
        table = Table(caption="mean MACs per image, on images that no threshold was chosen on")
        table.add_column("answer")
        for heading in ("MACs", "accuracy %"):
            table.add_column(heading, justify="right")
        for size, macs, accuracy in zip(self.sizes, self.macs, self.fixed, strict=True):
            word = "leaf" if size == 1 else "leaves"
            table.add_row(f"{size} {word}, every image", f"{macs:,}", f"{100 * accuracy:.2f}")
        table.add_section()
        for own in budgets:
            row = (f"{own.macs:,.0f}", f"{100 * own.accuracy:.2f}")
            table.add_row(f"budget {own.target_macs:,}", *row)
        return table

    def threshold_table(self, budgets: Sequence[Budget]) -> Table:
        """The confidence that stops an image at each size, and how many it stops."""
        table = Table(caption="an image stops at this confidence: share of the images that do")
        table.add_column("leaves", justify="right")
        for own in budgets:
            table.add_column(f"budget {own.target_macs:,}", justify="right")
        for index, size in enumerate(self.sizes):
            table.add_row(str(size), *(_stop(own, index) for own in budgets))
        return table

    def as_json(self, budgets: Sequence[Budget]) -> dict[str, Any]:
        """Everything the tables show; accuracies and fractions from 0 to 1."""
        chosen, reported = (len(labels) for _, labels in (self.choose_on, self.report_on))
        rows = zip(self.sizes, self.macs, self.fixed, strict=True)
        return {
            "split": self.split,
            "seed": self.seed,
            "skipped": sorted(self.skipped),
            "images": {"chosen_on": chosen, "reported_on": reported},
            "fixed": [
                {"leaves": size, "macs": macs, "accuracy": accuracy}
                for size, macs, accuracy in rows
            ],
            "budgets": [
                BUDGET.dump_python(budget, mode="json", by_alias=True) for budget in budgets
            ],
        }


@torch.no_grad()
def _answers(hne: HierarchicalEnsemble, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Logits of every nested size `[S, N, K]`, and classes `[N]`, of all images."""
    first = next(hne.parameters())
    logits, labels = [], []
    for batch, target, _ in batches:
        if not len(batch):  # none of its images can be read
            continue
        nested = nested_logits(hne(batch.to(first.device, first.dtype)).float(), hne.tree)
        logits.append(nested.transpose(0, 1).cpu())
        labels.append(target)
    return torch.cat(logits, 1), torch.cat(labels)


def _stop(own: Budget, index: int) -> str:
    fraction = f"{100 * own.fractions[index]:.1f} %"
    if index == len(own.thresholds):
        return f"the rest: {fraction}"
    threshold = own.thresholds[index]
    return f"never: {fraction}" if threshold > 1 else f"{threshold:.4f}: {fraction}"
