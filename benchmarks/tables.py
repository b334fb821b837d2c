"""The measured rows as Markdown: `python benchmarks/tables.py` puts them into the pages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_ROOT = Path(__file__).parents[1]
PAGES = (_ROOT / "docs" / "performance.md", _ROOT / "README.md")
# What stands in another table's file.
FILES = {"steps": "anytime", "deadlines": "anytime", "speed": "inference"}
# The rows of a table that has not all of its file.
ROWS = {
    "speed": (
        *("HNE, batch 1", "HNE, batch 32", "MobileNetV2 HNE, batch 1", "MobileNetV2 HNE, batch 8"),
        *("resnet18, batch 1", "vit_tiny_patch16_224, batch 1"),
    ),
}
COLUMNS = {
    "speed": ("macs_ratio", "base", "auto", "E"),
    "inference": (
        *("macs_ratio", "base", "packed", "looped", "auto", "independent", "vmap", "E"),
        *("auto_vs_best", "independent_vs_auto", "vmap_vs_auto", "share_of_product"),
    ),
    "shortcuts": ("with", "without", "gain"),
    "training": (
        *("macs_ratio", "base", "packed", "looped", "auto", "E", "auto_vs_best"),
        "share_of_product",
    ),
    "trainer": ("trainer", "bare", "overhead_%", "waiting_%", "workers"),
    "steps": ("base", "first", "first_vs_base", "steps", "one_call", "steps_vs_call"),
    "deadlines": (
        *("first_ms", "full_ms", "answers", "hits_%", "misses_by_ms", "worst_miss_ms"),
        *("leaves", "leaves_in_hindsight", "leaves_%"),
    ),
    "conversion": (
        *("converted", "built", "traced", "time_ratio", "result_MB", "base_MB", "peak_MB"),
        "peak_ratio",
    ),
}


def table(name: str) -> str:
    """A benchmark's rows as a Markdown table, in the order of measuring, batches of one by size."""
    columns = COLUMNS[name]
    results = RESULTS / f"{FILES.get(name, name)}.json"
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"] if results.is_file() else []
    rows = [row for row in rows if name not in ROWS or row["row"] in ROWS[name]]
    cases = [row["row"].partition(", batch ")[0] for row in rows]
    rows.sort(key=lambda row: _place(row["row"], cases))
    lines = ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for row in rows:
        if any(column in row for column in columns[:1]):
            cells = (_text(row.get(column, "")) for column in columns)
            lines.append(f"| {row['row']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _place(row: str, cases: list[str]) -> tuple[int, int]:
    case, _, batch = row.partition(", batch ")
    return cases.index(case), int(batch) if batch.isdecimal() else 0


def _text(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def updated(page: str) -> str:
    """A page with the table of NAME after every `<!-- NAME -->`."""
    for name in COLUMNS:
        mark = f"<!-- {name} -->\n"
        before, found, after = page.partition(mark)
        if found:
            rest = re.sub(r"\A(\n\|[^\n]*(?:\n\|[^\n]*)*\n)?", "", after)
            page = f"{before}{mark}\n{table(name)}\n{rest}"
    return page


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
