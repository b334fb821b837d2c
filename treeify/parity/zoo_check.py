"""One model's proof: how it can be checked in the memory there is, then every check.

A full check holds the ensemble several times over, some of them in float64. What does not fit is
converted on the meta device, where tensors have shapes and no values, and its numbers are checked
with fewer blocks: spare ones left out, or as many as its builder is asked for.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from treeify.conversion import checkpoint
from treeify.conversion.api import hierarchicalize, open_up
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.initialize import State, initialization
from treeify.conversion.splits import choose, inner_point, listed, parse
from treeify.engine.preserve import preserve_modes
from treeify.errors import ModelError, ParityError, SplitError
from treeify.evaluation.cost import count_macs
from treeify.models import shallow
from treeify.models.architecture import Architecture, example_shape, family, resized, skeleton
from treeify.parity.checks import check_shapes
from treeify.parity.deterministic import deterministic
from treeify.parity.fresh_weights import fit_statistics, settle
from treeify.parity.results import FULL, META, REDUCED
from treeify.parity.tolerance import deviation, scale_of
from treeify.parity.verify import verify, verify_outputs
from treeify.tracing.trace import Traced

CLASSES = 10
IMAGES = 2  # the fewest that have batch statistics
SEED = 0

# Sides of the images tried, smallest first. At 32 the last layers of many networks are a single
# pixel, and batch statistics over two numbers say little.
_SIDES = (64, 96, 128, 160, 192, 224, 256)
# How many numbers say enough: those of 2 images of 2 by 2 pixels.
_ENOUGH = 8
# What timm's builders call the number of blocks, for models that count on it, and small ones; of
# stages the most that run.
_SHALLOWER: tuple[dict[str, Any], ...] = (
    *({"depth": 4}, {"depth": 2}, {"depth": 1}),
    *({"depths": [1] * stages} for stages in (5, 4, 3)),
    *({"layers": [1] * stages} for stages in (4, 3)),
    *({"num_blocks": 4}, {"num_blocks": 2}),
    {"stages": [1, 1, 1, 1]},
)
# Blocks of one shape in a row.
_IN_A_ROW = (4, 2, 1)
# What Python and the libraries take before there is a model.
_BASE_BYTES = 2**30

Tell = Callable[..., None]
# What is left out, the shallower model, and its skeleton.
_Fewer = tuple[str, Architecture, nn.Module]


@dataclass(frozen=True)
class Plan:
    """How a model is checked.

    Args:
        how: `full`, `reduced:` with the arguments that make it shallower, or `meta`: not with
            numbers.
        architecture: what is built.
        shape: of one image, `(C, H, W)`.
        estimate: bytes the check of the full model may need.
        least: bytes that of the shallowest model may need; None where numbers are checked.
    """

    how: str
    architecture: Architecture
    shape: tuple[int, ...]
    estimate: int
    least: int | None = None


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
    tell(family=family(name), network=type(usual).__name__, parameters=_parameters(usual))
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


def plans(name: str, leaves: int, memory: int) -> Iterator[Plan]:
    """The ways to check a model, found by building it without weights.

    Args:
        name: of the model.
        leaves: of the ensemble.
        memory: bytes a check may need.

    Yields:
        Those estimated to need no more memory, the fullest first; the meta device is the last.

    Raises:
        ModelError: the model cannot be built.
    """
    options: dict[str, Any] = {} if ":" in name else {"num_classes": CLASSES}
    full = _smallest_input(Architecture(name, options))
    smallest = skeleton(full[0])
    estimate = estimated_bytes(smallest, leaves)
    if estimate <= memory:
        yield Plan(FULL, *full, estimate)
    for how, architecture, fewer in chain(_cut(*full), _built_shallower(*full)):
        if _parameters(fewer) < _parameters(smallest):
            smallest = fewer
            if estimated_bytes(fewer, leaves) <= memory:
                yield Plan(f"{REDUCED}:{how}", architecture, full[1], estimate)
    usual = Architecture(name)
    shape = example_shape(skeleton(usual), usual)
    yield Plan(META, usual, shape, estimate, estimated_bytes(smallest, leaves))


def _cut(architecture: Architecture, shape: tuple[int, ...]) -> Iterator[_Fewer]:
    """The model without the spare ones of its blocks, the most blocks first."""
    for blocks in _IN_A_ROW:
        cut = shallow.cut(architecture, blocks)
        if (model := _running(cut, shape)) is not None:
            yield f"blocks={blocks}", cut, model


def _built_shallower(architecture: Architecture, shape: tuple[int, ...]) -> Iterator[_Fewer]:
    """Fewer blocks as far as the builder takes their number, the most first."""
    staged = set()
    for fewer in _SHALLOWER:
        (key, value) = next(iter(fewer.items()))
        if key in staged:
            continue
        built = Architecture(architecture.name, {**architecture.kwargs, **fewer})
        if (model := _running(built, shape)) is not None:
            if isinstance(value, list):
                staged.add(key)  # with fewer stages it would be another model
            yield f"{key}={value}", built, model


def _running(architecture: Architecture, shape: tuple[int, ...]) -> nn.Module | None:
    """The skeleton of a model, if it can be built and takes images of that shape."""
    try:
        model = skeleton(architecture)
    except ModelError:
        return None
    return None if _starved(model, shape) is None else model


def estimated_bytes(model: nn.Module, leaves: int) -> int:
    """What the check of a model may hold at once.

    Per parameter and leaf: the ensemble in float32, the copy that is checked, and its gradients or
    what fused layers prepare; beside them one network with gradients and its weights once more. The
    copy is in float64 if the model has batch norms, under which float32 is often too coarse, and
    else seldom. Activations are small at the sizes checked.
    """
    number = 8 if any(isinstance(own, _BatchNorm) for own in model.modules()) else 4
    return _BASE_BYTES + _parameters(model) * (leaves * (4 + 2 * number) + 3 * number)


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


def _smallest_input(architecture: Architecture) -> tuple[Architecture, tuple[int, ...]]:
    """The architecture, and the smallest square image that both its modes run on.

    Of those below the usual size, one where the fewest batch norms have too little to average.
    """
    model = skeleton(architecture)
    usual = example_shape(model, architecture)
    found, fewest = (architecture, usual), math.inf
    for side in (side for side in _SIDES if side < min(usual[1:])):
        try:
            fitting = resized(architecture, model, side)
            candidate = model if fitting is architecture else skeleton(fitting)
        except ModelError:
            continue
        shape = (usual[0], side, side)
        if example_shape(candidate, fitting)[0] != usual[0]:
            continue
        starved = _starved(candidate, shape)
        if starved is not None and starved < fewest:
            found, fewest = (fitting, shape), starved
        if starved == 0:
            break
    return found


def _starved(model: nn.Module, shape: Sequence[int]) -> int | None:
    """How many calls of batch norms take the mean of too few numbers, for images of a shape.

    None if the model, on the meta device, does not take them in both modes.
    """
    x = torch.zeros(IMAGES, *shape, device="meta")
    counts: list[float] = []

    def count(_: nn.Module, args: tuple[Any, ...]) -> None:
        counts.append(args[0].numel() / args[0].shape[1])

    norms = [own for own in model.modules() if isinstance(own, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(count) for norm in norms]
    try:
        for mode in (False, True):
            with torch.no_grad():
                model.train(mode)(x)
    except Exception:  # whatever a library raises for a size it does not take
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return sum(one < _ENOUGH for one in counts)


def _macs(model: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Multiply-accumulates per image of a model on the meta device; None if it does not run."""
    try:
        return count_macs(model, shape)
    except Exception:  # the checks will tell what is wrong with it
        return None


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
