import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from treeify.errors import DataError
from treeify.evaluation.metrics import Scores, correct, logit_std, nll
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


def test_leaves_that_disagree_have_a_deviation() -> None:
    """Of each class's logits over the leaves, averaged over classes and images: by hand."""
    logits = torch.zeros(2, 2, 2)  # two images, two leaves, two classes
    logits[0] = torch.tensor([[1.0, 5.0], [3.0, 5.0]])  # deviations 1 and 0
    logits[1] = torch.tensor([[0.0, -2.0], [0.0, 4.0]])  # 0 and 3
    found = logit_std(logits, Tree((2,)))
    assert_close(found, torch.tensor([[0.0, 0.5], [0.0, 1.5]]))
    scores = Scores(Tree((2,)))
    scores.add(logits, torch.tensor([0, 1]))
    assert [score.logit_std for score in scores.result()] == [0.0, 1.0]


def test_the_deviation_is_that_of_the_standard() -> None:
    """Over more than two leaves, where it is no mean of distances."""
    logits, _ = examples(50)
    found = logit_std(logits, TREE)
    for column, leaves in enumerate((1, 3, 6)):
        assert_close(found[:, column], logits[:, :leaves].std(1, correction=0).mean(1))


def test_calibration_error_is_the_gap_in_fifteen_bins() -> None:
    logits, target = examples(200)
    scores = Scores(TREE)
    for part in (slice(0, 90), slice(90, 200)):
        scores.add(3 * logits[part], target[part])
    for score in scores.result():
        bins: dict[int, list[tuple[float, bool]]] = {}
        for image, label in zip((3 * logits[:, : score.leaves]).mean(1), target, strict=True):
            chances = image.softmax(0).tolist()
            confidence = max(chances)
            right = chances.index(confidence) == int(label)
            bins.setdefault(min(14, int(confidence * 15)), []).append((confidence, right))
        gaps = (abs(sum(c for c, _ in own) - sum(r for _, r in own)) for own in bins.values())
        assert len(bins) > 5
        assert score.calibration_error == pytest.approx(100 * sum(gaps) / 200, rel=1e-5)


def test_certain_answers_are_calibrated_when_they_are_right() -> None:
    logits = torch.zeros(4, TREE.leaves, 2)
    logits[..., 1] = 100.0
    for target, error in (([1, 1, 1, 1], 0.0), ([1, 1, 1, 0], 25.0)):
        scores = Scores(TREE)
        scores.add(logits, torch.tensor(target))
        assert {score.calibration_error for score in scores.result()} == {error}


def test_every_leaf_is_scored_by_itself() -> None:
    logits, target = examples(50)
    scores = Scores(TREE)
    scores.add(logits[:20], target[:20])
    scores.add(logits[20:], target[20:])
    right = logits.argmax(2) == target[:, None]
    own = (100 * right.double().mean(0)).tolist()
    assert scores.leaf_accuracy() == pytest.approx(own)
    assert len(set(scores.leaf_accuracy())) > 1


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


def test_batches_counted_together_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = examples(600)
    parts = (slice(0, 64), slice(64, 65), slice(65, 300), slice(300, 600))

    def totals(together: int) -> tuple[dict[str, torch.Tensor], list[float]]:
        monkeypatch.setattr("treeify.evaluation.metrics._TOGETHER", together)
        scores, seen = Scores(TREE), []
        for part in parts:
            scores.add(logits[part], target[part])
            seen.append(scores.accuracy)
        assert scores.images == 600
        return scores.totals, seen

    one_by_one, seen = totals(1)
    together, unseen = totals(10**9)
    assert not any(map(math.isnan, seen))
    assert all(map(math.isnan, unseen))
    for name, total in one_by_one.items():
        assert torch.equal(total, together[name]), name


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
