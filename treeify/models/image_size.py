"""The size of the images that a base model is fed, and how to build it for another."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from treeify.errors import InputError, described
from treeify.models.architecture import Architecture
from treeify.models.builders import TORCHVISION
from treeify.models.skeleton import skeleton

Size = int | Sequence[int]  # a square's side, or [H, W]

LARGEST = 2**15  # side of an image, and more channels than any has
_IMAGE_SIZE = "img_size"  # what timm calls it, as an argument and in modules


def example_shape(model: nn.Module, architecture: Architecture | None = None) -> tuple[int, ...]:
    """The shape of the images that a model is usually fed.

    The channels are those of the first layer if it is a convolution. Height and width are the first
    known of: what the model says it was built for (`img_size` or `image_size`), the argument of its
    builder, the input size of timm's weights, 299 for torchvision's `inception_v3`, and 224. A
    model that takes another size needs an example input of the caller's.

    Returns:
        The shape `(C, H, W)`.
    """
    timm_shape = timm_config(model).get("input_size")
    argument = None if architecture is None else _sides(architecture.kwargs.get(_IMAGE_SIZE))
    inception = architecture is not None and architecture.name == "torchvision/inception_v3"
    usual = (299, 299) if inception else (224, 224)
    size = image_size(model) or argument or (tuple(timm_shape[1:]) if timm_shape else usual)
    return (input_channels(model, default=timm_shape[0] if timm_shape else 3), *size)


def is_size_known(model: nn.Module, architecture: Architecture) -> bool:
    """Whether a model of the user's own says the size of its images; libraries' models do."""
    argument = architecture.kwargs.get(_IMAGE_SIZE)
    known = image_size(model) or timm_config(model).get("input_size") or argument
    return ":" not in architecture.name or known is not None


def height_and_width(size: Size) -> tuple[int, int]:
    """Both sides of an image, which is a square where there is one number.

    Raises:
        InputError: they are no sides.
    """
    sides = (size, size) if isinstance(size, int) else size
    is_pair = isinstance(sides, tuple | list) and len(sides) == 2
    if not is_pair or not all(type(side) is int and 1 <= side <= LARGEST for side in sides):
        raise InputError(
            "size is no height and width.",
            expected=f"a number of pixels from 1 to {LARGEST:,}, or two",
            found=described(list(size) if isinstance(size, tuple) else size),
            next_step="Pass one number for a square, 224, or both, [96, 160].",
        )
    height, width = sides
    return height, width


def resized(architecture: Architecture, model: nn.Module, size: Size) -> Architecture:
    """The architecture of `model` for images of another height and width.

    It is the same, unless the model is built for one size: then it has that argument set.
    """
    channels, *default_size = example_shape(model, architecture)
    height, width = height_and_width(size)
    if default_size == [height, width]:
        return architecture
    if image_size(model) is None and (
        not _has_fixed_size(model) or _takes(architecture, (channels, height, width))
    ):
        return architecture
    key = "image_size" if architecture.name.startswith(TORCHVISION) else _IMAGE_SIZE
    # Builders call a square by one number; some take no other.
    argument = height if height == width else [height, width]
    return Architecture(architecture.name, {**architecture.kwargs, key: argument})


def _has_fixed_size(model: nn.Module) -> bool:
    """Whether timm says that a model takes one size only, which its builder can be told.

    It is not always right: some of these take other sizes all the same.
    """
    if not timm_config(model).get("fixed_input_size"):
        return False
    # A class may pass its arguments on to the one above it.
    return any(_IMAGE_SIZE in inspect.signature(kind).parameters for kind in type(model).__mro__)


def _takes(architecture: Architecture, shape: tuple[int, ...]) -> bool:
    """Whether a model runs on an image of a shape."""
    try:
        with torch.no_grad():
            skeleton(architecture).eval()(torch.zeros(1, *shape, device="meta"))
    except Exception:  # whatever a library raises for a size it does not take
        return False
    return True


def timm_config(model: nn.Module) -> Mapping[str, Any]:
    """What timm notes on its models about their trained weights; empty for other models."""
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else {}


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width that a model says it was built for, in any of its modules."""
    for module in model.modules():
        for key in (_IMAGE_SIZE, "image_size"):
            if sides := _sides(getattr(module, key, None)):
                return sides
    return None


def _sides(size: object) -> tuple[int, int] | None:
    match size:
        case int(side) | (int(side),):
            return side, side
        case [int(height), int(width)]:
            return height, width
    return None


def input_channels(model: nn.Module, default: int) -> int:
    """Channels of the first layer's input if that is a convolution, else the default."""
    layers = (layer for layer in model.modules() if next(layer.children(), None) is None)
    first = next(layers, None)
    return first.in_channels if isinstance(first, nn.Conv2d) else default
