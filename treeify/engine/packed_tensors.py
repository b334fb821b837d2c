"""Packed parameters: a tensor of a level with `G` branches is `G` tensors concatenated along dim 0.

Dim 0, since it holds the output channels of nearly every parameter: the packed weight of a
convolution is then that of a grouped one, and a span of branches is contiguous in memory, a view
that costs nothing and that gradients and in-place updates pass through.

The modules built here carry the base model's own names: `state_dict` keys are the base model's.
Modules a rule can widen become the same module with `G` times the channels and groups; the others
become plain containers of their packed tensors.
"""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from treeify.tracing.hooks import has_hooks
from treeify.tree import Span, Tree

Widen = Callable[[nn.Module, int], None]


@dataclass(frozen=True)
class Slot:
    """Where one tensor of the base model is packed.

    Args:
        key: its state-dict key (non-persistent buffers have one here too).
        level: the level whose branches each have their own.
        scalar: whether the base tensor is 0-d, stacked to `[G]`.
    """

    key: str
    level: int
    scalar: bool

    def branch(self, packed: Tensor, branches: int, index: int) -> Tensor:
        """Branch `index` of the packed tensor, in the base tensor's shape; a view."""
        return packed[index] if self.scalar else narrow(packed, branches, Span(index, index + 1))


_Chunks = dict[int, tuple[Tensor, tuple[Tensor, ...]]]
_CHUNKS: ContextVar[_Chunks | None] = ContextVar("chunks", default=None)


@contextmanager
def chunk_once() -> Iterator[None]:
    """Within, `narrow` cuts each parameter into all its branches at once.

    The gradient of one branch's view is a packed tensor of zeros but for that view; a loop over `G`
    branches would add up `G` of them. That of all chunks together is one concatenation.
    """
    compiling = torch.compiler.is_compiling()
    if compiling or _CHUNKS.get() is not None or not torch.is_grad_enabled():
        yield
        return
    token = _CHUNKS.set({})
    try:
        yield
    finally:
        _CHUNKS.reset(token)


def narrow(packed: Tensor, branches: int, span: Span) -> Tensor:
    """The part of a packed tensor that belongs to a span of its branches; a view."""
    if span.size == branches:
        return packed
    chunks = None if torch.compiler.is_compiling() else _CHUNKS.get()
    if chunks is not None and span.size == 1 and packed.requires_grad:
        if id(packed) not in chunks:
            # With the tensor itself: as long as it lives, no other has its id.
            chunks[id(packed)] = packed, packed.chunk(branches)
        return chunks[id(packed)][1][span.start]
    width = packed.shape[0] // branches
    return packed.narrow(0, span.start * width, span.size * width)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has, non-persistent buffers included."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def set_memory_format(module: nn.Module, memory_format: torch.memory_format | None) -> None:
    """Give tensors of 4 dims, as images and their weights have, a memory format."""
    if memory_format is None:
        return
    for _, tensor in named_tensors(module):
        if tensor.ndim == 4:
            # The same parameter with other memory: optimizers and users refer to the object.
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


def get_submodule(root: nn.Module, path: str) -> nn.Module:
    """`root.get_submodule` that also finds names hidden by an attribute of the ensemble."""
    for name in path.split(".") if path else ():
        child = root._modules[name]
        assert child is not None
        root = child
    return root


