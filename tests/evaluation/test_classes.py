"""Which classes are named: counts that scikit-learn gives, too."""

import pytest
import torch
from sklearn.metrics import confusion_matrix, recall_score

from treeify.errors import DataError, InputError
from treeify.evaluation.classes import NamedClasses
from treeify.evaluation.metrics import Scores
from treeify.tree import Tree

TREE, CLASSES = Tree((3, 2)), 7


def examples(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right more often than not; no image is of the last class."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(CLASSES - 1, (images,), generator=generator)
    logits = torch.randn(images, TREE.leaves, CLASSES, generator=generator)
    logits[torch.arange(images), :, target] += 1.5
    return logits, target


@pytest.fixture
def found() -> NamedClasses:
    named = NamedClasses(TREE, CLASSES)
    logits, target = examples(200)
    for part in (slice(0, 64), slice(64, 65), slice(65, 200)):
        named.add(logits[part], target[part])
    return named


def test_confusion_is_scikit_learns(found: NamedClasses) -> None:
    logits, target = examples(200)
    for leaves in TREE.nested_sizes:
        answers = logits[:, :leaves].mean(1).argmax(1)
        expected = confusion_matrix(target, answers, labels=range(CLASSES))
        assert found.confusion(leaves).tolist() == expected.tolist()
    assert torch.equal(found.confusion(), found.confusion(TREE.leaves))
    assert found.confusion().sum() == found.images == 200
    assert not torch.equal(found.confusion(1), found.confusion())


def test_accuracy_per_class_is_scikit_learns_recall(found: NamedClasses) -> None:
    logits, target = examples(200)
    scores = found.per_class()
    assert [score.index for score in scores] == list(range(CLASSES))
    assert [score.images for score in scores] == target.bincount(minlength=CLASSES).tolist()
    assert scores[-1].accuracy is None
    for place, leaves in enumerate(TREE.nested_sizes):
        answers = logits[:, :leaves].mean(1).argmax(1)
        recall = recall_score(target, answers, labels=range(CLASSES - 1), average=None)
        accuracies = [score.accuracy[place] for score in scores[:-1] if score.accuracy]
        assert accuracies == pytest.approx((100 * recall).tolist())


def test_it_agrees_with_the_scores_and_keeps_the_images_order(found: NamedClasses) -> None:
    logits, target = examples(200)
    assert torch.equal(found.labels, target)
    scores = Scores(TREE)
    scores.add(logits, target)
    correct = (found.named == target[:, None]).double().mean(0)
    assert (100 * correct).tolist() == pytest.approx([own.accuracy for own in scores.result()])


def test_small_integers_and_half_precision_are_counted_too() -> None:
    logits, target = examples(20)
    whole, small = NamedClasses(TREE, CLASSES), NamedClasses(TREE, CLASSES)
    whole.add(logits.bfloat16().float(), target)
    small.add(logits.bfloat16().requires_grad_(), target.byte())
    assert torch.equal(whole.confusion(), small.confusion())


def test_what_does_not_fit_is_refused_and_not_counted() -> None:
    logits, target = examples(4)
    named = NamedClasses(TREE, CLASSES)
    with pytest.raises(DataError, match="no images"):
        named.confusion()
    with pytest.raises(DataError, match="no images"):
        named.per_class()
    with pytest.raises(InputError, match="7 logits"):
        named.add(logits[..., :5], target)
    with pytest.raises(DataError, match="0 to 6"):
        named.add(logits, target + 6)
    assert named.images == 0
    named.add(logits, target)
    with pytest.raises(InputError, match="one of 1, 2, 6"):
        named.confusion(5)
    with pytest.raises(InputError, match="at least 1"):
        NamedClasses(TREE, 0)
    with pytest.raises(InputError, match="tree"):
        NamedClasses(6, CLASSES)  # type: ignore[arg-type]
