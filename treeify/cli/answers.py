"""The answers on the way of one call, remembered for tables and JSON."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as serialised
from torch import Tensor

from treeify.anytime.session import Answer
from treeify.errors import printable

ClassIndex = Annotated[int, Field(serialization_alias="class")]


@serialised(frozen=True)
class ClassProbability:
    """How probable a class is, 0 to 1; the label is its name, if known."""

    index: ClassIndex
    label: str | None
    probability: float

    @property
    def name(self) -> str:
        """The label, or else the index."""
        return str(self.index) if self.label is None else self.label


@serialised(frozen=True)
class Step(ClassProbability):
    """The likeliest class of one image after some leaves, and the milliseconds since the call."""

    leaves: int
    elapsed_ms: float
    macs: int


@serialised(frozen=True)
class ImageAnswers:
    """What one image was answered by as many leaves as it used, and the likeliest classes then."""

    path: str
    leaves: int
    answers: list[Step]
    top: list[ClassProbability]


@dataclass(frozen=True)
class _TimedAnswer:
    """An answer, when it came, and the positions `[M]` in the batch of the images it is for."""

    answer: Answer
    seconds: float
    images: Tensor

    @cached_property
    def probabilities(self) -> Tensor:
        """Of every class for these images, `[M, K]`."""
        probabilities: Tensor = self.answer.logits.float().softmax(-1).cpu()
        return probabilities

    def of(self, image: int) -> Tensor | None:
        """The probabilities of one image's classes `[K]`; None if the answer is not for it."""
        rows = (self.images == image).nonzero()
        return self.probabilities[int(rows[0])] if len(rows) else None


def as_csv(images: Iterable[ImageAnswers]) -> str:
    """A line for each image: its likeliest class by all the leaves it used."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "label", "probability", "leaves", "macs", "elapsed_ms"])
    for image in images:
        last = image.answers[-1]
        path, label = (printable(word, in_file=True) for word in (image.path, last.label or ""))
        best = last.index, label, last.probability
        writer.writerow([path, *best, last.leaves, last.macs, last.elapsed_ms])
    return text.getvalue()


class Answers:
    """The answers of one call, remembered and, as they come, shown; the clock starts here.

    Args:
        files: the batch's images.
        labels: names of the classes, if known.
        top: how many classes to end with.
        show: called after every answer; its time does not count.
    """

    def __init__(
        self,
        files: Sequence[str],
        labels: Sequence[str] | None,
        top: int,
        show: Callable[[Answers], None] = lambda answers: None,
    ) -> None:
        self.files, self.labels, self.top = files, labels, top
        self._show = show
        self._timed: list[_TimedAnswer] = []
        self._begin = time.perf_counter()

    def observe(self, answer: Answer, images: Tensor) -> None:
        """Remember and show an answer that came for the images at positions `[M]` in the batch."""
        now = time.perf_counter()
        self._timed.append(_TimedAnswer(answer, now - self._begin, images.cpu()))
        self._show(self)
        self._begin += time.perf_counter() - now

    @property
    def seconds(self) -> float:
        """From the call to its last answer."""
        return self._timed[-1].seconds

    @property
    def leaves(self) -> int:
        """How many leaves the last answer has."""
        return self._timed[-1].answer.leaves

    def of_images(self, leaves: Sequence[int] | None = None) -> list[ImageAnswers]:
        """What every image was answered so far.

        Where the leaves that each used are given, answers of more are not for it any longer.
        """
        sizes = [self.leaves] * len(self.files) if leaves is None else leaves
        return [self._of_image(image, size) for image, size in enumerate(sizes)]

    def _of_image(self, image: int, leaves: int) -> ImageAnswers:
        steps = []
        probabilities = torch.empty(0)
        for timed in self._timed:
            row = timed.of(image)
            if row is None or timed.answer.leaves > leaves:
                continue
            probabilities = row
            (best,) = self._likeliest(row, 1)
            size, elapsed, macs = timed.answer.leaves, 1e3 * timed.seconds, timed.answer.macs
            steps.append(Step(best.index, best.label, best.probability, size, elapsed, macs))
        top = self._likeliest(probabilities, self.top)
        return ImageAnswers(self.files[image], steps[-1].leaves, steps, top)

    def _likeliest(self, probabilities: Tensor, count: int) -> list[ClassProbability]:
        values, indices = probabilities.topk(min(count, len(probabilities)))
        return [
            ClassProbability(index, self.labels[index] if self.labels else None, value)
            for index, value in zip(indices.tolist(), values.tolist(), strict=True)
        ]
