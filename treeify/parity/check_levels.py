"""How a model can be checked in the memory there is.

A full check holds the ensemble several times over, some of them in float64. What does not fit is
converted on the meta device, where tensors have shapes and no values, and its numbers are checked
with fewer blocks: spare ones left out, or as many as its builder is asked for.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from treeify.engine.preserve import preserve_modes
from treeify.errors import ModelError
from treeify.models import shallow
from treeify.models.architecture import Architecture
from treeify.models.image_size import example_shape, resized
from treeify.models.skeleton import skeleton
from treeify.parity.results import FULL, META, REDUCED

CLASSES = 10
IMAGES = 2  # the fewest that have batch statistics
# Sides of the images tried, smallest first. At 32 the last layers of many networks are a single
# pixel, and batch statistics over two numbers say little.
_SIDES = (64, 96, 128, 160, 192, 224, 256)
# How many numbers say enough: those of 2 images of 2 by 2 pixels.
_ENOUGH = 8
# What timm's builders call the number of blocks, for models that count on it, and small ones; of
# stages the most that run.
_FEWER_BLOCKS: dict[str, tuple[Any, ...]] = {
    "depth": (4, 2, 1),
    "depths": ([1] * 5, [1] * 4, [1] * 3),
    "layers": ([1] * 4, [1] * 3),
    "num_blocks": (4, 2),
    "stages": ([1] * 4,),
}
# How many blocks of one shape in a row are left, most first.
_BLOCKS_IN_A_ROW = (4, 2, 1)
# What Python and the libraries take before there is a model.
BASE_BYTES = 2**30
# What is left out, the shallower model, and its skeleton.
_Shallower = tuple[str, Architecture, nn.Module]


@dataclass(frozen=True)
class CheckLevel:
    """How fully a model is checked.

    Args:
        how: `full`, `reduced:` with the arguments that make it shallower, or `meta`: not with
            numbers.
        architecture: what is built.
        shape: of one image, `(C, H, W)`.
        estimate: bytes the check of the full model may need.
        least: bytes that of the shallowest model may need; None where numbers are checked.
    """

    how: str
    architecture: Architecture
    shape: tuple[int, ...]
    estimate: int
    least: int | None = None


def check_levels(name: str, leaves: int, memory: int) -> Iterator[CheckLevel]:
    """How fully a model can be checked within some bytes of memory, by building it without weights.

    Yields:
        Those estimated to need no more memory, the fullest first; the meta device is the last.
    """
    options: dict[str, Any] = {} if ":" in name else {"num_classes": CLASSES}
    full = _smallest_input(Architecture(name, options))
    smallest = skeleton(full[0])
    estimate = estimated_bytes(smallest, leaves)
    if estimate <= memory:
        yield CheckLevel(FULL, *full, estimate)
    for how, architecture, shallower in chain(_cut(*full), _built_shallower(*full)):
        if count_parameters(shallower) < count_parameters(smallest):
            smallest = shallower
            if estimated_bytes(shallower, leaves) <= memory:
                yield CheckLevel(f"{REDUCED}:{how}", architecture, full[1], estimate)
    usual = Architecture(name)
    shape = example_shape(skeleton(usual), usual)
    yield CheckLevel(META, usual, shape, estimate, estimated_bytes(smallest, leaves))


def _cut(architecture: Architecture, shape: tuple[int, ...]) -> Iterator[_Shallower]:
    """The model without the spare ones of its blocks, the most blocks first."""
    for blocks in _BLOCKS_IN_A_ROW:
        cut = shallow.cut(architecture, blocks)
        if (model := _skeleton_that_runs(cut, shape)) is not None:
            yield f"blocks={blocks}", cut, model


def _built_shallower(architecture: Architecture, shape: tuple[int, ...]) -> Iterator[_Shallower]:
    """Fewer blocks as far as the builder takes their number, the most first."""
    for key, values in _FEWER_BLOCKS.items():
        for value in values:
            built = Architecture(architecture.name, {**architecture.kwargs, key: value})
            if (model := _skeleton_that_runs(built, shape)) is not None:
                yield f"{key}={value}", built, model
                if isinstance(value, list):
                    break  # with fewer stages it would be another model


def _skeleton_that_runs(architecture: Architecture, shape: tuple[int, ...]) -> nn.Module | None:
    """The skeleton of a model; None if it cannot be built or does not take that shape."""
    try:
        model = skeleton(architecture)
    except ModelError:
        return None
    return None if _starved(model, shape) is None else model


def estimated_bytes(model: nn.Module, leaves: int) -> int:
    """What the check of a model may hold at once.

    Per parameter and leaf: the ensemble in float32, the copy that is checked, and its gradients or
    what fused layers prepare; beside them one network with gradients and its weights once more. The
    copy is in float64 if the model has batch norms, under which float32 is often too coarse, and
    else seldom. Activations are small at the sizes checked.
    """
    element = 8 if any(isinstance(module, _BatchNorm) for module in model.modules()) else 4
    return BASE_BYTES + count_parameters(model) * (leaves * (4 + 2 * element) + 3 * element)


def _smallest_input(architecture: Architecture) -> tuple[Architecture, tuple[int, ...]]:
    """The architecture, and the smallest image where the fewest batch norms starve."""
    model = skeleton(architecture)
    usual = example_shape(model, architecture)
    best, fewest = (architecture, usual), math.inf
    for side in (side for side in _SIDES if side < min(usual[1:])):
        try:
            fitting = resized(architecture, model, side)
            candidate = model if fitting is architecture else skeleton(fitting)
        except ModelError:
            continue
        shape = (usual[0], side, side)
        if example_shape(candidate, fitting)[0] != usual[0]:
            continue
        starved = _starved(candidate, shape)
        if starved is not None and starved < fewest:
            best, fewest = (fitting, shape), starved
        if starved == 0:
            break
    return best


def _starved(model: nn.Module, shape: Sequence[int]) -> int | None:
    """How many batch norms average too few numbers; None if not both modes run on the shape."""
    x = torch.zeros(IMAGES, *shape, device="meta")
    sizes: list[float] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        sizes.append(args[0].numel() / args[0].shape[1])

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        with torch.no_grad(), preserve_modes(model):
            for training in (False, True):
                model.train(training)(x)
    except Exception:  # whatever a library raises for a size it does not take
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return sum(size < _ENOUGH for size in sizes)


def count_parameters(model: nn.Module) -> int:
    """Of a base model."""
    return sum(parameter.numel() for parameter in model.parameters())
