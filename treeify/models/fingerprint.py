"""How to tell that two models are built alike."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

# What a module carries that says nothing about what it computes: nn.Module's own bookkeeping (with
# the train/eval flag), what `module.compile()` adds, a memory setting of timm's, and timm's notes
# on where a model comes from.
_NOT_STRUCTURE = frozenset(vars(nn.Module())) | {
    "_compiled_call_impl",
    "grad_checkpointing",
    "pretrained_cfg",
    "default_cfg",
    "pretrained_model_args",
    "_model_args",
    "_traits",
}


def fingerprint(model: nn.Module) -> str:
    """A digest of what a model computes, whatever its weights are: 64 hexadecimal digits.

    It covers every module's class, printed hyper-parameters and plain attributes, every parameter's
    and buffer's name, shape and dtype, and what is shared. It leaves out weights, train/eval mode,
    `requires_grad`, devices and hooks. Comparable under one version of torch, timm and torchvision.
    """
    # Saved ensembles hold fingerprints: the lines must stay as they are, to the letter.
    digest = hashlib.sha256()
    for line in chain(_module_lines(model), _tensor_lines(model)):
        # Addresses of functions differ from run to run.
        digest.update(re.sub(r" at 0x[0-9a-fA-F]+", "", line).encode() + b"\n")
    return digest.hexdigest()


def _module_lines(model: nn.Module) -> Iterator[str]:
    first_name: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if first_name.setdefault(module, name) != name:
            yield f"{name} is {first_name[module]}"
            continue
        yield f"{name} {_class_name(type(module))}({module.extra_repr()})"
        for key, value in sorted(vars(module).items()):
            if key not in _NOT_STRUCTURE:
                yield f"{name}.{key} = {_describe(value)}"


def _tensor_lines(model: nn.Module) -> Iterator[str]:
    saved = model.state_dict(keep_vars=True).keys()
    tensors = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    first_name: dict[int, str] = {}
    for name, tensor in tensors:
        shared = first_name.setdefault(id(tensor), name)
        yield f"{name} {_describe(tensor)} kept={name in saved} is {shared}"


def _describe(value: object, depth: int = 4) -> str:
    """A plain attribute as text; of anything that is not plain, its kind."""
    if value is None or isinstance(value, bool | int | float | str | Enum | torch.dtype):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    if isinstance(value, partial):
        value = (value.func, value.args, value.keywords)
    if depth and isinstance(value, list | tuple):
        return f"({', '.join(_describe(item, depth - 1) for item in value)})"
    if depth and isinstance(value, Mapping):
        items = (f"{key!r}: {_describe(item, depth - 1)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    named = value if hasattr(value, "__qualname__") else type(value)
    return _class_name(named)


def _class_name(value: object) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
