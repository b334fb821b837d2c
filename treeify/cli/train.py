"""`treeify train`: a recipe in, a trained ensemble and its table out."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from accelerate import PartialState
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from treeify.cli.options import InputSize, Weights
from treeify.cli.output import say
from treeify.cli.scores import score_rows, score_table
from treeify.cli.sparks import live_line, summary
from treeify.errors import RecipeError
from treeify.training import shipped_recipes
from treeify.training.distributed import leave
from treeify.training.events import Epoch, Reporter, Result, RunSize, Step
from treeify.training.folder_recipe import folder_recipe
from treeify.training.recipe import Recipe
from treeify.training.recipe_file import load_recipe
from treeify.training.run_directory import RunDirectory, is_run, recipe_in
from treeify.training.trainer import train as run_training

INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help="YAML recipe, or the name of one that comes with treeify (treeify recipes), and"
            " recipe keys to set, the values in YAML, e.g. optimizer.lr=0.05.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Instead of a recipe: images in FOLDER/train/CLASS and, held out, in"
            " FOLDER/val/CLASS; or in FOLDER/CLASS, of which a fifth is held out.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --data: timm's name, torchvision/NAME, or package.module:function.",
        ),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="With --data: begin with trained weights.")
    ] = False,
    weights: Weights = None,
    input_size: InputSize = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="With --data: 20 by default.")] = None,
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
            help="Go on with the run in this directory, from the last state it saved, by its own "
            "recipe. One that is given must be the one it began with.",
        ),
    ] = None,
    more_epochs: Annotated[
        int, typer.Option(min=0, help="Make the resumed run longer, also if it is finished.")
    ] = 0,
) -> None:
    """Train a hierarchical neural ensemble from a recipe, or on a folder of images.

    Ctrl-C or SIGTERM finishes the current step, saves the state to DIRECTORY/last and exits with
    code 130. Every run's directory has its recipe with all defaults: recipe.yaml.

    For example:

        treeify train digits_hne

        treeify train digits_hne loss.name=independent seed=1 --out runs/independent

        treeify train --data photos --model resnet18 --pretrained

        treeify train --data photos --model my_models:net --weights net.pth --input-size 64

        treeify train --resume runs/independent

        treeify train --resume runs/independent --more-epochs 10

        torchrun --nproc-per-node 2 -m treeify train digits_hne
    """
    console = Console()
    file, overrides = _parse(arguments or [])
    _check_target(resume, out, overwrite)
    settings = _settings(
        file, overrides, resume, data, model, pretrained, weights, input_size, epochs
    )
    with _Display(console) as display:
        result = run_training(
            settings,
            out=out,
            overwrite=overwrite,
            resume=resume,
            more_epochs=more_epochs,
            reporter=display,
        )
    if PartialState().is_main_process:
        _print_result(console, result, display.epochs)
    leave()
    if result.interrupted:
        sys.exit(INTERRUPTED)


def _settings(
    file: Path | None,
    overrides: list[str],
    resume: Path | None,
    data: Path | None,
    model: str | None,
    pretrained: bool,
    weights: Path | None,
    input_size: tuple[int, int] | None,
    epochs: int | None,
) -> Recipe:
    """The recipe of a file, of the run to go on with, or for a folder of images."""
    if data is None:
        if pretrained or any(option is not None for option in (model, weights, input_size, epochs)):
            raise RecipeError(
                "--model, --pretrained, --weights, --input-size and --epochs say how to train on a"
                " folder of images.",
                expected="--data FOLDER with them",
                next_step="In a recipe they are model.name, model.pretrained, model.weights,"
                " data.size and schedule.epochs.",
            )
        return load_recipe(_recipe_file(file, resume), overrides)
    if model is None or file is not None or resume is not None:
        raise RecipeError(
            "--data says what to train on where there is no recipe.",
            expected="--model NAME with it, and neither a recipe nor --resume",
            next_step="In a recipe, the folder is data.root.",
        )
    return folder_recipe(
        data,
        model,
        pretrained=pretrained,
        weights=weights,
        size=input_size,
        epochs=epochs,
        overrides=overrides,
    )


def _check_target(resume: Path | None, out: Path | None, overwrite: bool) -> None:
    if resume is not None and (out is not None or overwrite):
        raise RecipeError("--resume goes on in RUN: leave --out and --overwrite out.")


def _parse(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The recipe, if the first argument is one, and the overrides."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).exists()):
        return Path(arguments[0]), arguments[1:]
    return None, arguments


def _recipe_file(file: Path | None, resume: Path | None) -> Path:
    """The recipe to train by: the one given, else that of the run to go on with."""
    if file is None and resume is not None:
        return recipe_in(resume)
    if file is not None and not (path := shipped_recipes.find(file)).is_dir():
        return path
    if file is not None and is_run(file):
        next_step = f"Go on with the run in it: treeify train --resume {file}"
    else:
        next_step = (
            "To train on a folder of images without one:"
            f" treeify train --data {file or 'FOLDER'} --model resnet18"
        )
    raise RecipeError(
        "there is no recipe." if file is None else f"{str(file)!r} is no recipe.",
        expected="a YAML file, as docs/recipes.md describes it, or a name of treeify recipes",
        found=None if file is None else "a directory",
        next_step=next_step,
    )


class _Progress(Progress):
    """A progress bar with a line of text below it, once there is one."""

    def __init__(self, *columns: Any, below: Callable[[], str], **options: Any) -> None:
        self.below = below  # drawn while it is constructed
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if line := self.below():
            yield Text(line, no_wrap=True, overflow="crop")


class _Display(Reporter):
    """A live line on a terminal; elsewhere, where nothing can be redrawn, a line per epoch."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.epochs: list[Epoch] = []  # also those of before, where a run goes on
        self.progress = _Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=6),  # all of it fits 80 columns
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} {task.fields[accuracy]} ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            below=lambda: live_line(self.epochs, console.encoding),
        )
        self.task: TaskID | None = None
        self.last_epoch = 0
        self.held_out = "-"

    def __enter__(self) -> _Display:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def started(self, run: RunSize) -> None:
        """Say what is trained on what, and where; begin the live line."""
        self.last_epoch = run.epochs
        images = len(run.data.train)  # type: ignore[arg-type]
        where = f"{run.processes} processes, " if run.processes > 1 else ""
        say(
            self.console,
            f"{run.hne.leaves} leaves on {where}{run.device}, {images:,} training images; "
            f"{run.data.split}. Writing {run.directory}, with its recipe.yaml",
        )
        if run.data.preparation is not None:
            say(self.console, f"Images: {run.data.preparation}.")
        say(self.console, *run.hne.conversion.notes)
        parameters = list(run.hne.parameters())
        if frozen := sum(p.numel() for p in parameters if not p.requires_grad):
            total = sum(parameter.numel() for parameter in parameters)
            say(self.console, f"{frozen:,} of {total:,} parameters are frozen.")
        if run.done:
            total = run.epochs * run.steps
            say(self.console, f"Going on after step {run.done:,} of {total:,}.")
            rows = RunDirectory(run.directory).metrics()
            self.epochs = [row for row in rows if row.epoch <= run.done // run.steps]
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
        self.epochs.append(epoch)
        accuracy = epoch.held_out[-1].accuracy
        self.held_out = f"{accuracy:.1f} %"
        if not self.console.is_terminal:
            say(
                self.console,
                f"epoch {epoch.epoch}/{self.last_epoch}  loss {epoch.loss:.3f}  "
                f"accuracy {epoch.train[-1].accuracy:.2f} % training, {accuracy:.2f} % held out  "
                f"{epoch.seconds:.1f} s"
                + (f"  {epoch.skipped} images skipped" if epoch.skipped else ""),
            )

    def warned(self, message: str) -> None:
        say(self.console, message, style="yellow")


def _print_result(console: Console, result: Result, history: Sequence[Epoch]) -> None:
    run, last = result.run, result.last
    if last is not None:
        say(console, score_table(score_rows(run.hne, last.held_out, last.train)))
        say(console, f"Data: {run.data.split}.", *summary(history, console.encoding))
    state = run.directory / "last"
    if result.interrupted:
        epochs = last.epoch if last else run.done // run.steps  # its metrics may be lost
        done = f"after {epochs} of {run.epochs} epochs" if epochs else "in the first epoch"
        say(
            console,
            f"Stopped {done}; the state is saved in {state}. Go on with"
            f" treeify train --resume {run.directory}",
        )
    else:
        say(console, f"Run: {run.directory}  (the ensemble: {state})")
