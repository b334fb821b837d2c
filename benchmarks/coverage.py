"""The page on coverage, from rows of `treeify verify`.

python benchmarks/coverage.py                     # the page again, from the rows treeify ships
python benchmarks/coverage.py coverage-*.jsonl    # first put these rows among them
python benchmarks/coverage.py --recount macs.csv  # first count the MACs of every model again

What the page says of exports comes from the rows of benchmarks/exports.py.

Counting takes minutes; it notes each model in the file named, and goes on there when interrupted.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from treeify import files
from treeify.models.builders import family, library_names
from treeify.parity import results
from treeify.parity.results import FULL, META, REDUCED, Row
from treeify.parity.sweep import Settings
from treeify.parity.zoo_check import usual_macs

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
EXPORTS = Path(__file__).parent / "results" / "exports.jsonl"
ASKED = Settings().splits
_MOST_REASONS = 4


def updated(page: str, rows: Sequence[Row], names: Sequence[str]) -> str:
    """A page with everything between `<!-- NAME -->` and `<!-- end -->` written again.

    Args:
        page: the page as it is.
        rows: one a model.
        names: every name of the libraries.
    """
    known = sorted((row for row in rows if row.name in set(names)), key=lambda row: row.name)
    parts = {
        "counts": _counts(rows),
        "totals": _totals(known, names),
        "families": _families(known, names),
        "failures": _failures(known),
        "shapes": _shapes(known),
        "exports": _exports(list(export_rows().values())),
    }
    for name, text in parts.items():
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(\n<!-- end -->)",
            lambda match, text=text: f"{match[1]}\n{text}\n{match[2]}",
            page,
            count=1,
            flags=re.DOTALL,
        )
    return page


def _counts(rows: Sequence[Row]) -> str:
    """What the page's own code prints."""
    counts = (len(rows), sum(row.converted for row in rows), sum(row.proven for row in rows))
    return f"```text\n{' '.join(map(str, counts))}\n```"


def _totals(rows: Sequence[Row], names: Sequence[str]) -> str:
    converted = [row for row in rows if row.converted]
    whole = sum(row.how == FULL for row in converted)
    bare = sum(row.how == META or bool(row.shallower_splits) for row in converted)
    fewer = len(converted) - whole - bare
    worst = max((row.worst for row in rows if row.proven and row.worst is not None), default=0.0)
    meta = _by_shapes_only(rows)
    reduced = [row for row in rows if row.proven and str(row.how).startswith(REDUCED)]
    exact = sum(row.proven for row in rows) - len(reduced)
    versions = sorted({_versions(row) for row in rows})
    lines = [
        f"- **{len(rows)} of {len(names)} names were checked**; of the others nothing is known.",
        f"- {len(converted)} of the {len(rows)} converted: {whole} as their numbers were checked,"
        f" {bare} as they are usually built, without weights"
        + (f"; {fewer} with fewer blocks only, by rows of an older treeify." if fewer else "."),
        f"- {exact + len(reduced)} of the {len(rows)} are proven numerically: {exact} in full,"
        f" {len(reduced)} shallower; {len(meta)} more by shapes only.",
        f"- {sum(row.inner_split is not None and row.failure is None for row in rows)} of them were"
        " split once more, by name at a point inside a module, and that ensemble checked too.",
        f"- Largest error of those proven: {worst:.3g} of the tolerance.",
        f"- Versions: {'; '.join(versions)}.",
    ]
    return "\n".join(lines)


def _versions(row: Row) -> str:
    return ", ".join(f"{package} {number}" for package, number in row.versions.items())


