"""What was found by passing anything to the Python API, one mistake a test."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import small
import torch
from api_calls import ensemble
from torch import Tensor

import treeify
from treeify import losses
from treeify.engine import memory
from treeify.errors import (
    CheckpointError,
    DataError,
    InputError,
    LeafError,
    ModelError,
    RecipeError,
    SplitError,
)
from treeify.evaluation import metrics
from treeify.evaluation.cost import count_macs
from treeify.training.recipe_file import load_recipe
from treeify.training.trainer import train
from treeify.tree import Span, Tree

TREE = Tree((2, 3))
NAMES = ("independent", "structured", "co_distillation", "hierarchical_distillation")


def logits(images: int = 4) -> Tensor:
    return torch.randn(images, 6, small.CLASSES, generator=torch.Generator().manual_seed(0))


def loss(name: str, target: Any, **options: Any) -> Tensor:
    return losses.get(name)(logits(), target, TREE, **options)


def soft(*first_row: float, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = torch.full((4, small.CLASSES), 1 / small.CLASSES)
    rows[0] = torch.tensor(first_row)
    return rows.to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("target", "found"),
    [
        (torch.tensor([0, 1, 2, -1]), "Found -1"),
        (torch.tensor([0, 1, 2, small.CLASSES]), f"Found {small.CLASSES}"),
        (torch.tensor([0, 1, 2, -100]), "Found -100"),  # torch would leave it out
        (torch.tensor([0, 1, 2, 3], dtype=torch.int32), r"target\.long\(\)"),
        (torch.tensor([True, False, True, True]), "torch.bool"),
        (torch.tensor([0, 1, 2, 3], dtype=torch.complex64), "complex64"),
        ([0, 1, 2, 3], r"Found \[0, 1, 2, 3\]"),
        (soft(math.nan, 0, 0, 0, 1), "a sum that is off by nan"),
        (soft(-0.5, 0, 0, 0, 1.5), "a smallest of -0.5"),
        (soft(0.5, 0, 0, 0, 0), "a sum that is off by 0.5"),
        (soft(1, 0, 0, 0, 0).to("meta"), "another device"),
    ],
)
def test_labels_that_are_none(name: str, target: Any, found: str) -> None:
    with pytest.raises(InputError, match=found) as caught:
        loss(name, target)
    assert len(str(caught.value).splitlines()) == 4  # what, expected, found, what to do next


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mixed_labels_of_any_precision_are_taken(dtype: torch.dtype) -> None:
    assert loss("independent", soft(0.3, 0.3, 0.2, 0.1, 0.1, dtype=dtype)).isfinite()


@pytest.mark.parametrize("name", NAMES[2:])
@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": value} for value in (math.nan, math.inf, 0, -1.0, "2", True, 10**400)),
        *({"alpha": value} for value in (math.nan, -0.1, 1.1, None, True)),
        {"scale_by_t2": "yes"},
    ],
    ids=str,
)
def test_options_of_losses_that_are_none(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        loss(name, torch.arange(4), **options)


@pytest.mark.parametrize("temperature", [math.nan, math.inf, 0])
def test_a_teacher_of_no_temperature(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature"):
        losses.from_teacher(logits(), logits()[:, 0], TREE, temperature=temperature)


def test_a_loss_of_no_image() -> None:
    with pytest.raises(InputError, match="at least one image"):
        losses.independent(logits(0), torch.zeros(0, dtype=torch.long), TREE)


@pytest.mark.parametrize("name", NAMES)
def test_losses_still_compile_and_transform(name: str) -> None:
    """Values of labels are not looked at where there may be none."""
    function, target = losses.get(name), torch.arange(4)
    expected = function(logits(), target, TREE)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits(), target, TREE), expected)
    mapped = torch.func.vmap(lambda x, y: function(x, y, TREE))(logits()[None], target[None])
    torch.testing.assert_close(mapped[0], expected)


@pytest.mark.parametrize(
    "leaves", [0, -1, 7, 10**6, pytest.param(10**5000, id="huge"), 2.0, "2", True]
)
@pytest.mark.parametrize("method", ["count_macs", "count_parameters", "sub_ensemble"])
def test_numbers_of_leaves_that_there_are_not(method: str, leaves: Any) -> None:
    with pytest.raises(LeafError, match="an integer from 1 to 6"):
        getattr(ensemble(), method)(leaves)


def test_trees_refuse_what_is_not_theirs() -> None:
    for call in (
        lambda: TREE.branch_count(0),
        lambda: TREE.leaves_below(3),
        lambda: TREE.pieces(Span(0, 10**12)),
        lambda: TREE.span(0, Span(4, 2)),
    ):
        with pytest.raises(LeafError):
            call()
    for fanouts in (5, "22", (2,) * 10**6, (2**40,), (2.0,), None):
        with pytest.raises(SplitError):
            Tree(fanouts)


@pytest.mark.parametrize("deadline", ["x", math.nan, -1.0, 0, True, 10**400, np.zeros(3)])
def test_deadlines_that_are_none(deadline: Any) -> None:
    hne, x = ensemble(), small.images(1)
    hne.calibrate(x, repeats=2, budget=0.0)
    with pytest.raises(InputError, match="seconds above 0"):
        hne.predict(x, deadline=deadline)


@pytest.mark.parametrize("confidence", ["0.9", math.nan, -0.1, True, [0.5], [0.5, None], 10**400])
def test_confidences_that_are_none(confidence: Any) -> None:
    with pytest.raises(InputError, match="a probability, or one for each"):
        ensemble().predict(small.images(), confidence=confidence)


@pytest.mark.parametrize("images", [None, "x", [0, "1"], {}, [[0], [1, 2]], 1.5, [10**30]])
def test_selections_that_are_none(images: Any) -> None:
    session = ensemble().session(small.images(3))
    session.advance(1)
    with pytest.raises(InputError, match="positions from 0 to 2"):
        session.select(images)
    assert session.advance().logits.shape == (3, small.CLASSES)  # nothing has changed


@pytest.mark.parametrize("sizes", [5, "12", [1, 1], [2, 1], [1.0], [7], [None]])
def test_sizes_that_are_none(sizes: Any) -> None:
    with pytest.raises(LeafError):
        list(ensemble().anytime(small.images(), sizes))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 3, 8, 8, device="meta"),
        torch.zeros(2, 3, 8, 8).to_sparse(),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 3, 0, 8),
        np.zeros((2, 3, 8, 8)),
    ],
    ids=["meta", "sparse", "bytes", "no pixels", "numpy"],
)
@pytest.mark.parametrize("method", ["__call__", "predict", "session"])
def test_images_that_are_none(method: str, x: Any) -> None:
    with pytest.raises(InputError):
        getattr(ensemble(), method)(x)


def test_an_empty_batch_is_answered_but_not_trained_on() -> None:
    hne, x = small.ensemble(), torch.zeros(0, 3, 8, 8)
    assert hne(x).shape == (0, 6, small.CLASSES)
    hne.train()
    with pytest.raises(InputError, match="Leave empty batches out"):
        hne(x)
    assert all(buffer.isfinite().all() for buffer in hne.buffers())


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"splits": 10**6}, SplitError),
        ({"splits": "9" * 5000}, SplitError),
        ({"splits": True}, SplitError),
        ({"fanout": 1}, SplitError),
        ({"fanout": "2"}, SplitError),
        ({"fanout": 10**40}, SplitError),
        ({"seed": -1}, InputError),
        ({"seed": True}, InputError),
        ({"seed": 0.5}, InputError),
        ({"init": 1}, InputError),
        ({"init": ["copy"]}, InputError),
        ({"example_input": "x"}, InputError),
        ({"example_input": torch.zeros(0, 3, 8, 8)}, InputError),
        ({"weights": 5}, CheckpointError),
        ({"weights": "a\0b"}, CheckpointError),
    ],
    ids=lambda value: str(value)[:40],
)
def test_conversions_that_cannot_be(wrong: dict[str, Any], error: type[Exception]) -> None:
    options = {"splits": 1, "init": "copy", "example_input": small.EXAMPLE} | wrong
    with pytest.raises(error) as caught:
        treeify.hierarchicalize(small.SmallNet(), **options)
    assert len(str(caught.value).splitlines()) >= 3


def test_a_million_branches_say_what_they_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "treeify.engine.packed_tensors.Packer.pack_children", lambda *_: pytest.fail("allocated")
    )
    model = small.SmallNet()
    with pytest.raises(SplitError, match="too large") as caught:
        treeify.hierarchicalize(
            model, ["head"], fanout=10**6, init="copy", example_input=small.EXAMPLE
        )
    shared = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    head = sum(tensor.nbytes for tensor in model.head.parameters())
    assert f"{shared + (10**6 - 1) * head:,} bytes of weights" in str(caught.value)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    with pytest.raises(SplitError, match="at most 10,000 bytes, which are free"):
        small.ensemble()


def test_a_list_of_one_model_is_a_list() -> None:
    for models in (small.SmallNet(), "resnet18", None, [None, 5]):
        with pytest.raises(ModelError):
            treeify.pack(models, 1, small.EXAMPLE)


@pytest.mark.parametrize(
    "call",
    [
        lambda: treeify.save(small.SmallNet(), "x"),
        lambda: treeify.verify(None, small.images()),
        lambda: metrics.measure(small.SmallNet(), []),
        lambda: metrics.measure(ensemble(), None),
        lambda: metrics.measure(ensemble(), [small.images()]),
        lambda: ensemble().tune(small.images(), repeats=0),
        lambda: ensemble().tune(small.images(), training="yes"),
        lambda: ensemble().tune(small.images(), training=True, loss=lambda x: x),
        lambda: ensemble().calibrate(small.images(), budget=math.nan),
        lambda: ensemble().branches_of("heda.bias"),
        lambda: ensemble().keep_evaluating("stem.1"),
        lambda: ensemble().example_images(10**15),
        lambda: ensemble().predict(small.images(), observe="x"),
        lambda: count_macs(small.SmallNet(), (3, 8, 8)),
    ],
)
def test_arguments_of_a_wrong_type(call: Callable[[], object]) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert "Expected" in str(caught.value)


@pytest.mark.parametrize(
    "target", [torch.zeros(2), torch.tensor([0, 1, 2]), torch.tensor([0, 1], dtype=torch.int32)]
)
def test_evaluation_needs_a_class_for_every_image(target: Tensor) -> None:
    with pytest.raises(DataError):
        metrics.measure(ensemble(), [(small.images(2), target)])


def test_paths_and_recipes_that_are_none() -> None:
    for path in (None, 5, "", "a\0b", b"x"):
        with pytest.raises(CheckpointError):
            treeify.load(path)
        with pytest.raises(RecipeError):
            load_recipe(path)
    with pytest.raises(RecipeError, match="load_recipe"):
        train("recipe.yaml")
