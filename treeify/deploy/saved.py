"""What a directory holds: a run, an ensemble by itself or an export, and its held-out data."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treeify import files
from treeify.conversion import saved_config, saving
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.saved_config import EMA, read_config, scored_ensemble
from treeify.data import Data, Preparation, UnreadableImageError
from treeify.data.conventions import of_data_set, of_trained_weights
from treeify.deploy.exported import ExportedEnsemble, looks_exported
from treeify.errors import CheckpointError, DataError, InputError, RecipeError
from treeify.evaluation.comparison import base_model_of
from treeify.models.architecture import Architecture
from treeify.training.recipe import DataRecipe
from treeify.training.recipe_file import data_of_run, data_recipe, values_of_run
from treeify.training.run_directory import CHECKPOINTS, RECIPE, STATES

_IMAGENET_CLASSES = 1000


def exported_in(directory: Path, device: str = "auto") -> ExportedEnsemble | None:
    """The export that a directory is; None if it is none.

    Raises:
        CheckpointError: it is damaged.
        InputError: a device was asked for that it does not run on.
    """
    if not looks_exported(directory):
        return None
    if device not in ("auto", "cpu"):
        raise InputError(
            f"--device {device} was given, and {directory} is an export.",
            expected="auto or cpu: its runtime computes on the CPU",
            next_step="Answer with what it was exported from.",
        )
    return ExportedEnsemble(directory)


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
    beside = path / RECIPE
    if beside.is_file() and (path / saved_config.CONFIG).is_file():  # as it was pushed
        if not trust:
            files.require_inside(beside, path)
        return beside
    state = path.parent if path.name == EMA else path
    run = state.parent.parent if state.parent.name == STATES else state.parent
    recipe = run / RECIPE
    in_run = state.parent.name == STATES or state.name in CHECKPOINTS
    if not in_run or not recipe.is_file():
        return None
    if not trust:
        files.require_inside(recipe, run)
    return recipe


def library_classes(
    hne: HierarchicalEnsemble, path: Path, count: int, *, trust: bool = False
) -> tuple[str, ...] | None:
    """ImageNet-1k's names, which the outputs of a model of timm's or torchvision's have.

    Args:
        hne: a checkpoint's ensemble.
        path: the checkpoint.
        count: how many outputs it has.
        trust: whether links may lead out of the run.

    Returns:
        A name for each output; None for any other number than 1,000, a model of the user's own, or
        one that a run has trained.
    """
    architecture = hne.architecture
    is_own = architecture is None or ":" in architecture.name
    if count != _IMAGENET_CLASSES or is_own or recipe_of(path, trust=trust):
        return None
    from timm.data.imagenet_info import ImageNetInfo  # after `treeify.data.timm_utils`

    return tuple(ImageNetInfo().label_descriptions())


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


def preparation_of_export(
    exported: ExportedEnsemble,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    size: tuple[int, int] | None,
) -> Preparation:
    """What images go through before an export sees them; statistics as in `preparation_in`.

    Raises:
        InputError: it takes another size, or no images, or the numbers do not fit.
    """
    preparation = exported.preparation
    if size is not None and tuple(size) != preparation.size:
        asked, own = ("x".join(map(str, each)) for each in (size, preparation.size))
        raise InputError(
            f"--input-size {asked} was given, and {exported.path} is an export.",
            expected=f"{own}, the size that its files take",
            next_step=f"Export for that size: treeify export DIR --input-size {asked}",
        )
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


def base_model_in(
    hne: HierarchicalEnsemble, weights: Path | None, path: Path, *, trust: bool
) -> tuple[nn.Module, Path | None, list[str]]:
    """The base model of a checkpoint's ensemble, in evaluation mode.

    Args:
        hne: the ensemble.
        weights: trained weights of the base model; by default those that the run began with, if it
            is trusted.
        path: the checkpoint.
        trust: whether those may be read, and directories of weights may name what is imported.

    Returns:
        The base model, where its weights are from if that is known, and why others do not fit.

    Raises:
        CheckpointError: the weights cannot be read, or are of another model.
    """
    origin = origin_of(path, trust=trust) if weights is None else None
    if origin is not None and not trust:  # it may be any file, in any format
        note = f"The run says it began with the weights in {origin}: --weights {origin} reads them."
        return base_model_of(hne, None), None, [note]
    if origin is not None and (files.is_file(origin) or files.is_directory(origin)):
        try:
            return base_model_of(hne, origin, trust=True), origin, []
        except CheckpointError:  # its head is for other classes, say
            note = f"The weights in {origin}, which the run began with, are of another model."
            return base_model_of(hne, None), None, [note]
    return base_model_of(hne, weights, trust=trust), weights, []


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
    data = _prepared(data, preparation, options)
    classes = preparation.classes
    if classes is None and (recipe := recipe_of(path, trust=trust)):
        # A data set that is not trusted is none of those whose classes earlier runs sorted.
        with suppress(CheckpointError):
            run_section = data_of_run(recipe, trust=trust)
            classes = run_section.classes_of_earlier_runs(data.classes)
    return data if classes is None else data.numbered_by(classes)


def training_images(data: Data, count: int) -> Tensor:
    """Some training images, always the same ones, prepared as in evaluation: `[count, C, H, W]`.

    Those that cannot be read are left out.

    Raises:
        DataError: none can be read.
    """
    total = len(data.train)  # type: ignore[arg-type]
    return torch.stack(_some(data.unaugmented, total, count, "training"))


def held_out_images(data: Data, count: int) -> tuple[Tensor, Tensor]:
    """The same of held-out images, and their classes `[count]`.

    Raises:
        DataError: none can be read.
    """
    total = len(data.held_out)  # type: ignore[arg-type]
    pairs = _some(data.held_out.__getitem__, total, count, "held-out")
    return torch.stack([pair[0] for pair in pairs]), torch.tensor([int(pair[1]) for pair in pairs])


def _some(read: Callable[[int], Any], total: int, count: int, kind: str) -> list[Any]:
    """Up to `count` of `total` examples, drawn by a seed of their own."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    examples: list[Any] = []
    for index in order.tolist():
        if len(examples) == count:
            break
        with suppress(UnreadableImageError):
            examples.append(read(index))
    if not examples:
        raise DataError(f"none of the {kind} images can be read.", expected="at least one")
    return examples


