"""What a plan is asked for: a budget, the first answer, leaves and fanouts; what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from treeify.arguments import require_integer, require_iterable, require_number
from treeify.errors import InputError, described

MACS, MS, PARAMS, MB = "macs", "ms", "params", "mb"
QUANTITIES = (MACS, MS, PARAMS, MB)
# A search goes through every number of leaves; nobody trains more.
_MOST_LEAVES = 1024
DEFAULT_LEAVES, DEFAULT_FANOUTS = (4, 16), (2, 4)
# Without a budget an ensemble may cost so many base models.
_DEFAULT_RATIO = 4
_UNITS = {MACS: "MACs", MS: "ms", PARAMS: "parameters", MB: "MB"}


@dataclass(frozen=True)
class Budget:
    """The most that all leaves may cost.

    Args:
        quantity: `macs` per image, `ms` for one image, `params` or `mb` (10^6 bytes of parameters
            and buffers).
        most: how many.
        asked: whether somebody said so.
    """

    quantity: str
    most: float
    asked: bool = True

    def __str__(self) -> str:
        """As `1,200,000,000 MACs`."""
        return amount(self.most, self.quantity)


@dataclass(frozen=True)
class Limits:
    """What a plan is asked for, checked.

    Args:
        budget: the most that all leaves may cost; None for the default.
        first_macs: the most that the first answer may cost.
        first_ms: the most that it may take.
        leaves: the fewest and the most.
        fanouts: children per split to choose from.
    """

    budget: Budget | None
    first_macs: float | None
    first_ms: float | None
    leaves: tuple[int, int]
    fanouts: tuple[int, ...]

    @property
    def timed(self) -> bool:
        """Whether times have to be known."""
        by_time = self.budget is not None and self.budget.quantity == MS
        return by_time or self.first_ms is not None

    def budget_for(self, base_macs: int) -> Budget:
        """The budget; if nobody gave one, a few times what the base model costs."""
        return self.budget or Budget(MACS, _DEFAULT_RATIO * base_macs, asked=False)

    def check_first(self, macs: int, seconds: float | None) -> None:
        """Refuse a first answer that is to cost less than the base model does.

        Args:
            macs: of the base model.
            seconds: that it takes, if that is known.

        Raises:
            InputError: the first answer is to cost less.
        """
        spent = {MACS: macs, MS: None if seconds is None else 1e3 * seconds}
        for quantity, most in ((MACS, self.first_macs), (MS, self.first_ms)):
            costs = spent[quantity]
            if most is not None and costs is not None and costs > most:
                raise InputError(
                    "the first answer costs what one base model costs.",
                    expected=f"first_{quantity} of at least {amount(costs, quantity, up=True)},"
                    " which is the nearest possible",
                    found=amount(most, quantity),
                    next_step="Raise it, take a smaller model, or smaller images.",
                )


def limits(
    firsts: tuple[float | None, float | None],
    most: Sequence[float | None],
    leaves: int | Sequence[int],
    fanouts: Iterable[int],
) -> Limits:
    """What a user asks for, checked.

    Args:
        firsts: the most that the first answer may cost, in MACs and milliseconds.
        most: that all leaves may cost, by `QUANTITIES`.
        leaves: how many, or the fewest and the most.
        fanouts: children per split to choose from.

    Raises:
        InputError: a number is out of range, several budgets are given, the first answer may cost
            more than all, or no product of the fanouts is in the range of leaves.
    """
    given = {key: value for key, value in zip(QUANTITIES, most, strict=True) if value is not None}
    named = {f"max_{key}": value for key, value in given.items()}
    named |= {
        f"first_{key}": value
        for key, value in zip((MACS, MS), firsts, strict=True)
        if value is not None
    }
    for name, value in named.items():
        require_number(name, value, above=0, finite=True, expected="a number above 0")
    if len(given) > 1:
        raise InputError(
            "a plan has one budget.",
            expected=f"one of {', '.join(f'max_{key}' for key in QUANTITIES)}",
            found=" and ".join(f"max_{key}" for key in given),
            next_step="Plan by the tighter one; the table shows the others of every tree.",
        )
    for key in (MACS, MS):
        first, all_leaves = named.get(f"first_{key}"), given.get(key)
        if first is not None and all_leaves is not None and first > all_leaves:
            raise InputError(
                f"first_{key} is above max_{key}: the first answer is part of all of them.",
                expected=f"first_{key} of at most {amount(all_leaves, key)}",
                found=amount(first, key),
                next_step="Swap them, or leave one out.",
            )
    chosen = _fanouts(fanouts)
    budget = next((Budget(key, value) for key, value in given.items()), None)
    return Limits(budget, *firsts, _leaves(leaves, chosen), chosen)


def amount(number: float, quantity: str, *, up: bool = False) -> str:
    """A number with its unit: `1,200,000 MACs`, `4.25 ms`.

    Args:
        number: how many.
        quantity: of what, one of `QUANTITIES`.
        up: round up, so that what costs so much keeps to it.
    """
    if number < 1e-6:  # a mistake, of which no digits matter
        return f"{number:.3g} {_UNITS[quantity]}"
    step = 1.0
    if quantity in (MS, MB):
        step = 10.0 ** min(0, floor(log10(number)) - 2)
    rounded = (ceil if up else round)(number / step) * step
    return f"{rounded:,.{max(0, -floor(log10(step)))}f} {_UNITS[quantity]}"


def numbers_of_leaves(fanouts: Iterable[int], most: int) -> list[int]:
    """All products of some fanouts up to `most`, in order; 1 is the product of none."""
    products, latest = {1}, {1}
    choices = tuple(fanouts)
    while latest:
        latest = {leaves * fanout for leaves in latest for fanout in choices}
        latest = {leaves for leaves in latest if leaves <= most} - products
        products |= latest
    return sorted(products)


def _fanouts(fanouts: Iterable[int]) -> tuple[int, ...]:
    require_iterable("fanouts", fanouts, "numbers of children per split, such as (2, 4)")
    chosen = list(fanouts)
    for fanout in chosen:
        require_integer("a fanout", fanout, 2, _MOST_LEAVES)
    if not chosen:
        raise InputError(
            "there are no fanouts to choose from.",
            expected="at least one number of children per split",
            next_step="Pass fanouts=(2,), --fanouts 2.",
        )
    return tuple(sorted(set(chosen)))


def _leaves(leaves: int | Sequence[int], fanouts: Sequence[int]) -> tuple[int, int]:
    """The range of leaves, which some tree must be in."""
    ends = (leaves, leaves) if isinstance(leaves, int) else leaves
    if not isinstance(ends, Sequence) or isinstance(ends, str | bytes) or len(ends) != 2:
        raise InputError(
            "leaves is no range.",
            expected="the fewest and the most, such as (4, 16), or one number",
            found=described(leaves),
            next_step="Pass leaves=(4, 16).",
        )
    low, high = ends
    next_step = "Pass leaves=(4, 16), --leaves 4..16."
    require_integer("the least number of leaves", low, 2, _MOST_LEAVES, next_step=next_step)
    require_integer("the largest number of leaves", high, low, _MOST_LEAVES, next_step=next_step)
    possible = numbers_of_leaves(fanouts, _MOST_LEAVES)[1:]
    if not any(low <= product <= high for product in possible):
        below = [product for product in possible if product < low][-1:]
        above = [product for product in possible if product > high][:1]
        nearest = " or ".join(f"{product:,}" for product in (*below, *above))
        raise InputError(
            f"no tree has {low} to {high} leaves." if low < high else f"no tree has {low} leaves.",
            expected=f"a product of the fanouts {', '.join(map(str, fanouts))}; the nearest"
            f" possible: {nearest}",
            next_step="Widen the range, or give more fanouts.",
        )
    return low, high
