"""The properties that are checked: leaves, prefixes, statistics, gradients and shapes."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.engine.packed_tensors import named_tensors
from treeify.engine.plan import Plan
from treeify.engine.preserve import preserve_buffers, preserve_modes
from treeify.engine.program import EXECUTIONS
from treeify.errors import ParityError
from treeify.parity.deterministic import deterministic
from treeify.parity.tolerance import check_structure, deviation, scale_of, tensors_in

# Gives the separate network of a leaf.
LeafOf = Callable[[int], nn.Module]


@torch.no_grad()
def check_outputs(hne: HierarchicalEnsemble, leaf_of: LeafOf, x: Tensor) -> dict[str, float]:
    """Deviations in evaluation mode: of leaves, by every plan, and of prefixes.

    The ensemble may be changed. `prefix` is left out where `leaf_eval` exceeds 1.
    """
    hne.eval()
    outputs: dict[Plan, Any] = {}
    leaf = prefix = 0.0
    expected = run_pass(leaf_of(0), x, [], training=False).output
    for plan in dict.fromkeys((hne.plan(x), *_every_plan(hne))):
        hne.train().eval()  # drops the weights that were prepared for the last plan
        with deterministic(x.dtype), _preserve_state(hne):
            outputs[plan] = hne.run(x, hne.leaves, plan)
        leaf = max(leaf, _leaf_deviation(outputs[plan], 0, expected))
    # If rounding is too coarse for one leaf already, the others need not confirm it: float64 has to
    # decide in any case.
    if leaf > 1:
        return {"leaf_eval": leaf}
    for index in range(1, hne.leaves):
        expected = run_pass(leaf_of(index), x, [], training=False).output
        deviations = (_leaf_deviation(output, index, expected) for output in outputs.values())
        leaf = max(leaf, *deviations)
    for size in hne.tree.nested_sizes[:-1]:  # the last is all leaves
        with deterministic(x.dtype), _preserve_state(hne):
            prefix_output = hne(x, leaves=size)
        expected = _first(outputs[hne.plan(x)], size)
        prefix = max(prefix, deviation(prefix_output, expected, scale_of(expected)))
    return {"leaf_eval": leaf, "prefix": prefix}


def _leaf_deviation(output: Any, index: int, expected: Any) -> float:
    return deviation(select(output, index), expected, scale_of(expected))


@contextmanager
def _preserve_state(hne: HierarchicalEnsemble) -> Iterator[None]:
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


def check_training(
    hne: HierarchicalEnsemble, leaf_of: LeafOf, x: Tensor, without_gradient: list[str]
) -> dict[str, float]:
    """Deviations in training mode: of leaves, of buffers after the pass, and of gradients.

    The gradient of a branch is compared with the sum of those of the networks that share it.

    The ensemble may be changed. Leaves after the first that exceeds 1 are left out. Parameters that
    receive no gradient, and none in any network, are added to `without_gradient`.
    """
    weights: list[Tensor] = []
    packed = run_pass(hne, x, weights, training=True)
    worst = {"leaf_train": 0.0, "buffers": 0.0, "gradient": 0.0}
    sums: dict[str, Tensor] = {}  # of gradients, where several leaves share a branch
    keys_with_gradient: set[str] = set()
    scales: list[float] = []

    def compare(index: int) -> None:
        network = leaf_of(index)
        leaf_weights = [select(weight, index) for weight in weights]
        single = run_pass(network, x, leaf_weights, training=True)
        scale = scale_of(single.gradients)
        deviations = {
            "leaf_train": _leaf_deviation(packed.output, index, single.output),
            "buffers": _buffer_deviation(hne, packed, index, single, network.state_dict().keys()),
            "gradient": _gradient_deviation(hne, packed, index, single, scale),
        }
        worst.update({name: max(worst[name], value) for name, value in deviations.items()})
        _add_shared(hne, index, single.gradients, sums)
        keys_with_gradient.update(single.gradients)
        scales.append(scale)

    for index in range(hne.leaves):
        compare(index)  # a function, so that a network is freed before the next one is made
        if max(worst.values()) > 1:
            return worst
    without_gradient += [name for name, _ in hne.named_parameters() if name not in packed.gradients]
    if keys_with_gradient != set(packed.gradients):
        worst["gradient"] = math.inf
    for key, expected in sums.items():
        if key in packed.gradients:
            shared = deviation(packed.gradients[key], expected, max(scales))
            worst["gradient"] = max(worst["gradient"], shared)
    return worst


@dataclass(frozen=True)
class Pass:
    """What a pass of a network or an ensemble gives.

    Buffers are as the forward pass left them: recomputing activations in the backward pass would
    once more update the statistics of batch norms.
    """

    output: Any
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor]


def run_pass(model: nn.Module, x: Tensor, weights: list[Tensor], *, training: bool) -> Pass:
    """Run a model forward and, in training mode, backward from a weighted sum of its outputs.

    Its mode, buffers and gradients change. Weights of the outputs that have gradients are drawn and
    appended if there are none yet.
    """
    for parameter in model.train(training).parameters():
        # Whole numbers can have none.
        can_have_gradient = parameter.is_floating_point() or parameter.is_complex()
        parameter.requires_grad_(training and can_have_gradient)
    model.zero_grad()
    with torch.set_grad_enabled(training), deterministic(x.dtype):
        output = model(x)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}
    if training:
        with torch.enable_grad():
            torch.autograd.backward(_weighted_sum(output, weights))
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.grad is not None
    }
    return Pass(output, buffers, gradients)


def _weighted_sum(value: Any, weights: list[Tensor]) -> Tensor:
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


def select(value: Any, index: int) -> Any:
    """One leaf of an output, in the output's structure."""
    return tree_map_only(Tensor, lambda out: out.select(min(1, out.ndim - 1), index), value)


