"""Answers on the way: what each image was told, when, and what does not count."""

import time

import pytest
import torch

from treeify.anytime.session import Answer
from treeify.cli.answers import Answers
from treeify.cli.output import print_json

FILES = ("a.png", "b.png")


def answer(leaves: int, *rows: list[float]) -> Answer:
    return Answer(leaves, torch.tensor(rows).log(), 0.0, 100 * leaves)


def test_an_image_has_the_answers_it_took_part_in_until_it_was_done() -> None:
    answers = Answers(FILES, ["x", "y"], top=5)
    answers.observe(answer(1, [0.9, 0.1], [0.4, 0.6]), torch.tensor([0, 1]))
    answers.observe(answer(3, [0.2, 0.8]), torch.tensor([1]))
    first, second = answers.of_images([1, 3])
    assert (first.path, first.leaves) == ("a.png", 1)
    assert [(step.leaves, step.macs, step.label) for step in first.answers] == [(1, 100, "x")]
    assert [(step.leaves, step.index) for step in second.answers] == [(1, 1), (3, 1)]
    assert [best.name for best in second.top] == ["y", "x"]
    assert second.top[0].probability == pytest.approx(0.8)
    assert answers.leaves == 3


def test_answers_that_come_for_all_images_end_where_each_was_done() -> None:
    answers = Answers(FILES, None, top=1)
    for leaves in (1, 3):
        answers.observe(answer(leaves, [0.9, 0.1], [0.4, 0.6]), torch.tensor([0, 1]))
    assert [len(image.answers) for image in answers.of_images([1, 3])] == [1, 2]
    assert answers.of_images()[0].leaves == 3
    assert answers.of_images()[0].top[0].name == "0"


def test_the_time_of_showing_does_not_count() -> None:
    shown = []

    def show(answers: Answers) -> None:
        shown.append(answers.leaves)
        time.sleep(0.2)

    answers = Answers(FILES[:1], None, 1, show)
    for leaves in (1, 3, 6):
        answers.observe(answer(leaves, [0.9, 0.1]), torch.tensor([0]))
    assert shown == [1, 3, 6]
    assert answers.seconds < 0.2


def test_json_has_the_class_by_that_name(capsys: pytest.CaptureFixture[str]) -> None:
    answers = Answers(FILES[:1], None, top=1)
    answers.observe(answer(1, [0.5, 0.25]), torch.tensor([0]))
    print_json(answers.of_images()[0].top)
    assert '"class": 0' in capsys.readouterr().out
