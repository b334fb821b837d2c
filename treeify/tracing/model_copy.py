"""The copies of a model that all is done to, and models of which a copy would not be right.

The user's model itself is never modified.
"""

import copy
import inspect
import weakref
from collections.abc import Collection, Iterator
from functools import _lru_cache_wrapper, partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from treeify.errors import TraceError
from treeify.tracing.hooks import Hook, hooks_in
from treeify.tracing.side_effects import attributes


def require_copyable(model: nn.Module) -> None:
    """Refuse a model of which a copy would show no code, or run that of the model itself.

    Raises:
        TraceError: it is scripted, needs more than images, or has functions, weak references or
            hooks that a copy would share with it or lose.
    """
    module_ids = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        _require_copyable_module(path, module, module_ids)
    for hook in hooks_in(model):
        _require_separate(hook, module_ids)
    try:
        inspect.signature(model.forward, follow_wrapped=False).bind(None)
    except TypeError as error:
        raise TraceError(
            f"{type(model).__name__} cannot be called with images alone: {error}.",
            expected="forward(self, images), further arguments with default values",
            next_step="Give a module whose forward calls the model with all it needs.",
        ) from error


def _require_copyable_module(path: str, module: nn.Module, module_ids: Collection[int]) -> None:
    """Refuse a module of which a copy would not be right."""
    # `copy.deepcopy` copies no function: what a lambda, a cache or a weak reference holds of the
    # model would go on being used by the copy, with the weights of the model.
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError(
            f"{path or 'the model'} is scripted, and shows no code to trace.",
            expected="modules written in Python",
            next_step="Give the module that it was scripted from.",
        )
    forward = vars(module).get("forward")
    if any(isinstance(captured, nn.Module) for captured in _captured(forward)):
        raise TraceError(
            f"forward of {path or 'the model'} was replaced by a function that calls this very"
            " model, not a copy of it.",
            expected="a method: types.MethodType(function, module)",
            next_step="Or give a module of its own whose forward calls the model.",
        )
    for name, value in attributes(module).items():
        captured = (each for leaf in tree_leaves(value) for each in _captured(leaf))
        if any(id(each) in module_ids for each in captured):
            raise TraceError(
                f"{name!r} of {path or 'the model'} is a function, cache or weak reference that"
                " holds a module of this very model: a copy of it would go on using that module.",
                expected="methods, and modules as attributes",
                next_step="Make a lambda a method of its class; hold modules directly.",
            )


def _require_separate(hook: Hook, module_ids: Collection[int]) -> None:
    """Refuse a hook that holds a module of the model: with a copy it would not be the copy's."""
    function = hook.function
    while isinstance(function, partial):
        function = function.func
    holders = (getattr(function, "__self__", None), *_captured(function))
    if not hook.is_torchs and any(id(holder) in module_ids for holder in holders):
        raise TraceError(
            f"a hook of {hook.path or 'the model'} belongs to the model itself, whose outputs may"
            " depend on it.",
            expected="hooks that observe, or that change a value by themselves",
            next_step="Do in forward what it does, or remove it first: handle.remove().",
        )


def _captured(value: Any) -> Iterator[Any]:
    """Objects that a copy of a function, a cache of one or a weak reference shares with it."""
    if isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, partial):
        yield from _captured(value.func)
    elif isinstance(value, MethodType):
        yield from _captured(value.__func__)
    elif isinstance(value, _lru_cache_wrapper):
        yield getattr(value.__wrapped__, "__self__", None)
        yield from _captured(value.__wrapped__)
    elif isinstance(value, FunctionType):
        closure = map(_content, value.__closure__ or ())
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        for captured in (*closure, *defaults):
            yield getattr(captured, "__self__", captured)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return None


def private_copy(model: nn.Module) -> nn.Module:
    """A copy that is traced and run; hooks are the same functions.

    Raises:
        TraceError: it cannot be copied, or a hook computes weights.
    """
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils"):
                raise TraceError(
                    f"a hook of {type(hook).__module__} computes weights of {path or 'the model'}.",
                    expected="parameters, or parametrizations of them",
                    next_step="Use torch.nn.utils.parametrizations instead, or make its weights"
                    " permanent: torch.nn.utils.remove_weight_norm, prune.remove.",
                )
    try:
        return copy_model(model)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied: {error}",
            expected="a module that copy.deepcopy accepts, since the given model is never modified",
        ) from error


def copy_model(model: nn.Module) -> nn.Module:
    """A copy of a model that may have been used, its weights too."""
    leaves = (leaf for module in model.modules() for leaf in tree_leaves(attributes(module)))
    # Activations left from a pass with gradients, which torch refuses to copy, are left out.
    activations = {
        id(leaf): None for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None
    }
    # What holds a hook (a logger, a collector of features) may be anything: it is not copied.
    hooks = {id(hook.function): hook.function for hook in hooks_in(model)}
    return copy.deepcopy(model, activations | hooks)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy without weights; tensors that are one in the model are one in the copy."""
    memo: dict[int, Any] = {}
    for _, tensor in (*model.named_parameters(), *model.named_buffers()):
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)
