"""A recipe without a file: from a folder of images and the name of a model."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treeify.errors import DataError, quoted
from treeify.models.architecture import Architecture
from treeify.models.image_size import example_shape
from treeify.models.skeleton import skeleton
from treeify.training.recipe import Recipe
from treeify.training.recipe_file import recipe_from

# What is not said, as in recipes/finetune_image_folder.yaml.
FINE_TUNING: Mapping[str, Any] = {
    "model": {"splits": 3},
    "data": {"name": "image_folder", "auto_augment": "rand-m7-mstd0.5", "random_erasing": 0.1},
    "loss": {"name": "hierarchical_distillation"},
    "optimizer": {
        "name": "adamw",
        "lr": 5e-4,
        "weight_decay": 0.05,
        "filter_bias_and_bn": True,
        "clip_grad": 1.0,
    },
    "schedule": {"epochs": 20, "warmup_epochs": 2.0},
    "ema": {"decay": 0.999, "warmup": True},
    "batch_size": 64,
    "channels_last": True,
    "workers": 4,
    "skip_corrupt": 10,
}


def folder_recipe(
    folder: Path,
    model: str,
    *,
    pretrained: bool = False,
    epochs: int | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """The recipe that trains a model on a folder of images, with as many classes as it has.

    Args:
        folder: images in `folder/train/CLASS/*` and, held out, `folder/val/CLASS/*`.
        model: name of the base model.
        pretrained: begin with its trained weights, in every branch with noise (`init: perturb`).
        epochs: how many; a tenth of them warms up.
        overrides: `key.path=value`, as for a recipe's file.

    Raises:
        DataError: the folders are not there.
        ModelError: the model is unknown.
        RecipeError: an override is wrong.
    """
    _check_parts(folder)
    name = re.sub(r"[^\w.-]+", "_", f"{folder.resolve().name}_{model}").lstrip(".-")
    architecture = Architecture(model)
    height, width = example_shape(skeleton(architecture), architecture)[1:]
    size = height if height == width else [height, width]
    values: dict[str, Any] = {
        **FINE_TUNING,
        "name": name or "folder",
        "model": {**FINE_TUNING["model"], "name": model},
        "data": {**FINE_TUNING["data"], "root": str(folder), "size": size},
    }
    if pretrained:
        values["model"] |= {"pretrained": True, "init": "perturb"}
        if ":" not in model:
            values["data"]["like"] = model
    if epochs is not None:
        values["schedule"] = {"epochs": epochs, "warmup_epochs": min(2.0, epochs / 10)}
    subject = f"the recipe for {str(folder)!r}"
    recipe = recipe_from(values, overrides, subject)
    values["model"]["kwargs"] = {"num_classes": len(recipe.data.load().classes)}
    return recipe_from(values, overrides, subject)


def _check_parts(folder: Path) -> None:
    """Raise DataError unless a folder has one of images to train on and one of those held out."""
    if all((folder / part).is_dir() for part in ("train", "val")):
        return
    names = sorted(path.name for path in folder.glob("[!.]*/"))
    inside = "no such directory" if not folder.is_dir() else "no folders in it"
    if names:
        inside = f"the folders {quoted(names, 5)}"
    some = "one in five of each class, say"
    next_step = f"Move all classes into 'train', and then images into 'val': {some}."
    if "train" in names:
        next_step = f"Rename the folder of images held out to 'val', or make one: {some}."
    raise DataError(
        f"{str(folder)!r} is not divided into images to train on and images held out.",
        expected=f"folders {str(folder / 'train' / 'CLASS')!r} and"
        f" {str(folder / 'val' / 'CLASS')!r} for each class",
        found=inside,
        next_step=next_step if names else None,
    )
