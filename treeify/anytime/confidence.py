"""As many leaves as an image needs: confidence thresholds, and the budget they keep on average.

Source: Huang et al., Multi-Scale Dense Networks for Resource Efficient Image Classification, ICLR
2018, section 3 and appendix: the budgeted-batch setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treeify.anytime.session import Answer, Session
from treeify.errors import InputError


class Prediction(NamedTuple):
    """What a batch was answered.

    Args:
        logits: mean logits of each image's leaves, `[N, K]`.
        leaves: how many leaves each image used, `[N]`.
    """

    logits: Tensor
    leaves: Tensor


@dataclass(frozen=True)
class Budget:
    """Thresholds for an average budget, and what they gave on held-out images.

    Args:
        target_macs: the wanted mean MACs per image.
        sizes: the nested sizes at which an image may stop.
        thresholds: the confidence at which it does, for every size but the last.
        macs: mean MACs per image on the held-out images.
        accuracy: share of the held-out images answered rightly, 0 to 1.
        shares: share of the held-out images that stop at each size.
        images: how many images were held out.
    """

    target_macs: int
    sizes: tuple[int, ...]
    thresholds: tuple[float, ...]
    macs: float
    accuracy: float
    shares: tuple[float, ...]
    images: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def on(self, logits: Tensor, labels: Tensor, macs: Sequence[int]) -> Budget:
        """The same thresholds with what they give on other images.

        Args:
            logits: of the images at every size, `[S, N, K]`.
            labels: their classes, `[N]`.
            macs: MACs per image of each size.
        """
        needed = torch.tensor((*self.thresholds, 0.0), dtype=torch.double)
        enough = confidence(logits.double()) >= needed[:, None]
        enough[-1] = True
        stop = enough.int().argmax(0)  # the first size that is sure enough
        images = len(labels)
        right = logits.argmax(-1)[stop, torch.arange(images)] == labels
        shares = torch.bincount(stop, minlength=len(macs)).double() / images
        return replace(
            self,
            macs=(shares * torch.tensor(macs, dtype=shares.dtype)).sum().item(),
            accuracy=right.double().mean().item(),
            shares=tuple(shares.tolist()),
            images=images,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Budget:
        """What `to_dict` wrote."""
        lists = {name: tuple(values[name]) for name in ("sizes", "thresholds", "shares")}
        return cls(**{**values, **lists})


def confidence(logits: Tensor) -> Tensor:
    """The probability of the likeliest class, `[..., K] -> [...]`."""
    return logits.softmax(-1).amax(-1)


def answer(
    session: Session,
    sizes: Sequence[int],
    thresholds: Sequence[float],
    *,
    watch: Callable[[Answer, Tensor], None] = lambda step, images: None,
) -> Prediction:
    """Advance a session until every image is confident; sure images leave the batch.

    Args:
        session: a new session.
        sizes: the nested sizes.
        thresholds: per size but the last, the confidence that suffices.
        watch: told every step, and which images of the batch it has logits of, positions `[M]`.

    Raises:
        InputError: the model returns no single tensor of logits.
    """
    logits, used = None, None
    open_rows = None
    for size, threshold in zip(sizes, (*thresholds, None), strict=True):
        step = session.advance(to=size)
        found = step.logits
        if not isinstance(found, Tensor):
            raise InputError(
                "confidence needs one tensor of logits.",
                expected="[N, K]",
                found=type(found).__name__,
            )
        if logits is None or used is None or open_rows is None:
            logits, used = found.clone(), torch.zeros(len(found), dtype=torch.long)
            open_rows = everyone = torch.arange(len(found), device=found.device)
        watch(step, open_rows if session.droppable else everyone)
        if not session.droppable:
            found = found[open_rows]
        sure = torch.ones(len(found), dtype=torch.bool, device=found.device)
        if threshold is not None:
            sure = confidence(found) >= threshold
        logits[open_rows[sure]] = found[sure]
        used[open_rows[sure].cpu()] = size
        open_rows = open_rows[~sure]
        if not len(open_rows):
            break
        if session.droppable and sure.any():
            session.select(~sure)
    assert logits is not None and used is not None
    return Prediction(logits, used)


def thresholds_for(
    given: float | Sequence[float] | Budget, sizes: Sequence[int]
) -> tuple[float, ...]:
    """One threshold for every size but the last.

    Raises:
        InputError: a threshold is no probability, or their number is wrong.
    """
    if isinstance(given, Budget):
        if given.sizes != tuple(sizes):
            raise InputError(
                "the budget was made for another tree.",
                expected=f"thresholds for {tuple(sizes)} leaves",
                found=f"thresholds for {given.sizes}",
            )
        return given.thresholds
    count = len(sizes) - 1
    values = tuple(given) if isinstance(given, Sequence) else (given,) * count
    if len(values) != count or not all(value >= 0 for value in values):
        raise InputError(
            f"confidence={given!r} fits no ensemble of {sizes[-1]} leaves.",
            expected=f"a probability, or one for each of {tuple(sizes[:-1])} leaves"
            " (above 1: never stop there)",
        )
    return values


def budget(
    logits: Tensor, labels: Tensor, sizes: Sequence[int], macs: Sequence[int], target_macs: int
) -> Budget:
    """Thresholds that spend a budget on average, as MSDNet chooses them.

    The shares of images that stop at each size fall or rise geometrically, so that their mean cost
    is the target; the thresholds are those that let these shares of held-out images stop.

    Args:
        logits: of held-out images at every size, `[S, N, K]`.
        labels: their classes, `[N]`.
        sizes: the `S` nested sizes.
        macs: MACs per image of each size.
        target_macs: the wanted mean MACs per image.

    Raises:
        InputError: the target lies outside what the sizes cost, or there are no images.

    Source: Huang et al., ICLR 2018, section 3.
    """
    if not len(labels):
        raise InputError("there are no held-out images.", expected="at least one")
    if not macs[0] <= target_macs <= macs[-1]:
        raise InputError(
            f"a mean of {target_macs:,} MACs per image cannot be kept.",
            expected=f"{macs[0]:,} (1 leaf) to {macs[-1]:,} ({sizes[-1]} leaves)",
        )
    cumulative = _geometric_shares(macs, target_macs).cumsum(0)
    sure = confidence(logits.double())
    thresholds: list[float] = []
    rest = torch.arange(len(labels))
    for own, share in zip(sure[:-1], cumulative[:-1], strict=True):
        wanted = round(share.item() * len(labels)) - (len(labels) - len(rest))
        thresholds.append(_threshold(own[rest], wanted))
        rest = rest[~(own[rest] >= thresholds[-1])]
    chosen = Budget(target_macs, tuple(sizes), tuple(thresholds), 0.0, 0.0, (), 0)
    return chosen.on(logits, labels, macs)


def _threshold(sure: Tensor, wanted: int) -> float:
    """The confidence that lets `wanted` images stop, and all as sure as the last of them."""
    if wanted <= 0:
        return 2.0  # above every probability: nobody stops
    last = sure.sort(descending=True).values[min(wanted, len(sure)) - 1]
    below = sure[sure < last]
    # Half-way to the next image, so that rounding does not decide about either.
    return ((last + below.max()) / 2).item() if len(below) else last.item() * (1 - 1e-6)


def _geometric_shares(macs: Sequence[int], target: int) -> Tensor:
    """Shares `q^k`, normalised, whose mean cost is the target; `q` found by bisection."""
    costs = torch.tensor(macs, dtype=torch.double)
    exponents = torch.arange(len(macs), dtype=torch.double)
    low, high = -50.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        shares = (middle * exponents).softmax(0)
        low, high = (middle, high) if (shares * costs).sum() < target else (low, middle)
    return ((low + high) / 2 * exponents).softmax(0)
