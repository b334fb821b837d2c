"""How figures look: colours that colour-blind readers tell apart, and text that stays text."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from treeify.errors import printable

# Text and lines, less important ones, the grid, and what is behind everything.
INK, MUTED, GRID, PAPER = "#1b1f24", "#59636e", "#dde1e6", "#fefefe"
# Okabe and Ito, Color Universal Design, 2008; without its yellow, which white paper swallows.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Told apart without colours, too.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1, 1, 1)))

# The width of a column of a paper, and of a phone: inches.
WIDTH = 4.8
# Characters of a name that two columns of a legend have room for.
_HALF = 24

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "savefig.dpi": 200,
    "text.parse_math": False,  # names of classes and runs may hold dollars
}

_P = ParamSpec("_P")
_R = TypeVar("_R")


@contextmanager
def styled(name: str = "treeify") -> Iterator[None]:
    """Let matplotlib draw and save in this style for a while, whatever the user has set.

    Files of the same figure and name are the same, bit by bit.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Names may be in any script; a page has the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        matplotlib.rcParams["svg.hashsalt"] = name
        yield


def in_style(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that draws in this style."""

    @wraps(draw)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with styled():
            return draw(*args, **kwargs)

    return wrapped


def axes(height: float = 3.2) -> tuple[Figure, Axes]:
    """A figure of one column's width with one pair of axes, and those; the height is in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def colour(index: int) -> str:
    """The colour of a series; after the last, they begin anew with other markers and dashes."""
    return SERIES[index % len(SERIES)]


def line(index: int) -> dict[str, Any]:
    """How the line of a series is drawn."""
    return {
        "color": colour(index),
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(SERIES) % len(DASHES)],
    }


def count(number: float, _position: object = None) -> str:
    """A number of MACs, say, in three digits: 120 k, 1.2 M."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.3g}"


def number(value: float, _position: object = None) -> str:
    """A number of milliseconds, say, without an exponent."""
    return f"{value:g}"


def leaves(size: int) -> str:
    """1 -> `1 leaf`, 4 -> `4 leaves`."""
    return "1 leaf" if size == 1 else f"{size} leaves"


def log_costs(axis: Any, formatted: Callable[[float, object], str]) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5 times each power of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(formatted))


def accuracies(axis: Any, least: float = 4.0) -> None:
    """An axis of percent that shows at least so many: a few images are no landslide."""
    low, high = axis.get_view_interval()
    missing = max(0.0, least - (high - low)) / 2
    low, high = low - missing, high + missing
    above = max(0.0, high - 100.5)
    axis.set_view_interval(max(0.0, low - above), high - above, ignore=True)


def legend_below(figure: Figure, columns: int = 2, **options: Any) -> None:
    """The legend of everything that has a name, under the axes; long names stand alone."""
    labels = [label for ax in figure.axes for label in ax.get_legend_handles_labels()[1]]
    if max(map(len, labels), default=0) > _HALF:
        columns = 1
    figure.legend(loc="outside lower center", ncols=columns, **options)


def short(text: str, most: int = 28) -> str:
    """A name as long as a figure has room for, without what no figure can hold."""
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def drawn(figure: Figure, name: str, format: str) -> bytes:
    """A figure as a file's content, the same every time.

    Args:
        figure: drawn in this style.
        name: of the file.
        format: `svg`, `pdf` or `png`.
    """
    content = io.BytesIO()
    dates: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with styled(name):
        if figure.get_layout_engine() is not None:
            # A second pass moves some axes by a hair: from here on they stay where they are.
            figure.draw_without_rendering()
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        paper = "white" if format == "png" else "none"
        figure.savefig(content, format=format, facecolor=paper, metadata=dates[format])
    return content.getvalue()
