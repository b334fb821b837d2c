"""Proof that a conversion is right: every leaf against the untouched base architecture.

The oracle is `hne.leaf(i)`: the base model's own code with one leaf's weights. It owes packing
nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only, tree_structure

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.engine.packed_tensors import named_tensors
from treeify.engine.plan import Plan
from treeify.engine.preserve import preserve_buffers, preserve_modes
from treeify.engine.program import EXECUTIONS
from treeify.errors import ParityError
from treeify.parity.deterministic import held

RTOL, ATOL = 1e-4, 1e-5
# So many times its own rounding a network's outputs may be off in float32 where float64 has to
# decide. Gradients may be off by any finite number: those of ReLU jump where rounding changes a
# sign.
_AMPLIFIED = {False: 100.0, True: math.inf}

# About so many elements are compared at once.
_AT_ONCE = 2**20

_Leaf = Callable[[int], nn.Module]
_Check = Callable[[HierarchicalEnsemble, _Leaf, Tensor], dict[str, float]]


@dataclass(frozen=True)
class Figures:
    """Largest deviations found, as multiples of the tolerance: at most 1 passes.

    An element may deviate by `1e-5 * s + 1e-4 * |expected|`, where expected is the value of the
    untouched base architecture. The scale `s` is 1, or the largest expected value of the output or
    of all gradients where that is smaller: else networks whose logits vanish would always pass.

    Args:
        leaf_eval: leaf logits in evaluation mode, as `hne.execution` is set and in every way to
            run: packed, looped, both with layers fused, and packed and looped level by level.
        leaf_train: leaf logits in training mode, batch statistics included, as `hne.execution` is
            set.
        buffers: buffers (running statistics) after that training pass, but for
            `hne.shared_buffers`, of which each separate network has its own.
        prefix: `hne(x, leaves=n)` against `hne(x)[:, :n]` for every nested size `n`.
        gradient: gradient of every parameter in training mode, summed over the leaves.
        ungraded: parameters that receive no gradient, and none in the base architecture either.
        dtypes: the precision each check was decided in: float64 where float32 rounding exceeded
            the tolerance.
    """

    leaf_eval: float
    leaf_train: float
    buffers: float
    prefix: float
    gradient: float
    ungraded: tuple[str, ...]
    dtypes: dict[str, str]

    @property
    def worst(self) -> float:
        """The largest deviation of all checks."""
        return max(self.leaf_eval, self.leaf_train, self.buffers, self.prefix, self.gradient)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def verify(hne: HierarchicalEnsemble, x: Tensor) -> Figures:
    """Check leaf, prefix and gradient parity against the untouched base architecture.

    Fresh weights hide mistakes, so where there are some a copy is checked too in which they have
    values as training gives them: see `settle` and `fit_statistics`. Of fresh weights themselves
    only evaluation mode is checked. Trained weights stay as they are.
    Random draws are held at their mean (see `held.MeanNoise`): they differ in the ensemble and in
    the separate networks.

    Args:
        hne: the ensemble. Not modified.
        x: images, `[N, C, H, W]`; use at least 2 for batch statistics.

    Returns:
        The largest deviation of each check.

    Raises:
        ParityError: a check exceeds the tolerance in float32 and in float64; names it.
        InputError: the input does not fit the model.
    """
    ungraded: list[str] = []
    with torch.random.fork_rng(devices=[]):
        evaluated = [_decide(_eval_parity, hne, x, training=False)]
        with _at_work(hne, x) as checked:
            if checked is not hne:
                evaluated.append(_decide(_eval_parity, checked, x, training=False))
            train_parity = partial(_train_parity, ungraded=ungraded)
            trained, train_dtype = _decide(train_parity, checked, x, training=True)
    return Figures(
        **{name: max(found[name] for found, _ in evaluated) for name in ("leaf_eval", "prefix")},
        **trained,
        ungraded=tuple(dict.fromkeys(ungraded)),
        dtypes={"eval": max(dtype for _, dtype in evaluated), "train": train_dtype},
    )


def verify_outputs(hne: HierarchicalEnsemble, x: Tensor) -> float:
    """Check leaf and prefix parity in evaluation mode only: see `verify`.

    Returns:
        The largest deviation, in multiples of the tolerance.

    Raises:
        ParityError: it exceeds the tolerance in float32 and in float64.
    """
    found, _ = _decide(_eval_parity, hne, x, training=False)
    return max(found.values())


def verify_shapes(hne: HierarchicalEnsemble, x: Tensor) -> None:
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
                    _check_shapes(output, size, expected)


def _check_shapes(output: Any, size: int, expected: Any) -> None:
    for index in range(size):
        own = _select(output, index)
        _check_structure(own, expected)
        if _shapes(own) != _shapes(expected):
            raise ParityError(
                f"leaf {index} of {size} has an output of another shape.",
                expected=f"{_shapes(expected)}",
                found=f"{_shapes(own)}",
            )
    if any(out.shape[min(1, out.ndim - 1)] != size for out in _tensors(output)):
        raise ParityError(f"the output of {size} leaves does not have {size} of them.")


def _with_plain_dicts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_plain_dicts(own) for key, own in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_with_plain_dicts, value))
    return value


def _check_structure(actual: Any, expected: Any) -> None:
    # A graph gives a dict for any kind of it.
    found, wanted = (tree_structure(_with_plain_dicts(own)) for own in (actual, expected))
    if found != wanted:
        raise ParityError(
            "the tensors are held in another structure.", expected=f"{wanted}", found=f"{found}"
        )


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in _tensors(value)]


@contextmanager
def _at_work(hne: HierarchicalEnsemble, x: Tensor) -> Iterator[HierarchicalEnsemble]:
    """The ensemble, or a copy of it where fresh weights would hide mistakes."""
    idle = _idle(hne)
    if not idle:
        yield hne
        return
    with _copied(hne) as own:
        settle(own)
        if any(name.endswith("running_var") for name, _ in idle):
            fit_statistics(own, x)
        yield own


def settle(model: nn.Module) -> None:
    """Give fresh statistics and zero-initialised weights values that matter, as training would.

    A fresh network hides mistakes: running means of 0, variances and scales of 1, and last scales
    of residual branches of 0, under which whole branches vanish from the output.

    Args:
        model: changed in place, from torch's random state.
    """
    with torch.no_grad():
        for name, tensor in _idle(model):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            else:
                tensor.add_(torch.empty_like(tensor).uniform_(0.1, 0.3))


def _idle(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and running statistics of one value throughout; if they have one alone, 0 or 1."""
    statistics = ("running_mean", "running_var")
    tensors = (
        *model.named_parameters(),
        *((name, own) for name, own in model.named_buffers() if name.endswith(statistics)),
    )
    return [
        (name, own)
        for name, own in tensors
        if own.is_floating_point()
        and own.numel()
        and (low := own.min()) == own.max()
        and (own.numel() > 1 or low in (0, 1))
    ]


