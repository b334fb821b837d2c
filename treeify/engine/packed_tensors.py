"""Packed parameters: a tensor of a level with `G` branches is `G` tensors concatenated along dim 0.

The modules built here carry the base model's own names: `state_dict` keys are the base model's.
Modules a rule can widen become the same module with `G` times the channels and groups; the others
become plain containers of their packed tensors.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from treeify.tree import Span, Tree

Widen = Callable[[nn.Module, int], None]


@dataclass(frozen=True)
class Slot:
    """Where one tensor of the base model lives.

    Args:
        key: its state-dict key (non-persistent buffers have one here too).
        level: the level whose branches each have their own.
        scalar: whether the base tensor is 0-d, stored stacked to `[G]`.
    """

    key: str
    level: int
    scalar: bool

    def branch(self, packed: Tensor, branches: int, index: int) -> Tensor:
        """Branch `index` of the packed tensor, in the base tensor's shape; a view."""
        return packed[index] if self.scalar else narrow(packed, branches, Span(index, index + 1))


_Cuts = dict[int, tuple[Tensor, tuple[Tensor, ...]]]
_CUTS: ContextVar[_Cuts | None] = ContextVar("cuts", default=None)


@contextmanager
def cut_once() -> Iterator[None]:
    """Within, `narrow` cuts each parameter into all its branches at once.

    The gradient of one branch's part is a whole packed tensor of zeros but for that part; a loop
    over `G` branches would add up `G` of them. That of the cut is one concatenation.
    """
    compiling = torch.compiler.is_compiling()
    if compiling or _CUTS.get() is not None or not torch.is_grad_enabled():
        yield
        return
    token = _CUTS.set({})
    try:
        yield
    finally:
        _CUTS.reset(token)


def narrow(packed: Tensor, branches: int, span: Span) -> Tensor:
    """The part of a packed tensor that belongs to a span of its branches; a view."""
    if span.size == branches:
        return packed
    cuts = None if torch.compiler.is_compiling() else _CUTS.get()
    if cuts is not None and span.size == 1 and packed.requires_grad:
        if id(packed) not in cuts:
            # With the tensor itself: while it is there, no other has its id.
            cuts[id(packed)] = packed, packed.chunk(branches)
        return cuts[id(packed)][1][span.start]
    width = packed.shape[0] // branches
    return packed.narrow(0, span.start * width, span.size * width)


def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has, non-persistent buffers included."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def lay_out(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Give tensors of 4 dims, as images and their weights have, a memory format."""
    for _, tensor in tensors(module):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


