"""As many leaves as an image needs: confidence thresholds, and the budget they keep on average.

Source: Huang et al., Multi-Scale Dense Networks for Resource Efficient Image Classification, ICLR
2018, section 3 and appendix: the budgeted-batch setting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from treeify.anytime.session import Answer, Session
from treeify.arguments import is_number, require_type
from treeify.errors import InputError, described


@dataclass(frozen=True)
class Budget:
    """Thresholds for an average budget, and what they gave on held-out images.

    Args:
        target_macs: the mean MACs per image to be spent.
        sizes: the nested sizes at which an image may stop.
        thresholds: the confidence at which it does, for every size but the last.
        macs: mean MACs per image on the held-out images.
        accuracy: fraction of the held-out images answered rightly, 0 to 1.
        fractions: fraction of the held-out images that stop at each size.
        images: how many images were held out.
    """

    target_macs: int
    sizes: tuple[int, ...]
    thresholds: tuple[float, ...]
    macs: float
    accuracy: float
    # Saved ensembles have them under this name.
    fractions: Annotated[tuple[float, ...], Field(alias="shares")]
    images: int

    def on(self, logits: Tensor, labels: Tensor, macs: Sequence[int]) -> Budget:
        """The same thresholds with what they give on other images.

        Logits `[S, N, K]` and MACs per image `[S]` are those of every size.
        """
        thresholds = torch.tensor((*self.thresholds, 0.0), dtype=torch.double)
        confident = confidence(logits.double()) >= thresholds[:, None]
        confident[-1] = True
        stop = confident.int().argmax(0)  # the first size that is confident enough
        images = len(labels)
        correct = logits.argmax(-1)[stop, torch.arange(images)] == labels
        fractions = torch.bincount(stop, minlength=len(macs)).double() / images
        return replace(
            self,
            macs=(fractions * torch.tensor(macs, dtype=fractions.dtype)).sum().item(),
            accuracy=correct.double().mean().item(),
            fractions=tuple(fractions.tolist()),
            images=images,
        )


# To and from JSON values.
BUDGET = TypeAdapter(Budget)


def confidence(logits: Tensor) -> Tensor:
    """The probability of the likeliest class, `[..., K] -> [...]`."""
    return logits.softmax(-1).amax(-1)


def answer(
    session: Session,
    sizes: Sequence[int],
    thresholds: Sequence[float],
    *,
    observe: Callable[[Answer, Tensor], None] = lambda answer, images: None,
) -> tuple[Tensor, Tensor]:
    """Advance a session until every image is confident; confident images leave the batch.

    Args:
        session: a new session.
        sizes: the nested sizes.
        thresholds: per size but the last, the confidence that suffices.
        observe: called with every answer, and the positions `[M]` of its images in the batch.

    Returns:
        Mean logits `[N, K]` of each image's leaves, and how many leaves it used, `[N]`.

    Raises:
        InputError: the model returns no single tensor of logits.
    """
    logits: Tensor | None = None
    for size, threshold in zip(sizes, (*thresholds, None), strict=True):
        answer = session.advance(to=size)
        scores = answer.logits
        if not isinstance(scores, Tensor):
            raise InputError(
                "confidence needs one tensor of logits.",
                expected="[N, K]",
                found=type(scores).__name__,
            )
        if logits is None:
            logits, leaves = scores.clone(), torch.zeros(len(scores), dtype=torch.long)
            # Positions of the images that are not yet confident, and of all.
            pending = batch = torch.arange(len(scores), device=scores.device)
        observe(answer, pending if session.droppable else batch)
        if not session.droppable:
            scores = scores[pending]
        confident = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        if threshold is not None:
            confident = confidence(scores) >= threshold
        logits[pending[confident]] = scores[confident]
        leaves[pending[confident].cpu()] = size
        pending = pending[~confident]
        if not len(pending):
            break
        if session.droppable and confident.any():
            session.select(~confident)
    assert logits is not None
    return logits, leaves


def thresholds_for(
    limit: float | Sequence[float] | Budget, sizes: Sequence[int]
) -> tuple[float, ...]:
    """One threshold for every size but the last, each at least 0.

    Raises:
        InputError: the limit is none, or for another tree.
    """
    if isinstance(limit, Budget):
        if limit.sizes != tuple(sizes):
            raise InputError(
                "the budget was made for another tree.",
                expected=f"thresholds for {tuple(sizes)} leaves",
                found=f"thresholds for {limit.sizes}",
                next_step="Choose thresholds for this ensemble: treeify calibrate, or `budget`.",
            )
        return limit.thresholds
    count = len(sizes) - 1
    is_list = isinstance(limit, Sequence) and not isinstance(limit, str | bytes)
    thresholds: Sequence[Any] = limit if is_list else [limit] * count  # type: ignore[assignment]
    # One that is none is refused even where there is but one size.
    checked = thresholds if is_list else [limit]
    if len(thresholds) != count or not all(map(_is_level, checked)):
        raise InputError(
            f"confidence={described(limit)} fits no ensemble of {sizes[-1]} leaves.",
            expected=f"a probability, or one for each of {tuple(sizes[:-1])} leaves"
            " (above 1: never stop there)",
            found=", ".join(map(described, checked[:8])) or "none",
            next_step="Pass one probability, such as 0.9, for all sizes.",
        )
    return tuple(thresholds)


def _is_level(threshold: object) -> bool:
    """Whether a confidence may be compared with it: a number of at least 0, no truth value."""
    return is_number(threshold) and bool(threshold >= 0)  # type: ignore[operator]


def budget(
    logits: Tensor, labels: Tensor, sizes: Sequence[int], macs: Sequence[int], target_macs: int
) -> Budget:
    """Thresholds that spend a budget on average, as MSDNet chooses them.

    The fractions of images that stop at each size fall or rise geometrically, so that their mean
    cost is the target; the thresholds are those that let these fractions of held-out images stop.

    Args:
        logits: of held-out images at every size, `[S, N, K]`.
        labels: their classes, `[N]`.
        sizes: the `S` nested sizes.
        macs: MACs per image of each size.
        target_macs: the mean MACs per image to be spent.

    Raises:
        InputError: the target lies outside what the sizes cost, or there are no images.

    Source: Huang et al., ICLR 2018, section 3.
    """
    _check_answers(logits, labels, len(sizes))
    if not (_is_level(target_macs) and macs[0] <= target_macs <= macs[-1]):
        amount = f"{target_macs:,}" if _is_level(target_macs) else described(target_macs)
        raise InputError(
            f"a mean of {amount} MACs per image cannot be kept.",
            expected=f"{macs[0]:,} (1 leaf) to {macs[-1]:,} ({sizes[-1]} leaves)",
            next_step="Choose a target between what one leaf and all leaves cost.",
        )
    cumulative = _geometric_fractions(macs, target_macs).cumsum(0)
    confidences = confidence(logits.double())
    thresholds: list[float] = []
    pending = torch.arange(len(labels))
    for row, fraction in zip(confidences[:-1], cumulative[:-1], strict=True):
        # By how many images the count of those that have stopped is short at this size.
        count = round(fraction.item() * len(labels)) - (len(labels) - len(pending))
        thresholds.append(_threshold(row[pending], count))
        pending = pending[~(row[pending] >= thresholds[-1])]
    chosen = Budget(target_macs, tuple(sizes), tuple(thresholds), 0.0, 0.0, (), 0)
    return chosen.on(logits, labels, macs)


def _check_answers(logits: Tensor, labels: Tensor, sizes: int) -> None:
    """Raise InputError unless there are logits of every size, and a class for each image."""
    for name, tensor in (("logits", logits), ("labels", labels)):
        require_type(name, tensor, Tensor, "a tensor")
    if not labels.numel():
        raise InputError(
            "there are no held-out images.",
            expected="at least one",
            next_step="Choose thresholds on images that were not trained on.",
        )
    fits = logits.ndim == 3 and logits.shape[:2] == (sizes, labels.numel())
    integers = not (labels.is_floating_point() or labels.is_complex())
    if not (fits and labels.ndim == 1 and logits.is_floating_point() and integers):
        raise InputError(
            "the labels do not fit the logits.",
            expected=f"floats of shape [{sizes}, N, K] and N integer classes",
            found=f"{described(logits)} and {described(labels)}",
            next_step="Stack the logits of every nested size: `treeify.losses.nested_logits`.",
        )


def _threshold(confidences: Tensor, count: int) -> float:
    """The confidence that lets `count` images stop, and all as confident as the last of them."""
    if count <= 0:
        return 2.0  # above every probability: nobody stops
    ranked = confidences.sort(descending=True).values
    last = ranked[min(count, len(ranked)) - 1]
    below = confidences[confidences < last]
    # Half-way to the next image, so that rounding does not decide about either.
    return ((last + below.max()) / 2).item() if len(below) else last.item() * (1 - 1e-6)


def _geometric_fractions(macs: Sequence[int], target: int) -> Tensor:
    """Fractions `q^k`, normalised, whose mean cost is the target; `q` found by bisection."""
    costs = torch.tensor(macs, dtype=torch.double)
    exponents = torch.arange(len(macs), dtype=torch.double)
    low, high = -50.0, 50.0  # logarithms of q
    for _ in range(200):
        middle = (low + high) / 2
        fractions = (middle * exponents).softmax(0)
        low, high = (middle, high) if (fractions * costs).sum() < target else (low, middle)
    return ((low + high) / 2 * exponents).softmax(0)
