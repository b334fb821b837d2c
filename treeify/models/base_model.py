"""A base model built from its name, the number of its classes and the size of its images."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from treeify.arguments import LARGEST_SEED, require_integer
from treeify.models.architecture import Architecture
from treeify.models.image_size import (
    Size,
    example_shape,
    height_and_width,
    is_size_known,
    resized,
)
from treeify.models.recognise import recognise


@dataclass(frozen=True)
class BaseModel:
    """A base model, how to build it again, and one blank image `[1, C, H, W]` as it is fed.

    `notes` says where the size of that image is anyone's guess.
    """

    model: nn.Module
    architecture: Architecture
    example: Tensor
    notes: tuple[str, ...] = ()


def base_model(
    name: str,
    num_classes: int | None = None,
    input_size: Size | None = None,
    *,
    pretrained: bool = False,
    seed: int = 0,
) -> BaseModel:
    """Build a base model from its name.

    Args:
        name: timm's name, `torchvision/NAME`, or `package.module:function`.
        num_classes: classes of the model; by default its own.
        input_size: height and width of its images, or both as one number; by default what it is
            usually fed.
        pretrained: load trained weights.
        seed: of the fresh weights.

    Raises:
        ModelError: the name is unknown, its builder takes no such options, or pretrained weights
            cannot be had.
        InputError: the seed is none.
    """
    require_integer("seed", seed, 0, LARGEST_SEED)
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    architecture = Architecture(name, kwargs)
    model = _build(architecture, pretrained, seed)
    if input_size is not None:
        fitting = resized(architecture, model, input_size)
        if fitting != architecture:
            architecture, model = fitting, _build(fitting, pretrained, seed)
    if pretrained:
        # Some builders set more than weights, e.g. how googlenet scales its input.
        architecture = recognise(model) or architecture
    channels, *size = example_shape(model, architecture)
    notes: tuple[str, ...] = ()
    if input_size is not None:
        size = list(height_and_width(input_size))
    elif not is_size_known(model, architecture):
        shape = " x ".join(map(str, size))
        notes = (f"{name} does not say which size of images it takes: {shape}, or --input-size",)
    return BaseModel(model, architecture, torch.zeros(1, channels, *size), notes)


def _build(architecture: Architecture, pretrained: bool, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return architecture.build(pretrained)
