"""Directories -> a report: one page, each figure by itself, or matplotlib figures in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treeify import files
from treeify.arguments import require_iterable, require_member
from treeify.errors import InputError
from treeify.models.hub import local_path
from treeify.report import style, writing
from treeify.report.chart import Chart
from treeify.report.contents import sections, summary
from treeify.report.grids import is_grid, read_grid
from treeify.report.page import page
from treeify.report.published import data_sets, published
from treeify.report.reading import Options
from treeify.report.reading import read as read_result
from treeify.report.results import GridResult, Result
from treeify.report.sections.section import Contents, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PUBLISHED = "published"


@dataclass(frozen=True)
class Report:
    """What was read, as sections of charts, facts and of what is missing.

    Args:
        contents: what was read.
    """

    contents: Contents = field(repr=False)

    @cached_property
    def sections(self) -> list[Section]:
        """The ten sections, in order."""
        return sections(self.contents)

    @property
    def charts(self) -> list[Chart]:
        """Every figure with its title, its description and its numbers."""
        return [chart for section in self.sections for chart in section.charts]

    @property
    def figures(self) -> dict[str, Figure]:
        """Every figure of matplotlib's by its name, such as `trade_off`."""
        return {chart.name: chart.figure for chart in self.charts}

    def numbers(self) -> list[dict[str, Any]]:
        """Every section's tables and what it says is missing, ready for JSON."""
        return [
            {
                "section": section.title,
                "charts": [_numbers(chart) for chart in section.charts],
                "missing": [*section.warnings, *section.missing],
            }
            for section in self.sections
        ]

    def html(self, title: str | None = None) -> str:
        """The page, which needs no other file; by default it is called after what it is of."""
        names = ", ".join(owner.name for owner in self.contents.owners)
        return page(self.sections, title or names, summary(self.contents))

    def write(self, out: str | Path, title: str | None = None, *, overwrite: bool = False) -> Path:
        """Write the page, completely or not at all.

        Args:
            out: the file, in a directory that exists.
            title: of the page.
            overwrite: write even if the file exists.

        Returns:
            The file.

        Raises:
            DataError: it cannot be written.
        """
        out = writing.check_page(Path(out), overwrite=overwrite)
        with writing.readable(out):
            files.replace_text(out, self.html(title))
        return out

    def write_figures(
        self, folder: str | Path, format: str = "svg", *, overwrite: bool = False
    ) -> list[Path]:
        """Write each figure by itself, as a paper takes it, all or none of them.

        Args:
            folder: new or empty.
            format: `svg`, `pdf` or `png`.
            overwrite: write into a folder that is not empty, over files of the same names.

        Returns:
            The files.

        Raises:
            DataError: they cannot be written.
            InputError: there is no such format.
        """
        writing.check_format(format)
        folder = writing.check_folder(Path(folder), overwrite=overwrite)
        contents = {
            f"{chart.name}.{format}": style.drawn(chart.figure, chart.name, format)
            for chart in self.charts
        }
        with writing.readable(folder):
            return writing.write_all(folder, contents)


def read(
    *directories: str | Path,
    data: Sequence[str] = (),
    beside: str | None = None,
    latency: bool = True,
    verify: bool = True,
    trust: bool = False,
    device: str = "auto",
    weights: str | Path | None = None,
) -> Report:
    """Read runs, ensembles, exports and grids, and measure them on their held-out images.

    Args:
        *directories: of runs, or their checkpoints; of ensembles, exports, and what
            `treeify ablate` wrote, or its `results.json`.
        data: keys of a recipe's data section to set, as `key=value`; a run knows its data.
        beside: `published` adds what others printed for the same data set.
        latency: time answers for one image, about 3 seconds each.
        verify: compare ensembles with their untouched architecture.
        trust: import what the directories name, if whoever wrote them is trusted.
        device: that ensembles are measured on.
        weights: trained weights of the base model of the one directory, to measure it too.

    Returns:
        The report.

    Raises:
        CheckpointError: a directory is none of these, or damaged.
        DataError, RecipeError: the data that were asked for cannot be read.
        InputError: no directory is given, or one twice, or an argument does not fit.
    """
    paths = [local_path(each) for each in directories]
    _check(paths, data, beside, weights)
    options = Options(
        tuple(data), latency, verify, trust, device, None if weights is None else Path(weights)
    )
    results: list[Result] = []
    grids: list[GridResult] = []
    for path, name in zip(paths, _names(paths), strict=True):
        if is_grid(path):
            grids.append(read_grid(path, name, trust=trust))
        else:
            results.append(read_result(path, name, options))
    contents = Contents(tuple(results), tuple(grids))
    return Report(contents if beside is None else with_published(contents))


def _check(paths: Sequence[Path], data: Sequence[str], beside: str | None, weights: object) -> None:
    """Raise InputError where the arguments of `read` do not fit each other."""
    if not paths:
        raise InputError("there is nothing to report on.", expected="a run's directory, or several")
    require_iterable("data", data, "keys and values, such as ['name=digits']")
    if weights is not None and len(paths) > 1:
        raise InputError(
            "weights of one base model were given, and several directories.",
            expected="one directory with weights",
        )
    if beside is not None:
        require_member("beside", beside, (PUBLISHED,), PUBLISHED)
    if data and all(map(is_grid, paths)):
        raise InputError(
            "data were named, and grids are not measured.",
            expected="data with runs, ensembles or exports",
            next_step="Leave --data out, or give the grid's runs.",
        )
    resolved = [path.resolve() for path in paths]
    again = [path for index, path in enumerate(paths) if resolved[index] in resolved[:index]]
    if again:
        raise InputError(
            f"{again[0]} is given twice, or is a link to another of the directories.",
            expected="each directory once",
            next_step="Leave it out.",
        )


def with_published(contents: Contents) -> Contents:
    """The same with the points that were published for its data sets, or why there are none."""
    names = sorted(set(contents.data_sets.values()))
    found = [series for name in names for series in published(name)]
    if found:
        return replace(contents, published=tuple(found))
    known, own = (", ".join(sets) or "none that is known" for sets in (data_sets(), names))
    text = f"No published points are known for its data ({own}); there are some for {known}."
    return replace(contents, beside=text)


def _numbers(chart: Chart) -> dict[str, Any]:
    headings = [column.heading for column in chart.table.columns]
    rows = [dict(zip(headings, row, strict=True)) for row in chart.table.rows]
    return {"name": chart.name, "title": chart.title, "rows": rows}


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each path: its last part, or as many of the last as tell it from the others."""
    # Not resolved: `best` is a link, and a name that says more than what it leads to.
    parts = [(path.resolve() if ".." in path.parts else path.absolute()).parts for path in paths]
    names = []
    for index, own in enumerate(parts):
        others = [other for position, other in enumerate(parts) if position != index]
        count = 1
        if own[-1] in ("last", "best", "ema") or own[-1].startswith(("step-", "seed")):
            count = 2
        while count < len(own) and any(other[-count:] == own[-count:] for other in others):
            count += 1
        names.append("/".join(own[-count:]))
    return names
