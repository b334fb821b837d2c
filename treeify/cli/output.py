"""How commands print: lines, tables and JSON, each in one way."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import typer
from pydantic_core import to_jsonable_python
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from treeify import files
from treeify.errors import DataError, printable

# No table is as wide.
_WIDE = 10**6
# Of each column: a line and two spaces, and how narrow words may get.
_BORDER, _WORD = 3, 8


class Column(NamedTuple):
    """A column of a table.

    Args:
        heading: over it.
        format: of its numbers, which stand on the right and are never broken; None for words, which
            stand on the left and fold where there is no room.
        no_wrap: do not break words either.
    """

    heading: str
    format: str | None = None
    no_wrap: bool = False


def table(
    columns: Sequence[Column],
    *sections: Iterable[Sequence[Any]],
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """A table of some sections of rows with a line between them; text is shown as it is."""
    result = Table(
        title=None if title is None else _plain(title, "table.title"),
        caption=None if caption is None else _plain(caption, "table.caption"),
    )
    for column in columns:
        numbers = column.format is not None
        result.add_column(
            _plain(column.heading),
            justify="right" if numbers else "left",
            overflow="fold",
            no_wrap=numbers or column.no_wrap,
        )
    for rows in sections:
        for row in rows:
            cells = [
                _plain(cell if isinstance(cell, str) else format(cell, column.format or ""))
                for cell, column in zip(row, columns, strict=True)
            ]
            result.add_row(*cells)
            for drawn, cell in zip(result.columns, cells, strict=True):
                if drawn.no_wrap:
                    drawn.min_width = max(drawn.min_width or 0, cell.cell_len)
        result.add_section()
    return result


def _plain(text: str, style: str = "") -> Text:
    """Text that is neither markup, nor emoji, nor anything a terminal obeys."""
    return Text(printable(text), style)


def say(console: Console, *parts: str | Table, style: str | None = None) -> None:
    """Print lines and tables; nothing is markup.

    Lines are wrapped by the terminal, so whoever pipes one into a file gets one line. A table is as
    wide as its cells in a pipe, and fits a terminal as far as that breaks no number.
    """
    for part in parts:
        width = console.width
        if isinstance(part, Table):
            console.width = table_width(console, part)
        soft_wrap = isinstance(part, str)
        shown = _plain(part) if isinstance(part, str) else part
        console.print(shown, soft_wrap=soft_wrap, highlight=False, style=style)
        console.width = width


def table_width(console: Console, table: Table) -> int:
    """How wide to draw a table; where it would not fit, headings over numbers are broken."""
    options = console.options.update(width=_WIDE)
    natural = Measurement.get(console, options, table).maximum
    if natural <= console.width or not console.is_terminal:
        return natural
    least = 1
    for column in table.columns:
        least += _BORDER
        if column.no_wrap:
            heading = str(column.header).replace(" ", "\n")
            column.header = _plain(heading)
            least += max(column.min_width or 0, *map(cell_len, heading.split("\n")))
        else:
            least += _WORD
    return max(console.width, least)


def short(number: float) -> str:
    """Three digits and a unit that options such as `--max-params` take: `1.82G`."""
    units = ((10**9, "G"), (10**6, "M"), (10**3, "k"))
    size, unit = next(((size, unit) for size, unit in units if number >= size), (1, ""))
    return f"{number / size:.3g}{unit}"


def print_json(values: Any) -> None:
    """Print values as JSON; they may hold dataclasses, paths and tuples."""
    typer.echo(json.dumps(to_jsonable_python(values, by_alias=True), indent=2))


def write_text(path: Path, text: str, option: str) -> None:
    """Write a file completely or not at all.

    Raises:
        DataError: it cannot be written.
    """
    try:
        # As the file system names files, whatever their encoding.
        files.replace_bytes(path, text.encode(errors="surrogateescape"))
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error}", next_step=f"Give another {option}."
        ) from error
