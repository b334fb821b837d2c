"""`treeify ablate`: a grid of recipes, and its table."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from treeify import files
from treeify.cli.options import Json
from treeify.cli.output import Column, print_json, say, table
from treeify.cli.train import INTERRUPTED
from treeify.errors import RecipeError
from treeify.training import shipped_recipes
from treeify.training.ablation import MOST_SEEDS, GridRun, ablate, expand, load_grid, results
from treeify.training.ablation import table as scores
from treeify.training.distributed import leave
from treeify.training.events import Epoch, Reporter


def run_grid(
    grid: Annotated[
        Path,
        typer.Argument(
            help="YAML grid, or the name of one that comes with treeify (treeify recipes)."
        ),
    ],
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_SEEDS, help="Seeds of every variant, from 0; by default the grid's."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the runs; by default runs/NAME.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VARIANT", help="Train these variants, others elsewhere; may be repeated."
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Only print what has finished; train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a grid of recipes with several seeds, and compare them.

    What has finished is not trained again, and a run that was stopped goes on. The table has the
    held-out accuracy of every number of leaves, mean and deviation over seeds; every run's last
    metrics go to OUT/results.json.

    For example:

        treeify ablate ablations/digits --seeds 5
    """
    console = Console(quiet=as_json)
    grid = shipped_recipes.find(grid)
    directory = Path("runs") / load_grid(grid).name if out is None else out
    runs = expand(grid, directory, seeds)
    finished = show or ablate(
        _chosen(runs, only), started=lambda run: _Line(console, run, len(runs), runs.index(run))
    )
    rows = results(runs)
    if rows and not show and PartialState().is_main_process:
        files.replace_text(directory / "results.json", json.dumps(rows, indent=1) + "\n")
    if as_json:
        print_json(rows)
    for part, title in (("held_out", "held-out accuracy %"), ("train", "training accuracy %")):
        say(console, _table(rows, part, title))
    say(console, f"{len(rows)} of {len(runs)} runs have finished; {directory}")
    leave()
    if not finished:
        sys.exit(INTERRUPTED)


def _chosen(runs: Sequence[GridRun], only: Sequence[str] | None) -> Sequence[GridRun]:
    """The runs of some variants; of all if none is named."""
    if unknown := set(only or ()) - {run.variant for run in runs}:
        raise RecipeError(
            f"the grid has no variant {', '.join(sorted(unknown))}.",
            expected=f"some of {', '.join(dict.fromkeys(run.variant for run in runs))}",
        )
    return [run for run in runs if run.variant in only] if only else runs


class _Line(Reporter):
    """A line per run."""

    def __init__(self, console: Console, run: GridRun, count: int, index: int) -> None:
        self.console = console
        self.name = f"[{index + 1}/{count}] {run.variant}, seed {run.seed}"
        self.epochs = run.recipe.schedule.epochs

    def finished_epoch(self, epoch: Epoch) -> None:
        if epoch.epoch == self.epochs:
            accuracy = f"{epoch.held_out[-1].accuracy:.2f} % held out with all leaves"
            say(self.console, f"{self.name}: {accuracy}")

    def warned(self, message: str) -> None:
        say(self.console, f"{self.name}: {message}")


def _table(results: Sequence[Mapping[str, Any]], part: str, title: str) -> Table:
    variants = scores(results, part)
    sizes = sorted({leaves for row in variants.values() for leaves in row})
    rows = [
        (variant, *(str(row.get(size, "")) for size in sizes)) for variant, row in variants.items()
    ]
    columns = [Column(""), *(Column(f"{size}", "") for size in sizes)]
    return table(columns, rows, title=title, caption="mean ± deviation over seeds")
