"""One model verified by its name: every check, as fully as there is memory for."""

import tempfile
from collections.abc import Callable
from itertools import islice
from math import prod
from typing import Any

import torch
from torch import Tensor

from treeify.conversion import checkpoint, saving
from treeify.conversion.assemble import assemble, trace_model
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.initialize import Source, initial_weights
from treeify.conversion.resolve import resolve
from treeify.conversion.splits import inner_point, listed, parse
from treeify.engine.preserve import preserve_modes
from treeify.errors import ParityError, SplitError
from treeify.evaluation.cost import count_macs
from treeify.models.architecture import Architecture
from treeify.models.builders import family
from treeify.models.image_size import example_shape
from treeify.models.skeleton import skeleton
from treeify.parity.check_levels import IMAGES, CheckLevel, check_levels, count_parameters
from treeify.parity.checks import check_shapes
from treeify.parity.deterministic import deterministic
from treeify.parity.fresh_weights import fit_statistics, settle
from treeify.parity.results import FULL, META
from treeify.parity.tolerance import deviation, scale_of
from treeify.parity.verify import verify, verify_outputs

SEED = 0
Tell = Callable[..., None]
# Exports an ensemble and compares; raises what says why that is not possible.
Export = Callable[[HierarchicalEnsemble], object]
# What a row says of exports that did not come to an end, or were not begun.
UNFINISHED, NO_NUMBERS = "not finished", "only shapes were checked"


def verify_model(
    name: str,
    splits: str,
    memory: int,
    tell: Tell,
    exhausted: int = 0,
    *,
    export: Export | None = None,
) -> None:
    """Convert a model and run every check on it: `verify`, and a round trip through a file.

    It is then split once more, by name at a point inside one of its modules, and the outputs of
    that ensemble are checked. What is too large for that is converted both ways as it is usually
    built and fed, without weights, and only its shapes are checked; all checks of numbers are done
    on the same model with fewer blocks, if one fits.

    Args:
        name: of the model.
        splits: as `hierarchicalize` takes them, as text.
        memory: bytes a check may need; decides how fully the model is checked.
        tell: called with fields of a `results.Row`, as soon as their values are known.
        exhausted: how many levels, the fullest first, took more memory than estimated.
        export: called, if given, with the ensemble whose numbers passed; what it raises is raised
            after `export=UNFINISHED` was told, and after all else.

    Raises:
        SplitError: the model has no such splits.
    """
    torch.manual_seed(SEED)
    usual = skeleton(Architecture(name))
    tell(family=family(name), network=type(usual).__name__, parameters=count_parameters(usual))
    tell(macs=usual_macs(name))
    are_shapes_checked = False
    for level in islice(check_levels(name, _leaves(splits), memory), exhausted, None):
        tell(
            how=level.how,
            memory=memory,
            estimate=level.estimate,
            least=level.least,
            arguments=dict(level.architecture.kwargs),
            input=level.shape,
        )
        if level.how != FULL and not are_shapes_checked:
            tell(**_check_without_weights(name, splits))
            are_shapes_checked = True
        if level.how == META:
            if export is not None:
                tell(export=NO_NUMBERS)
            return
        try:
            _check_numbers(level, splits, tell)
        except SplitError:  # with fewer blocks it may not have what is named
            if level.how == FULL:
                raise
        else:
            if export is not None:
                tell(export=UNFINISHED)
                export(_ensemble(level, splits))
                tell(export="")
            return


def _check_without_weights(name: str, splits: str) -> dict[str, Any]:
    """Convert a usual model without weights and check its shapes; gives fields of a `Row`."""
    architecture = Architecture(name)
    base = skeleton(architecture)
    x = torch.zeros(IMAGES, *example_shape(base, architecture), device="meta")
    traced = trace_model(base, architecture, x[:1])
    inner = inner_point(traced)
    for specs in [splits] if inner is None else [[inner.name], splits]:
        hne = assemble(base, architecture, specs, traced=traced)
        check_shapes(hne, x)
    return {**_conversion(hne), "inner_split": None if inner is None else inner.name}