def _first(value: Any, size: int) -> Any:
    """The first leaves of an output, in the output's structure."""
    return tree_map_only(Tensor, lambda out: out.narrow(min(1, out.ndim - 1), 0, size), value)


def _add_shared(
    hne: HierarchicalEnsemble, leaf: int, gradients: dict[str, Tensor], sums: dict[str, Tensor]
) -> None:
    """Add a separate network's gradients to the branches that it shares with others."""
    packed = dict(named_tensors(hne))
    for key, gradient in gradients.items():
        if hne.branches_of(key) < hne.leaves:
            if key not in sums:
                sums[key] = torch.zeros_like(packed[key])
            hne.part(key, leaf, sums[key]).add_(gradient)


def _gradient_deviation(
    hne: HierarchicalEnsemble, packed: Pass, leaf: int, single: Pass, scale: float
) -> float:
    """Deviation of the gradients of the branches that belong to this leaf alone."""
    worst = 0.0
    for key, gradient in packed.gradients.items():
        if hne.branches_of(key) == hne.leaves:
            part = hne.part(key, leaf, gradient)
            # One leaf's network may not use what another's does.
            expected = single.gradients.get(key)
            expected = torch.zeros_like(part) if expected is None else expected
            worst = max(worst, deviation(part, expected, scale))
    return worst


def _buffer_deviation(
    hne: HierarchicalEnsemble, packed: Pass, leaf: int, single: Pass, persistent: Collection[str]
) -> float:
    worst = 0.0
    for key, expected in single.buffers.items():
        part = hne.part(key, leaf, packed.buffers[key])
        # What is no part of a state dict and changes its shape is a cache for some image size.
        is_cache = key not in persistent and part.shape != expected.shape
        if key not in hne.shared_buffers and not is_cache:
            worst = max(worst, deviation(part, expected))
    return worst


def check_shapes(hne: HierarchicalEnsemble, x: Tensor) -> None:
    """Check that every leaf's output has the shape the untouched base architecture gives.

    All that can be checked on the meta device: in evaluation mode every way to run and every nested
    size, in training mode all leaves. The ensemble is not modified but for its buffers.

    Raises:
        ParityError: a leaf's output has another shape.
    """
    with preserve_modes(hne):
        for training in (False, True):
            hne.train(training)
            expected = hne.leaf(0)(x)
            with torch.set_grad_enabled(training):
                if training:
                    _check_output_shapes(hne(x), hne.leaves, expected)
                    continue
                for size in hne.tree.nested_sizes:
                    for plan in _every_plan(hne):
                        _check_output_shapes(hne.run(x, size, plan), size, expected)


def _check_output_shapes(output: Any, size: int, expected: Any) -> None:
    expected_shapes = _shapes(expected)
    for index in range(size):
        leaf_output = select(output, index)
        check_structure(leaf_output, expected)
        if (shapes := _shapes(leaf_output)) != expected_shapes:
            raise ParityError(
                f"leaf {index} of {size} has an output of another shape.",
                expected=f"{expected_shapes}",
                found=f"{shapes}",
            )
    if any(out.shape[min(1, out.ndim - 1)] != size for out in tensors_in(output)):
        raise ParityError(f"the output of {size} leaves does not have {size} of them.")


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors_in(value)]
