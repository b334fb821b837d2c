"""Running an operation branch by branch, exactly as in the base model: needs no rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from treeify.engine.forms import Branches, Form, pick
from treeify.engine.packed_tensors import Slot, call_assigning, get_parent, get_tensor, narrow
from treeify.rules.elementwise import call_target
from treeify.tracing.aliasing import is_library
from treeify.tree import Span


def is_closed(code: Any) -> bool:
    """Whether a function or class is not torch's, and was not traced: anything may be in it."""
    return not (isinstance(code, str) or is_library(code))


def _dense(values: Any) -> Any:
    """Tensors without gaps, as in the base model: views of them must be possible."""
    return tree_map_only(Tensor, Tensor.contiguous, values)


class EachBranch(nn.Module):
    """Maps a function or tensor method over the branches."""

    def __init__(self, target: Callable[..., Any] | str) -> None:
        super().__init__()
        self.target, self.is_closed = target, is_closed(target)

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Any:
        """One result per branch."""
        return Branches(
            self._call(pick(args, index), pick(kwargs, index)) for index in range(span.size)
        )

    def _call(self, args: Any, kwargs: Any) -> Any:
        if self.is_closed:
            args, kwargs = _dense((args, kwargs))
        return call_target(self.target, *args, **kwargs)

    def extra_repr(self) -> str:
        """The target, for printing a segment."""
        return getattr(self.target, "__name__", str(self.target))


class FirstBranch(EachBranch):
    """Reads a size, rank or dtype of per-branch values: the same for all, so one is enough."""

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Any:
        """The first branch's result."""
        return self._call(pick(args, 0), pick(kwargs, 0))


class Dense(nn.Module):
    """What is given to a closed function or module that is called once for all branches."""

    def forward(self, span: Span, value: Any) -> Any:
        """The value, without gaps in memory."""
        return _dense(value)


