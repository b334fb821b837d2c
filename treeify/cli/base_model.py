"""The options that say which base model is meant, shared by the commands that take one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from treeify.models.architecture import Architecture
from treeify.models.image_size import example_shape, resized
from treeify.models.recognise import recognise

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Base model: timm's name, torchvision/NAME, or package.module:function.",
        show_default=False,
    ),
]
NumClasses = Annotated[
    int | None,
    typer.Option(min=1, help="Classes of the model; by default its own.", show_default=False),
]
InputSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Height and width of its images; by default what it is usually fed.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class BaseModel:
    """A base model as the command line names it.

    Args:
        model: the network.
        architecture: how to build it again.
        example: one blank image of the size it is fed, `[1, C, H, W]`.
    """

    model: nn.Module
    architecture: Architecture
    example: Tensor


def base_model(
    name: str,
    num_classes: int | None = None,
    input_size: int | None = None,
    *,
    pretrained: bool = False,
    seed: int = 0,
) -> BaseModel:
    """Build the base model that the options describe.

    Raises:
        ModelError: the name is unknown, its builder takes no such options, or pretrained weights
            cannot be had.
    """
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
    if input_size is not None:
        size = [input_size, input_size]
    return BaseModel(model, architecture, torch.zeros(1, channels, *size))


def _build(architecture: Architecture, pretrained: bool, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return architecture.build(pretrained)