def fit_statistics(model: nn.Module, images: Tensor) -> None:
    """Bring running means and variances of batch norms near those of some images.

    With statistics that fit no images the activations of deep networks grow in evaluation mode,
    until the rounding of float64 decides what the network answers.

    Args:
        model: a network or an ensemble; changed in place, from torch's random state.
        images: `[N, C, H, W]`.
    """
    norms = [
        own for own in model.modules() if isinstance(own, _BatchNorm) and own.track_running_stats
    ]
    momenta = [own.momentum for own in norms]
    for own in norms:
        own.momentum = 1.0  # this batch's statistics, whole
    with preserve_modes(model), torch.no_grad(), held(images.dtype):
        model.train()(images)
    for own, momentum in zip(norms, momenta, strict=True):
        own.momentum = momentum
        mean, var = own.running_mean, own.running_var
        assert mean is not None
        assert var is not None
        mean.add_(torch.randn_like(mean).mul_(0.1 * var.sqrt()))
        var.mul_(torch.empty_like(var).uniform_(0.8, 1.25))


def _decide(
    check: _Check,
    hne: HierarchicalEnsemble,
    x: Tensor,
    *,
    training: bool,
) -> tuple[dict[str, float], str]:
    """Run a check in the ensemble's precision and, if rounding is too coarse, in float64.

    Args:
        check: takes a copy of the ensemble, what gives its leaves as they are now, and images; it
            may leave out figures once one of them exceeds 1.
        hne: the ensemble. Not modified.
        x: images.
        training: the mode that is checked.

    Raises:
        InputError: the images do not fit the model.
        ParityError: a figure exceeds 1 in float64 too, the model's own values are random, or the
            precision it was given in is off by more than its rounding explains.
    """
    hne.check_input(x)
    text, rough = "", 0.0
    if x.dtype != torch.float64:
        found = _on_a_copy(check, hne, hne.leaf, x)
        if max(found.values()) <= 1:
            return found, str(x.dtype).removeprefix("torch.")
        rough = max(found.values())
        text = f" ({rough:.3g} times in {x.dtype})"

    def leaf_of(index: int) -> nn.Module:
        return hne.leaf(index).double()

    given, x = x, x.double()
    found = _on_a_copy(check, hne, leaf_of, x)
    worst = max(found, key=lambda name: found[name])
    if found[worst] <= 1:
        if rough:
            _check_rounding(hne.leaf(0), given, rough, training=training)
        return found, "float64"
    text = f"{worst} parity is off by {found[worst]:.3g} times the tolerance in float64{text}"
    if _is_random(leaf_of, x, training=training):
        raise ParityError(
            f"{text}, and the base architecture itself gives other values each time.",
            expected="random draws that can be held at their mean: dropout, stochastic depth,"
            " torch.rand, torch.randn, torch.bernoulli and their like",
            next_step="Check the model with its own noise switched off.",
        )
    raise ParityError(
        f"{text}.",
        expected=f"at most {ATOL} + {RTOL} * |value of the untouched base architecture|, the first"
        " times the largest of them where that is below 1",
        next_step="This is a bug in treeify: please report the model's name and the splits"
        f" ({hne.extra_repr()}).",
    )


