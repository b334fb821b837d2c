"""One model's proof: every check, as fully as there is memory for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import islice
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from treeify.conversion import checkpoint
from treeify.conversion.api import hierarchicalize, open_up
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.initialize import State, initialization
from treeify.conversion.splits import choose, inner_point, listed, parse
from treeify.engine.preserve import preserve_modes
from treeify.errors import ParityError, SplitError
from treeify.evaluation.cost import count_macs
from treeify.models.architecture import Architecture, example_shape, family, skeleton
from treeify.parity.check_levels import IMAGES, Plan, count_parameters, plans
from treeify.parity.checks import check_shapes
from treeify.parity.deterministic import deterministic
from treeify.parity.fresh_weights import fit_statistics, settle
from treeify.parity.results import FULL, META
from treeify.parity.tolerance import deviation, scale_of
from treeify.parity.verify import verify, verify_outputs
from treeify.tracing.trace import Traced

SEED = 0


Tell = Callable[..., None]


def prove(name: str, splits: str, memory: int, tell: Tell, exhausted: int = 0) -> None:
    """Convert a model and run every check on it: `verify`, and a round trip through a file.

    It is then split once more, by name at a point inside one of its modules, and the outputs of
    that ensemble are checked. What is too large for that is converted both ways as it is usually
    built and fed, without weights, and only its shapes are checked; all checks of numbers are done
    on the same model with fewer blocks, if one fits.

    Args:
        name: of the model.
        splits: as `hierarchicalize` takes them, as text.
        memory: bytes a check may need; decides how the model is checked.
        tell: called with what is found, as fields of a `results.Row`, as soon as it is.
        exhausted: how many ways, the fullest first, took more memory than estimated.

    Raises:
        TreeifyError: the model cannot be built or converted, or a check found a difference.
        SplitError: of these, the model has no such splits.
    """
    torch.manual_seed(SEED)
    usual = skeleton(Architecture(name))
    tell(family=family(name), network=type(usual).__name__, parameters=count_parameters(usual))
    tell(macs=_macs(usual, example_shape(usual, Architecture(name))))
    has_shapes = False
    for plan in islice(plans(name, _leaves(splits), memory), exhausted, None):
        tell(
            how=plan.how,
            memory=memory,
            estimate=plan.estimate,
            least=plan.least,
            arguments=dict(plan.architecture.kwargs),
            input=plan.shape,
        )
        if plan.how != FULL and not has_shapes:
            tell(**convert_without_weights(name, splits))
            has_shapes = True
        if plan.how == META:
            return
        try:
            _check_numbers(plan, splits, tell)
        except SplitError:  # with fewer blocks it may not have what is named
            if plan.how == FULL:
                raise
        else:
            return


def convert_without_weights(name: str, splits: str) -> dict[str, Any]:
    """Convert a model as it is usually built and fed, without weights, and check its shapes.

    Args:
        name: of the model.
        splits: as `hierarchicalize` takes them, as text.

    Returns:
        What the conversion did, as fields of a `treeify.parity.results.Row`.

    Raises:
        TreeifyError: the model cannot be built or converted, or a shape is another.
    """
    architecture = Architecture(name)
    base = skeleton(architecture)
    shape = example_shape(base, architecture)
    x = torch.zeros(IMAGES, *shape, device="meta")
    traced = open_up(base, architecture, x[:1])
    inner = inner_point(traced)
    for wanted in [splits] if inner is None else [[inner.name], splits]:
        hne = HierarchicalEnsemble(traced, choose(traced, wanted), base, architecture)
        check_shapes(hne, x)
    return {**_conversion(hne), "inner_split": None if inner is None else inner.name}


def _conversion(hne: HierarchicalEnsemble) -> dict[str, Any]:
    return {
        "splits": hne.conversion.splits.specs,
        "fanouts": hne.tree.fanouts,
        "packed_share": hne.conversion.packed_share,
        "reasons": hne.conversion.fallbacks,
    }


def _check_numbers(plan: Plan, splits: str, tell: Tell) -> None:
    """All checks of a plan's model, with weights.

    Raises:
        SplitError: the splits named are not there, or not as many as asked for.
    """
    sources = _settled(plan)
    hne = _converted(plan, splits, sources)
    whole = plan.how == FULL
    if whole:
        tell(**_conversion(hne))
    else:
        tell(shallower_splits=hne.conversion.splits.specs)
    x = _images(plan)
    inner = inner_point(hne.traced)
    figures = verify(hne, x)
    checks = ("leaf_eval", "leaf_train", "buffers", "prefix", "gradient")
    deviations = {check: getattr(figures, check) for check in checks}
    tell(deviations=deviations, dtypes=figures.dtypes, ungraded=len(figures.ungraded))
    deviations["round_trip"] = round_trip(hne, x)
    tell(deviations=deviations)
    if inner is not None:
        tell(**{"inner_split" if whole else "shallower_inner_split": inner.name})
        traced = hne.traced
        del hne  # its memory serves the next
        again = _split_inside(traced, inner.name, plan)
        again.fill(sources)
        fit_statistics(again, _images(plan))
        if figures.dtypes["eval"] == "float64":  # float32 was too coarse for these weights
            again, x = again.double(), x.double()
        deviations["inner_split"] = verify_outputs(again, x)
        tell(deviations=deviations)


def round_trip(hne: HierarchicalEnsemble, x: Tensor) -> float:
    """Save an ensemble, load it again and compare.

    Args:
        hne: the ensemble, whose base model treeify can build. Its mode is put back afterwards.
        x: images, `[N, C, H, W]`.

    Returns:
        The largest deviation of the leaf logits, in multiples of the tolerance.

    Raises:
        ParityError: a tensor is not what was saved, or the logits deviate by more than 1.
        CheckpointError: it cannot be saved, or not be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="treeify-") as directory:
        checkpoint.save(hne, directory)
        loaded = checkpoint.load(directory)
    state, again = hne.state_dict(), loaded.state_dict()
    changed = sorted(state.keys() ^ again.keys()) or [
        key for key in state if not torch.equal(state[key], again[key].to(state[key].device))
    ]
    if changed:
        raise ParityError(
            f"{len(changed)} tensors changed between save and load: {', '.join(changed[:3])}.",
            expected="the same tensors",
            next_step="This is a bug in treeify: please report the model's name.",
        )
    with preserve_modes(hne), torch.no_grad(), deterministic(x.dtype):
        expected = hne.eval()(x)
        found = deviation(loaded(x), expected, scale_of(expected))
    if not found <= 1:
        raise ParityError(
            f"logits after save and load are off by {found:.3g} times the tolerance.",
            expected="the same logits from the same weights",
            next_step="This is a bug in treeify: please report the model's name.",
        )
    return found


