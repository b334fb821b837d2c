"""The table that `train` and `eval` end with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from treeify.cost import costs
from treeify.ensemble import HierarchicalEnsemble
from treeify.metrics import Score


def score_rows(hne: HierarchicalEnsemble, scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Accuracy beside cost, one row per nested size, ready for JSON."""
    return [
        {
            "leaves": score.leaves,
            "accuracy": score.accuracy,
            "nll": score.nll,
            "macs": cost.macs,
            "parameters": cost.parameters,
        }
        for score, cost in zip(scores, costs(hne), strict=True)
    ]


def score_table(
    hne: HierarchicalEnsemble, held_out: Sequence[Score], train: Sequence[Score] = ()
) -> Table:
    """Accuracy beside cost, one row per nested size.

    Args:
        hne: the ensemble, for its costs.
        held_out: its scores on held-out images.
        train: its scores on training images, if known: they tell over- from underfitting.

    Returns:
        The table, to be printed by rich.
    """
    caption = "accuracy of the mean logits; MACs per image"
    if train:
        caption += "; training: augmented images, during the last epoch"
    table = Table(caption=caption)
    for heading in ("leaves", "accuracy %", *(["training %"] if train else []), "NLL"):
        table.add_column(heading, justify="right")
    for heading in ("MACs", "parameters"):
        table.add_column(heading, justify="right")
    for index, row in enumerate(score_rows(hne, held_out)):
        table.add_row(
            str(row["leaves"]),
            f"{row['accuracy']:.2f}",
            *([f"{train[index].accuracy:.2f}"] if train else []),
            f"{row['nll']:.3f}",
            f"{row['macs']:,}",
            f"{row['parameters']:,}",
        )
    return table
