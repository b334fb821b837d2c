"""Running an operation branch by branch, exactly as in the base model: needs no rule."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from treeify.engine.forms import Branches, pick
from treeify.engine.packed_tensors import Slot, call_assigning, get_tensor
from treeify.rules.operations.direct import Target, TargetOperation, call_target
from treeify.rules.operations.widened import LIVE
from treeify.tracing.aliasing import is_library
from treeify.tracing.hooks import has_hooks
from treeify.tree import Span

_State = dict[str, Tensor]


def is_opaque(code: Any) -> bool:
    """Whether a function or class is not torch's, and was not traced: anything may be in it."""
    return not (isinstance(code, str) or is_library(code))


def _contiguous(values: Any) -> Any:
    """Tensors without gaps, as in the base model: views of them must be possible."""
    return tree_map_only(Tensor, Tensor.contiguous, values)


class EachBranch(TargetOperation):
    """Maps a function or tensor method over the branches."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.is_opaque = is_opaque(target)

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Any:
        """One result per branch."""
        return Branches(self._call(index, args, kwargs) for index in range(span.size))

    def _call(self, index: int, args: Any, kwargs: Any) -> Any:
        args, kwargs = pick(args, index), pick(kwargs, index)
        if self.is_opaque:
            args, kwargs = _contiguous((args, kwargs))
        return call_target(self.target, *args, **kwargs)


class FirstBranch(EachBranch):
    """Reads a size, rank or dtype of per-branch values: the same for all, so one is enough."""

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Any:
        """The first branch's result."""
        return self._call(0, args, kwargs)


class Contiguous(nn.Module):
    """Makes contiguous what an untraced function or module is called with once for all."""

    def forward(self, span: Span, value: Any) -> Any:
        """The value, its tensors contiguous."""
        return _contiguous(value)


class EachBranchModule(nn.Module):
    """Calls the base architecture's module once per branch, with that branch's tensors.

    Args:
        module: the base architecture's module; its own tensors are never used.
        packed_module: holds the packed tensors under the same names.
        layout: the slot of each tensor, by its name in the module.
        branches: branches of each level.
        level: the level of the call.
        copies: whether each call gets copies of tensors, since the module changes them in place.
    """

    def __init__(
        self,
        module: nn.Module,
        packed_module: nn.Module,
        layout: Mapping[str, Slot],
        branches: tuple[int, ...],
        level: int,
        *,
        copies: bool = False,
    ) -> None:
        super().__init__()
        self.copies, self.is_opaque = copies, is_opaque(type(module)) or has_hooks(module)
        self.module, self.packed_module = module, packed_module
        self.layout, self.branches, self.level = dict(layout), branches, level
        self.shared_buffers = [
            name for name, _ in module.named_buffers() if layout[name].level < level
        ]

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Branches:
        """One result per branch."""
        self._follow_mode()
        states = {branch: self._state(branch) for branch in range(*span)}
        results, assignments = [], []
        for index, state in enumerate(states.values()):
            result, assigned = call_assigning(
                self.module, state, self._inputs(args, index), self._inputs(kwargs, index)
            )
            results.append(result)
            # What has another shape is a cache for some image size.
            assignments.append(
                {key: new for key, new in assigned.items() if new.shape == state[key].shape}
            )
        for name in dict.fromkeys(key for assigned in assignments for key in assigned):
            self._assign(name, states, [assigned.get(name) for assigned in assignments])
        if self.module.training:
            for name in self.shared_buffers:
                self._merge(name, states)
        return Branches(results)

    def _assign(
        self, name: str, states: Mapping[int, _State], tensors: list[Tensor | None]
    ) -> None:
        """Take over what calls assigned, if anything; a shared buffer's goes into `states`."""
        pairs = zip(states, tensors, strict=True)
        assigned = {branch: tensor.detach() for branch, tensor in pairs if tensor is not None}
        if name in self.shared_buffers:
            for branch, tensor in assigned.items():
                states[branch][name] = tensor
            return
        slot, packed = self.layout[name], get_tensor(self.packed_module, name)
        # A new tensor, since autograd may still need the values that the calls read.
        fresh = packed.detach().clone()
        for branch, tensor in assigned.items():
            index = branch // self._siblings(name)
            slot.branch(fresh, self.branches[slot.level], index).copy_(tensor)
        packed.data = fresh

    def _inputs(self, values: Any, index: int) -> Any:
        """One branch's arguments, as the base model's module may have them."""
        inputs = pick(values, index)
        if self.is_opaque:
            inputs = _contiguous(inputs)
        return tree_map_only(Tensor, torch.clone, inputs) if self.copies else inputs

    def _state(self, branch: int) -> _State:
        """The tensors of one branch; views, so that buffers are updated in place."""
        state = {name: self._part(name, branch) for name in self.layout}
        for name in self.shared_buffers:
            state[name] = state[name].clone()
        return state

    def _part(self, name: str, branch: int) -> Tensor:
        slot = self.layout[name]
        packed = get_tensor(self.packed_module, name)
        return slot.branch(packed, self.branches[slot.level], branch // self._siblings(name))

    def _siblings(self, name: str) -> int:
        """Branches of this level that share one tensor."""
        return self.branches[self.level] // self.branches[self.layout[name].level]

    def _merge(self, name: str, states: Mapping[int, _State]) -> None:
        """Give a buffer that siblings share the mean of their updates."""
        updates: dict[int, list[Tensor]] = {}
        for branch, state in states.items():
            updates.setdefault(branch // self._siblings(name), []).append(state[name])
        for parent, tensors in updates.items():
            mean = torch.stack(tensors).double().mean(0)
            # Through `.data`: batch norm updates its statistics without telling autograd either.
            self._part(name, parent * self._siblings(name)).data.copy_(mean)

    def _follow_mode(self) -> None:
        """Take over what users change on the ensemble's modules, such as their mode."""
        for path, module in self.module.named_modules():
            twin = _descend(self.packed_module, path)
            module.training = twin.training
            if type(twin) is type(module):  # else a container of its tensors, without options
                vars(module).update({name: vars(twin)[name] for name in LIVE if name in vars(twin)})

    def extra_repr(self) -> str:
        """The module's class, for printing a segment."""
        return type(self.module).__name__


def _descend(packed_module: nn.Module, path: str) -> nn.Module:
    """The packed twin of a nested module; a widened module keeps its submodules inside."""
    for name in path.split(".") if path else ():
        child = packed_module._modules.get(name)
        if child is None:
            return packed_module
        packed_module = child
    return packed_module


class SharedModule(EachBranchModule):
    """Calls the base architecture's module once, for a level with a single branch."""

    def forward(self, span: Span, *args: Any, **kwargs: Any) -> Any:
        """The module's result."""
        return super().forward(Span(0, 1), *args, **kwargs)[0]