def owner(root: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and the tensor's name there."""
    path, _, name = key.rpartition(".")
    return submodule(root, path), name


def lookup(root: nn.Module, key: str) -> Tensor:
    """The tensor under a key."""
    holder, name = owner(root, key)
    parameter = holder._parameters.get(name)
    found = holder._buffers.get(name) if parameter is None else parameter
    assert found is not None
    return found


# Held while a module has tensors that are not its own: another thread may call it, too.
_SWAPPING = threading.RLock()


def call_with(
    module: nn.Module,
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Call a module of ours with other tensors in place of its own.

    `torch.func.functional_call` without its checks, which forbid `torch.jit.trace` (and so counting
    MACs) and cost more than a small layer; compiling takes the original.
    """
    if torch.compiler.is_compiling():
        return functional_call(module, dict(values), args, dict(kwargs or {}))
    with _SWAPPING:
        own = _swap(module, values)
        try:
            return module(*args, **(kwargs or {}))
        finally:
            _swap(module, own)


def call_assigning(
    module: nn.Module, values: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """The same of a module of anyone's; also what it put in the place of tensors or of their data.

    `self.steps = self.steps + 1` does the one, `self.weight.data = ...` the other. Under
    `torch.compile`, which does not let data be exchanged, the first alone is seen.
    """
    last = dict(values)
    if torch.compiler.is_compiling():
        result = functional_call(module, last, args, kwargs)  # leaves in `last` what it found
        return result, {key: now for key, now in last.items() if now is not values[key]}
    places = {key: value.data_ptr() for key, value in values.items()}
    with _SWAPPING:
        own = _swap(module, values)
        try:
            result = module(*args, **kwargs)
        finally:
            last = _swap(module, own)
    return result, {
        key: now
        for key, now in last.items()
        if now is not None and (now is not values[key] or now.data_ptr() != places[key])
    }


def _swap(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put tensors into a module and return those that were there."""
    before = {}
    for key, value in values.items():
        holder, name = owner(module, key)
        table: Any = holder._parameters if name in holder._parameters else holder._buffers
        before[key] = table[name]
        table[name] = value
    return before


def submodule(root: nn.Module, path: str) -> nn.Module:
    """`get_submodule` that also finds names hidden by an attribute of the ensemble."""
    module = root
    for part in path.split(".") if path else ():
        found = module._modules[part]
        assert found is not None
        module = found
    return module


def slots(skeleton: nn.Module, uses: Iterable[tuple[fx.Node, int]]) -> dict[str, Slot]:
    """The level of every tensor: the lowest level that uses it; 0 where nothing does.

    Args:
        skeleton: the base architecture.
        uses: nodes of all graphs with their levels.
    """
    named = dict(tensors(skeleton))
    lowest: dict[int, int] = {}
    for node, level in uses:
        for key in _read_by(node, skeleton, named):
            identity = id(named[key])
            lowest[identity] = min(level, lowest.get(identity, level))
    return {
        key: Slot(key, lowest.get(id(tensor), 0), tensor.ndim == 0) for key, tensor in named.items()
    }


def _read_by(node: fx.Node, skeleton: nn.Module, named: Mapping[str, Tensor]) -> list[str]:
    target = str(node.target)
    if node.op == "get_attr":
        return [target] if target in named else []
    if node.op != "call_module":
        return []
    return [f"{target}.{name}" for name, _ in tensors(skeleton.get_submodule(target))]


def build(
    root: nn.Module,
    skeleton: nn.Module,
    layout: Mapping[str, Slot],
    tree: Tree,
    widen: Mapping[type[nn.Module], Widen],
    like: Mapping[str, Tensor],
    whole: Set[str],
) -> None:
    """Give `root` the skeleton's module names, holding packed, uninitialised tensors.

    Args:
        root: the ensemble; receives children, parameters and buffers.
        skeleton: the base architecture on the meta device.
        layout: the slot of every tensor.
        tree: how many branches each level has.
        widen: how to give a module of an exact type more branches.
        like: tensors of the base model, for device and dtype.
        whole: paths of modules called before the first split only: they stay what they are.
    """
    _Builder(layout, tree, widen, like, whole).fill_children(root, skeleton)


class _Builder:
    def __init__(
        self,
        layout: Mapping[str, Slot],
        tree: Tree,
        widen: Mapping[type[nn.Module], Widen],
        like: Mapping[str, Tensor],
        whole: Set[str],
    ) -> None:
        self.layout, self.tree, self.widen, self.like = layout, tree, widen, like
        self.whole = whole
        self.made: dict[int, Tensor] = {}

    def fill_children(self, storage: nn.Module, module: nn.Module, path: str = "") -> None:
        """Give a container the packed tensors and children of a module."""
        self.fill(storage, module, path)
        for name, child in module._modules.items():
            below = f"{path}.{name}" if path else name
            storage._modules[name] = None if child is None else self.packed(child, below)

    def packed(self, module: nn.Module, path: str) -> nn.Module:
        """A module's storage: the module itself, widened or not, or a container."""
        levels = {self.layout[f"{path}.{name}"].level for name, _ in tensors(module)}
        nested = any(True for child in module.children() for _ in tensors(child))
        if path in self.whole:
            storage = copy.deepcopy(module)
            for below, inner in module.named_modules():
                self.fill(submodule(storage, below), inner, f"{path}.{below}" if below else path)
        elif type(module) in self.widen and len(levels) <= 1 and not nested:
            storage = copy.deepcopy(module)
            self.widen[type(module)](storage, self.tree.branches[max(levels, default=0)])
            self.fill(storage, module, path)
        else:
            storage = nn.Module()
            self.fill_children(storage, module, path)
        if hasattr(storage, "inplace"):
            # The rewriter knows where overwriting is safe.
            storage.inplace = False  # type: ignore[assignment]
        storage.training = module.training
        return storage

    def fill(self, storage: nn.Module, module: nn.Module, path: str) -> None:
        """Register a module's own tensors, packed; tensors tied in the base model stay tied."""
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            packed = None if parameter is None else self.tensor(parameter, prefix + name)
            storage._parameters[name] = packed  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            storage._buffers[name] = None if buffer is None else self.tensor(buffer, prefix + name)
        storage._non_persistent_buffers_set = set(module._non_persistent_buffers_set)

    def tensor(self, base: Tensor, key: str) -> Tensor:
        """The packed, uninitialised tensor of a base tensor."""
        if id(base) not in self.made:
            slot, like = self.layout[key], self.like[key]
            branches = self.tree.branches[slot.level]
            shape = (branches,) if slot.scalar else (branches * base.shape[0], *base.shape[1:])
            packed = torch.empty(shape, dtype=like.dtype, device=like.device)
            if isinstance(base, nn.Parameter):
                packed = nn.Parameter(packed, requires_grad=like.requires_grad)
            self.made[id(base)] = packed
        return self.made[id(base)]
