"""Each loss against the paper's formula spelled out in scalar Python."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from treeify import losses
from treeify.errors import InputError, RecipeError
from treeify.tree import Tree

TREES = [(2, 2, 2, 2), (3, 3), (3, 2), (2, 3, 2), (4,), ()]
IMAGES, CLASSES = 5, 7


def cross_entropy(logits: list, probabilities: list) -> torch.Tensor:
    """`-sum_k p_k log softmax(logits)_k` of one image."""
    total = sum(torch.exp(logit) for logit in logits)
    return -sum(
        p * torch.log(torch.exp(x) / total) for x, p in zip(logits, probabilities, strict=True)
    )


def mean_logits(leaf_logits: list, leaves: int) -> list:
    return [sum(leaf[k] for leaf in leaf_logits[:leaves]) / leaves for k in range(CLASSES)]


def sizes_of(fanouts: tuple) -> list:
    return [math.prod(fanouts[len(fanouts) - b :]) for b in range(len(fanouts) + 1)]


def labels_loss(students: list, label: int) -> torch.Tensor:
    hard = [float(k == label) for k in range(CLASSES)]
    return sum(cross_entropy(student, hard) for student in students)


def soft_loss(students: list, teacher: list, temperature: float) -> torch.Tensor:
    exponentials = [math.exp(x.item() / temperature) for x in teacher]
    soft = [e / sum(exponentials) for e in exponentials]
    return sum(cross_entropy([x / temperature for x in student], soft) for student in students)


def slow_independent(leaves, label, fanouts):
    return labels_loss(leaves, label)


def slow_structured(leaves, label, fanouts):
    return labels_loss([mean_logits(leaves, n) for n in sizes_of(fanouts)], label)


def slow_co(leaves, label, fanouts, alpha=0.5, temperature=2.0, scale_by_t2=False):
    soft = soft_loss(leaves, mean_logits(leaves, len(leaves)), temperature)
    factor = temperature**2 if scale_by_t2 else 1
    return (1 - alpha) * labels_loss(leaves, label) + alpha * factor * soft


def slow_hierarchical(leaves, label, fanouts, alpha=0.5, temperature=2.0, scale_by_t2=False):
    students = [mean_logits(leaves, n) for n in sizes_of(fanouts)[:-1]]
    soft = soft_loss(students, mean_logits(leaves, len(leaves)), temperature)
    factor = temperature**2 if scale_by_t2 else 1
    return (1 - alpha) * labels_loss(leaves, label) + alpha * factor * soft


OPTIONS = [
    {},
    {"alpha": 0.3, "temperature": 3.0},
    {"alpha": 1.0, "temperature": 0.7, "scale_by_t2": True},
]
CASES = [
    ("independent", slow_independent, {}),
    ("structured", slow_structured, {}),
    *(("co_distillation", slow_co, options) for options in OPTIONS),
    *(("hierarchical_distillation", slow_hierarchical, options) for options in OPTIONS),
]


def batch(tree: Tree, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (IMAGES, tree.leaves, CLASSES)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return logits.requires_grad_(), torch.randint(CLASSES, (IMAGES,), generator=generator)


@pytest.mark.parametrize("fanouts", TREES, ids=str)
@pytest.mark.parametrize(("name", "slow", "options"), CASES)
def test_loss_and_gradient_follow_the_paper(
    name: str, slow: Callable, options: dict, fanouts: tuple
) -> None:
    logits, target = batch(Tree(fanouts))
    loss = losses.get(name)(logits, target, Tree(fanouts), **options)
    expected = sum(
        slow([list(leaf) for leaf in image], int(label), fanouts, **options)
        for image, label in zip(logits, target, strict=True)
    )
    expected = expected / IMAGES
    assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("name", ["co_distillation", "hierarchical_distillation"])
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    """With `alpha=1` only distillation is left: leaves no student contains stay untouched."""
    tree = Tree((2, 2))
    logits, target = batch(tree)
    losses.get(name)(logits, target, tree, alpha=1.0).backward()
    touched = logits.grad.abs().sum((0, 2)) > 0
    students = {"co_distillation": 4, "hierarchical_distillation": 2}[name]
    assert touched.tolist() == [index < students for index in range(4)]


def test_distillation_moves_a_leaf_towards_the_ensemble() -> None:
    """One student against a fixed teacher: the gradient is `(softmax(s/T) - softmax(t/T)) / T`."""
    tree = Tree((2,))
    logits, target = batch(tree)
    losses.hierarchical_distillation(logits, target, tree, alpha=1.0).backward()
    with torch.no_grad():
        student, teacher = ((x / 2).softmax(-1) for x in (logits[:, 0], logits.mean(1)))
    assert_close(logits.grad[:, 0], (student - teacher) / 2 / IMAGES)


def test_nested_logits_average_the_first_leaves() -> None:
    tree = Tree((2, 3))
    logits, _ = batch(tree)
    nested = losses.nested_logits(logits, tree)
    expected = torch.stack([logits[:, :n].mean(1) for n in (1, 3, 6)], dim=1)
    assert_close(nested, expected)


def test_large_logits_stay_finite() -> None:
    tree = Tree((2, 2))
    logits, target = batch(tree, scale=1e4)
    for name in losses.names():
        assert torch.isfinite(losses.get(name)(logits.float(), target, tree)), name


@pytest.mark.parametrize("name", ["independent", "structured", "co_distillation"])
@pytest.mark.parametrize(
    ("shape", "labels", "match"),
    [
        ((5, 3, 7), torch.zeros(5, dtype=torch.long), r"shape \[N, 4, K\].*\[5, 3, 7\]"),
        ((5, 7), torch.zeros(5, dtype=torch.long), r"not hne\.predict"),
        ((5, 4, 7), torch.zeros(4, dtype=torch.long), r"5 integer classes.*\[4\]"),
        ((5, 4, 7), torch.zeros(5), "float32"),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple, labels: torch.Tensor, match: str) -> None:
    with pytest.raises(InputError, match=f"(?s){match}"):
        losses.get(name)(torch.zeros(shape), labels, Tree((2, 2)))


def test_auxiliary_outputs_are_refused() -> None:
    logits, target = batch(Tree((2,)))
    with pytest.raises(InputError, match="Found a tuple"):
        losses.independent((logits, logits), target, Tree((2,)))


@pytest.mark.parametrize(
    ("options", "match"), [({"alpha": 1.5}, "alpha"), ({"temperature": 0.0}, "temperature")]
)
def test_options_out_of_range_are_named(options: dict, match: str) -> None:
    logits, target = batch(Tree((2,)))
    with pytest.raises(InputError, match=match):
        losses.hierarchical_distillation(logits, target, Tree((2,)), **options)


def test_an_unknown_loss_offers_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean it") as caught:
        losses.get("hierarchical_destillation")
    assert "'hierarchical_distillation'" in str(caught.value)


def test_registering_a_name_twice_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(losses.LOSSES, "mine", raising=False)

    @losses.register("mine")
    def first(logits, target, tree):
        return logits.sum()

    assert losses.get("mine") is first
    with pytest.raises(RecipeError, match=r"first and .*second"):

        @losses.register("mine")
        def second(logits, target, tree):
            return logits.sum()

    assert losses.get("mine") is first
    del losses.LOSSES["mine"]
