"""Modules that run packed as themselves, with more channels and groups: convolutions, norms, ..."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from treeify.engine.packed_tensors import call_with, narrow
from treeify.rules.table import rules_of
from treeify.tree import Span

# What users change on a module after it was made.
LIVE = ("training", "eps", "momentum")


class Widened(nn.Module):
    """Runs a widened module, or the part of it that a span of branches needs.

    Args:
        module: the packed module in the ensemble, with all `branches` of its level.
        base: the base architecture's module.
        branches: how many branches `module` holds.
        of_channels: whether what it does depends on how many there are, even without tensors.
    """

    def __init__(
        self, module: nn.Module, base: nn.Module, branches: int, *, of_channels: bool = False
    ) -> None:
        super().__init__()
        self.module = module
        self.base = base
        self.branches = branches
        self._resized: dict[int, nn.Module] = {}
        # Not those of children: what was attached to a layer takes no part in it.
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        self.has_tensors = bool(tensors)
        self.of_channels = of_channels
        if branches > 1 and (self.has_tensors or of_channels):
            self.resized(1)  # made here, so that compiling a looped level meets no copying

    def forward(self, span: Span, x: Tensor, *sizes: Any, **named: Any) -> Any:
        """`[N, G*C, ...]` -> what the module makes of it, for the branches of `span`."""
        if span.size > 1 and self._averages_by_counter():
            pieces = zip(range(*span), x.chunk(span.size, dim=1), strict=True)
            results = [self(Span(branch, branch + 1), piece) for branch, piece in pieces]
            return torch.cat(results, dim=1)
        if not self.has_tensors and self.of_channels:
            return self.resized(span.size)(x, *sizes, **named)
        if span.size == self.branches or not self.has_tensors:
            return self.module(x, *sizes, **named)
        return call_with(self.resized(span.size), self.tensors(span), (x, *sizes), named)

    def _averages_by_counter(self) -> bool:
        """Whether its statistics move by one over a counter, which every branch has of its own."""
        norm = self.module
        if not isinstance(norm, _BatchNorm) or norm.momentum is not None:
            return False
        return norm.training and norm.track_running_stats

    def resized(self, count: int) -> nn.Module:
        """The base architecture's module, widened for `count` branches; its tensors go unused."""
        if count not in self._resized:
            module = copy.copy(self.base)
            # The ensemble's own submodules, whose mode and hooks users may change.
            module._modules = self.module._modules
            widen = rules_of(type(self.base)).widen
            assert widen is not None
            widen(module, count)
            self._resized[count] = module  # finished: another thread may be waiting for it
        part = self._resized[count]
        for name in LIVE:
            if name in self.module.__dict__:
                part.__dict__[name] = self.module.__dict__[name]
        return part

    def tensors(self, span: Span) -> dict[str, Tensor]:
        """The packed tensors' parts for the branches of `span`; views."""
        packed: dict[str, Tensor | None] = {**self.module._parameters, **self.module._buffers}
        return {
            name: narrow(tensor, self.branches, span)
            for name, tensor in packed.items()
            if tensor is not None
        }


class OfRows(nn.Module):
    """Runs a widened module on branches in the batch, where every image has several rows."""

    def __init__(self, operation: Widened) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[G*R, C, ...] -> [G*R, O, ...]`."""
        rows = torch.unflatten(x, 0, (span.size, -1)).transpose(0, 1)
        result = self.operation(span, rows.flatten(1, 2))
        return torch.unflatten(result, 1, (span.size, -1)).transpose(0, 1).flatten(0, 1)
