"""The properties that are checked: leaves, prefixes, statistics, gradients and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.engine.packed_tensors import preserve_buffers, preserve_modes, tensors
from treeify.engine.plan import Plan
from treeify.engine.program import EXECUTIONS
from treeify.errors import ParityError
from treeify.parity.deterministic import held
from treeify.parity.tolerance import check_structure, deviation, scale_of, tensors_in

Leaf = Callable[[int], nn.Module]


@torch.no_grad()
def eval_parity(hne: HierarchicalEnsemble, leaf_of: Leaf, x: Tensor) -> dict[str, float]:
    hne.eval()
    outputs: dict[Plan, Any] = {}
    leaf = prefix = 0.0
    first = _answer(leaf_of(0), x)
    for plan in dict.fromkeys((hne.plan(x), *_every_plan(hne))):
        hne.train().eval()  # drops the weights that were prepared for the last plan
        with held(x.dtype), _kept(hne):
            outputs[plan] = hne.run(x, hne.leaves, plan)
        leaf = max(leaf, deviation(_select(outputs[plan], 0), first, scale_of(first)))
    # Rounding that one leaf shows already, the others need not confirm: see `_decide`.
    if leaf > 1:
        return {"leaf_eval": leaf}
    for index in range(1, hne.leaves):
        own = _answer(leaf_of(index), x)
        scale = scale_of(own)
        found = (deviation(_select(logits, index), own, scale) for logits in outputs.values())
        leaf = max(leaf, *found)
    whole = outputs[hne.plan(x)]
    for size in hne.tree.nested_sizes[:-1]:  # the last is all leaves
        with held(x.dtype), _kept(hne):
            answers = hne(x, leaves=size)
        first = _first(whole, size)
        prefix = max(prefix, deviation(answers, first, scale_of(first)))
    return {"leaf_eval": leaf, "prefix": prefix}


def _answer(network: nn.Module, x: Tensor) -> Any:
    with held(x.dtype):
        return network.eval()(x)


@contextmanager
def _kept(hne: HierarchicalEnsemble) -> Iterator[None]:
    """Undo what a run leaves behind in the state: updated buffers, exchanged data of weights."""
    weights = [(parameter, parameter.data) for parameter in hne.parameters()]
    with preserve_buffers(hne):
        yield
    for parameter, data in weights:
        parameter.data = data


def _every_plan(hne: HierarchicalEnsemble) -> list[Plan]:
    """All levels packed and all looped, with and without fused layers, and level by level in turn.

    The first level has one branch: the turns of two levels would be no others.
    """
    levels = hne.tree.levels
    plans = [Plan((way,) * levels, fuse=fuse) for way in EXECUTIONS for fuse in (False, True)]
    if levels > 2:
        order = (EXECUTIONS, EXECUTIONS[::-1])
        plans += [Plan(tuple(islice(cycle(ways), levels)), fuse=False) for ways in order]
    return plans


@torch.enable_grad()
def train_parity(
    hne: HierarchicalEnsemble, leaf_of: Leaf, x: Tensor, ungraded: list[str]
) -> dict[str, float]:
    want_gradients(hne.train())
    hne.zero_grad()
    weights: list[Tensor] = []
    with held(x.dtype):
        logits = hne(x)
    # As the forward pass left them: recomputing activations in the backward pass would once more
    # update the statistics of batch norms.
    updated = {name: own.clone() for name, own in hne.named_buffers(remove_duplicate=False)}
    torch.autograd.backward(scalar(logits, weights))
    actual = gradients_of(hne)
    found = {"leaf_train": 0.0, "buffers": 0.0, "gradient": 0.0}
    graded: set[str] = set()
    expected: dict[str, Tensor] = {}  # where several leaves share a branch
    scales: list[float] = []

    def compare(index: int) -> None:
        network = leaf_of(index).train()
        want_gradients(network)
        with held(x.dtype):
            own = network(x)
        worst = deviation(_select(logits, index), own, scale_of(own))
        found["leaf_train"] = max(found["leaf_train"], worst)
        worst = _buffer_deviation(hne, updated, index, network)
        found["buffers"] = max(found["buffers"], worst)
        torch.autograd.backward(scalar(own, [_select(w, index) for w in weights]))
        gradients = gradients_of(network)
        graded.update(gradients)
        scales.append(scale_of(gradients))
        worst = _own_gradient_deviation(hne, index, actual, gradients, scales[-1])
        found["gradient"] = max(found["gradient"], worst)
        _collect(hne, index, gradients, expected)

    for index in range(hne.leaves):
        compare(index)  # its network is freed before the next one is made
        if max(found.values()) > 1:
            return found
    ungraded += [name for name, _ in hne.named_parameters() if name not in actual]
    shared = (
        deviation(actual[key], expected[key], max(scales)) for key in expected if key in actual
    )
    found["gradient"] = max([found["gradient"], *shared]) if graded == set(actual) else math.inf
    return found


def _select(value: Any, index: int) -> Any:
    """One leaf of an output, in the output's structure."""
    return tree_map_only(Tensor, lambda out: out.select(min(1, out.ndim - 1), index), value)


