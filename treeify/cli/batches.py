"""Answers to any number of image files, one batch of them in memory at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treeify.anytime.confidence import Budget
from treeify.anytime.deadline import find
from treeify.anytime.session import Prediction
from treeify.cli.answers import Answers, ImageAnswers
from treeify.cli.image_files import ImageFile
from treeify.conversion import saving
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data.preparation import Preparation, read_files
from treeify.deploy.exported import ExportedEnsemble
from treeify.engine.plan import Situation
from treeify.errors import CheckpointError, DataError, InputError
from treeify.evaluation.metrics import placed

# What answers: an ensemble, or an export of one.
Ensemble = HierarchicalEnsemble | ExportedEnsemble


class Limits(NamedTuple):
    """What ends an answer, at most one of them: arguments of `hne.predict`."""

    leaves: int | None
    deadline: float | None
    confidence: float | Budget | None


class Run:
    """The answers to one batch after the other: read, warm up, answer; and at the end, finish.

    Args:
        hne: the ensemble.
        path: its directory, where latencies are kept.
        limits: what ends an answer.
        label: the names, if they are known, of so many classes.
        top: how many classes to end with.
        notes: what the user should know, to be added to.
    """

    def __init__(
        self,
        hne: Ensemble,
        path: Path,
        limits: Limits,
        label: Callable[[int], Sequence[str] | None],
        top: int,
        notes: list[str],
    ) -> None:
        self.hne, self.path, self.limits = hne, path, limits
        self.label, self.top, self.notes = label, top, notes
        self.measured = False
        self.unread: list[str] = []
        self.seconds: list[float] = []
        self.met: list[bool] = []
        self._names: Sequence[str] | None = None
        self._files: list[Path] = []
        self._x = torch.empty(0)
        self._warm: set[torch.Size] = set()
        self._answered: list[ImageAnswers] = []

    def read(self, files: Sequence[ImageFile], preparation: Preparation) -> None:
        """Load a batch, without what cannot be read unless the user named it.

        Raises:
            DataError: files that the user named cannot be read.
        """
        self._files = [file.path for file in files]
        try:
            images = read_files(self._files, preparation)
        except DataError:
            single = [(file, _read_one(file.path, preparation)) for file in files]
            if any(file.named for file, image in single if image is None):
                raise
            self.unread += [str(file.path) for file, image in single if image is None]
            readable = [(file.path, image) for file, image in single if image is not None]
            self._files = [path for path, _ in readable]
            images = torch.cat([torch.empty(0), *(image for _, image in readable)])
        hne = self.hne
        self._x = images if isinstance(hne, ExportedEnsemble) else placed(images, hne)

    def warm_up(self) -> None:
        """Answer blank images of a new shape, and know how long answers take for a deadline."""
        if not self._files or self._x.shape in self._warm:
            return
        if self.limits.deadline is not None:
            self.measured |= _measure_if_unknown(self.hne, self._x, self.path, self.notes)
        classes = _count_classes(self.hne, self._x, self.limits.leaves)
        if not self._warm:
            self._names = self.label(classes)
        self._warm.add(self._x.shape)

    def answer(self, show: Callable[[Answers], None]) -> None:
        """Answer the batch; `show` is called with every answer on the way."""
        if not self._files:
            return
        files = [str(file) for file in self._files]
        limits: dict[str, Any] = self.limits._asdict()
        answers = Answers(files, self._names, self.top, show)
        prediction = self.hne.predict(self._x, **limits, observe=answers.observe)
        leaves, seconds = None, answers.seconds
        if isinstance(prediction, Prediction):
            leaves = prediction.leaves.tolist()
            if prediction.met is not None:
                seconds = prediction.seconds
                self.met.append(prediction.met)
        self.seconds.append(seconds)
        self._answered += answers.of_images(leaves)

    def finish(self) -> list[ImageAnswers]:
        """The answers to all batches.

        Raises:
            DataError: no image could be read.
        """
        if not self._answered:
            count = len(self.unread)
            raise DataError(f"none of the {count:,} images can be read.", found=self.unread[0])
        if self.unread:
            self.notes.append(f"Not read, and left out: {', '.join(self.unread)}.")
        return self._answered


def _read_one(file: Path, preparation: Preparation) -> Tensor | None:
    """An image `[1, C, H, W]`; None if it cannot be read."""
    try:
        return read_files([file], preparation)
    except DataError:
        return None


def _measure_if_unknown(hne: Ensemble, x: Tensor, path: Path, notes: list[str]) -> bool:
    """Measure how long steps take for this batch unless that is known; whether it was done."""
    if isinstance(hne, ExportedEnsemble):
        note = hne.measure_if_unknown(x)
        notes += [] if note is None else [note]
        return note is not None
    situation = Situation.of(x, training=False)
    try:
        find(hne.latencies, situation, hne.plan(x))
    except InputError:
        repeats = hne.calibrate(x).repeats
    else:
        return False
    try:
        saving.save_measurements(hne, path)
        outcome = f"kept in {path}"
    except CheckpointError as error:
        outcome = f"not kept: {str(error).splitlines()[0].rstrip('.')}"
    notes.append(
        f"Latencies of {situation} were not known: measured in {repeats} rounds, {outcome}."
    )
    return True


def _count_classes(hne: Ensemble, x: Tensor, leaves: int | None) -> int:
    """Answer blank images, and return the number of classes `K`."""
    # The first calls of a process set up kernels and take longer than any later one.
    logits = hne.predict(torch.zeros_like(x), leaves, observe=lambda answer, images: None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise InputError("the ensemble returns no single tensor of logits.", expected="[N, K]")
    return logits.shape[1]