def data_for_export(
    exported: ExportedEnsemble, section: DataRecipe, options: Sequence[str]
) -> Data:
    """The same for an export, whose files take one size of images.

    Raises:
        DataError: as there.
        InputError: the images have another shape.
    """
    data = section.load(exported.shape[0])
    if len(exported.shape) == 3:
        preparation = exported.preparation
        data = _prepared(data, preparation, options)
        if preparation.classes is not None:
            data = data.numbered_by(preparation.classes)
    if (shape := tuple(data.example().shape)) != exported.shape:
        raise InputError(
            "the images have another shape than those that the export takes.",
            expected=f"{exported.shape}",
            found=f"{shape}",
            next_step="Leave their size to the export, or export for that size: treeify export"
            " --input-size.",
        )
    return data


def _prepared(data: Data, preparation: Preparation, options: Sequence[str]) -> Data:
    """Data whose images are prepared as an ensemble's, unless options say otherwise."""
    if data.preparation is None:
        return data
    changed = {option.partition("=")[0].strip() for option in options}
    is_known = preparation.is_known and not _PREPARING & changed
    size = (data.preparation if "size" in changed else preparation).size
    return data.prepared_by(replace(preparation if is_known else data.preparation, size=size))


def data_section(
    path: Path, options: Sequence[str], *, option: str = "--data", trust: bool = False
) -> DataRecipe:
    """The data of the run that wrote a checkpoint, changed by `key=value`; else these alone.

    Args:
        path: the checkpoint.
        options: what the user sets, as `key=value`.
        option: what they were given as, for messages.
        trust: whether what the run names may be imported.

    Raises:
        CheckpointError: the run names data that would be imported, and is not trusted.
        RecipeError: there is no run, and no data are named.
    """
    if recipe := recipe_of(path, trust=trust):
        return data_of_run(recipe, [f"data.{change}" for change in options], trust=trust)
    if options:
        return data_recipe(options)
    raise RecipeError(
        f"{str(path)!r} does not say what data to use.",
        expected="a run directory, or its last/ or best/, with the run's recipe.yaml",
        next_step=f"Name the data: {option} name=image_folder {option} root=DIRECTORY",
    )