class EachBranchModule(nn.Module):
    """Calls the base architecture's module once per branch, with that branch's tensors.

    Args:
        module: the base architecture's module; its own tensors are never used.
        storage: holds the packed tensors under the same names.
        layout: the slot of each tensor, by its name in the module.
        branches: branches of each level.
        level: the level of the call.
        copies: whether each call gets copies of tensors, since the module changes them in place.
    """

    def __init__(
        self,
        module: nn.Module,
        storage: nn.Module,
        layout: Mapping[str, Slot],
        branches: tuple[int, ...],
        level: int,
        *,
        copies: bool = False,
    ) -> None:
        super().__init__()
        self.copies, self.is_closed = copies, is_closed(type(module))
        self.module, self.storage = module, storage
        self.layout, self.branches, self.level = dict(layout), branches, level
        self.shared_buffers = [
            name for name, _ in module.named_buffers() if layout[name].level < level
        ]

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Branches:
        """One result per branch."""
        self._follow_mode()
        states = {branch: self._state(branch) for branch in range(*span)}
        results, assigned = [], []
        for index, state in enumerate(states.values()):
            result, found = call_assigning(
                self.module, state, self._own(args, index), self._own(kwargs, index)
            )
            results.append(result)
            # What has another shape is a cache for some image size.
            assigned.append({k: own for k, own in found.items() if own.shape == state[k].shape})
        for name in dict.fromkeys(key for found in assigned for key in found):
            self._assign(name, states, [found.get(name) for found in assigned])
        if self.module.training:
            for name in self.shared_buffers:
                self._merge(name, states)
        return Branches(results)

    def _assign(
        self, name: str, states: dict[int, dict[str, Tensor]], found: list[Tensor | None]
    ) -> None:
        """Take over what calls assigned; what they read until then stays as it was."""
        news = [(branch, new) for branch, new in zip(states, found, strict=True) if new is not None]
        if name in self.shared_buffers:
            for branch, new in news:
                states[branch][name] = new.detach()
            return
        slot, packed = self.layout[name], get_tensor(self.storage, name)
        fresh = packed.detach().clone()
        for branch, new in news:
            own = branch // self._siblings(name)
            slot.branch(fresh, self.branches[slot.level], own).copy_(new.detach())
        packed.data = fresh

    def _own(self, values: Any, index: int) -> Any:
        picked = pick(values, index)
        if self.is_closed:
            picked = _dense(picked)
        return tree_map_only(Tensor, torch.clone, picked) if self.copies else picked

    def _state(self, branch: int) -> dict[str, Tensor]:
        """The tensors of one branch; views, so that buffers are updated in place."""
        state = {name: self._part(name, branch) for name in self.layout}
        for name in self.shared_buffers:
            state[name] = state[name].clone()
        return state

    def _part(self, name: str, branch: int) -> Tensor:
        slot = self.layout[name]
        stored = self.branches[slot.level]
        return slot.branch(get_tensor(self.storage, name), stored, branch // self._siblings(name))

    def _siblings(self, name: str) -> int:
        """Branches of this level that share one stored tensor."""
        return self.branches[self.level] // self.branches[self.layout[name].level]

    def _merge(self, name: str, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Give a buffer that siblings share the mean of their updates."""
        updates: dict[int, list[Tensor]] = {}
        for branch, state in states.items():
            updates.setdefault(branch // self._siblings(name), []).append(state[name])
        for parent, found in updates.items():
            mean = torch.stack(found).double().mean(0)
            # Through `.data`: batch norm updates its statistics without telling autograd either.
            self._part(name, parent * self._siblings(name)).data.copy_(mean)

    def _follow_mode(self) -> None:
        """Take over train or eval mode from the ensemble, module by module."""
        for path, module in self.module.named_modules():
            module.training = _descend(self.storage, path).training

    def extra_repr(self) -> str:
        """The module's class, for printing a segment."""
        return type(self.module).__name__


def _descend(storage: nn.Module, path: str) -> nn.Module:
    """The storage of a nested module; a widened module keeps its whole inside."""
    for part in path.split(".") if path else ():
        child = storage._modules.get(part)
        if child is None:
            return storage
        storage = child
    return storage


class SharedModule(EachBranchModule):
    """The same for a level with a single branch: one call, its plain result."""

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Any:
        """The module's result."""
        return super().forward(Span(0, 1), *args, **kwargs)[0]


class ReadTensor(nn.Module):
    """Reads a parameter or buffer that the base model uses directly.

    Args:
        root: the ensemble.
        slot: where the tensor lives.
        branches: branches of each level.
        level: the level that reads it.
        form: shared gives the base model's own shape, packed `[G, ...]`.
    """

    def __init__(
        self, root: nn.Module, slot: Slot, branches: tuple[int, ...], level: int, form: Form
    ) -> None:
        super().__init__()
        # In a tuple, so that the ensemble does not become a submodule of its own segment.
        self.owner = (get_parent(root, slot.key)[0],)
        self.name = slot.key.rpartition(".")[2]
        self.slot, self.branches, self.level, self.form = slot, branches, level, form

    def forward(self, span: Span) -> Tensor:
        """The tensor, for the branches of `span`."""
        packed = get_tensor(self.owner[0], self.name)
        stored = self.branches[self.slot.level]
        if self.form is Form.SHARED:
            return self.slot.branch(packed, stored, 0)
        ratio = self.branches[self.level] // stored
        parents = span.parents(ratio)
        part = narrow(packed, stored, parents)
        if not self.slot.scalar:
            part = torch.unflatten(part, 0, (parents.size, -1))
        if ratio == 1:
            return part
        return part[[branch // ratio - parents.start for branch in range(*span)]]

    def extra_repr(self) -> str:
        """The tensor's key, for printing a segment."""
        return self.slot.key


class Constant(nn.Module):
    """A tensor the base model holds outside its parameters and buffers."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = (value,)

    def forward(self, span: Span) -> Any:
        """The value."""
        return self.value[0]