def _conversion(hne: HierarchicalEnsemble) -> dict[str, Any]:
    return {
        "splits": hne.conversion.splits.specs,
        "fanouts": hne.tree.fanouts,
        "packed_fraction": hne.conversion.packed_fraction,
        "reasons": hne.conversion.fallbacks,
    }


def _ensemble(level: CheckLevel, splits: str, source: Source | None = None) -> HierarchicalEnsemble:
    """A level's model as an ensemble, with weights; SplitError if it has no such splits."""
    architecture, example = level.architecture, torch.zeros(1, *level.shape)
    source = source or _settled(architecture)
    hne = assemble(resolve(architecture)[0], architecture, splits, source, example_input=example)
    fit_statistics(hne, torch.rand(IMAGES, *level.shape))
    return hne


def _check_numbers(level: CheckLevel, splits: str, tell: Tell) -> None:
    """All checks of a level's model, with weights; SplitError if it has no such splits."""
    architecture = level.architecture
    source = _settled(architecture)
    hne = _ensemble(level, splits, source)
    is_full = level.how == FULL
    tell(**_conversion(hne) if is_full else {"shallower_splits": hne.conversion.splits.specs})
    x = torch.rand(IMAGES, *level.shape)
    traced = hne.traced
    inner = inner_point(traced)
    figures = verify(hne, x)
    checks = ("leaf_eval", "leaf_train", "buffers", "prefix", "gradient")
    deviations = {check: getattr(figures, check) for check in checks}
    tell(deviations=deviations, dtypes=figures.dtypes, ungraded=len(figures.ungraded))
    deviations["round_trip"] = round_trip(hne, x)
    tell(deviations=deviations)
    if inner is not None:
        tell(**{"inner_split" if is_full else "shallower_inner_split": inner.name})
        del hne  # its memory serves the next
        hne = assemble(architecture.build(), architecture, [inner.name], source, traced=traced)
        fit_statistics(hne, torch.rand(IMAGES, *level.shape))
        if figures.dtypes["eval"] == "float64":  # float32 was too coarse for these weights
            hne, x = hne.double(), x.double()
        deviations["inner_split"] = verify_outputs(hne, x)
        tell(deviations=deviations)


def _settled(architecture: Architecture) -> Source:
    """Weights of networks like the model, all at work: else a mistake could leave no trace."""
    base = architecture.build()
    settle(base)
    return initial_weights(base, architecture, "perturb", SEED)


def round_trip(hne: HierarchicalEnsemble, x: Tensor) -> float:
    """Save an ensemble whose base model treeify can build, load it again and compare.

    Returns:
        The largest deviation of the leaf logits, in multiples of the tolerance.

    Raises:
        ParityError: a tensor is not what was saved, or the logits deviate by more than 1.
    """
    with tempfile.TemporaryDirectory(prefix="treeify-") as directory:
        saving.save(hne, directory)
        loaded = checkpoint.load(directory, trust=True)  # it was written just now
    saved_state, state = hne.state_dict(), loaded.state_dict()
    changed = sorted(saved_state.keys() ^ state.keys()) or [
        key
        for key, tensor in saved_state.items()
        if not torch.equal(tensor, state[key].to(tensor.device))
    ]
    if changed:
        raise ParityError(
            f"{len(changed)} tensors changed between save and load: {', '.join(changed[:3])}.",
            expected="the same tensors",
            next_step="This is a bug in treeify: please report the model's name.",
        )
    with preserve_modes(hne), torch.no_grad(), deterministic(x.dtype):
        expected = hne.eval()(x)
        worst = deviation(loaded(x), expected, scale_of(expected))
    if not worst <= 1:
        raise ParityError(
            f"logits after save and load are off by {worst:.3g} times the tolerance.",
            expected="the same logits from the same weights",
            next_step="This is a bug in treeify: please report the model's name.",
        )
    return worst


def _leaves(splits: str) -> int:
    specs = listed(splits)
    if isinstance(specs, int):
        return int(2**specs)
    return prod(parse(spec)[1] or 2 for spec in specs)


def usual_macs(name: str) -> int | None:
    """MACs per image of a model as it is usually built and fed; None if it does not run."""
    architecture = Architecture(name)
    try:
        model = skeleton(architecture)
        return count_macs(model, example_shape(model, architecture))
    except Exception:  # the checks will tell what is wrong with it
        return None
