"""From a model to its architecture, so that a checkpoint can hold a name instead of code.

Names are guessed from what timm and torchvision leave on their models. A guess counts only if the
model it builds has the same fingerprint, so a wrong one is never accepted.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import timm
import torch
import torchvision
from timm.models import get_pretrained_cfg
from torch import nn

from treeify.errors import ModelError
from treeify.models.architecture import Architecture
from treeify.models.builders import TORCHVISION, torchvision_names
from treeify.models.fingerprint import fingerprint
from treeify.models.image_size import image_size, input_channels, timm_config
from treeify.models.skeleton import build_without_weights


def recognise(model: nn.Module) -> Architecture | None:
    """How to build a model like `model` again, if it comes from timm or torchvision, else None.

    The answer rebuilds exactly this structure: its fingerprint was compared. A model that was
    changed after it was built, cast to another dtype, or whose class is the user's own has no
    name; its constructor is never called. No random state is used.
    """
    # A class of the user's own is not constructed: its constructor may do anything.
    origin = type(model).__module__
    if origin.startswith("timm."):
        guesses = _timm_guesses(model)
    elif origin.startswith("torchvision.models."):
        guesses = _torchvision_guesses(model)
    else:
        return None
    expected = fingerprint(model)
    with torch.random.fork_rng(devices=[]):
        matches = (_match(guess, model, expected) for guess in guesses)
        return next(filter(None, matches), None)


def _match(guess: Architecture, model: nn.Module, expected: str) -> Architecture | None:
    """The guess, with options that the model notes about itself, if that rebuilds the model."""
    candidate = _rebuild(guess)
    if candidate is None or type(candidate) is not type(model):
        return None
    if fingerprint(candidate) == expected:
        return guess
    accepted = inspect.signature(type(model).__init__).parameters
    options = {
        key: value
        for key, value in vars(model).items()
        if key in accepted
        and isinstance(value, bool | int | float | str)
        and vars(candidate).get(key) != value
    }
    if not options.keys() - guess.kwargs.keys():
        return None
    completed = Architecture(guess.name, {**guess.kwargs, **options})
    candidate = _rebuild(completed)
    return completed if candidate is not None and fingerprint(candidate) == expected else None


def _rebuild(architecture: Architecture) -> nn.Module | None:
    """The model of a guess; None if its builder refuses it, as wrong guesses may."""
    try:
        return build_without_weights(architecture)
    except ModelError:
        return None


def _timm_guesses(model: nn.Module) -> Iterator[Architecture]:
    """Names and arguments that timm may have built a model from, the likeliest first."""
    config = timm_config(model)
    if not timm.is_model(config.get("architecture") or ""):
        return
    name, tag = config["architecture"], config.get("tag")
    default = get_pretrained_cfg(name)
    if tag and (default is None or default.tag != tag):
        name = f"{name}.{tag}"
    if arguments := getattr(model, "_model_args", None):  # timm 1.0.31 keeps the arguments
        with contextlib.suppress(ModelError):
            yield Architecture(name, arguments)
    kwargs: dict[str, Any] = {}
    if (classes := getattr(model, "num_classes", None)) not in (None, config.get("num_classes")):
        kwargs["num_classes"] = classes
    default_channels, *default_size = config.get("input_size") or (3, 224, 224)
    if (channels := input_channels(model, default=default_channels)) != default_channels:
        kwargs["in_chans"] = channels
    if (size := image_size(model)) not in (None, tuple(default_size)):
        kwargs["img_size"] = size
    yield Architecture(name, kwargs)
    for module in model.modules():
        if isinstance(pooling := getattr(module, "pool_type", None), str):
            yield Architecture(name, {**kwargs, "global_pool": pooling})


def _torchvision_guesses(model: nn.Module) -> Iterator[Architecture]:
    """The architectures of a model's class in torchvision whose sizes are nearest to its own."""
    size = sum(parameter.numel() for parameter in model.parameters())
    kwargs = {}
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if layers and (classes := len(layers[-1].weight)) != 1000:
        kwargs["num_classes"] = classes
        size += (1000 - classes) * (layers[-1].weight[0].numel() + 1)
    names = [
        name
        for name in torchvision_names()
        if torchvision.models.get_model_builder(name).__module__ == type(model).__module__
    ]
    # Variants differ far more in size than their options make them: the nearest three will do.
    for name in sorted(names, key=lambda name: abs(_documented_size(name) - size))[:3]:
        yield Architecture(TORCHVISION + name, kwargs)


def _documented_size(name: str) -> int:
    """How many parameters torchvision says its trained model has."""
    return int(next(iter(torchvision.models.get_model_weights(name))).meta["num_params"])
