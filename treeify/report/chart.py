"""A figure together with what is said beside it: its title, its description and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Column(NamedTuple):
    """A column of a table.

    Args:
        heading: over it.
        format: of its numbers, which stand on the right; None for words, which stand on the left.
    """

    heading: str
    format: str | None = None


# A column with its format, or the heading alone of one that holds words.
AnyColumn = Column | tuple[str, str] | str


@dataclass(frozen=True)
class Table:
    """Rows of numbers and words under their columns; None is a cell that nobody measured."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, columns: Sequence[AnyColumn], rows: Any) -> Table:
        """A table of columns, each with its format or, if it holds words, its heading alone."""
        named = (Column(each) if isinstance(each, str) else Column(*each) for each in columns)
        return cls(tuple(named), tuple(tuple(row) for row in rows))

    @property
    def cells(self) -> list[list[str]]:
        """Every cell as text."""
        return [
            [_text(cell, column) for cell, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]


def _text(cell: Any, column: Column) -> str:
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else format(cell, column.format or "")


@dataclass(frozen=True)
class Chart:
    """A figure, and what a reader of it alone needs.

    Args:
        name: of its file, such as `trade_off`.
        title: one line.
        description: what is shown and how it was measured, some sentences.
        figure: drawn.
        table: the numbers that are drawn.
    """

    name: str
    title: str
    description: str
    figure: Figure
    table: Table
