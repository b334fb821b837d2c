"""Every public call with valid arguments, and what any argument of it may be.

A `Call` is a function of keyword arguments, each with a predicate that says whether a value is
right. `check` replaces some of them by anything: a call with right values only has to answer, any
other has to raise a `TreeifyError` that says what was expected.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import small
import torch
from torch import Tensor, nn

import treeify
from treeify import data, losses
from treeify.anytime.confidence import budget
from treeify.conversion.ensemble import Measurements
from treeify.conversion.initialize import INITS
from treeify.errors import TreeifyError
from treeify.evaluation import comparison, cost, metrics
from treeify.evaluation.halves import Halves
from treeify.tree import Span, Tree

LEAVES, CLASSES, IMAGES = 6, small.CLASSES, 4
SHAPE = (IMAGES, LEAVES, CLASSES)
TREE = Tree((2, 3))


def is_int(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return type(value) is int and least <= value <= most


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    plain = isinstance(value, int | float) and type(value) is not bool and least <= value <= most
    return plain and (isinstance(value, float) or abs(value) < 2**63)


def is_tensor(value: Any, shape: tuple, *dtypes: torch.dtype) -> bool:
    plain = isinstance(value, Tensor) and value.layout is torch.strided
    return (
        plain
        and value.device.type == "cpu"
        and tuple(value.shape) == shape
        and value.dtype in dtypes
    )


def is_size(value: Any) -> bool:
    return value is None or is_int(value, 1, LEAVES)


def is_same(value: Any, expected: Any) -> bool:
    """Equal and of the same type: arrays compare element by element."""
    return type(value) is type(expected) and value == expected


def is_level(value: Any) -> bool:
    return is_int(value, 0, 2)


def is_span(value: Any) -> bool:
    return isinstance(value, Span) and 0 <= value.start <= value.stop <= LEAVES


def is_logits(value: Any) -> bool:
    return is_tensor(value, SHAPE, *FLOATS)


def is_target(value: Any) -> bool:
    if is_tensor(value, (IMAGES,), torch.int64, torch.uint8):
        return bool(((value >= 0) & (value < CLASSES)).all())
    mixed = is_tensor(value, (IMAGES, CLASSES), *FLOATS)
    return mixed and bool((value >= 0).all() and ((value.double().sum(1) - 1).abs() < 1e-3).all())


def is_classes(value: Any) -> bool:
    return is_target(value) and not value.is_floating_point()


def is_images(value: Any, least: int = 0) -> bool:
    """Of the small network: three channels, any height and width."""
    dense = isinstance(value, Tensor) and value.layout is torch.strided and value.ndim == 4
    right = dense and value.dtype == torch.float32 and value.shape[1] == 3
    return right and value.device.type == "cpu" and 0 not in value.shape[least == 0 :]


def is_nothing(value: Any) -> bool:
    """Something to go through, in which there is nothing."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0 and len(value) == 0
    return isinstance(value, SEVERAL) and not value


def is_modules(value: Any) -> bool:
    """Nothing, or the path of the whole ensemble: others are not drawn."""
    return is_nothing(value) or (isinstance(value, SEVERAL) and all(path == "" for path in value))


def is_no_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and is_nothing(value)


def is_callback(value: Any) -> bool:
    return value is None or callable(value)


def is_flag(value: Any) -> bool:
    return type(value) is bool


def is_sizes(value: Any) -> bool:
    """Increasing numbers of leaves."""
    if value is None or is_nothing(value):
        return True
    listed = isinstance(value, list | tuple | set | dict)
    rising = listed and all(is_int(size, 1, LEAVES) for size in value)
    return rising and list(value) == sorted(set(value))


def is_confidence(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, list | tuple):
        return len(value) == 2 and all(is_number(threshold, 0) for threshold in value)
    return is_number(value, 0)


