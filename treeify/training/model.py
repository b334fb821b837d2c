"""The ensemble of a run: built from its recipe, checked against the data, set up for training."""

from collections.abc import Callable
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from treeify.conversion.api import hierarchicalize
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data import Data, Preparation
from treeify.engine.preserve import preserve_buffers, preserve_modes
from treeify.errors import CheckpointError, DataError, InputError, ModelError, RecipeError, quoted
from treeify.evaluation.metrics import placed
from treeify.models.architecture import Architecture
from treeify.models.image_size import input_channels
from treeify.models.skeleton import skeleton
from treeify.training import fine_tuning
from treeify.training.distributed import Team, broadcast
from treeify.training.loaders import Order
from treeify.training.recipe import DataRecipe, ModelRecipe, Recipe


def load_data(recipe: Recipe) -> Data:
    """The data of a recipe, with as many channels as its model takes where that is left open.

    Raises:
        DataError: the data set cannot be read.
    """
    return recipe.data.load(_channels(recipe.model) if recipe.data.follows_model else None)


def _channels(model: ModelRecipe) -> int | None:
    if isinstance(channels := model.kwargs.get("in_chans"), int):
        return channels
    try:
        return input_channels(skeleton(Architecture(model.name, model.kwargs)), default=3)
    except ModelError:
        return None  # building it will say so, too


def build(recipe: Recipe, data: Data) -> HierarchicalEnsemble:
    """Build the untrained ensemble of a recipe's model section and seed, on the CPU.

    Raises:
        RecipeError: the model does not run on the data's images.
    """
    model = recipe.model
    architecture = Architecture(model.name, model.kwargs)
    base: nn.Module | Architecture = architecture
    if model.pretrained and ":" in model.name:
        # By name, not as a module, which nothing could build again when the run goes on.
        base = Architecture(model.name, {**model.kwargs, "pretrained": True})
    elif model.pretrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            base = architecture.build(pretrained=True)
    image = data.example()
    is_float = image.is_floating_point()
    # Floats become what the model computes with, also in training; integers are no images.
    example = image[None].to(torch.get_default_dtype() if is_float else image.dtype)
    convert = partial(
        hierarchicalize,
        base,
        splits=model.splits,
        fanout=model.fanout,
        seed=recipe.seed,
        example_input=example,
        weights=model.weights,
        trust=model.trust,
    )
    try:
        hne = convert(init=model.init)
    except InputError as error:
        raise RecipeError(
            f"the model does not run on the data's images, of shape {tuple(image.shape)} and"
            f" {image.dtype}.",
            expected="channels, a size and a type of numbers that the model takes",
            found=str(error).splitlines()[0],
            next_step="Set data.channels and data.size, or the model's arguments, e.g."
            f" model.kwargs.in_chans={len(image)}."
            if is_float
            else "Give floats: image.float() / 255, normalised.",
        ) from error
    fine_tuning.initialise(hne, model, recipe.seed, partial(convert, init="copy"))
    return hne


def as_saved(hne: HierarchicalEnsemble, section: DataRecipe, data: Data) -> Data:
    """The data that a saved run goes on with; by name, their classes are those of the run.

    Raises:
        CheckpointError: the classes have other names or another order.
    """
    classes = None if hne.preparation is None else hne.preparation.classes
    earlier = section.classes_of_earlier_runs(data.classes)
    if classes in (None, earlier):
        return data.numbered_by(earlier)
    if classes is not None and classes != data.classes:
        changes = [
            f"{number}: {new or 'none'!r}, the run has {old or 'none'!r}"
            for number, (new, old) in enumerate(zip_longest(data.classes, classes))
            if new != old
        ]
        raise CheckpointError(
            "the classes of the data are not those that the run was trained on.",
            expected=quoted(classes),
            found="\n    ".join(["other names by number:", *changes[:8]]),
            next_step="Name the classes, or their folders, as they were.",
        )
    return data


def other_classes(hne: HierarchicalEnsemble, data: Data, model: ModelRecipe) -> str | None:
    """Says so where a new run begins with a classifier of other classes than the data's."""
    classes = None if hne.preparation is None else hne.preparation.classes
    if classes is None or classes == data.classes or model.head == "fresh":
        return None
    return (
        f"The weights tell apart {quoted(classes)}, and the data have {quoted(data.classes)}:"
        " to draw the classifier anew, set model.head=fresh."
    )


