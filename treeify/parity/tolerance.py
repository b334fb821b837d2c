"""How far outputs are from those expected, in multiples of what is tolerated."""

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
    """
    check_structure(actual, expected)
    worst = 0.0
    for tensor, reference in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if not isinstance(reference, Tensor):
            continue
        if tensor.shape != reference.shape or tensor.dtype != reference.dtype:
            return math.inf
        if reference.numel() and not torch.equal(tensor, reference):
            worst = max(worst, *map(_largest, _pieces(tensor), _pieces(reference), repeat(scale)))
    return worst


def scale_of(expected: Any) -> float:
    """The largest value of some tensors together, at most 1; 1 where all are 0."""
    largest = (
        tensor.detach().abs().max().item()
        for tensor in tensors_in(expected)
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex())
    )
    return min(1.0, max(largest, default=0.0)) or 1.0


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dictionaries, nested or not."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def check_structure(actual: Any, expected: Any) -> None:
    """Raise ParityError unless tensors are nested in the same tuples, lists and dictionaries."""
    # A graph gives a dict for any kind of it.
    structures = [tree_structure(_with_plain_dicts(value)) for value in (actual, expected)]
    if structures[0] != structures[1]:
        raise ParityError(
            "the tensors are nested in another structure.",
            expected=f"{structures[1]}",
            found=f"{structures[0]}",
        )


def _with_plain_dicts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_plain_dicts(element) for key, element in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_with_plain_dicts, value))
    return value


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor cut along dim 0, so that comparing it needs little memory besides."""
    return tensor.chunk(-(-tensor.numel() // _AT_ONCE)) if tensor.ndim else (tensor,)


def _largest(actual: Tensor, expected: Tensor, scale: float) -> float:
    """The largest of the elements' deviations."""
    actual, expected = actual.detach(), expected.detach()  # of the same dtype
    if expected.is_complex():
        actual, expected = (
            torch.view_as_real(tensor.to(torch.complex128)) for tensor in (actual, expected)
        )
    elif expected.dtype not in (torch.float32, torch.float64):
        actual, expected = actual.double(), expected.double()
    tolerance = expected.abs().mul_(RTOL).add_(ATOL * scale)
    error = (actual - expected).abs_().div_(tolerance)
    largest = error.max().item()
    if math.isfinite(largest):
        return largest
    # Both may be infinite or nan in the same places.
    error = torch.where((actual == expected) | (actual.isnan() & expected.isnan()), 0.0, error)
    return error.nan_to_num(nan=math.inf, posinf=math.inf).max().item()
