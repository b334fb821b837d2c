"""The tables that `train` and `eval` end with."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from torch import Tensor

from treeify.cli.output import Column, table
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.evaluation.cost import costs
from treeify.evaluation.metrics import Score

# By the keys of a row.
_COLUMNS = {
    "leaves": Column("leaves", "d"),
    "accuracy": Column("accuracy %", ".2f"),
    "training": Column("training %", ".2f"),
    "nll": Column("NLL", ".3f"),
    "calibration_error": Column("ECE %", ".2f"),
    "logit_std": Column("logit std", ".3f"),
    "macs": Column("MACs", ",d"),
    "parameters": Column("parameters", ",d"),
    "milliseconds": Column("ms", ".2f"),
}
_BRIEF = ("leaves", "accuracy", "training", "nll", "macs", "parameters")


def score_rows(
    hne: HierarchicalEnsemble,
    scores: Sequence[Score],
    train: Sequence[Score] = (),
    seconds: Mapping[int, float] | None = None,
    x: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Scores beside cost, one row per nested size, ready for JSON.

    Args:
        hne: the ensemble, for its costs.
        scores: its scores on held-out images.
        train: its scores on training images, if known.
        seconds: of an answer, by number of leaves, if measured.
        x: one image `[1, C, H, W]` of the size that was scored; by default the conversion's size.
    """
    rows = []
    for index, (score, cost) in enumerate(zip(scores, costs(hne, x), strict=True)):
        row = asdict(score) | asdict(cost)
        if train:
            row["training"] = train[index].accuracy
        if seconds:
            row["milliseconds"] = 1e3 * seconds[score.leaves]
        rows.append(row)
    return rows


def score_table(rows: Sequence[Mapping[str, Any]], *, brief: bool = False) -> Table:
    """The rows of `score_rows`; brief tables leave out calibration error and logit deviation."""
    caption = "accuracy of the mean logits; MACs per image"
    if "training" in rows[0]:
        caption += "; training: augmented images, during the last epoch"
    if not brief and "calibration_error" in rows[0]:
        caption += "; ECE: expected calibration error"
    keys = [key for key in _COLUMNS if key in rows[0] and (not brief or key in _BRIEF)]
    cells = [[row[key] for key in keys] for row in rows]
    return table([_COLUMNS[key] for key in keys], cells, caption=caption)


def as_csv(rows: Sequence[Mapping[str, Any]], leaves: Sequence[float]) -> str:
    """The rows of `score_rows` (`first` leaves) and, below them, each `single` leaf's accuracy.

    Accuracies are in percent; single leaves are counted from 0 as everywhere.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, ["kind", *rows[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"kind": "first", **row} for row in rows)
    writer.writerows(
        {"kind": "single", "leaves": number, "accuracy": accuracy}
        for number, accuracy in enumerate(leaves)
    )
    return text.getvalue()
