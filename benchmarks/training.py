"""Is every multiply-accumulate of an ensemble as cheap as in its base model? Training steps.

`python benchmarks/training.py` measures forward and backward of the hierarchical-distillation loss,
in one process and in turns: packed, looped and as tuned, beside the base model's cross-entropy. The
base model gets the same allocator setting, threads and memory format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from treeify import losses
from treeify.engine import timing

BATCHES = (8, 128)
CASES = (*common.CIFAR, common.Case("resnet18", torchvision.models.resnet18, 64))
COLUMNS = (
    *("macs_ratio", "base", "packed", "looped", "auto", "E", "auto_vs_best"),
    *("share_of_product", "plan"),
)


def measure(report: common.Report, case: common.Case, budget: float) -> None:
    """One row per batch size."""
    rows = {count: f"{case.name}, batch {count}" for count in BATCHES}
    if not any(report.wanted(row) for row in rows.values()):
        return
    base = case.base().train()
    hne = case.ensemble(base).train()
    ratio = hne.count_macs() / hne.count_macs(1)
    for count, row in rows.items():
        if not report.wanted(row):
            continue
        x, labels = case.images(count), torch.randint(0, 100, (count,))

        def loss(logits: Tensor, labels: Tensor = labels) -> Tensor:
            return losses.hierarchical_distillation(logits, labels, hne.tree)

        hne.tune(x, loss=loss, repeats=5 if count < 32 else 2)

        def way(
            setting: str, x: Tensor = x, loss: Callable[[Tensor], Tensor] = loss
        ) -> Callable[[], Any]:
            def step() -> None:
                hne.execution = setting
                loss(hne(x)).backward()  # type: ignore[no-untyped-call]
                hne.zero_grad()

            return step

        def base_step(x: Tensor = x, labels: Tensor = labels) -> None:
            F.cross_entropy(base(x), labels).backward()  # type: ignore[no-untyped-call]
            base.zero_grad()

        actions: dict[str, Callable[[], Any]] = {
            "base": base_step,
            **{name: way(name) for name in ("packed", "looped", "auto")},
            "product": common.product(),
        }
        times = timing.alternate(actions, x.device, repeats=15, budget=budget)
        hne.execution = "auto"
        report.add(
            row,
            # Backward takes two products for each of forward's.
            **common.columns(times, ratio, 3 * count * hne.count_macs()),
            plan=str(hne.plan(x)),
        )


def main() -> None:
    """Measure what is asked for and print the table."""
    options = common.arguments(__doc__ or "").parse_args()
    common.prepare()
    report = common.Report("training", COLUMNS, options)
    for case in CASES:
        measure(report, case, options.budget)
    report.show()


if __name__ == "__main__":
    main()
