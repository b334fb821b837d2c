"""Confusion: labelled by the sizes that answer, and no larger for more classes."""

import torch

from treeify.evaluation.classes import confused_pairs, confusion_matrix
from treeify.report.figures.confusion import class_accuracy, matrix, worst_pairs

CLASSES = tuple("abc")
TARGET = torch.tensor([0, 0, 1, 1, 2])
FEW, MANY = torch.tensor([1, 1, 1, 0, 2]), torch.tensor([0, 1, 1, 1, 2])


def headings(chart: object) -> list[str]:
    return [column.heading for column in chart.table.columns]  # type: ignore[attr-defined]


def test_sizes_that_answer_are_named() -> None:
    ends = {2: FEW, 8: MANY}
    pairs, classes = worst_pairs(CLASSES, TARGET, ends), class_accuracy(CLASSES, TARGET, ends)
    assert headings(pairs) == ["class", "taken for", "8 leaves", "2 leaves"]
    assert list(pairs.table.rows) == [("a", "b", 1, 2)]
    assert headings(classes) == ["class", "images", "2 leaves %", "8 leaves %"]
    assert list(classes.table.rows) == [("a", 2, 0, 50), ("b", 2, 50, 100), ("c", 1, 100, 100)]
    assert "by 8 leaves" in matrix(CLASSES, TARGET, MANY, 8).description
    for chart in (pairs, classes):
        labels = [text.get_text() for text in chart.figure.legends[0].get_texts()]
        assert sorted(labels) == ["2 leaves", "8 leaves"]


def test_a_single_size_stands_once() -> None:
    pairs, classes = (draw(CLASSES, TARGET, {1: FEW}) for draw in (worst_pairs, class_accuracy))
    assert headings(pairs) == ["class", "taken for", "1 leaf"]
    assert list(pairs.table.rows) == [("a", "b", 2), ("b", "a", 1)]
    assert headings(classes) == ["class", "images", "1 leaf %"]
    right = worst_pairs(CLASSES, TARGET, {1: TARGET})
    assert "answered rightly by 1 leaf" in right.description


def test_pairs_are_those_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    target, named = torch.randint(5, (2, 200), generator=generator)
    counts = confusion_matrix(target, named, 5).fill_diagonal_(0)
    expected = {
        (row, column): int(counts[row, column]) for row, column in counts.nonzero().tolist()
    }
    assert confused_pairs(target, named, 5) == expected


def test_a_million_classes_need_no_matrix() -> None:
    # A dense one would take 8 terabytes.
    names = range(10**6)
    target = torch.tensor([3, 3, 999_999])
    named = torch.tensor([999_999, 999_999, 999_999])
    pairs = worst_pairs(list(map(str, names)), target, {1: named, 4: named})
    assert list(pairs.table.rows) == [("3", "999999", 2, 2)]