def _families(rows: Sequence[Row], names: Sequence[str]) -> str:
    sizes = Counter(map(family, names))
    lines = [
        "| family | checked | converted | proven | packed | error | remaining reasons |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name in sorted({family(row.name) for row in rows}):
        members = [row for row in rows if family(row.name) == name]
        fractions = [row.packed_fraction for row in members if row.packed_fraction is not None]
        worst = [row.worst for row in members if row.proven and row.worst is not None]
        cells = (
            name,
            f"{len(members)} of {sizes[name]}",
            str(sum(row.converted for row in members)),
            str(sum(row.proven for row in members)),
            f"{100 * sum(fractions) / len(fractions):.1f} %" if fractions else "",
            f"{max(worst):.3g}" if worst else "",
            _reasons(members),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _reasons(rows: Iterable[Row]) -> str:
    """Why nodes run per branch, the most frequent first."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row.reasons)
    common = [f"{_cell(reason)} ({count})" for reason, count in counts.most_common(_MOST_REASONS)]
    rest = len(counts) - len(common)
    return "; ".join([*common, f"{rest} more"] if rest > 0 else common)


def _failures(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row.failure is not None]
    return "\n".join(f"- `{row.name}`: {_cell(str(row.failure))}" for row in failed) or "Nothing."


def _by_shapes_only(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.failure is None and row.how == META]


def _shapes(rows: Sequence[Row]) -> str:
    lines = [
        f"- `{row.name}`: {row.shortage or 'no reason is on record'}."
        for row in _by_shapes_only(rows)
    ]
    return "\n".join(lines) or "None."


def export_rows(file: Path = EXPORTS) -> dict[str, dict[str, Any]]:
    """The last row that benchmarks/exports.py wrote of each model, by its name."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def _exports(rows: Sequence[dict[str, Any]]) -> str:
    proven = [row for row in rows if row["export"] == ""]
    worst = max((row["difference"] for row in proven), default=0.0)
    packages = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime")
    versions = {", ".join(f"{each} {row['versions'][each]}" for each in packages) for row in rows}
    lines = [
        f"- **{len(proven)} of {len(rows)} export**, and their files answer as PyTorch does.",
        f"- Largest difference: {worst:.1e} of the largest logit.",
        f"- Versions: {'; '.join(sorted(versions))}.",
    ]
    return "\n".join([*lines, *map(_unfit, (row for row in rows if row["export"]))])


def _unfit(row: dict[str, Any]) -> str:
    """Why a class does not export, and whether it does for images one by one."""
    alone = "; with `--batch 1` it does" if row.get("one_image") == "" else ""
    return f"- {row['network']} (`{row['name']}`) does not: {_cell(row['export'])}{alone}"


def _cell(text: str) -> str:
    """Text that stays inside a table's cell."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def recounted(rows: Iterable[Row], file: Path) -> Iterator[Row]:
    """Rows with the MACs of their models counted again; those in the file are taken from there."""
    counts: dict[str, int] = {}
    if file.exists():
        with file.open(newline="", encoding="utf-8") as lines:
            counts = {name: int(macs) for name, macs in csv.reader(lines)}
    with file.open("a", newline="", encoding="utf-8") as lines:
        for row in rows:
            macs = counts.get(row.name) or usual_macs(row.name)
            if macs is not None and row.name not in counts:
                csv.writer(lines).writerow((row.name, macs))
                lines.flush()
            yield row if macs is None else row.model_copy(update={"macs": macs})


def main() -> None:
    """Put rows into the shipped file, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    help_text = "of treeify verify; rows of other versions or splits than usual are left out"
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE", help=help_text)
    parser.add_argument("--recount", type=Path, metavar="FILE", help="where counts are noted")
    options = parser.parse_args()
    rows, names = results.shipped().newest(), library_names()
    for path in options.paths:
        for row in results.read(path).present(ASKED):
            if row.name in names:
                rows[row.name] = row
    if options.recount:
        rows = {row.name: row for row in recounted(rows.values(), options.recount)}
    if options.paths or options.recount:
        files.replace_bytes(results.SHIPPED, results.compressed(rows.values()))
    page = updated(PAGE.read_text(encoding="utf-8"), list(rows.values()), names)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
