"""Writes the tables of docs/results from the raw metrics beside the pages.

`python docs/result_tables.py` after `treeify ablate` wrote new ones. A mark in a page,
`<!-- FILE KIND -->`, says which: FILE is a results.json of `treeify ablate`, KIND is a score
(accuracy, nll, calibration_error, logit_std), `training`, or `VARIANT minus others`; or FILE is a
pattern of metrics.jsonl files named after variants, KIND is `LEAVES leaves`: that size by epochs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from treeify.training.ablation import cells, table

FOLDER = Path(__file__).with_name("results")
MARK = re.compile(r"(<!-- (\S+\.jsonl?) (.+?) -->\n)(?:\n\|[^\n]*(?:\n\|[^\n]*)*\n)?")

Rows = Sequence[Mapping[str, Any]]


def scores(rows: Rows, part: str, score: str) -> Iterator[tuple[str, list[str]]]:
    """A row per variant: mean and deviation over seeds for each number of leaves."""
    for variant, found in table(rows, part, score).items():
        yield variant, [str(found[leaves]) for leaves in sorted(found)]


def differences(rows: Rows, chosen: str) -> Iterator[tuple[str, list[str]]]:
    """How much more accurate a variant is than each other, seed by seed."""
    accuracies = {
        (row["variant"], row["seed"]): [score["accuracy"] for score in row["held_out"]]
        for row in rows
    }
    for other in dict.fromkeys(row["variant"] for row in rows if row["variant"] != chosen):
        seeds = [seed for variant, seed in accuracies if variant == other]
        pairs = [(accuracies[chosen, seed], accuracies[other, seed]) for seed in seeds]
        columns = zip(*([a - b for a, b in zip(*pair, strict=True)] for pair in pairs), strict=True)
        yield (
            f"{chosen} minus {other}",
            [f"{cells(own)} ({sum(d > 0 for d in own)} of {len(own)})" for own in columns],
        )


def markdown(rows: Rows, kind: str) -> str:
    """A table of one kind."""
    if kind.endswith(" minus others"):
        lines = differences(rows, kind.removesuffix(" minus others"))
    elif kind == "training":
        lines = scores(rows, "train", "accuracy")
    else:
        lines = scores(rows, "held_out", kind)
    sizes = [score["leaves"] for score in rows[0]["held_out"]]
    return _markdown(["leaves", *map(str, sizes)], [[name, *values] for name, values in lines])


def curves(pattern: str, leaves: int) -> str:
    """Held-out accuracy of so many leaves after every epoch, a row per variant."""
    found: dict[str, dict[int, str]] = {}
    for path in sorted(FOLDER.glob(pattern)):
        epochs = found.setdefault(path.stem, {})
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            score = next(own for own in row["held_out"] if own["leaves"] == leaves)
            epochs[row["epoch"]] = f"{score['accuracy']:.2f}"
    columns = sorted({epoch for epochs in found.values() for epoch in epochs})
    body = [[name, *(own.get(epoch, "") for epoch in columns)] for name, own in found.items()]
    return _markdown(["epoch", *map(str, columns)], body)


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *body))


def updated(page: str) -> str:
    """A page with its tables written again."""

    def written(found: re.Match[str]) -> str:
        size = found[3].removesuffix(" leaves")
        if size != found[3]:
            return f"{found[1]}\n{curves(found[2], int(size))}"
        rows = json.loads((FOLDER / found[2]).read_text(encoding="utf-8"))
        return f"{found[1]}\n{markdown(rows, found[3])}"

    return MARK.sub(written, page)


if __name__ == "__main__":
    for path in FOLDER.glob("*.md"):
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
