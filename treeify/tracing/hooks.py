"""Hooks around a model's modules: those that observe are left out, those that change values stay.

Which ones do is known by running them alone.
"""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves

from treeify.errors import CheckpointError, InputError, TraceError
from treeify.tracing.side_effects import version

_FORWARD = ("_forward_pre_hooks", "_forward_hooks")
_BACKWARD = ("_backward_pre_hooks", "_backward_hooks")
_GLOBAL = tuple(f"_global{name}" for name in (*_FORWARD, *_BACKWARD))


@dataclass(frozen=True)
class Hook:
    """A hook: the path of its module, the table of the module's that holds it, and its key there.

    Those of all modules at once have no path.
    """

    path: str | None
    table: str
    key: int
    function: Callable[..., Any]

    @property
    def name(self) -> str:
        """What a user knows it by."""
        code = getattr(self.function, "__code__", None)
        line = f" ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else ""
        named = self.function if hasattr(self.function, "__qualname__") else type(self.function)
        return f"{named.__qualname__}{line}"

    @property
    def is_torchs(self) -> bool:
        """Whether it is torch's own, as those of eager quantisation are."""
        return str(getattr(self.function, "__module__", "")).startswith("torch.")


def hooks_in(model: nn.Module) -> list[Hook]:
    """All hooks around passes through a model's modules."""
    return [
        Hook(path, table, key, function)
        for path, module in model.named_modules()
        for table in (*_FORWARD, *_BACKWARD)
        for key, function in getattr(module, table).items()
    ]


def global_hooks() -> list[Hook]:
    """Hooks around passes through all modules at once."""
    return [
        Hook(None, table, key, function)
        for table in _GLOBAL
        for key, function in getattr(torch_module, table).items()
    ]


def has_hooks(module: nn.Module) -> bool:
    """Whether there are hooks around a module or one inside of it.

    Of the base architecture's modules: any that there are change what it computes.
    """
    return bool(hooks_in(module))


def leave_hooks(model: nn.Module, hooks: Collection[Hook]) -> None:
    """Remove a model's hooks but for some, which later copies of the model will share."""
    for hook in hooks_in(model):
        table = getattr(model.get_submodule(str(hook.path)), hook.table)
        if hook in hooks:
            table[hook.key] = _uncopied(hook.function)
        else:
            del table[hook.key]


def _uncopied(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls another, which may be a method: of functions there are no copies."""

    @wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Call no hooks of all modules at once: they are not to see what stands for values."""
    with ExitStack() as patches:
        for table in _GLOBAL:
            patches.enter_context(mock.patch.dict(getattr(torch_module, table), clear=True))
        yield


def changing_hooks(
    model: nn.Module, example: Tensor, copied: Callable[[nn.Module], nn.Module]
) -> list[Hook]:
    """Hooks that change what is computed, as seen when they run on an example, in both modes.

    They return a value of their own, or change a tensor that they are given or one of the module's.

    Args:
        model: the base model with its hooks. Not modified.
        example: images, `[N, C, H, W]`.
        copied: makes the copy of it that runs; a pass may leave anything behind.

    Raises:
        TraceError: a hook fails, or one that changes values is around the model itself or around
            all modules at once.
        InputError: the model does not run on the example.
    """
    hooks = hooks_in(model) + global_hooks()
    if not hooks:
        return []
    model = copied(model)
    changing: list[Hook] = []
    with ExitStack() as patches:
        for hook in hooks:
            owner = torch_module if hook.path is None else model.get_submodule(hook.path)
            recording = {hook.key: _recording(hook, changing)}
            patches.enter_context(mock.patch.dict(getattr(owner, hook.table), recording))
        with_backward = any("backward" in hook.table for hook in hooks)
        patches.callback(random.setstate, random.getstate())
        patches.callback(np.random.set_state, np.random.get_state())
        patches.enter_context(torch.random.fork_rng(devices=[]))
        for training in (False, True):
            _run(model.train(training), example, with_backward=with_backward)
    for hook in changing:
        if not hook.path:
            whose = "all modules" if hook.path is None else f"the model itself ({_kind(model)})"
            raise TraceError(
                f"the hook {hook.name} of {whose} changes what is computed, and no branch could"
                " have it.",
                expected="hooks that observe, or hooks of the model's modules",
                next_step="Do in forward what it does, or remove it first: handle.remove().",
            )
    return list(dict.fromkeys(changing))


def require_hooks(path: Path, saved: Sequence[str], changed: Sequence[str]) -> None:
    """Refuse a model for a saved ensemble if its hooks change other modules than they did then.

    Files hold no hooks, and a fingerprint does not cover them.

    Args:
        path: the ensemble's.
        saved: the modules when it was saved.
        changed: the modules now.

    Raises:
        CheckpointError: they differ.
    """
    if list(saved) != list(changed):
        raise CheckpointError(
            f"{path}: hooks change what the base model computes otherwise than when it was saved.",
            expected=f"such hooks around {', '.join(saved) or 'none of its modules'}",
            found=f"around {', '.join(changed) or 'none'}",
            next_step="Register the same before treeify.load(path, model=...).",
        )


def _kind(model: nn.Module) -> str:
    return type(model).__name__


def _recording(hook: Hook, changing: list[Hook]) -> Callable[..., Any]:
    """A function in a hook's place that adds it to those that change something, if it does."""

    def call(module: nn.Module, *args: Any) -> Any:
        before = _versions(module, args)
        try:
            result = hook.function(module, *args)
        except Exception as error:
            raise TraceError(
                f"the hook {hook.name} of {hook.path or 'the model'} does not run on the example:"
                f" {type(error).__name__}: {error}",
                expected="a hook that runs on an image of the example's shape",
                next_step="Give an example_input that it takes, or remove it first:"
                " handle.remove().",
            ) from error
        returns = result is not None and result is not args[-1]
        if returns or _versions(module, args) != before:
            changing.append(hook)
        return result

    return call


def _versions(module: nn.Module, args: Any) -> list[tuple[int, int, int | None]]:
    """Which tensors a hook may reach, where they lie, and how often they were changed."""
    state = (*module.parameters(), *module.buffers())
    leaves = (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
    return [(id(tensor), _pointer(tensor), version(tensor)) for tensor in (*state, *leaves)]


def _pointer(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else tensor.data_ptr()


def _run(model: nn.Module, example: Tensor, *, with_backward: bool) -> None:
    """One pass, and one back; what else stops the model is told where it is traced."""
    device = next((parameter.device for parameter in model.parameters()), example.device)
    images = torch.cat([example, example]).to(device)  # batch norms need more than one
    try:
        with torch.set_grad_enabled(with_backward):
            outputs = tree_leaves(model(images))
        losses = [
            output.float().sum()
            for output in outputs
            if with_backward and isinstance(output, Tensor) and output.requires_grad
        ]
        if losses:
            torch.autograd.backward(torch.stack(losses).sum())
    except TraceError:
        raise
    except Exception as error:
        raise InputError(
            f"{_kind(model)} does not run on the example, on which its hooks are looked at:"
            f" {type(error).__name__}: {error}",
            expected="an example_input that the model takes",
        ) from error
