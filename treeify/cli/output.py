"""How commands print: lines, tables and JSON, each in one way."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import typer
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.table import Table


class Column(NamedTuple):
    """A column of a table.

    Args:
        heading: over it.
        format: of its numbers, which stand on the right; None for words, which stand on the left.
        fold: break long words instead of cutting them off.
        no_wrap: keep each cell in one line.
    """

    heading: str
    format: str | None = None
    fold: bool = False
    no_wrap: bool = False


def table(
    columns: Sequence[Column],
    *sections: Iterable[Sequence[Any]],
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """A table of some sections of rows with a line between them; text is shown as it is."""
    result = Table(title=title, caption=caption)
    for column in columns:
        result.add_column(
            column.heading,
            justify="left" if column.format is None else "right",
            overflow="fold" if column.fold else "ellipsis",
            no_wrap=column.no_wrap,
        )
    for rows in sections:
        for row in rows:
            cells = zip(row, columns, strict=True)
            result.add_row(
                *(
                    cell if isinstance(cell, str) else format(cell, column.format or "")
                    for cell, column in cells
                )
            )
        result.add_section()
    return result


def say(console: Console, *parts: str | Table, style: str | None = None) -> None:
    """Print lines, which the terminal wraps, and tables, which fit it; nothing is markup."""
    for part in parts:
        # Whoever pipes a line into a file gets one line.
        soft_wrap = isinstance(part, str)
        console.print(part, soft_wrap=soft_wrap, highlight=False, markup=False, style=style)


def print_json(values: Any) -> None:
    """Print values as JSON; they may hold dataclasses, paths and tuples."""
    typer.echo(json.dumps(to_jsonable_python(values, by_alias=True), indent=2))