def _first(value: Any, size: int) -> Any:
    """The first leaves of an output, in the output's structure."""
    return tree_map_only(Tensor, lambda out: out.narrow(min(1, out.ndim - 1), 0, size), value)


def scalar(value: Any, weights: list[Tensor]) -> Tensor:
    """A weighted sum of the outputs with gradients; draws the weights where they are missing."""
    outputs = [output for output in tensors_in(value) if output.requires_grad]
    if not outputs:
        raise ParityError(
            "no output has a gradient, so that training cannot be checked.",
            expected="an output that depends on the parameters by differentiable operations",
            next_step="Check outputs alone: treeify.parity.verify.verify_outputs(hne, x).",
        )
    if not weights:
        weights.extend(torch.randn_like(output) for output in outputs)
    return torch.stack(
        [(output * weight).sum() for output, weight in zip(outputs, weights, strict=True)]
    ).sum()


def want_gradients(network: nn.Module, wanted: bool = True) -> None:
    """Let parameters have gradients or not, but for whole numbers, which can have none."""
    for parameter in network.parameters():
        parameter.requires_grad_(
            wanted and (parameter.is_floating_point() or parameter.is_complex())
        )


def gradients_of(network: nn.Module) -> dict[str, Tensor]:
    return {
        key: parameter.grad
        for key, parameter in network.named_parameters(remove_duplicate=False)
        if parameter.grad is not None
    }


def _collect(
    hne: HierarchicalEnsemble, leaf: int, gradients: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """Add a separate network's gradients to the branches that it shares with others."""
    packed = dict(tensors(hne))
    for key, gradient in gradients.items():
        if hne.branches_of(key) < hne.leaves:
            if key not in expected:
                expected[key] = torch.zeros_like(packed[key])
            hne.part(key, leaf, expected[key]).add_(gradient)


def _own_gradient_deviation(
    hne: HierarchicalEnsemble,
    leaf: int,
    packed: dict[str, Tensor],
    gradients: dict[str, Tensor],
    scale: float,
) -> float:
    """Deviation of the gradients of the branches that belong to this leaf alone."""
    worst = 0.0
    for key, gradient in packed.items():
        if hne.branches_of(key) == hne.leaves:
            part = hne.part(key, leaf, gradient)
            # One leaf's network may not use what another's does.
            own = gradients[key] if key in gradients else torch.zeros_like(part)
            worst = max(worst, deviation(part, own, scale))
    return worst


def _buffer_deviation(
    hne: HierarchicalEnsemble, packed: dict[str, Tensor], leaf: int, network: nn.Module
) -> float:
    lasting = network.state_dict().keys()
    worst = 0.0
    for key, own in network.named_buffers(remove_duplicate=False):
        part = hne.part(key, leaf, packed[key])
        # What is no part of a state dict and changes its shape is a cache for some image size.
        is_cache = key not in lasting and part.shape != own.shape
        if key not in hne.shared_buffers and not is_cache:
            worst = max(worst, deviation(part, own))
    return worst


def check_shapes(hne: HierarchicalEnsemble, x: Tensor) -> None:
    """Check that every leaf's output has the shape the untouched base architecture gives.

    All that can be checked on the meta device: in evaluation mode every way to run and every nested
    size, in training mode all leaves.

    Args:
        hne: the ensemble. Not modified but for its buffers.
        x: images, `[N, C, H, W]`.

    Raises:
        ParityError: a leaf's output has another shape.
    """
    with preserve_modes(hne):
        for training in (False, True):
            hne.train(training)
            expected = hne.leaf(0)(x)
            with torch.set_grad_enabled(training):
                if training:
                    outputs = {hne.leaves: [hne(x)]}
                else:
                    outputs = {
                        size: [hne.run(x, size, plan) for plan in _every_plan(hne)]
                        for size in hne.tree.nested_sizes
                    }
            for size, found in outputs.items():
                for output in found:
                    _check_output_shapes(output, size, expected)


def _check_output_shapes(output: Any, size: int, expected: Any) -> None:
    for index in range(size):
        own = _select(output, index)
        check_structure(own, expected)
        if _shapes(own) != _shapes(expected):
            raise ParityError(
                f"leaf {index} of {size} has an output of another shape.",
                expected=f"{_shapes(expected)}",
                found=f"{_shapes(own)}",
            )
    if any(out.shape[min(1, out.ndim - 1)] != size for out in tensors_in(output)):
        raise ParityError(f"the output of {size} leaves does not have {size} of them.")


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors_in(value)]