def _converted(plan: Plan, splits: str, sources: Callable[[int], State]) -> HierarchicalEnsemble:
    architecture = plan.architecture
    example = torch.zeros(1, *plan.shape)
    hne = hierarchicalize(architecture, splits, init="copy", example_input=example)
    hne.fill(sources)
    fit_statistics(hne, _images(plan))
    return hne


def _images(plan: Plan) -> Tensor:
    return torch.rand(IMAGES, *plan.shape)


def _split_inside(traced: Traced, name: str, plan: Plan) -> HierarchicalEnsemble:
    """The same trace split in two at one point."""
    base = plan.architecture.build()
    return HierarchicalEnsemble(traced, choose(traced, [name]), base, plan.architecture)


def _settled(plan: Plan) -> Callable[[int], State]:
    """The weights of networks like the model.

    Every network has its own, all of them at work: else a mistake could leave no trace.
    """
    base = plan.architecture.build()
    settle(base)
    return initialization(base, plan.architecture, "perturb", SEED).sources


def _leaves(splits: str) -> int:
    wanted = listed(splits)
    if isinstance(wanted, int):
        return int(2**wanted)
    return prod(parse(spec)[1] or 2 for spec in wanted)


def _macs(model: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Multiply-accumulates per image of a model on the meta device; None if it does not run."""
    try:
        return count_macs(model, shape)
    except Exception:  # the checks will tell what is wrong with it
        return None