def _on_a_copy(
    check: _Check, hne: HierarchicalEnsemble, leaf_of: _Leaf, x: Tensor
) -> dict[str, float]:
    """Run a check on a copy of the ensemble in the images' precision."""
    with _copied(hne) as own:
        return check(own.double() if x.dtype == torch.float64 else own, leaf_of, x)


@contextmanager
def _copied(hne: HierarchicalEnsemble) -> Iterator[HierarchicalEnsemble]:
    """A copy whose memory is freed in the end."""
    own = copy.deepcopy(hne)
    try:
        yield own
    finally:
        # Graphs refer to themselves: what they hold would stay through the next check.
        own.train().to("meta")


def _is_random(leaf_of: _Leaf, x: Tensor, *, training: bool) -> bool:
    """Whether a network gives other values or gradients each time: then there is no comparing them.

    Gradients alone are random where activations are recomputed: no draw is held in backward passes.
    """
    weights: list[Tensor] = []
    passes = (_pass(leaf_of(0), x, weights, training=training) for _ in range(2))
    return _deviation_of_passes(*passes) > 1


def _rounding(network: nn.Module, x: Tensor, *, training: bool) -> float:
    """How far a network's outputs and gradients are from its own in float64.

    In multiples of the tolerance.
    """
    weights: list[Tensor] = []
    expected = _pass(copy.deepcopy(network).double(), x.double(), weights, training=training)
    weights = [own.to(x.dtype) for own in weights]
    found = _pass(network, x, weights, training=training)
    return _deviation_of_passes(tree_map_only(Tensor, _widened, found), expected)


def _deviation_of_passes(actual: tuple[Any, Any], expected: tuple[Any, Any]) -> float:
    """Of outputs and of gradients, each by their own scale."""
    pairs = zip(actual, expected, strict=True)
    return max(deviation(one, other, scale_of(other)) for one, other in pairs)


