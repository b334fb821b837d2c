"""What a directory on the command line holds: a run, or an ensemble by itself."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from treeify import files
from treeify.conversion import saved_config, saving
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.saved_config import EMA, read_config, scored_ensemble
from treeify.data import Data, Preparation
from treeify.data.conventions import of_data_set, of_trained_weights
from treeify.errors import CheckpointError, InputError, RecipeError
from treeify.models.architecture import Architecture
from treeify.training.recipe import DataRecipe
from treeify.training.recipe_file import data_of_run, data_recipe, values_of_run
from treeify.training.run_directory import CHECKPOINTS, RECIPE, STATES


def checkpoint_in(directory: Path, *, trust: bool = False) -> Path:
    """The checkpoint that is meant: a run's last one, or the directory itself.

    Where a moving average was kept, it is meant: it is what the run measured. `CheckpointError` is
    raised if the checkpoint has no readable configuration, or a link leads out of the directory.
    """
    path = scored_ensemble(directory, trust=trust)
    read_config(path, trust=trust)
    return path


def keep_measurements(
    hne: HierarchicalEnsemble, path: Path, directory: Path, *, trust: bool = False
) -> Path:
    """Write what was measured beside its weights, wherever they are by now.

    A run that goes on removes its older states, also the one that was being measured.

    Args:
        hne: the ensemble that was measured.
        path: the checkpoint it was loaded from.
        directory: what was named, which the checkpoint was found in.
        trust: whether links may lead out of it.

    Returns:
        The checkpoint that was written to: the same, or that of the same weights.

    Raises:
        CheckpointError: there is none any more, or it cannot be written.
    """
    try:
        saving.save_measurements(hne, path)
    except CheckpointError:
        if path.is_dir():
            raise
    else:
        return path
    try:
        now = checkpoint_in(directory, trust=trust)
        saving.save_measurements(hne, now)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is gone, and what was measured of it is not kept.",
            expected="the weights that were measured",
            found=str(error).splitlines()[0],
            next_step=f"A run that goes on removes older states. Measure {directory} when it has"
            f" ended, or a copy of it: cp -r {directory} COPY, then treeify calibrate COPY.",
        ) from error
    return now


def recipe_of(path: Path, *, trust: bool = False) -> Path | None:
    """The recipe of the run that wrote a checkpoint; None if no run did."""
    path = path.resolve()
    state = path.parent if path.name == EMA else path
    run = state.parent.parent if state.parent.name == STATES else state.parent
    recipe = run / RECIPE
    in_run = state.parent.name == STATES or state.name in CHECKPOINTS
    if not in_run or not recipe.is_file():
        return None
    if not trust:
        files.require_inside(recipe, run)
    return recipe


def preparation_in(
    path: Path,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    *,
    trust: bool = False,
) -> Preparation:
    """What images go through before a checkpoint's ensemble sees them.

    It says so itself. If an earlier version wrote it, the run's recipe does, or what its
    architecture's trained weights saw. Otherwise nothing but the shape is known.

    Args:
        path: the checkpoint.
        mean: of each channel, or of all; replaces what is known, together with `std`.
        std: the same.
        size: height and width, instead of those of the ensemble.
        trust: whether links may lead out of its directory.

    Raises:
        CheckpointError: the checkpoint is damaged.
        InputError: its inputs are no images, or the numbers do not fit them.
    """
    config = read_config(path, trust=trust)
    preparation = saved_config.preparation_in(path, config)
    if preparation is None:
        shape = tuple(config["example"])
        if len(shape) != 3:
            raise InputError(
                f"the ensemble takes inputs of shape {shape}, not files of images.",
                expected="(C, H, W) with 1, 3 or 4 channels",
                next_step="Load it with treeify.load and call hne.predict(x).",
            )
        preparation = _of_earlier_version(path, config, shape, trust=trust)
    if size is not None:
        preparation = replace(preparation, size=size)
    return preparation.with_statistics(mean, std, "--mean and --std")


def _of_earlier_version(
    path: Path, config: Mapping[str, Any], shape: tuple[int, int, int], *, trust: bool
) -> Preparation:
    architecture = config["architecture"] and Architecture.from_dict(config["architecture"])
    preparation = None
    source = "neither the ensemble nor its architecture says it"
    if recipe := recipe_of(path, trust=trust):
        source = "the data set of its run does not say it"
        with suppress(CheckpointError):  # nothing is known of one that is not trusted either
            section = data_of_run(recipe, trust=trust)
            preparation = of_data_set(section.name, section.options, shape)
            source = f"the data set {section.name!r} of its run does not say it"
    elif architecture:
        preparation = of_trained_weights(architecture.name, shape)
    return preparation or Preparation(size=shape[1:], channels=shape[0], source=source)


def origin_of(path: Path, *, trust: bool = False) -> Path | None:
    """The weights that the run which wrote a checkpoint says it began with; they may be gone."""
    recipe = recipe_of(path, trust=trust)
    model = values_of_run(recipe).get("model") if recipe else None
    weights = model.get("weights") if isinstance(model, dict) else None
    return Path(weights) if isinstance(weights, str) else None


def skips_damaged(path: Path, *, trust: bool = False) -> bool:
    """Whether the run that wrote a checkpoint passes over images that cannot be read."""
    recipe = recipe_of(path, trust=trust)
    fraction = values_of_run(recipe).get("skip_corrupt") if recipe else None
    return isinstance(fraction, int | float) and fraction > 0


# Options of data sets that say how images are prepared, besides their size.
_PREPARING = {"like", "mean", "std", "crop_pct", "crop_padding"}


def held_out_data(
    path: Path, section: DataRecipe, options: Sequence[str], channels: int, *, trust: bool = False
) -> Data:
    """The data to measure a checkpoint's ensemble on.

    Images are prepared as `treeify predict` does, in the ensemble's size, unless options say
    otherwise; classes are those of the ensemble, by name.

    Args:
        path: the checkpoint.
        section: its data, see `data_section`.
        options: what the user changed of them, as `key=value`.
        channels: of the ensemble's inputs.
        trust: whether links may lead out of the checkpoint's directory.

    Raises:
        DataError: the data cannot be read, or have classes that the ensemble does not know.
    """
    data = section.load(channels)
    if len(read_config(path, trust=trust)["example"]) != 3:
        return data
    preparation = preparation_in(path, trust=trust)
    changed = {option.partition("=")[0].strip() for option in options}
    if data.preparation is not None:
        is_known = preparation.is_known and not _PREPARING & changed
        size = (data.preparation if "size" in changed else preparation).size
        data = data.prepared_by(replace(preparation if is_known else data.preparation, size=size))
    classes = preparation.classes
    if classes is None and (recipe := recipe_of(path, trust=trust)):
        # A data set that is not trusted is none of those whose classes earlier runs sorted.
        with suppress(CheckpointError):
            run_section = data_of_run(recipe, trust=trust)
            classes = run_section.classes_of_earlier_runs(data.classes)
    return data if classes is None else data.numbered_by(classes)


def data_section(path: Path, options: Sequence[str], *, trust: bool = False) -> DataRecipe:
    """The data of the run that wrote a checkpoint, changed by `key=value`; else these alone.

    Raises:
        CheckpointError: the run names data that would be imported, and is not trusted.
        RecipeError: there is no run, and no data are named.
    """
    if recipe := recipe_of(path, trust=trust):
        return data_of_run(recipe, [f"data.{option}" for option in options], trust=trust)
    if options:
        return data_recipe(options)
    raise RecipeError(
        f"{str(path)!r} does not say what data to evaluate on.",
        expected="a run directory, or its last/ or best/, with the run's recipe.yaml",
        next_step="Name the data: --data name=image_folder --data root=DIRECTORY",
    )
