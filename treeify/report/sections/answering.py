"""Sections on answers to held-out images: calibration, confusion, what more leaves change."""

from __future__ import annotations

from collections.abc import Iterator

from treeify.report.figures.changes import changes
from treeify.report.figures.confusion import (
    class_accuracy,
    has_matrix,
    matrix,
    worst_pairs,
)
from treeify.report.figures.reliability import reliability
from treeify.report.results import Answers, Result
from treeify.report.sections.accuracy import why_no_answers
from treeify.report.sections.section import Contents, Draft, Gallery, Section, only_of_runs


def reliability_section(contents: Contents) -> Section:
    """Reliability diagrams of the first, the middle and the last size."""
    draft = Draft("reliability", "Calibration")
    for result, answers in _answered(contents, draft):
        last = len(answers.scores) - 1
        shown = sorted({0, (last + 1) // 2, last})
        chart = reliability(
            [answers.scores[index].leaves for index in shown],
            answers.confidence[shown],
            (answers.nested == answers.target)[shown],
            [answers.scores[index].calibration_error for index in shown],
        )
        draft.charts.append(contents.mark(chart, result))
    draft.missing += only_of_runs(contents, "Calibration")
    return draft.section()


def confusion_section(contents: Contents) -> Section:
    """The worst pairs, accuracy of each class, and what more leaves change."""
    draft = Draft("confusion", "What is mistaken, and what more leaves change")
    for result, answers in _answered(contents, draft):
        sizes = [score.leaves for score in answers.scores]
        # One entry where there is one size.
        ends = {sizes[index]: answers.nested[index] for index in (0, -1)}
        charts = []
        if len(sizes) > 1:
            charts.append(changes(sizes, answers.nested == answers.target))
        charts += [
            worst_pairs(answers.classes, answers.target, ends),
            class_accuracy(answers.classes, answers.target, ends),
        ]
        if has_matrix(answers.classes):
            charts.append(matrix(answers.classes, answers.target, answers.nested[-1], sizes[-1]))
        draft.charts += [contents.mark(chart, result) for chart in charts]
        draft.galleries += _galleries(contents, result, answers)
    draft.missing += only_of_runs(contents, "Confusion")
    return draft.section()


def _answered(contents: Contents, draft: Draft) -> Iterator[tuple[Result, Answers]]:
    """Every result with answers; of the others it is said why they have none."""
    for result in contents.results:
        if result.answers is None:
            draft.missing.append(contents.say(why_no_answers(result), result))
        else:
            yield result, result.answers


def _galleries(contents: Contents, result: Result, answers: Answers) -> Iterator[Gallery]:
    """The images kept: those that become right, and those that become wrong."""
    for title, better in (("Become right", True), ("Become wrong", False)):
        thumbnails = tuple(
            thumbnail
            for thumbnail in answers.thumbnails
            if (thumbnail.after == thumbnail.target) == better
        )
        word = "right" if better else "wrong"
        text = f"The first few images of which each size makes a {'wrong' if better else 'right'}"
        if thumbnails:
            text += f" answer {word}: from which class to which, and with how many leaves."
            yield Gallery(contents.say(title, result), text, thumbnails)