def _widened(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _pass(
    network: nn.Module, x: Tensor, weights: list[Tensor], *, training: bool
) -> tuple[Any, dict[str, Tensor]]:
    """A network's output and, in training mode, the gradients of a weighted sum of it."""
    _want_gradients(network.train(training), training)
    with torch.set_grad_enabled(training), held(x.dtype):
        output = network(x)
    if training:
        torch.autograd.backward(_scalar(output, weights))
    return output, _gradients(network)


def _check_rounding(network: nn.Module, x: Tensor, rough: float, *, training: bool) -> None:
    """Refuse deviations that float64 does not have and rounding does not explain.

    Args:
        network: one of the ensemble's.
        x: images in the precision that is too coarse.
        rough: the ensemble's largest deviation in it, in multiples of the tolerance.
        training: the mode it was found in.

    Raises:
        ParityError: there is such a deviation.
    """
    rounding = _rounding(network, x, training=training)
    allowed = _AMPLIFIED[training] * max(1.0, rounding)
    if not (rough <= allowed and (math.isfinite(rough) or not math.isfinite(rounding))):
        raise ParityError(
            f"parity is off by {rough:.3g} times the tolerance in {x.dtype}, though not in"
            " float64.",
            expected=f"at most {_AMPLIFIED[training]} times what rounding does to one network"
            f" ({rounding:.3g})",
            next_step="This is a bug in treeify, in what runs in that precision alone: please"
            " report the model's name and the splits.",
        )


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
    _check_structure(actual, expected)
    worst = 0.0
    for one, other in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if not isinstance(other, Tensor):
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            return float("inf")
        if other.numel() and not torch.equal(one, other):
            worst = max(worst, *map(_largest, _pieces(one), _pieces(other), repeat(scale)))
    return worst


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor cut along dim 0, so that comparing it needs little memory besides."""
    return tensor.chunk(-(-tensor.numel() // _AT_ONCE)) if tensor.ndim else (tensor,)


def scale_of(expected: Any) -> float:
    """The largest value of some tensors together, at most 1; 1 where all are 0."""
    values = [own for own in _tensors(expected) if own.is_floating_point() or own.is_complex()]
    largest = max((own.detach().abs().max().item() for own in values if own.numel()), default=0.0)
    return min(1.0, largest) or 1.0


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


@torch.no_grad()
def _eval_parity(hne: HierarchicalEnsemble, leaf_of: _Leaf, x: Tensor) -> dict[str, float]:
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
def _train_parity(
    hne: HierarchicalEnsemble, leaf_of: _Leaf, x: Tensor, ungraded: list[str]
) -> dict[str, float]:
    _want_gradients(hne.train())
    hne.zero_grad()
    weights: list[Tensor] = []
    with held(x.dtype):
        logits = hne(x)
    # As the forward pass left them: recomputing activations in the backward pass would once more
    # update the statistics of batch norms.
    updated = {name: own.clone() for name, own in hne.named_buffers(remove_duplicate=False)}
    torch.autograd.backward(_scalar(logits, weights))
    actual = _gradients(hne)
    found = {"leaf_train": 0.0, "buffers": 0.0, "gradient": 0.0}
    graded: set[str] = set()
    expected: dict[str, Tensor] = {}  # where several leaves share a branch
    scales: list[float] = []

    def compare(index: int) -> None:
        network = leaf_of(index).train()
        _want_gradients(network)
        with held(x.dtype):
            own = network(x)
        worst = deviation(_select(logits, index), own, scale_of(own))
        found["leaf_train"] = max(found["leaf_train"], worst)
        worst = _buffer_deviation(hne, updated, index, network)
        found["buffers"] = max(found["buffers"], worst)
        torch.autograd.backward(_scalar(own, [_select(w, index) for w in weights]))
        gradients = _gradients(network)
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


def _scalar(value: Any, weights: list[Tensor]) -> Tensor:
    """A weighted sum of the outputs with gradients; draws the weights where they are missing."""
    outputs = [output for output in _tensors(value) if output.requires_grad]
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


def _want_gradients(network: nn.Module, wanted: bool = True) -> None:
    """Let parameters have gradients or not, but for whole numbers, which can have none."""
    for parameter in network.parameters():
        parameter.requires_grad_(
            wanted and (parameter.is_floating_point() or parameter.is_complex())
        )


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    return {
        key: parameter.grad
        for key, parameter in network.named_parameters(remove_duplicate=False)
        if parameter.grad is not None
    }


def _collect(
    hne: HierarchicalEnsemble, leaf: int, gradients: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """Add a separate network's gradients to the branches that it shares with others."""
    packed = dict(named_tensors(hne))
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
