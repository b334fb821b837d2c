"""`treeify train`: a recipe in, a trained ensemble and its table out."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from treeify.cli.output import say
from treeify.cli.scores import score_rows, score_table
from treeify.errors import RecipeError
from treeify.training.distributed import leave
from treeify.training.events import Epoch, Reporter, Result, RunSize, Step
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train as run_training

INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Recipe keys to set, the values in YAML, e.g. optimizer.lr=0.05.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run directory, new or empty. Without it the recipe's, else runs/NAME, or "
            "runs/NAME-2, ... if that is there."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is already in the directory.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Go on with the run in this directory, from the last state it saved. The recipe "
            "and overrides must be those it began with: RUN/recipe.yaml has them.",
        ),
    ] = None,
) -> None:
    """Train a hierarchical neural ensemble from a recipe.

    Ctrl-C or SIGTERM finishes the current step, saves the state to DIRECTORY/last and exits with
    code 130.

    For example:

        treeify train recipes/digits_hne.yaml

        treeify train recipes/digits_hne.yaml loss.name=independent seed=1 --out runs/independent

        treeify train runs/independent/recipe.yaml --resume runs/independent

        torchrun --nproc-per-node 2 -m treeify train recipes/digits_hne.yaml
    """
    console = Console()
    _check_target(out, overwrite, resume)
    settings = load_recipe(recipe, overrides or ())
    with _Display(console) as display:
        result = run_training(
            settings, out=out, overwrite=overwrite, resume=resume, reporter=display
        )
    if PartialState().is_main_process:
        _print_result(console, result)
    leave()
    if result.interrupted:
        sys.exit(INTERRUPTED)


def _check_target(out: Path | None, overwrite: bool, resume: Path | None) -> None:
    if resume is not None and (out is not None or overwrite):
        raise RecipeError("--resume goes on in RUN: leave --out and --overwrite out.")


class _Display(Reporter):
    """A live line on a terminal; elsewhere, where nothing can be redrawn, a line per epoch."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=6),  # all of it fits 80 columns
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} {task.fields[accuracy]} ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task: TaskID | None = None
        self.epochs = 0
        self.held_out = "-"

    def __enter__(self) -> _Display:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def started(self, run: RunSize) -> None:
        """Say what is trained on what, and where; begin the live line."""
        self.epochs = run.epochs
        images = len(run.data.train)  # type: ignore[arg-type]
        where = f"{run.processes} processes, " if run.processes > 1 else ""
        say(
            self.console,
            f"{run.hne.leaves} leaves on {where}{run.device}, {images:,} training images; "
            f"{run.data.split}. Writing {run.directory}",
        )
        say(self.console, *run.hne.conversion.notes)
        if run.done:
            total = run.epochs * run.steps
            say(self.console, f"Going on after step {run.done:,} of {total:,}.")
        self.task = self.progress.add_task(
            "",
            total=run.epochs * run.steps,
            completed=run.done,
            epoch=run.done // run.steps + 1,
            epochs=run.epochs,
            loss="-",
            accuracy="",
        )

    def stepped(self, step: Step) -> None:
        assert self.task is not None
        accuracy = "-" if math.isnan(step.accuracy) else f"{step.accuracy:.1f} %"
        self.progress.update(
            self.task,
            advance=1,
            epoch=step.epoch,
            loss=f"{step.loss:.2f}",
            accuracy=f"train {accuracy}, held out {self.held_out}",
        )

    def finished_epoch(self, epoch: Epoch) -> None:
        accuracy = epoch.held_out[-1].accuracy
        self.held_out = f"{accuracy:.1f} %"
        if not self.console.is_terminal:
            say(
                self.console,
                f"epoch {epoch.epoch}/{self.epochs}  loss {epoch.loss:.3f}  "
                f"accuracy {epoch.train[-1].accuracy:.2f} % training, {accuracy:.2f} % held out  "
                f"{epoch.seconds:.1f} s"
                + (f"  {epoch.skipped} images skipped" if epoch.skipped else ""),
            )

    def warned(self, message: str) -> None:
        say(self.console, message, style="yellow")


def _print_result(console: Console, result: Result) -> None:
    run, last = result.run, result.last
    if last is not None:
        say(console, score_table(score_rows(run.hne, last.held_out, last.train), brief=True))
        say(console, f"Data: {run.data.split}.")
    state = run.directory / "last"
    if result.interrupted:
        done = f"after {last.epoch} of {run.epochs} epochs" if last else "in the first epoch"
        say(
            console,
            f"Stopped {done}; the state is saved in {state}. Go on with"
            f" treeify train {run.directory / 'recipe.yaml'} --resume {run.directory}",
        )
    else:
        say(console, f"Run: {run.directory}  (the ensemble: {state})")
