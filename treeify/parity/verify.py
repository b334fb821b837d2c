"""Proof that a conversion is right: every leaf against the untouched base architecture.

The oracle is `hne.leaf(i)`: the base model's own code with one leaf's weights. It owes packing
nothing.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from treeify.conversion.ensemble import HierarchicalEnsemble, require_ensemble
from treeify.errors import ParityError
from treeify.parity.checks import LeafOf, Pass, check_outputs, check_training, run_pass
from treeify.parity.fresh_weights import fit_statistics, idle_tensors, settle
from treeify.parity.tolerance import ATOL, RTOL, deviation, scale_of

# So many times its own rounding a network's outputs may be off in float32 where float64 has to
# decide. Gradients may be off by any finite number: those of ReLU jump where rounding changes a
# sign.
_AMPLIFIED = {False: 100.0, True: math.inf}

_Check = Callable[[HierarchicalEnsemble, LeafOf, Tensor], dict[str, float]]


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


def verify(hne: HierarchicalEnsemble, x: Tensor) -> Figures:
    """Check leaf, prefix and gradient parity against the untouched base architecture.

    Fresh weights hide mistakes, so where there are some a copy is checked too in which they have
    values as training gives them: see `fresh_weights`. Of fresh weights themselves only evaluation
    mode is checked. Trained weights stay as they are.
    Random draws give their mean (see `deterministic.MeanNoise`): they differ in the ensemble and in
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
    require_ensemble(hne)
    without_gradient: list[str] = []
    with torch.random.fork_rng(devices=[]):
        evaluated = [_decide(check_outputs, hne, x, training=False)]
        with _with_settled_weights(hne, x) as settled:
            if settled is not hne:
                evaluated.append(_decide(check_outputs, settled, x, training=False))
            check = partial(check_training, without_gradient=without_gradient)
            trained, train_dtype = _decide(check, settled, x, training=True)
    return Figures(
        **{
            name: max(deviations[name] for deviations, _ in evaluated)
            for name in ("leaf_eval", "prefix")
        },
        **trained,
        ungraded=tuple(dict.fromkeys(without_gradient)),
        dtypes={"eval": max(dtype for _, dtype in evaluated), "train": train_dtype},
    )


def verify_outputs(hne: HierarchicalEnsemble, x: Tensor) -> float:
    """Check leaf and prefix parity in evaluation mode only: see `verify`.

    Returns:
        The largest deviation, in multiples of the tolerance.
    """
    deviations, _ = _decide(check_outputs, hne, x, training=False)
    return max(deviations.values())


@contextmanager
def _with_settled_weights(hne: HierarchicalEnsemble, x: Tensor) -> Iterator[HierarchicalEnsemble]:
    """The ensemble, or a copy with other weights where fresh ones would hide mistakes."""
    idle = idle_tensors(hne)
    if not idle:
        yield hne
        return
    with _copied(hne) as settled:
        settle(settled)
        if any(name.endswith("running_var") for name, _ in idle):
            fit_statistics(settled, x)
        yield settled


def _decide(
    check: _Check, hne: HierarchicalEnsemble, x: Tensor, *, training: bool
) -> tuple[dict[str, float], str]:
    """Run a check in the ensemble's precision and, if rounding is too coarse, in float64.

    Returned are its figures and the precision they were decided in.

    Raises:
        ParityError: a figure exceeds 1 in float64 too, the model's own values are random, or the
            precision of the ensemble is off by more than its rounding explains.
    """
    hne.check_input(x)
    text = ""
    if x.dtype != torch.float64:
        deviations = _on_a_copy(check, hne, hne.leaf, x)
        coarse = max(deviations.values())
        if coarse <= 1:
            return deviations, str(x.dtype).removeprefix("torch.")
        text = f" ({coarse:.3g} times in {x.dtype})"

    def leaf_of(index: int) -> nn.Module:
        return hne.leaf(index).double()

    deviations = _on_a_copy(check, hne, leaf_of, x.double())
    worst = max(deviations, key=lambda name: deviations[name])
    if deviations[worst] <= 1:
        if text:
            _check_rounding(hne.leaf(0), x, coarse, training=training)
        return deviations, "float64"
    text = f"{worst} parity is off by {deviations[worst]:.3g} times the tolerance in float64{text}"
    if _is_random(leaf_of, x.double(), training=training):
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
    check: _Check, hne: HierarchicalEnsemble, leaf_of: LeafOf, x: Tensor
) -> dict[str, float]:
    """Run a check on a copy of the ensemble in the images' precision."""
    with _copied(hne) as copied:
        return check(copied.double() if x.dtype == torch.float64 else copied, leaf_of, x)


@contextmanager
def _copied(hne: HierarchicalEnsemble) -> Iterator[HierarchicalEnsemble]:
    """A copy whose memory is freed in the end."""
    copied = copy.deepcopy(hne)
    try:
        yield copied
    finally:
        # Graphs refer to themselves: what they hold would stay through the next check.
        copied.train().to("meta")


def _is_random(leaf_of: LeafOf, x: Tensor, *, training: bool) -> bool:
    """Whether a network gives other values or gradients each time: then there is no comparing them.

    Gradients alone are random where activations are recomputed: draws in backward passes are not
    replaced by their mean.
    """
    weights: list[Tensor] = []
    passes = (run_pass(leaf_of(0), x, weights, training=training) for _ in range(2))
    return _deviation_of_passes(*passes) > 1


def _check_rounding(network: nn.Module, x: Tensor, coarse: float, *, training: bool) -> None:
    """Refuse a deviation that float64 does not have and one network's rounding does not explain."""
    rounding = _rounding(network, x, training=training)
    allowed = _AMPLIFIED[training] * max(1.0, rounding)
    if not (coarse <= allowed and (math.isfinite(coarse) or not math.isfinite(rounding))):
        raise ParityError(
            f"parity is off by {coarse:.3g} times the tolerance in {x.dtype}, though not in"
            " float64.",
            expected=f"at most {_AMPLIFIED[training]} times what rounding does to one network"
            f" ({rounding:.3g})",
            next_step="This is a bug in treeify, in what runs in that precision alone: please"
            " report the model's name and the splits.",
        )


def _rounding(network: nn.Module, x: Tensor, *, training: bool) -> float:
    """How many times the tolerance a network's values and gradients are from those in float64."""
    weights: list[Tensor] = []
    expected = run_pass(copy.deepcopy(network).double(), x.double(), weights, training=training)
    weights = [weight.to(x.dtype) for weight in weights]
    return _deviation_of_passes(run_pass(network, x, weights, training=training), expected)


def _deviation_of_passes(actual: Pass, expected: Pass) -> float:
    """Of outputs and of gradients, each by their own scale."""
    pairs = ((actual.output, expected.output), (actual.gradients, expected.gradients))
    return max(deviation(_widened(one), other, scale_of(other)) for one, other in pairs)


def _widened(value: Any) -> Any:
    """Floating-point tensors in float64."""
    return tree_map_only(
        Tensor, lambda out: out.double() if out.is_floating_point() else out, value
    )
