"""Models with fewer blocks than their builders would make, for checks in little memory."""

import re

import torch
from torch import nn

from treeify.models.architecture import Architecture
from treeify.models.skeleton import ParametersOnMeta

# A module's class, and its parameters' names and shapes.
_Shape = tuple[type[nn.Module], tuple[tuple[str, torch.Size], ...]]
# The builder below, as `Architecture` names it.
NAME = f"{__name__}:build"
# The method by which timm's modules compute buffers that no file holds.
_COMPUTE_BUFFERS = "init_non_persistent_buffers"


def cut(architecture: Architecture, blocks: int) -> Architecture:
    """What builds a model with at most some blocks of one shape in a row; see `build`."""
    return Architecture(NAME, {"model": architecture.name, "blocks": blocks, **architecture.kwargs})


def build(model: str, blocks: int, **options: object) -> nn.Module:
    """A model, as `Architecture` builds it, with at most so many blocks of one shape in a row.

    Where more modules in a row are of one class and have parameters of the same shapes, those after
    the first are left out; so are further turns of blocks that take turns. The full model's weights
    never take memory: what is left is initialised by its layers. It may not run: a forward can
    count on its blocks.

    Raises:
        ModelError: the model cannot be built.
    """
    architecture = Architecture(model, options)
    with ParametersOnMeta():
        shallower = architecture.build()
    if not all(map(_computes_buffers, shallower.modules())):
        shallower = architecture.build()  # their values come from its constructor
    for module in list(shallower.modules()):
        if _is_sequence(module):
            _leave_out(module, blocks)
    _materialize(shallower)
    return shallower


def _is_sequence(module: nn.Module) -> bool:
    """Whether a module's forward goes through its children in order, whatever their number."""
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return True
    # As timm's regnets do: blocks b1, b2, ... and nothing else.
    return len({re.sub(r"\d+$", "", name) for name, _ in module.named_children()}) == 1


def _leave_out(sequence: nn.Module, blocks: int) -> None:
    """Remove the blocks of a sequence that repeat those before them too often."""
    names = [name for name, _ in sequence.named_children()]
    for position in reversed(_repeats(list(map(_shape, sequence.children())), blocks)):
        if isinstance(sequence, nn.ModuleList):
            del sequence[position]  # numbers those that follow anew
        else:
            delattr(sequence, names[position])


def _repeats(shapes: list[_Shape], times: int) -> list[int]:
    """Positions that repeat what comes `times` times in a row before them.

    What repeats may be one block or several that take turns.
    """
    remaining = list(range(len(shapes)))
    for period in range(1, len(shapes)):
        start = 0
        while (end := start + period * (times + 1)) <= len(remaining):
            run = [shapes[position] for position in remaining[start:end]]
            # What has no weights may be a pooling, on which what follows depends.
            if run == run[:period] * (times + 1) and all(weights for _, weights in run):
                del remaining[end - period : end]
            else:
                start += 1
    return sorted(set(range(len(shapes))) - set(remaining))


def _shape(module: nn.Module) -> _Shape:
    """What blocks of one shape have in common."""
    return type(module), tuple((name, tensor.shape) for name, tensor in module.named_parameters())


def _meta_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    buffers = module.named_buffers(recurse=False)
    return {name: buffer for name, buffer in buffers if buffer.is_meta}


def _computes_buffers(module: nn.Module) -> bool:
    """Whether a module can compute what buffers it has on the meta device, as timm's can."""
    missing = _meta_buffers(module)
    has_method = callable(getattr(module, _COMPUTE_BUFFERS, None))
    return not missing or (has_method and missing.keys() <= module._non_persistent_buffers_set)


def _materialize(model: nn.Module) -> None:
    """Give memory and values to what is on the meta device.

    Layers initialise their own parameters; those that no layer initialises get small noise.
    """
    # By parameter, so that shared ones stay shared.
    replacements: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        parameters = list(module.named_parameters(recurse=False))
        missing = [(name, parameter) for name, parameter in parameters if parameter.is_meta]
        for name, parameter in missing:
            if parameter not in replacements:
                noise = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(0, 0.02)
                replacements[parameter] = nn.Parameter(noise, parameter.requires_grad)
            module.register_parameter(name, replacements[parameter])
        reset = getattr(module, "reset_parameters", None)
        if missing and callable(reset):
            reset()
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # a skeleton is being built: under its mode nothing took memory
    for module in model.modules():
        if buffers := _meta_buffers(module):
            for name, buffer in buffers.items():
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
            getattr(module, _COMPUTE_BUFFERS)()
