"""Accuracy class by class as a table, and confusion as a file."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from treeify import files
from treeify.cli.output import Column, table
from treeify.errors import InputError, printable
from treeify.evaluation.classes import NamedClasses

_ENDINGS = (".csv", ".json")


def check_confusion(path: Path | None, leaves: int | None, other: Path | None) -> None:
    """Refuse, before anything is computed, what no confusion can be written to.

    Args:
        path: of the file.
        leaves: the size it is to be of.
        other: a file that is written, too.

    Raises:
        DataError: the file cannot be written.
        InputError: its ending says no format, it is the other, or a size is given and no file.
    """
    if path is None:
        if leaves is not None:
            raise InputError(
                f"--confusion-leaves {leaves} says what --confusion is of.",
                expected="--confusion FILE with it",
            )
        return
    if path.suffix.lower() not in _ENDINGS:
        raise InputError(
            f"--confusion {path} does not say by its ending what to write.",
            expected=f"a name that ends in {' or '.join(_ENDINGS)}",
            found=path.suffix or "no ending",
            next_step=f"Write --confusion {path.with_suffix('.csv')}",
        )
    if other is not None and path.resolve() == other.resolve():
        raise InputError(
            f"--confusion and --csv both name {path}.",
            expected="a file for each",
            next_step="Give one of them another name.",
        )
    files.check_writable_file(path, f"--confusion {path}")


def check_size(leaves: int | None, sizes: Sequence[int]) -> None:
    """Refuse a size of --confusion-leaves that is not answered with.

    Raises:
        InputError: it is none of the sizes.
    """
    if leaves is not None and leaves not in sizes:
        raise InputError(
            f"--confusion-leaves {leaves} is no size that is measured.",
            expected=f"one of {', '.join(map(str, sizes))}",
            next_step="Leave it out for all leaves.",
        )


def class_rows(
    classes: NamedClasses, names: Sequence[str], sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for each class, ready for JSON: its accuracies in percent, by number of leaves."""
    kept = [(size, classes.tree.nested_sizes.index(size)) for size in sizes]
    return [
        {
            "class": score.index,
            "label": names[score.index],
            "images": score.images,
            "accuracy": {
                str(size): None if score.accuracy is None else score.accuracy[place]
                for size, place in kept
            },
        }
        for score in classes.per_class()
    ]


def class_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of `class_rows`."""
    sizes = list(rows[0]["accuracy"])
    cells = [
        [row["label"], row["images"]]
        + ["-" if value is None else value for value in row["accuracy"].values()]
        for row in rows
    ]
    columns = [Column("class"), Column("images", ",d"), *(Column(size, ".2f") for size in sizes)]
    return table(columns, cells, caption="accuracy % on the images of each class, by leaves")


def confusion_text(
    path: Path,
    classes: NamedClasses,
    names: Sequence[str],
    leaves: int | None,
    origin: dict[str, str],
) -> str:
    """Confusion as the ending of its file says: a row for each true class.

    Args:
        path: of the file.
        classes: what was named.
        names: of the classes.
        leaves: a nested size; None for all leaves.
        origin: what was measured on what, for JSON.
    """
    size = classes.tree.leaves if leaves is None else leaves
    counts = classes.confusion(size).tolist()
    if path.suffix.lower() == ".json":
        axes = {"rows": "true classes", "columns": "named classes"}
        values = {**origin, "leaves": size, **axes, "classes": list(names), "counts": counts}
        return json.dumps(values, indent=1) + "\n"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    labels = [printable(name, in_file=True) for name in names]
    word = "leaf" if size == 1 else "leaves"
    writer.writerow([f"true class; columns: named by {size} {word}", *labels])
    writer.writerows([label, *row] for label, row in zip(labels, counts, strict=True))
    return text.getvalue()