def is_chosen(value: Any) -> bool:
    """Positions of images in a batch, or a mask."""
    if isinstance(value, list | tuple | range | np.ndarray):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            return False
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return False
    if value.dtype == torch.bool:
        return tuple(value.shape) in ((IMAGES,), (0,))
    if value.shape == (0,):
        return True
    whole = not (value.is_floating_point() or value.is_complex())
    return value.ndim == 1 and whole and bool(((value >= 0) & (value < IMAGES)).all())


def is_splits(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() in tuple("012345") or value in ("", "stage1", "stage2:3")
    if isinstance(value, list | tuple):
        return list(value) in ([], ["stage1"], ["stage1", "stage2:3"])
    return is_int(value, 0, 5)  # as many as the small network has, one behind the other


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SOFT = torch.softmax(torch.linspace(-1, 1, IMAGES * CLASSES).view(IMAGES, CLASSES), 1)
_LABELS = torch.arange(IMAGES)


@cache
def ensemble() -> treeify.HierarchicalEnsemble:
    return small.ensemble()


def _drop(session_of: Callable[[], Any], **arguments: Any) -> Any:
    session = session_of()
    session.advance(1)
    session.select(**arguments)
    return session.advance()


@cache
def _calibrated() -> treeify.HierarchicalEnsemble:
    hne = small.ensemble()
    for count in (1, IMAGES):
        hne.calibrate(small.images(count), repeats=2)
    return hne


def _predicted(**arguments: Any) -> Any:
    return _calibrated().predict(**arguments)


def _set(name: str) -> Callable[[Any], None]:
    # Not by assignment, which makes a module a child.
    return lambda value: getattr(treeify.HierarchicalEnsemble, name).fset(small_copy(), value)


@cache
def small_copy() -> treeify.HierarchicalEnsemble:
    return small.ensemble()


def _convert(**arguments: Any) -> treeify.HierarchicalEnsemble:
    return treeify.hierarchicalize(
        small.SmallNet(), **{"init": "copy", "example_input": small.EXAMPLE, **arguments}
    )


@dataclass(frozen=True)
class Call:
    """A function, valid arguments of it, and what each may be."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    right: Mapping[str, Callable[[Any], bool]]
    # Errors that right values may get all the same, e.g. of two limits that exclude one another.
    allowed: str = "^$"


def _losses() -> dict[str, Call]:
    plain = {"logits": is_logits, "target": is_target, "tree": lambda value: is_same(value, TREE)}
    options = {
        "alpha": lambda value: is_number(value, 0, 1),
        "temperature": lambda value: is_number(value, 1e-300, 1e300),
        "scale_by_t2": is_flag,
    }
    calls = {}
    for name in ("independent", "structured", "co_distillation", "hierarchical_distillation"):
        right = plain | (options if "distillation" in name else {})
        valid = {"logits": torch.randn(SHAPE), "target": _LABELS, "tree": TREE}
        calls[f"losses.{name}"] = Call(losses.get(name), valid, right)
    calls["losses.from_teacher"] = Call(
        losses.from_teacher,
        {"logits": torch.randn(SHAPE), "teacher": torch.randn(IMAGES, CLASSES), "tree": TREE},
        {
            "logits": is_logits,
            "teacher": lambda value: is_tensor(value, (IMAGES, CLASSES), *FLOATS),
            "tree": plain["tree"],
            "temperature": options["temperature"],
        },
    )
    calls["losses.nested_logits"] = Call(
        losses.nested_logits,
        {"logits": torch.randn(SHAPE), "tree": TREE},
        {"logits": is_logits, "tree": plain["tree"]},
    )
    return calls


def _trees() -> dict[str, Call]:
    level, leaves = {"level": is_level}, {"leaves": lambda value: is_int(value, 1, LEAVES)}
    leaf = {"leaf": lambda value: is_int(value, 0, LEAVES - 1)}

    def is_fanouts(value: Any) -> bool:
        if isinstance(value, Tensor | np.ndarray):
            return is_nothing(value)
        whole = isinstance(value, SEVERAL) and all(is_int(fanout, 2) for fanout in value)
        return whole and math.prod(value) <= 2**31

    return {
        "Tree": Call(Tree, {"fanouts": (2, 3)}, {"fanouts": is_fanouts}),
        "Tree.leaves_below": Call(TREE.leaves_below, {"level": 1}, level),
        "Tree.branch_count": Call(TREE.branch_count, {"leaves": 2}, leaves),
        "Tree.check_size": Call(TREE.check_size, {"leaves": 2}, leaves),
        "Tree.first": Call(TREE.first, {"leaves": 3}, leaves, "equally many children"),
        "Tree.check_leaf": Call(TREE.check_leaf, {"leaf": 2}, leaf),
        "Tree.path": Call(TREE.path, {"leaf": 2}, leaf),
        "Tree.pieces": Call(TREE.pieces, {"leaves": Span(0, 4)}, {"leaves": is_span}),
        "Tree.span": Call(
            TREE.span, {"level": 1, "leaves": Span(0, 4)}, {**level, "leaves": is_span}
        ),
    }


def _ensembles() -> dict[str, Call]:
    hne, x = ensemble(), small.images(IMAGES)
    images = {"x": is_images}
    size = {"leaves": is_size}
    key = {"key": lambda value: isinstance(value, str) and value in hne.state_dict()}

    def session() -> Any:
        return hne.session(x)

    return {
        "hne": Call(hne, {"x": x}, images | size),
        "hne in training": Call(
            lambda **arguments: small_copy().train()(**arguments),
            {"x": x},
            {"x": lambda value: is_images(value, 1)} | size,
            "more than 1 value",
        ),
        "hne.predict": Call(hne.predict, {"x": x}, images | size),
        "hne.predict by observing": Call(
            hne.predict, {"x": x, "observe": print}, images | size | {"observe": is_callback}
        ),
        "hne.predict by deadline": Call(
            _predicted,
            {"x": x, "deadline": 1.0},
            {"deadline": lambda value: value is None or is_number(value, 5e-324)},
        ),
        "hne.predict by confidence": Call(
            hne.predict, {"x": x, "confidence": 0.5}, images | {"confidence": is_confidence}
        ),
        "hne.session": Call(hne.session, {"x": x}, images),
        "hne.anytime": Call(
            lambda **arguments: list(hne.anytime(**arguments)),
            {"x": x},
            images | {"sizes": is_sizes},
        ),
        "session.advance": Call(
            lambda **arguments: session().advance(**arguments), {}, {"to": is_size}
        ),
        "session.select": Call(
            lambda **arguments: _drop(session, **arguments),
            {"images": [0]},
            {"images": is_chosen},
        ),
        "hne.leaf": Call(
            hne.leaf, {"index": 1}, {"index": lambda value: is_int(value, 0, LEAVES - 1)}
        ),
        "hne.sub_ensemble": Call(
            hne.sub_ensemble,
            {"leaves": 3},
            {"leaves": lambda value: is_int(value, 1, LEAVES)},
            "equally many children",
        ),
        "hne.part": Call(
            hne.part,
            {"key": "head.bias", "leaf": 1, "packed": hne.head.bias},
            {
                "key": lambda value: is_same(value, "head.bias"),
                "leaf": lambda value: is_int(value, 0, LEAVES - 1),
                "packed": lambda value: value is hne.head.bias,
            },
        ),
        "hne.branches_of": Call(hne.branches_of, {"key": "head.bias"}, key),
        "hne.count_macs": Call(hne.count_macs, {}, size),
        "hne.count_parameters": Call(hne.count_parameters, {}, size),
        "hne.example_images": Call(
            hne.example_images, {"count": 2}, {"count": lambda value: is_int(value, 0, 10**6)}
        ),
        "hne.plan": Call(hne.plan, {"x": x}, {"x": lambda value: _is_batch(value)}),
        "hne.run": Call(
            hne.run,
            {"x": x, "leaves": 2, "plan": hne.plan(x)},
            {"leaves": lambda value: is_int(value, 1, LEAVES), "plan": lambda value: False},
        ),
        "hne.check_input": Call(hne.check_input, {"x": x}, images),
        "hne.keep_evaluating": Call(
            lambda **arguments: small_copy().keep_evaluating(**arguments),
            {"paths": ["stem.1"]},
            {"paths": is_modules},
        ),
        "hne.fill": Call(hne.fill, {"source": None}, {"source": lambda value: False}),
        "hne.execution": Call(
            _set("execution"),
            {"value": "auto"},
            {"value": lambda value: isinstance(value, str) and value == "auto"},
        ),
        "hne.measurements": Call(
            _set("measurements"),
            {"value": Measurements()},
            {"value": lambda value: isinstance(value, Measurements)},
        ),
        # One after the other: many rounds without end would be right.
        "hne.calibrate rounds": Call(
            lambda **arguments: small_copy().eval().calibrate(**arguments),
            {"x": x[:1], "repeats": 2, "budget": 0.0},
            {"repeats": lambda value: is_int(value, 2)},
        ),
        "hne.calibrate seconds": Call(
            lambda **arguments: small_copy().eval().calibrate(**arguments),
            {"x": x[:1], "repeats": 2},
            {"budget": lambda value: is_number(value, 0)},
        ),
        "hne.tune": Call(
            lambda **arguments: small_copy().tune(**arguments),
            {"x": x[:1], "repeats": 1, "budget": 0.0},
            {
                "training": lambda value: value is None or is_flag(value),
                "budget": lambda value: is_number(value, 0),
            },
        ),
    }


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == 3


def _is_range(value: Any) -> bool:
    """Numbers of leaves that a plan may be asked for."""
    if isinstance(value, list | tuple):
        ordered = len(value) == 2 and all(is_int(end, 2, 1024) for end in value)
        return ordered and value[0] <= value[1]
    return is_int(value, 2, 1024)


def _is_limit(value: Any) -> bool:
    return value is None or (is_number(value) and 0 < value < math.inf)


def _conversions() -> dict[str, Call]:
    return {
        "hierarchicalize": Call(
            _convert,
            {"splits": 1},
            {
                "splits": is_splits,
                "fanout": lambda value: is_int(value, 2, 2**16),
                "init": lambda value: value is None or (isinstance(value, str) and value in INITS),
                "seed": lambda value: is_int(value, 0, 2**63 - 1),
                "example_input": lambda value: value is None or is_images(value, 1),
                "weights": lambda value: value is None,
            },
        ),
        "hierarchicalize a model": Call(
            treeify.hierarchicalize,
            {"model": small.SmallNet(), "example_input": small.EXAMPLE, "splits": 1},
            {"model": lambda value: isinstance(value, small.SmallNet)},
        ),
        "plan": Call(
            treeify.plan,
            {"model": small.SmallNet(), "example_input": small.EXAMPLE, "leaves": 4},
            {
                "model": lambda value: isinstance(value, small.SmallNet),
                "example_input": lambda value: value is None or is_images(value, 1),
                "leaves": _is_range,
                "fanouts": lambda value: (
                    isinstance(value, SEVERAL) and all(is_int(each, 2, 1024) for each in value)
                ),
                "pick": lambda value: is_int(value, 1),
                "all_points": is_flag,
                "max_params": _is_limit,
                "max_mb": _is_limit,
                "first_macs": _is_limit,
            },
            "nearest possible|too few split points|no tree has|one budget|no fanouts|pick is no",
        ),
        "pack": Call(
            treeify.pack,
            {
                "models": [small.SmallNet(), small.SmallNet()],
                "splits": 1,
                "example_input": small.EXAMPLE,
            },
            {
                "models": lambda value: False,
                "splits": lambda value: (
                    is_splits(value) and value in (1, "1", "stage1", ["stage1"])
                ),
                "architecture": lambda value: value is None or isinstance(value, small.SmallNet),
            },
            "no such leaves|cannot be the leaves",
        ),
        "load": Call(treeify.load, {"path": Path("no such place")}, {"path": lambda value: False}),
        "push": Call(
            treeify.push,
            {"directory": Path("no such place"), "repository": "org/name", "dry_run": True},
            dict.fromkeys(
                [
                    *("directory", "repository", "extras", "as_timm", "data", "licence"),
                    *("base_model", "private", "revision", "create_pr", "out", "trust", "observe"),
                ],
                lambda value: False,  # there is nothing to push
            ),
        ),
        "save": Call(
            treeify.save,
            {"hne": ensemble(), "path": Path("setup.cfg/below")},
            {"hne": lambda value: False},
        ),
        "verify": Call(
            treeify.verify,
            {"hne": ensemble(), "x": small.images()},
            {"hne": lambda value: False, "x": lambda value: False},
        ),
    }


def _data() -> dict[str, Call]:
    """Data sets that are nowhere, of whatever name."""
    nowhere = {"root": lambda value: False}

    def is_side(value: Any) -> bool:
        return is_int(value, 1, 2**15)

    def is_sides(value: Any) -> bool:
        pair = isinstance(value, tuple | list) and len(value) == 2
        return is_side(value) or (pair and all(map(is_side, value)))

    def is_statistics(value: Any) -> bool:
        plain = isinstance(value, tuple | list) and len(value) in (1, 3)
        return value is None or (plain and all(is_number(each, 1e-300, 1e300) for each in value))

    return {
        "Preparation": Call(
            data.Preparation,
            {"size": (8, 8), "mean": (0.5,), "std": (0.5,)},
            {
                "size": is_sides,
                "mean": is_statistics,
                "std": is_statistics,
                "channels": is_side,
                "crop_mode": lambda value: False,
                "crop_pct": lambda value: is_number(value, 1e-300, 1e300),
                "interpolation": lambda value: False,
            },
            "was given alone|images have",
        ),
        "image_folder": Call(
            data.image_folder, {"root": "nowhere"}, {**nowhere, "size": lambda value: False}
        ),
        "cifar10": Call(data.cifar10, {"root": "nowhere"}, nowhere),
        "timm_dataset": Call(
            data.timm_dataset,
            {"root": "nowhere"},
            {
                **nowhere,
                "train_split": lambda value: False,
                "class_map": lambda value: False,
            },
        ),
        "webdataset": Call(
            data.webdataset,
            {"train": "nowhere.tar", "held_out": "nowhere.tar", "classes": 3},
            {"train": lambda value: False, "held_out": lambda value: False},
        ),
    }


def _evaluations() -> dict[str, Call]:
    hne, batch = ensemble(), (small.images(IMAGES), _LABELS)
    is_hne = {"hne": lambda value: False}
    is_batches = {"batches": is_nothing}
    one = {"x": lambda value: value is None or (is_images(value, 1) and len(value) == 1)}
    return {
        "measure": Call(
            metrics.measure,
            {"hne": hne, "batches": [batch]},
            {**is_hne, "stop": callable, "observe": callable},
        ),
        "measure batches": Call(
            lambda **arguments: metrics.measure(hne, **arguments).result(),
            {"batches": [batch]},
            is_batches,
            "no images",
        ),
        "measure a batch": Call(
            lambda **arguments: metrics.measure(hne, [tuple(arguments.values())]),
            {"x": batch[0], "target": _LABELS},
            # A batch of which no image could be read is passed over, whatever shape it has.
            {
                "x": lambda value: (
                    is_no_batch(value) or (is_images(value, 1) and len(value) == IMAGES)
                ),
                "target": lambda value: is_no_batch(value) or is_classes(value),
            },
            "as many classes",
        ),
        "Scores": Call(
            metrics.Scores, {"tree": TREE}, {"tree": lambda value: isinstance(value, Tree)}
        ),
        "Scores.add": Call(
            lambda **arguments: metrics.Scores(TREE).add(**arguments),
            {"logits": torch.randn(SHAPE), "target": _LABELS},
            {
                "logits": is_logits,
                "target": lambda value: is_tensor(value, (IMAGES,), torch.int64, torch.uint8),
            },
        ),
        "Gains.add": Call(
            lambda **arguments: comparison.Gains(TREE).add(**arguments),
            {"logits": torch.randn(SHAPE), "target": _LABELS},
            {
                "logits": is_logits,
                "target": lambda value: is_tensor(value, (IMAGES,), torch.int64, torch.uint8),
            },
        ),
        "compare": Call(
            comparison.compare,
            {"hne": hne, "batches": [batch]},
            {
                **is_hne,
                **is_batches,
                "base": lambda value: value is None or isinstance(value, small.SmallNet),
            },
            "no images",
        ),
        "base_model_of": Call(comparison.base_model_of, {"hne": hne, "weights": None}, is_hne),
        "is_leaf": Call(
            comparison.is_leaf,
            {"base": hne.leaf(0), "hne": hne},
            {
                **is_hne,
                "base": lambda value: isinstance(value, nn.Module),
                "index": lambda value: is_int(value, 0, LEAVES - 1),
            },
        ),
        "costs": Call(cost.costs, {"hne": hne}, {**is_hne, **one}),
        "base_cost": Call(cost.base_cost, {"hne": hne}, is_hne),
        "answer_seconds": Call(
            cost.answer_seconds,
            {"hne": hne, "x": small.images(1), "budget": 0.0},
            {
                **is_hne,
                "budget": lambda value: is_number(value, 0),
                "base": lambda value: value is None or isinstance(value, MODULES),
            },
        ),
        "count_macs": Call(
            cost.count_macs,
            {"model": small.SmallNet().to("meta"), "shape": (3, 8, 8)},
            {
                "model": lambda value: isinstance(value, nn.Identity),
                "shape": lambda value: (
                    isinstance(value, tuple) and all(is_int(size, 1) for size in value)
                ),
            },
            allowed="does not run on such an image",
        ),
        "budget": Call(
            budget,
            {
                "logits": torch.randn(3, IMAGES, CLASSES),
                "labels": _LABELS,
                "sizes": (1, 3, 6),
                "macs": (10, 20, 50),
                "target_macs": 20,
            },
            {
                "logits": lambda value: is_tensor(value, (3, IMAGES, CLASSES), *FLOATS),
                "labels": lambda value: (
                    isinstance(value, Tensor) and is_tensor(value, (IMAGES,), *WHOLE)
                ),
                "target_macs": lambda value: is_number(value, 10, 50),
            },
        ),
        "Halves": Call(
            Halves,
            {"hne": hne, "batches": [batch], "seed": 0},
            {**is_hne, **is_batches, "seed": lambda value: is_int(value, 0, 2**63 - 1)},
            "no images",
        ),
    }


SEVERAL = (list, tuple, set, dict)
MODULES = (nn.Identity, small.SmallNet)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


CALLBACKS = {"observe", "stop"}


def _quiet(*_: Any) -> None:
    """A callback that does nothing."""


@cache
def calls() -> dict[str, Call]:
    """All public calls, by name."""
    return {
        **_losses(),
        **_trees(),
        **_ensembles(),
        **_conversions(),
        **_data(),
        **_evaluations(),
    }


def check(name: str, replaced: Mapping[str, Any]) -> None:
    """Make a call with some arguments replaced: it answers or refuses, as they deserve."""
    call = calls()[name]
    is_right = all(call.right[key](value) for key, value in replaced.items())
    # What a callback does is the user's.
    quiet = {key: _quiet for key in CALLBACKS & replaced.keys() if callable(replaced[key])}
    arguments = {**call.arguments, **replaced, **quiet}
    try:
        call.function(**arguments)
    except TreeifyError as error:
        text = str(error)
        assert not is_right or re.search(call.allowed, text), f"right values are refused: {text}"
        lines = text.splitlines()
        assert len(lines) >= 3, f"says too little: {text}"
        assert "  Expected" in text or "  Found" in text, text
    else:
        assert is_right, f"{name} takes {replaced!r:.300}"
