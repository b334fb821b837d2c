"""Grids of recipes: every variant with several seeds, trained where that is not done yet.

A grid is a file:

    name: table1
    recipe: ../digits_hne.yaml        # of all variants, relative to the file
    overrides: [schedule.epochs=20]   # of all variants
    seeds: 5                          # how many, from 0
    variants:                         # by the name of their row
      L_I: [loss.name=independent]
      L_HD: [loss.name=hierarchical_distillation]
      other: {recipe: ../other.yaml, overrides: [optimizer.lr=0.05]}

Its runs are ordinary ones, in a directory each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pydantic import Field, PositiveInt, ValidationError

from treeify import files
from treeify.conversion.saved_config import LAST
from treeify.errors import RecipeError
from treeify.training.events import Epoch, Reporter
from treeify.training.recipe import Recipe
from treeify.training.recipe_file import load_recipe
from treeify.training.run_directory import RunDirectory, check_same, is_run, state_name
from treeify.training.sections import Section
from treeify.training.trainer import train
from treeify.training.yaml_values import MOST_BYTES, check_keys, parse

# Each is read and checked before the first begins.
MOST_SEEDS = 1_000


class Variant(Section):
    """A row of the table: its recipe stands instead of the grid's, its overrides after them."""

    recipe: str | None = None
    overrides: list[str] = Field(default=[])


class Grid(Section):
    """What is compared; the runs are in `runs/NAME` unless told otherwise."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    recipe: str
    overrides: list[str] = Field(default=[])
    seeds: PositiveInt = Field(default=1, le=MOST_SEEDS)
    variants: dict[str, list[str] | Variant] = Field(min_length=1)


@dataclass(frozen=True)
class GridRun:
    """One run of a grid: its row of the table, its seed, what is trained and where."""

    variant: str
    seed: int
    recipe: Recipe
    directory: Path


def load_grid(path: Path) -> Grid:
    """Read and check a grid; nothing is built.

    Raises:
        RecipeError: the file cannot be read or does not describe a grid.
    """
    try:
        values, node = parse(files.read_bytes(path, MOST_BYTES).decode())
        check_keys(node)
        return Grid.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, detail['loc'])) or 'the grid'}: {detail['msg']}"
            for detail in error.errors()[:20]
        ]
        raise RecipeError(
            "\n  ".join([f"grid {str(path)!r} is not one.", *problems]),
            expected="name, recipe, variants (name: [overrides]), and perhaps overrides and seeds",
        ) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"grid {str(path)!r} cannot be read.", found=str(error)) from error


def expand(path: Path, out: Path, seeds: int | None = None) -> list[GridRun]:
    """Every run of a grid, its recipe checked.

    Args:
        path: of the grid's file.
        out: directory of the runs.
        seeds: instead of the grid's.

    Raises:
        RecipeError: the grid or one of its recipes is wrong.
    """
    grid = load_grid(path)
    runs = []
    for name, variant in grid.variants.items():
        variant = variant if isinstance(variant, Variant) else Variant(overrides=variant)
        file = path.parent / (variant.recipe or grid.recipe)
        for seed in range(grid.seeds if seeds is None else seeds):
            recipe = load_recipe(file, [*grid.overrides, *variant.overrides, f"seed={seed}"])
            runs.append(GridRun(name, seed, recipe, out / name / f"seed{seed}"))
    return runs


def last_epoch(run: GridRun) -> Epoch | None:
    """A finished run's last epoch, else None; CheckpointError if the run is of another recipe."""
    if not is_run(run.directory):
        return None
    directory = RunDirectory(run.directory)
    check_same(directory, run.recipe)
    metrics, epochs = directory.metrics(), run.recipe.schedule.epochs
    if not metrics or metrics[-1].epoch != epochs:
        return None
    # Killed between the last line and the last state, it has not finished.
    newest = (run.directory / LAST).resolve().name
    return metrics[-1] if newest == state_name(metrics[-1].step, epochs) else None


def ablate(
    runs: Sequence[GridRun],
    *,
    started: Callable[[GridRun], Reporter] = lambda run: Reporter(),
) -> bool:
    """Train what is left of a grid; a run that was stopped goes on.

    Args:
        runs: see `expand`.
        started: called with each run before it begins; its reporter hears how it goes.

    Returns:
        Whether all runs have finished; Ctrl-C stops in between.

    Raises:
        CheckpointError: a run's directory holds another recipe's run.
    """
    for run in runs:
        if last_epoch(run) is not None:
            continue
        directory, reporter = run.directory, started(run)
        if is_run(directory):
            result = train(run.recipe, resume=directory, reporter=reporter)
        else:
            result = train(run.recipe, out=directory, reporter=reporter)
        if result.interrupted:
            return False
    return True


def results(runs: Sequence[GridRun]) -> list[dict[str, Any]]:
    """Every finished run's last epoch, with what it was run with, ready for JSON.

    Raises:
        CheckpointError: a run's directory holds another recipe's run.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        if (epoch := last_epoch(run)) is not None:
            environment = asdict(RunDirectory(run.directory).environment())
            settings = {key: environment[key] for key in ("versions", "commit", "threads")}
            rows.append({"variant": run.variant, "seed": run.seed, **asdict(epoch), **settings})
    return rows


@dataclass(frozen=True)
class Cell:
    """A mean over seeds, and the sample standard deviation; None for one seed."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        """With one digit more than one image of a thousand is worth."""
        spread = "" if self.deviation is None else f" ±{self.deviation:.2f}"
        return f"{self.mean:.2f}{spread}"


def cells(values: Sequence[float]) -> Cell:
    """The mean and spread of some seeds."""
    return Cell(mean(values), stdev(values) if len(values) > 1 else None)


def table(
    results: Sequence[Mapping[str, Any]], part: str = "held_out", score: str = "accuracy"
) -> dict[str, dict[int, Cell]]:
    """Rows of a table like the paper's Table 1: by variant and number of leaves.

    Args:
        results: of the finished runs.
        part: `held_out` or `train`.
        score: a field of `treeify.evaluation.metrics.Score`.
    """
    values: dict[str, dict[int, list[float]]] = {}
    for row in results:
        for scores in row[part]:
            sizes = values.setdefault(row["variant"], {})
            sizes.setdefault(scores["leaves"], []).append(scores[score])
    return {
        variant: {leaves: cells(numbers) for leaves, numbers in row.items()}
        for variant, row in values.items()
    }
