"""Tables and CSV of scores: which columns there are, and how numbers look."""

import csv
import io
from typing import Any

from rich.console import Console
from rich.table import Table

from treeify.cli.output import say
from treeify.cli.scores import as_csv, score_table, score_tables

ROWS: list[dict[str, Any]] = [
    {
        "leaves": leaves,
        "accuracy": 90.126 + leaves,
        "nll": 0.51234,
        "calibration_error": 1.5,
        "logit_std": 0.25,
        "macs": 1_000 * leaves,
        "parameters": 12_345,
    }
    for leaves in (1, 2)
]


def shown(*tables: Table) -> str:
    file = io.StringIO()
    say(Console(file=file, width=80), *tables)
    return file.getvalue()


def test_a_column_for_every_score_there_is() -> None:
    text = shown(*score_tables(ROWS))
    for part in ("91.13", "0.512", "1.50", "0.250", "2,000", "12,345", "ECE: expected"):
        assert part in text
    assert "training" not in text
    assert " ms " not in text
    assert " 5.00 " in shown(*score_tables([row | {"milliseconds": 5.0} for row in ROWS]))


def test_the_tables_of_large_ensembles_fit_80_columns() -> None:
    large = {"macs": 4_109_464_576, "parameters": 25_557_032, "milliseconds": 1234.5}
    gains = {"gain": 1.5, "gain_per_cost": None, "disagreement": 3.0, "gain_error": 0.25}
    base = {"leaves": "base model", "macs": 4_109_464_576, "parameters": 25_557_032}
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    say(console, *score_tables([base, *(row | large | gains for row in ROWS)]))
    assert max(map(len, file.getvalue().splitlines())) <= 80
    assert "+1.50" in file.getvalue()
    assert " - │" in file.getvalue()


def test_a_brief_table_has_training_scores_and_no_calibration() -> None:
    text = shown(score_table([row | {"training": 99.0} for row in ROWS]))
    assert "99.00" in text
    assert "during the last epoch" in text
    assert "ECE" not in text


def test_csv_has_nested_sizes_and_then_single_leaves() -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv(ROWS, [80.0, 81.5]))))
    assert [(row["kind"], row["leaves"]) for row in lines] == [
        ("first", "1"),
        ("first", "2"),
        ("single", "0"),
        ("single", "1"),
    ]
    assert lines[1]["macs"] == "2000"
    assert lines[3]["accuracy"] == "81.5"
    assert lines[3]["macs"] == ""
