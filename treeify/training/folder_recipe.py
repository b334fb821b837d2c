"""A recipe without a file: from a folder of images and the name of a model."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treeify.data.image_folders import is_divided
from treeify.errors import RecipeError
from treeify.models.architecture import Architecture
from treeify.models.image_size import example_shape, height_and_width, is_size_known
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
    "skip_corrupt": 10,
}
_SMALL = 64  # pixels; as CIFAR's and Fashion-MNIST's recipes augment


def folder_recipe(
    folder: Path,
    model: str,
    *,
    pretrained: bool = False,
    weights: Path | None = None,
    size: tuple[int, int] | None = None,
    epochs: int | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """The recipe that trains a model on a folder of images, with as many classes as it has.

    Args:
        folder: images in `folder/train/CLASS/*` and, held out, `folder/val/CLASS/*`; of
            `folder/CLASS/*` a fifth is held out.
        model: name of the base model.
        pretrained: begin with its trained weights, in every branch with noise (`init: perturb`).
        weights: begin with trained weights of your own, likewise: a file, or the directory of an
            ensemble or a run.
        size: height and width of the images; by default what the model is usually fed. Images of at
            most 64 pixels are cropped at random within a border, and not augmented otherwise.
        epochs: how many; a tenth of them warms up.
        overrides: `key.path=value`, as for a recipe's file.

    Raises:
        DataError: the folders are not there.
        ModelError: the model is unknown.
        RecipeError: an override is wrong, or nothing says which size a model of your own takes.
    """
    is_divided(folder)  # what is no folder of images is refused before the model is built
    name = re.sub(r"[^\w.-]+", "_", f"{folder.resolve().name}_{model}").lstrip(".-")
    architecture = Architecture(model)
    network = skeleton(architecture)
    if size is None and not any(override.startswith("data.size=") for override in overrides):
        if not is_size_known(network, architecture):
            raise RecipeError(
                f"nothing says which size of images {model} takes.",
                expected="--input-size, e.g. --input-size 224 or 96x160",
                next_step="It is the size that its weights were trained with.",
            )
        size = height_and_width(example_shape(network, architecture)[1:])
    data: dict[str, Any] = {**FINE_TUNING["data"], "root": str(folder)}
    if size is not None:
        data["size"] = list(size)
        if max(size) <= _SMALL:
            data = {"name": data["name"], "root": data["root"], "size": data["size"]}
            data["crop_padding"] = max(size) // 8
    values: dict[str, Any] = {
        **FINE_TUNING,
        "name": name or "folder",
        "model": {**FINE_TUNING["model"], "name": model},
        "data": data,
        # A core is left to train on.
        "workers": min(4, (os.cpu_count() or 1) - 1),
    }
    if weights is not None:
        values["model"] |= {"weights": str(weights)}
    if pretrained:
        values["model"] |= {"pretrained": True, "init": "perturb"}
        if ":" not in model and "crop_padding" not in data:
            data["like"] = model
    if epochs is not None:
        values["schedule"] = {"epochs": epochs, "warmup_epochs": min(2.0, epochs / 10)}
    subject = f"the recipe for {str(folder)!r}"
    recipe = recipe_from(values, overrides, subject)
    values["model"]["kwargs"] = {"num_classes": len(recipe.data.load().classes)}
    return recipe_from(values, overrides, subject)
