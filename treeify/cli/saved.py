"""What a directory on the command line holds: a run, or an ensemble by itself."""

from collections.abc import Sequence
from pathlib import Path

from treeify.conversion import checkpoint
from treeify.conversion.checkpoint import EMA, scored_ensemble
from treeify.data.preparation import Preparation, preparation_for
from treeify.errors import RecipeError
from treeify.models.architecture import Architecture
from treeify.training.recipe import DataRecipe
from treeify.training.recipe_file import data_recipe, load_recipe
from treeify.training.run_directory import CHECKPOINTS, RECIPE, STATES


def checkpoint_in(directory: Path) -> Path:
    """The checkpoint that is meant: a run's last one, or the directory itself.

    Where a moving average was kept, it is meant: it is what the run measured. `CheckpointError` is
    raised if the checkpoint has no readable configuration.
    """
    path = scored_ensemble(directory)
    checkpoint.read_config(path)
    return path


def recipe_of(path: Path) -> Path | None:
    """The recipe of the run that wrote a checkpoint; None if no run did."""
    path = path.resolve()
    state = path.parent if path.name == EMA else path
    run = state.parent.parent if state.parent.name == STATES else state.parent
    recipe = run / RECIPE
    in_run = state.parent.name == STATES or state.name in CHECKPOINTS
    return recipe if in_run and recipe.is_file() else None


def preparation_in(
    path: Path, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Preparation:
    """What images go through before a checkpoint's ensemble sees them.

    Mean and standard deviation of each channel, or of all, replace the known ones; both or neither
    are set.
    """
    config = checkpoint.read_config(path)
    architecture = config["architecture"] and Architecture.from_dict(config["architecture"])
    recipe = recipe_of(path)
    section = load_recipe(recipe).data if recipe else None
    return preparation_for(
        tuple(config["example"]),
        data_set=section.name if section else None,
        options=section.options if section else None,
        architecture=architecture,
        mean=mean,
        std=std,
    )


def skips_damaged(path: Path) -> bool:
    """Whether the run that wrote a checkpoint passes over images that cannot be read."""
    recipe = recipe_of(path)
    return recipe is not None and load_recipe(recipe).skip_corrupt > 0


def data_section(path: Path, options: Sequence[str]) -> DataRecipe:
    """The data of the run that wrote a checkpoint, changed by `key=value`; else these alone."""
    if recipe := recipe_of(path):
        return load_recipe(recipe, [f"data.{option}" for option in options]).data
    if options:
        return data_recipe(options)
    raise RecipeError(
        f"{str(path)!r} does not say what data to evaluate on.",
        expected="a run directory, or its last/ or best/, with the run's recipe.yaml",
        next_step="Name the data: --data name=image_folder --data root=DIRECTORY",
    )