def remember_preparation(hne: HierarchicalEnsemble, data: Data) -> None:
    """Note in an ensemble how the data's images are prepared, and what the classes are called.

    Raises:
        DataError: the images have another shape than the data say.
    """
    if data.preparation is not None:
        shape = tuple(data.example().shape)
        if shape != data.preparation.shape:
            raise DataError(
                "the held-out images are not prepared as the data set's preparation says.",
                expected=f"shape {data.preparation.shape}",
                found=f"shape {shape}",
                next_step="Correct the size or the channels of Data(..., preparation=...).",
            )
        hne.preparation = data.preparation
    elif len(hne.example) == 3:
        channels, height, width = hne.example
        hne.preparation = Preparation(
            size=(height, width),
            channels=channels,
            classes=data.classes,
            source="the data set does not say it",
        )


@torch.no_grad()
def check_classes(hne: HierarchicalEnsemble, data: Data) -> None:
    """Compare an ensemble's outputs with the data's classes.

    Raises:
        DataError: there is one class only.
        InputError: the images are integers, which the model cannot compute with.
        RecipeError: there is not one logit for each class.
    """
    if len(data.classes) < 2:
        raise DataError(
            "there is nothing to learn from one class.",
            expected="images of at least two classes",
            found=", ".join(data.classes) or "none",
            next_step="Add a class of images of anything else.",
        )
    x = placed(data.example()[None], hne)
    with preserve_modes(hne):
        output = hne.eval()(x, leaves=1)
    if not isinstance(output, Tensor):
        raise RecipeError(
            "the model does not return logits.",
            expected="one tensor, [N, K]",
            found=type(output).__name__,
            next_step="Train a module whose forward returns the logits alone.",
        )
    outputs = output.shape[-1]
    if outputs != len(data.classes):
        raise RecipeError(
            "the model does not fit the data.",
            expected=f"a model with the data's {len(data.classes)} classes: {quoted(data.classes)}",
            found=f"one with {outputs}",
            next_step=f"Set model.kwargs.num_classes={len(data.classes)}, or its name for it.",
        )


@torch.no_grad()
def fewest_images(hne: HierarchicalEnsemble, data: Data) -> int:
    """How many images an ensemble needs to be trained on: 1, or 2 where it fails with one.

    Batch norms do whose features are of one pixel: one value has no variance.
    """
    x = placed(data.example()[None], hne)
    with preserve_modes(hne), preserve_buffers(hne), torch.random.fork_rng(devices=[]):
        hne.train()
        try:
            hne(x)
        except (RuntimeError, ValueError):
            hne(torch.cat([x, x]))
            return 2
    return 1


def keep_together(
    order: Order, hne: HierarchicalEnsemble, data: Data, warn: Callable[[str], None]
) -> None:
    """Divide images so that no batch has a single one, if an ensemble cannot be trained on it.

    Raises:
        RecipeError: a step has no more than one.
    """
    order.fewest = fewest_images(hne, data)
    if order.smallest < order.fewest:
        raise RecipeError(
            "the model cannot be trained on one image at a time, which has no variance where"
            " batch norms see one pixel of it.",
            expected="at least 2 images in every step",
            found=f"batch_size={order.batch_size}, {order.images} training images",
            next_step="Set a larger batch_size, or train on larger images.",
        )
    if order.fewest > 1:
        warn(
            "The model cannot be trained on one image at a time. One that is left over joins the"
            " step before, and parts of a step have 2 images or more."
        )


def choose_execution(
    hne: HierarchicalEnsemble, recipe: Recipe, data: Data, images: int, team: Team
) -> None:
    """Set how levels run and where their weights lie, measured if the recipe says so.

    An ensemble that was tuned before stays as it is. The first process measures, with as many
    images as are in one forward pass of a process, so that all of them run alike.
    """
    hne.execution = recipe.execution
    if recipe.tune and not hne.tunings:
        _set_memory_format(hne, recipe)  # what tuning compares other plans with
        image = data.example()
        x = placed(image[None].expand(images, *image.shape), hne)
        if team.index == 0:
            for training in (True, False):
                hne.tune(x, training=training)
        hne.tunings.update(broadcast(hne.tunings))
    _set_memory_format(hne, recipe)


def _set_memory_format(hne: HierarchicalEnsemble, recipe: Recipe) -> None:
    """Put weights in the format of the tuned plan, else of the recipe, also after resuming.

    The images need not be converted: convolutions take over their weights' format.
    """
    plans = [tuning.plan for situation, tuning in hne.tunings.items() if situation.training]
    channels_last = plans[-1].channels_last if plans else recipe.channels_last
    hne.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
