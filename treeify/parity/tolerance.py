"""How far outputs may be from those expected, and how far they are."""

from __future__ import annotations

import math
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_structure

from treeify.errors import ParityError

RTOL, ATOL = 1e-4, 1e-5

# About so many elements are compared at once.
_AT_ONCE = 2**20


def deviation(actual: Any, expected: Any, scale: float = 1.0) -> float:
    """Largest deviation of any element, in multiples of the tolerance.

    Infinite for nan, and where shapes or dtypes differ.

    Args:
        actual: a tensor, or tensors in tuples, lists or dictionaries.
        expected: the same of the base architecture.
        scale: what the absolute part of the tolerance is multiplied by; see `scale_of`.

    Raises:
        ParityError: the tensors are held in tuples, lists or dictionaries of another structure.
    """
    check_structure(actual, expected)
    worst = 0.0
    for one, other in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if not isinstance(other, Tensor):
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            return float("inf")
        if other.numel() and not torch.equal(one, other):
            worst = max(worst, *map(_largest, _pieces(one), _pieces(other), repeat(scale)))
    return worst


def scale_of(expected: Any) -> float:
    """The largest value of some tensors together, at most 1; 1 where all are 0."""
    values = [own for own in tensors_in(expected) if own.is_floating_point() or own.is_complex()]
    largest = max((own.detach().abs().max().item() for own in values if own.numel()), default=0.0)
    return min(1.0, largest) or 1.0


def check_structure(actual: Any, expected: Any) -> None:
    # A graph gives a dict for any kind of it.
    found, wanted = (tree_structure(_with_plain_dicts(own)) for own in (actual, expected))
    if found != wanted:
        raise ParityError(
            "the tensors are held in another structure.", expected=f"{wanted}", found=f"{found}"
        )


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _with_plain_dicts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_plain_dicts(own) for key, own in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_with_plain_dicts, value))
    return value


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor cut along dim 0, so that comparing it needs little memory besides."""
    return tensor.chunk(-(-tensor.numel() // _AT_ONCE)) if tensor.ndim else (tensor,)


def _largest(one: Tensor, other: Tensor, scale: float) -> float:
    """The largest of the elements' deviations."""
    one, other = one.detach(), other.detach()
    if one.is_complex() or other.is_complex():
        one, other = (torch.view_as_real(own.to(torch.complex128)) for own in (one, other))
    if other.dtype not in (torch.float32, torch.float64):
        one, other = one.double(), other.double()
    tolerance = other.abs().mul_(RTOL).add_(ATOL * scale)
    error = (one - other).abs_().div_(tolerance)
    largest = error.max().item()
    if math.isfinite(largest):
        return largest
    # Both may be infinite or nan in the same places.
    error = torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, error)
    return error.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()