def get_parent(root: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The module that has a tensor or module as its attribute, and the attribute's name."""
    path, _, name = key.rpartition(".")
    return get_submodule(root, path), name


def get_tensor(root: nn.Module, key: str) -> Tensor:
    """The parameter or buffer under a key."""
    module, name = get_parent(root, key)
    parameter = module._parameters.get(name)
    tensor = module._buffers.get(name) if parameter is None else parameter
    assert tensor is not None
    return tensor


# While a module has tensors in the place of its own, another thread must not call it.
_SWAPPING = threading.RLock()


def call_with(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    after: dict[str, Tensor] | None = None,
) -> Any:
    """Call a module with other tensors in the place of its own.

    `torch.func.functional_call` without its checks, which forbid `torch.jit.trace` (and so counting
    MACs) and cost more than a small layer; compiling takes the original. The module has its own
    tensors again afterwards; `after` is filled with what is in the place of `tensors` by then.
    """
    after = {} if after is None else after
    if torch.compiler.is_compiling():
        after.update(tensors)
        return functional_call(module, after, args, dict(kwargs or {}))  # updates `after`
    with _SWAPPING:
        original = _swap(module, tensors)
        try:
            return module(*args, **(kwargs or {}))
        finally:
            after.update(_swap(module, original))


def call_assigning(
    module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """Call a module with other tensors; also returns what it put in their place or their data's.

    `self.steps = self.steps + 1` does the one, `self.weight.data = ...` the other. Under
    `torch.compile`, which does not let data be exchanged, only the first is seen.
    """
    compiling = torch.compiler.is_compiling()
    # `.data = ...` leaves the tensor object and exchanges its memory: only the pointer tells.
    pointers = {} if compiling else {key: value.data_ptr() for key, value in tensors.items()}
    after: dict[str, Tensor] = {}
    result = call_with(module, tensors, args, kwargs, after)
    return result, {
        key: tensor
        for key, tensor in after.items()
        if tensor is not None
        and (tensor is not tensors[key] or (not compiling and tensor.data_ptr() != pointers[key]))
    }


def _swap(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put tensors into a module and return those that were there."""
    before = {}
    for key, tensor in tensors.items():
        parent, name = get_parent(module, key)
        table: Any = parent._parameters if name in parent._parameters else parent._buffers
        before[key] = table[name]
        table[name] = tensor
    return before


def slots(skeleton: nn.Module, uses: Iterable[tuple[fx.Node, int]]) -> dict[str, Slot]:
    """The slot of every tensor, at the lowest level whose nodes use it; 0 where nothing does."""
    tensors = dict(named_tensors(skeleton))
    # By identity, since tied tensors have several keys and one level.
    lowest: dict[int, int] = {}
    for node, level in uses:
        for key in keys_read_by(node, skeleton, tensors):
            identity = id(tensors[key])
            lowest[identity] = min(level, lowest.get(identity, level))
    return {
        key: Slot(key, lowest.get(id(tensor), 0), tensor.ndim == 0)
        for key, tensor in tensors.items()
    }


def keys_read_by(node: fx.Node, skeleton: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys of the tensors that a node reads."""
    target = str(node.target)
    if node.op == "get_attr":
        return [target] if target in tensors else []
    if node.op != "call_module":
        return []
    return [f"{target}.{name}" for name, _ in named_tensors(skeleton.get_submodule(target))]


@dataclass
class Packer:
    """Makes modules of packed, uninitialised tensors out of the base architecture's.

    Args:
        slots: the slot of every tensor.
        tree: how many branches each level has.
        widen: how to give a module of an exact type more branches.
        like: tensors of the base model, for device and dtype.
        unbranched: paths of modules called before the first split only: they stay what they are.
    """

    slots: Mapping[str, Slot]
    tree: Tree
    widen: Mapping[type[nn.Module], Widen]
    like: Mapping[str, Tensor]
    unbranched: Set[str]
    _packed: dict[int, Tensor] = field(default_factory=dict, init=False)

    def pack_children(self, packed: nn.Module, module: nn.Module, path: str = "") -> None:
        """Give a container, e.g. the ensemble, the packed tensors and children of a module.

        The module, at a path of the base architecture, is on the meta device.
        """
        self._pack_tensors(packed, module, path)
        for name, child in module._modules.items():
            below = f"{path}.{name}" if path else name
            packed._modules[name] = None if child is None else self._pack_module(child, below)

    def _pack_module(self, module: nn.Module, path: str) -> nn.Module:
        """A module with packed tensors: the module itself, widened or not, or a container."""
        levels = {self.slots[f"{path}.{name}"].level for name, _ in named_tensors(module)}
        if path in self.unbranched:
            # One branch needs no packing; whatever else the module holds comes along.
            packed = copy.deepcopy(module)
            for name, inner in module.named_modules():
                below = f"{path}.{name}" if name else path
                self._pack_tensors(get_submodule(packed, name), inner, below)
        elif type(module) in self.widen and len(levels) <= 1 and not has_hooks(module):
            # Exact types: a subclass may do more than its rule knows.
            packed = copy.deepcopy(module)
            self.widen[type(module)](packed, self.tree.branches[max(levels, default=0)])
            self._pack_tensors(packed, module, path)
            for name, child in module.named_children():
                # Attached to it, or a part of it that a rule refuses: tensors of every branch.
                if any(True for _ in named_tensors(child)):
                    packed._modules[name] = self._pack_module(child, f"{path}.{name}")
        else:
            # The base architecture's own module will be called with the branches' views.
            packed = nn.Module()
            self.pack_children(packed, module, path)
        if hasattr(packed, "inplace"):
            # `conversion.decide` finds where overwriting is safe, and it is switched on again.
            packed.inplace = False  # type: ignore[assignment]
        packed.training = module.training
        return packed

    def _pack_tensors(self, packed: nn.Module, module: nn.Module, path: str) -> None:
        """Register a module's own tensors, packed; tensors tied in the base model stay tied."""
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            tensor = None if parameter is None else self._pack_tensor(parameter, prefix + name)
            packed._parameters[name] = tensor  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            tensor = None if buffer is None else self._pack_tensor(buffer, prefix + name)
            packed._buffers[name] = tensor
        packed._non_persistent_buffers_set = set(module._non_persistent_buffers_set)

    def _pack_tensor(self, base: Tensor, key: str) -> Tensor:
        """The packed, uninitialised tensor of a base tensor."""
        # By identity, so that what is tied in the base model is one packed tensor as well.
        if id(base) not in self._packed:
            slot, like = self.slots[key], self.like[key]
            branches = self.tree.branches[slot.level]
            shape = (branches,) if slot.scalar else (branches * base.shape[0], *base.shape[1:])
            packed = torch.empty(shape, dtype=like.dtype, device=like.device)
            if isinstance(base, nn.Parameter):
                packed = nn.Parameter(packed, requires_grad=like.requires_grad)
            self._packed[id(base)] = packed
        return self._packed[id(base)]
