"""A session that remembers its steps: what the ways to answer do, for a display and for JSON."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from treeify.anytime import Session, Step


@dataclass(frozen=True)
class Told:
    """What a batch was told after a step.

    Args:
        step: leaves, logits and MACs per image.
        seconds: from the call to the end of the step.
        images: the positions in the batch of the images that took part, `[M]`.
    """

    step: Step
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
    """A session whose steps are remembered and, as they come, shown.

    It has what `advance_until` and `confidence.answer` use of a session, and stands in for one.

    Args:
        session: a new session.
        images: how many the batch has.
        begin: when the clock started, in seconds of `time.perf_counter()`.
        show: called after every step; its time does not count.
    """

    def __init__(
        self,
        session: Session,
        images: int,
        begin: float,
        show: Callable[[Watched], None] = lambda watched: None,
    ) -> None:
        self._session, self._begin, self._show = session, begin, show
        self._images = torch.arange(images)
        self.told: list[Told] = []

    @property
    def as_session(self) -> Session:
        """The same, for functions that take a session."""
        return cast("Session", self)

    @property
    def elapsed(self) -> float:
        """Seconds spent computing."""
        return self._session.elapsed

    @property
    def logits(self) -> Any:
        """The present answer, `[M, K]`."""
        return self._session.logits

    @property
    def droppable(self) -> bool:
        """Whether images can leave the batch."""
        return self._session.droppable

    def keep(self, images: Tensor) -> None:
        """Go on with some of the images only."""
        self._images = self._images[images.cpu()]
        self._session.keep(images)

    def advance(self, to: int) -> Step:
        """Add leaves, remember the answer and show it."""
        step = self._session.advance(to=to)
        now = time.perf_counter()
        self.told.append(Told(step, now - self._begin, self._images))
        self._show(self)
        self._begin += time.perf_counter() - now
        return step
