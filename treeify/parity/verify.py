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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.errors import ParityError
from treeify.parity.checks import (
    Leaf,
    eval_parity,
    gradients_of,
    scalar,
    train_parity,
    want_gradients,
)
from treeify.parity.deterministic import held
from treeify.parity.fresh_weights import fit_statistics, idle, settle
from treeify.parity.tolerance import ATOL, RTOL, deviation, scale_of

# So many times its own rounding a network's outputs may be off in float32 where float64 has to
# decide. Gradients may be off by any finite number: those of ReLU jump where rounding changes a
# sign.
_AMPLIFIED = {False: 100.0, True: math.inf}

_Check = Callable[[HierarchicalEnsemble, Leaf, Tensor], dict[str, float]]


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
        evaluated = [_decide(eval_parity, hne, x, training=False)]
        with _at_work(hne, x) as checked:
            if checked is not hne:
                evaluated.append(_decide(eval_parity, checked, x, training=False))
            check = partial(train_parity, ungraded=ungraded)
            trained, train_dtype = _decide(check, checked, x, training=True)
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
    found, _ = _decide(eval_parity, hne, x, training=False)
    return max(found.values())


@contextmanager
def _at_work(hne: HierarchicalEnsemble, x: Tensor) -> Iterator[HierarchicalEnsemble]:
    """The ensemble, or a copy of it where fresh weights would hide mistakes."""
    fresh = idle(hne)
    if not fresh:
        yield hne
        return
    with _copied(hne) as own:
        settle(own)
        if any(name.endswith("running_var") for name, _ in fresh):
            fit_statistics(own, x)
        yield own


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
    check: _Check, hne: HierarchicalEnsemble, leaf_of: Leaf, x: Tensor
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


def _is_random(leaf_of: Leaf, x: Tensor, *, training: bool) -> bool:
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
    want_gradients(network.train(training), training)
    with torch.set_grad_enabled(training), held(x.dtype):
        output = network(x)
    if training:
        torch.autograd.backward(scalar(output, weights))
    return output, gradients_of(network)


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
