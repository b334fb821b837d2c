"""Sections -> one HTML file that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from treeify.errors import printable
from treeify.report import style
from treeify.report.chart import Chart, Table
from treeify.report.sections.section import Section
from treeify.report.svg import VARIABLES, inline_svg

TEMPLATE = "page.html.j2"
# A table of more rows begins folded.
_OPEN = 8
# Lighter, to be read on a dark page.
_DARK = {
    style.INK: "#e6e9ed",
    style.MUTED: "#9aa4af",
    style.GRID: "#333a43",
    style.PAPER: "#171b21",
    **dict(
        zip(
            style.SERIES,
            ("#4aa8e8", "#f0803c", "#2bc79a", "#e09cc4", "#f2b632", "#8fd0f5"),
            strict=True,
        )
    ),
}


def page(sections: Sequence[Section], title: str, summary: Sequence[tuple[str, str]] = ()) -> str:
    """The page of a report.

    Args:
        sections: in order.
        title: of the page.
        summary: what matters most, values by their names.
    """
    # Names of classes, runs and files are anybody's: all of them are escaped.
    environment = Environment(
        loader=PackageLoader("treeify.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    environment.filters["is_short"] = _is_short
    template = environment.get_template(TEMPLATE)
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    rendered = template.render(
        shown=[section for section in sections if not section.is_empty],
        left_out=[section for section in sections if section.is_empty],
        title=title,
        summary=summary,
        light={name: value for value, name in VARIABLES.items()},
        dark={name: _DARK[value] for value, name in VARIABLES.items()},
        made=f"treeify {version('treeify')}, {made}",
    )
    # Names of files may be no text, and others may turn the direction of writing.
    return printable(rendered)


def _figure(chart: Chart) -> Markup:
    """A chart as an element; its texts are escaped as XML."""
    return Markup(inline_svg(chart, chart.name))


def _is_short(table: Table) -> bool:
    """Whether a table is shown without being asked for."""
    return len(table.rows) <= _OPEN
