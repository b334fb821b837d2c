"""The measured rows as Markdown: `python benchmarks/tables.py` puts them into the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
COLUMNS = {
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
    file = "anytime" if name in ("steps", "deadlines") else name
    results = RESULTS / f"{file}.json"
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"] if results.is_file() else []
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
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
