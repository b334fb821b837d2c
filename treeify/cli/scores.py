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
from treeify.evaluation.comparison import Gain
from treeify.evaluation.cost import Cost, base_cost, costs
from treeify.evaluation.metrics import Score

# By the keys of a row.
_COLUMNS = {
    "leaves": Column("leaves", "d"),
    "accuracy": Column("accuracy %", ".2f"),
    "gain": Column("gain", "+.2f"),
    "gain_per_cost": Column("gain / cost", "+.2f"),
    "training": Column("training %", ".2f"),
    "nll": Column("NLL", ".3f"),
    "calibration_error": Column("ECE %", ".2f"),
    "logit_std": Column("logit std", ".3f"),
    "macs": Column("MACs", ",d"),
    "parameters": Column("parameters", ",d"),
    "milliseconds": Column("ms", ".2f"),
    "disagreement": Column("differ %", ".1f"),
    "gain_error": Column("gain's error", ".2f"),
}
_WORTH = ("leaves", "accuracy", "gain", "gain_per_cost", "macs", "parameters", "milliseconds")
_QUALITY = ("leaves", "nll", "calibration_error", "logit_std", "disagreement", "gain_error")
_BRIEF = ("leaves", "accuracy", "training", "nll", "macs", "parameters")


def score_rows(
    hne: HierarchicalEnsemble,
    scores: Sequence[Score],
    train: Sequence[Score] = (),
    seconds: Mapping[int, float] | None = None,
    x: Tensor | None = None,
    gains: Sequence[Gain] = (),
) -> list[dict[str, Any]]:
    """Scores beside cost, one row per nested size, ready for JSON.

    Args:
        hne: the ensemble, for its costs.
        scores: its scores on held-out images.
        train: its scores on training images, if known.
        seconds: of an answer, by number of leaves, if measured.
        x: one image `[1, C, H, W]` of the size that was scored; by default the conversion's size.
        gains: over one leaf, if known.
    """
    return rows_of(scores, costs(hne, x), train, seconds, gains)


def rows_of(
    scores: Sequence[Score],
    costs: Sequence[Cost],
    train: Sequence[Score] = (),
    seconds: Mapping[int, float] | None = None,
    gains: Sequence[Gain] = (),
) -> list[dict[str, Any]]:
    """The same rows where the costs of the sizes are known."""
    rows: list[dict[str, Any]] = []
    for index, (score, cost) in enumerate(zip(scores, costs, strict=True)):
        row = asdict(score) | asdict(cost)
        if train:
            row["training"] = train[index].accuracy
        if gains:
            further = cost.macs / rows[0]["macs"] - 1 if rows and rows[0]["macs"] else 0
            row["gain"], row["gain_error"] = gains[index].gain, gains[index].error
            row["gain_per_cost"] = gains[index].gain / further if further else None
            row["disagreement"] = gains[index].disagreement
        if seconds:
            row["milliseconds"] = 1e3 * seconds[score.leaves]
        rows.append(row)
    return rows


def base_row(
    hne: HierarchicalEnsemble,
    macs: int,
    score: Score | None,
    seconds: Mapping[int, float] | None,
) -> dict[str, Any]:
    """The base model beside the rows of `score_rows`; without scores where they are not known."""
    row: dict[str, Any] = {} if score is None else asdict(score)
    row |= {"leaves": "base model", "macs": macs, "parameters": base_cost(hne).parameters}
    if seconds:
        row["milliseconds"] = 1e3 * seconds[0]
    return row


def score_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What training ends with, of the rows of `score_rows`."""
    caption = "training: augmented images, during the last epoch"
    return _table(rows, _BRIEF, caption if "training" in rows[0] else None)


def score_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Accuracy beside cost, and how sure and how different the answers are; 80 columns each."""
    gain = "gain: points over one leaf, and for every further cost of one leaf"
    pairs = "differ: images on which two leaves name different classes"
    return [
        _table(rows, _WORTH, gain),
        _table(rows, _QUALITY, f"ECE: expected calibration error; {pairs}"),
    ]


def _table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], caption: str | None) -> Table:
    keys = [key for key in keys if key in rows[-1]]
    cells = [["-" if row.get(key) is None else row[key] for key in keys] for row in rows]
    common = "accuracy of the mean logits; MACs per image" if "macs" in keys else None
    caption = "; ".join(filter(None, (common, caption)))
    return table([_COLUMNS[key] for key in keys], cells, caption=caption)


def as_csv(
    rows: Sequence[Mapping[str, Any]],
    leaves: Sequence[float],
    base: Mapping[str, Any] | None = None,
) -> str:
    """The rows of `score_rows` (`first` leaves) and, below them, each `single` leaf's accuracy.

    Above them stands the `base` model, if it is given. Accuracies are in percent; single leaves are
    counted from 0 as everywhere.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, ["kind", *rows[0]], lineterminator="\n")
    writer.writeheader()
    if base is not None:
        writer.writerow({"kind": "base", **base, "leaves": ""})
    writer.writerows({"kind": "first", **row} for row in rows)
    writer.writerows(
        {"kind": "single", "leaves": number, "accuracy": accuracy}
        for number, accuracy in enumerate(leaves)
    )
    return text.getvalue()
