"""The steps of an answer, remembered for a display and for JSON."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from treeify.anytime.session import Answer


@dataclass(frozen=True)
class Told:
    """What a batch was told after a step.

    Args:
        step: leaves, logits and MACs per image.
        seconds: from the call to the end of the step.
        images: the positions in the batch of the images that took part, `[M]`.
    """

    step: Answer
    seconds: float
    images: Tensor

    @cached_property
    def probabilities(self) -> Tensor:
        """Of every class for the images that took part, `[M, K]`."""
        probabilities: Tensor = self.step.logits.float().softmax(-1).cpu()
        return probabilities

    def of(self, image: int) -> Tensor | None:
        """The probabilities of one image's classes `[K]`; None if it took no part."""
        rows = (self.images == image).nonzero()
        return self.probabilities[int(rows[0])] if len(rows) else None


class Watched:
    """The steps of a session, remembered and, as they come, shown.

    Args:
        images: how many the batch has.
        begin: when the clock started, in seconds of `time.perf_counter()`.
        show: called after every step; its time does not count.
    """

    def __init__(
        self,
        images: int,
        begin: float,
        show: Callable[[Watched], None] = lambda watched: None,
    ) -> None:
        self._begin, self._show = begin, show
        self._images = torch.arange(images)
        self.told: list[Told] = []

    def take(self, step: Answer, images: Tensor | None = None) -> None:
        """Remember a step that has just ended, and show it.

        Args:
            step: the step.
            images: the positions in the batch of the images that took part; all if not given.
        """
        now = time.perf_counter()
        took_part = self._images if images is None else images.cpu()
        self.told.append(Told(step, now - self._begin, took_part))
        self._show(self)
        self._begin += time.perf_counter() - now
