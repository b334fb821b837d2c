"""`treeify plan`: a budget in, the trees that keep to it out, and what to paste for the best."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.table import Table

from treeify import files
from treeify.cli.options import (
    InputSize,
    Json,
    Name,
    NumClasses,
    bounds,
    count,
    megabytes,
    milliseconds,
    whole_numbers,
)
from treeify.cli.output import Column, print_json, say, short, table
from treeify.cli.quantities import Bounds
from treeify.models.base_model import base_model
from treeify.planning.limits import DEFAULT_FANOUTS, DEFAULT_LEAVES
from treeify.planning.plan import plan as make_plan
from treeify.planning.split_plan import RANKING, SplitPlan
from treeify.report.writing import check_format, readable, require_packages


def plan(
    name: Name,
    first_macs: Annotated[
        float | None, count("--first-macs", "The most MACs of the first answer: 300M.", "MACS")
    ] = None,
    first_ms: Annotated[
        float | None, milliseconds("--first-ms", "The most milliseconds of the first answer.")
    ] = None,
    max_macs: Annotated[
        float | None,
        count("--max-macs", "The most MACs of all leaves; by default 4 base models'.", "MACS"),
    ] = None,
    max_ms: Annotated[
        float | None, milliseconds("--max-ms", "The most milliseconds of all leaves on one image.")
    ] = None,
    max_params: Annotated[
        float | None, count("--max-params", "The most parameters of all leaves: 30M.")
    ] = None,
    max_mb: Annotated[
        float | None, megabytes("--max-mb", "The most megabytes of parameters and buffers.")
    ] = None,
    leaves: Annotated[
        Bounds | None,
        bounds("--leaves", "How many: 8, or the fewest and the most; by default 4..16."),
    ] = None,
    fanouts: Annotated[
        Sequence[int] | None,
        whole_numbers("--fanouts", "Children per split to choose from; by default 2,4."),
    ] = None,
    all_points: Annotated[
        bool,
        typer.Option(
            "--all-points",
            help="Split where several tensors cross, too, as in residual blocks, and before norms.",
        ),
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run the best few here, beside forecast times.")
    ] = False,
    pick: Annotated[int, typer.Option(min=1, help="Which row of the table to take.")] = 1,
    num_classes: NumClasses = None,
    input_size: InputSize = None,
    figure: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the trees: a .svg, .pdf or .png to write."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose where to split a model, and into how many branches, by what that costs.

    Of all trees over its split points, finds those that no other beats: none has as many leaves
    and as large a fraction of own MACs for less. Shows them, picks one, and says what to paste.
    Times (--max-ms, --first-ms, --measure) are forecast from the model's parts, which takes a
    minute.

    For example:

        treeify plan resnet18

        treeify plan mobilenetv2_140 --max-macs 1.2G --leaves 4..32 --fanouts 2,3,4

        treeify plan resnet18 --max-ms 40 --measure
    """
    if figure is not None:
        require_packages()
        check_format(figure.suffix.removeprefix("."))
        files.check_writable_file(figure, f"--figure {figure}")
    console = Console(quiet=as_json)
    base = base_model(name, num_classes, input_size)
    with console.status("counting, searching and, where times are asked for, measuring"):
        result = make_plan(
            base.architecture,
            first_macs=first_macs,
            first_ms=first_ms,
            max_macs=max_macs,
            max_ms=max_ms,
            max_params=max_params,
            max_mb=max_mb,
            leaves=leaves or DEFAULT_LEAVES,
            fanouts=fanouts or DEFAULT_FANOUTS,
            pick=pick,
            all_points=all_points,
            measure=measure,
            example_input=base.example,
        )
    if figure is not None:
        _draw(result, figure)
    if as_json:
        print_json(_report(result))
        return
    say(console, *base.notes, _table(result), RANKING, result.sentence, "")
    say(console, result.option)
    if result.recipe is not None:
        say(console, "", *result.recipe.splitlines())
    say(console, "", *result.notes)


def _draw(result: SplitPlan, figure: Path) -> None:
    """Write the picture of a plan."""
    # matplotlib takes its time, and is an extra.
    from treeify.report import style
    from treeify.report.figures.plan import plan as drawn_plan

    format = figure.suffix.removeprefix(".")
    content = style.drawn(drawn_plan(result).figure, figure.stem, format)
    with readable(figure):
        files.replace_bytes(figure, content)


def _table(result: SplitPlan) -> Table:
    """A row for every candidate, the first of which is recommended."""
    timed = result.candidates[0].forecast is not None
    run = any(tree.measured for tree in result.candidates)
    columns = [
        *(Column("", "d"), Column("splits"), Column("leaves", "d")),
        *(Column("MACs of 1 to all leaves"), Column("x base", ".2f")),
        *(Column("parameters", ""), Column("MB", ""), Column("own", ".1%")),
        Column("mean own", ".1%"),
        *([Column("ms, forecast", ",.1f")] if timed else []),
        *([Column("ms, measured")] if run else []),
    ]
    rows = []
    for number, tree in enumerate(result.candidates, 1):
        last = tree.nested[-1]
        row = [
            number,
            " ".join(tree.splits),
            tree.leaves,
            " ".join(short(cost.macs) for cost in tree.nested),
            last.macs / result.base.macs,
            short(last.parameters),
            _megabytes(tree.bytes),
            tree.own,
            tree.mean_own,
        ]
        if tree.forecast is not None:
            row.append(1e3 * tree.forecast[-1])
        if run:
            row.append("-" if tree.measured is None else f"{1e3 * tree.measured[-1]:,.1f}")
        rows.append(row)
    shape = " x ".join(map(str, result.input))
    title = f"{result.model} at {shape}: at most {result.budget}"
    caption = (
        f"{len(result.candidates)} of {result.optimal:,} trees that no other beats: for each number"
        " of leaves the best within each quarter of what the budget adds. own: fraction of a leaf's"
        " MACs that no other leaf shares; mean own: that newcomers own, whenever leaves double"
    )
    return table(columns, rows, title=title, caption=caption)


def _megabytes(size: int) -> str:
    """Three digits at least: `0.353`, `87.0`, `1,310`."""
    megabytes = size / 1e6
    return f"{megabytes:#.3g}" if megabytes < 100 else f"{megabytes:,.0f}"


def _report(result: SplitPlan) -> dict[str, object]:
    """The plan, and what to paste."""
    values: dict[str, object] = to_jsonable_python(result)
    return values | {
        "ranking": RANKING,
        "sentence": result.sentence,
        "option": result.option,
        "recipe": result.recipe,
    }
