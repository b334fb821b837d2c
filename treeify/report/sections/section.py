"""What a section holds, and how what belongs to one of several results is told apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count

from treeify.report.chart import Chart, Table
from treeify.report.results import GridResult, Result, Thumbnail
from treeify.report.series import PublishedSeries

# Characters of a name in a file's name, whose length systems limit.
_LONGEST = 60


@dataclass(frozen=True)
class Contents:
    """What a report is of.

    Args:
        results: runs, ensembles and exports.
        grids: of `treeify ablate`.
        published: points of other models, to stand beside them.
        beside: what became of a request for these; None if there was none.
    """

    results: tuple[Result, ...] = ()
    grids: tuple[GridResult, ...] = ()
    published: tuple[PublishedSeries, ...] = ()
    beside: str | None = None

    @property
    def owners(self) -> tuple[Result | GridResult, ...]:
        """Everything that was read."""
        return (*self.results, *self.grids)

    @property
    def are_several(self) -> bool:
        """Whether names have to say whose a chart is."""
        return len(self.owners) > 1

    @property
    def data_sets(self) -> dict[str, str]:
        """The names of data sets by the names of what was measured on them, where known."""
        return {each.name: each.data_set for each in self.owners if each.data_set is not None}

    def mark(self, chart: Chart, owner: Result | GridResult) -> Chart:
        """A chart of one of several results, which says of which."""
        if not self.are_several:
            return chart
        title = f"{chart.title}: {owner.name}"
        return replace(chart, name=f"{chart.name}_{self._slugs[owner.name]}", title=title)

    @cached_property
    def _slugs(self) -> dict[str, str]:
        """Every name as part of a file's name, of its own."""
        slugs: dict[str, str] = {}
        for owner in self.owners:
            part = re.sub(r"[^\w-]+", "_", owner.name).strip("_")[-_LONGEST:] or "run"
            numbered = (part if number == 1 else f"{part}_{number}" for number in count(1))
            slugs[owner.name] = next(each for each in numbered if each not in slugs.values())
        return slugs

    def say(self, text: str, owner: Result | GridResult) -> str:
        """A sentence about one of several results, which says of which."""
        return f"{owner.name}: {text}" if self.are_several else text


@dataclass(frozen=True)
class Facts:
    """Words by what they say, or rows of a table, or lines of a file; not drawn."""

    title: str
    values: tuple[tuple[str, str], ...] = ()
    table: Table | None = None
    text: str | None = None


@dataclass(frozen=True)
class Gallery:
    """Images whose answers a size changed, for better or for worse."""

    title: str
    description: str
    thumbnails: tuple[Thumbnail, ...]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        key: its name in links.
        title: one line.
        charts: drawn.
        facts: not drawn.
        galleries: of images.
        missing: what is left out, and why, sentences.
        warnings: what a reader must know first, sentences.
    """

    key: str
    title: str
    charts: tuple[Chart, ...] = ()
    facts: tuple[Facts, ...] = ()
    galleries: tuple[Gallery, ...] = ()
    missing: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it has nothing to show."""
        return not (self.charts or self.facts or self.galleries)


@dataclass
class Draft:
    """A section while it is gathered."""

    key: str
    title: str
    charts: list[Chart] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def section(self) -> Section:
        """The section; every sentence about what is missing stands once."""
        return Section(
            self.key,
            self.title,
            tuple(self.charts),
            tuple(self.facts),
            tuple(self.galleries),
            tuple(dict.fromkeys(filter(None, self.missing))),
            tuple(self.warnings),
        )


Gather = Callable[[Contents], Section]


def only_of_runs(contents: Contents, what: str) -> list[str]:
    """A sentence for each grid about what is not read of its runs."""
    return [
        contents.say(f"{what} is of a single run: give one of the grid's runs.", grid)
        for grid in contents.grids
    ]
