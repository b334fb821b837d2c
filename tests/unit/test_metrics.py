import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from treeify.errors import DataError
from treeify.metrics import Scores, correct, nll
from treeify.tree import Tree

TREE = Tree((2, 3))


def examples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(count, TREE.leaves, 4, generator=generator)
    return logits, torch.randint(4, (count,), generator=generator)


def test_each_size_is_scored_by_its_own_mean_logits() -> None:
    logits, target = examples(50)
    right, loss = correct(logits, target, TREE), nll(logits, target, TREE)
    for column, leaves in enumerate((1, 3, 6)):
        mean = logits[:, :leaves].mean(1)
        assert_close(right[:, column], mean.argmax(1) == target)
        assert_close(loss[:, column], F.cross_entropy(mean, target, reduction="none"))


def test_uneven_batches_give_the_scores_of_the_whole() -> None:
    logits, target = examples(50)
    scores = Scores(TREE)
    for part in (slice(0, 7), slice(7, 8), slice(8, 50)):
        scores.add(logits[part], target[part])
    assert scores.images == 50
    result = scores.result()
    assert [score.leaves for score in result] == [1, 3, 6]
    accuracy = 100 * correct(logits, target, TREE).double().mean(0)
    assert_close(torch.tensor([s.accuracy for s in result], dtype=torch.float64), accuracy)
    expected = nll(logits, target, TREE).double().mean(0)
    assert_close(torch.tensor([score.nll for score in result], dtype=torch.float64), expected)


def test_accuracy_is_in_percent() -> None:
    logits = torch.zeros(4, TREE.leaves, 2)
    logits[..., 1] = 1.0
    scores = Scores(TREE)
    scores.add(logits, torch.tensor([1, 1, 1, 0]))
    assert {score.accuracy for score in scores.result()} == {75.0}


def test_half_precision_logits_are_scored_in_full() -> None:
    logits, target = examples(50)
    scores = Scores(TREE)
    scores.add(logits.bfloat16(), target)
    whole = Scores(TREE)
    whole.add(logits.bfloat16().float(), target)
    assert scores.result() == whole.result()


def test_no_images_have_no_score() -> None:
    with pytest.raises(DataError, match="no images"):
        Scores(TREE).result()
