"""Tree arithmetic: which branches a range of leaves needs. Pure integers, no torch.

Leaves are numbered depth-first, so the first `n` leaves need, at each level, the first branches,
and going from `n` to `m` leaves only ever adds branches (the paper's nested sub-ensembles).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod
from operator import mul
from typing import NamedTuple

from treeify.errors import LeafError, SplitError, described

# Dims of tensors are counted in 64 bits, and a level has a tensor's dim of branches.
_MOST_LEAVES = 2**31


class Span(NamedTuple):
    """A range of branches `[start, stop)` of one level."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many branches the span holds."""
        return self.stop - self.start

    def parents(self, ratio: int) -> Span:
        """The branches above this span at a lower level, `ratio` of this level below each."""
        return Span(self.start // ratio, -(-self.stop // ratio))

    def within(self, branch: int, ratio: int) -> Span:
        """The part of this span below one branch of a lower level, `ratio` of this level each."""
        return Span(max(self.start, branch * ratio), min(self.stop, (branch + 1) * ratio))


@dataclass(frozen=True)
class Tree:
    """The shape of a hierarchical neural ensemble; prints as a tree.

    Args:
        fanouts: children per split, from the input to the output; `()` is the base model itself.

    Raises:
        SplitError: a fanout is not an integer of at least 2, or there are more than 2^31 leaves.

    Source: Ruiz & Verbeek, AAAI 2021, section 3.
    """

    fanouts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Take any sequence of integers as fanouts, and refuse what makes no tree."""
        try:
            fanouts = tuple(self.fanouts)
        except TypeError:  # it cannot be gone through
            fanouts = None
        if fanouts is None or isinstance(self.fanouts, str | bytes):
            raise SplitError(
                "the fanouts are no numbers.",
                expected="children per split, such as (2, 2)",
                found=described(self.fanouts),
                next_step="Give a number for each split, from the input to the output.",
            )
        object.__setattr__(self, "fanouts", fanouts)
        leaves = 1
        for fanout in self.fanouts:
            if isinstance(fanout, bool) or not isinstance(fanout, int) or fanout < 2:
                raise SplitError(
                    "a split needs at least two children.",
                    expected="an integer fanout of 2 or more",
                    found=f"fanout {described(fanout)}",
                    next_step="Leave the split out to keep that part of the model shared.",
                )
            leaves *= fanout
            if leaves > _MOST_LEAVES:
                raise SplitError(
                    "there are too many leaves.",
                    expected=f"a product of the fanouts of at most {_MOST_LEAVES:,}",
                    found=f"{len(self.fanouts):,} splits, one of fanout {described(fanout)}",
                    next_step="Split less often, or into fewer branches.",
                )

    @cached_property
    def branches(self) -> tuple[int, ...]:
        """Branches per level, `(1, fanout_1, fanout_1 * fanout_2, ...)`."""
        return tuple(accumulate(self.fanouts, mul, initial=1))

    @property
    def levels(self) -> int:
        """Number of levels, one more than splits."""
        return len(self.fanouts) + 1

    @property
    def leaves(self) -> int:
        """Number of leaves `L`."""
        return self.branches[-1]

    @cached_property
    def nested_sizes(self) -> tuple[int, ...]:
        """Sizes of the nested sub-ensembles: 1, last fanout, product of the last two, ..., `L`."""
        return tuple(accumulate(reversed(self.fanouts), mul, initial=1))

    def leaves_below(self, level: int) -> int:
        """Leaves below one branch of `level`.

        Raises:
            LeafError: there is no such level.
        """
        if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < self.levels:
            raise LeafError(
                f"level {described(level)} does not exist.",
                expected=f"an integer from 0 to {self.levels - 1}",
                next_step="Levels are numbered from the input, 0, to the output.",
            )
        return self.leaves // self.branches[level]

    def span(self, level: int, leaves: Span) -> Span:
        """The branches of `level` that a range of leaves needs.

        Raises:
            LeafError: there is no such level, or there are no such leaves.
        """
        self._check_span(leaves)
        return leaves.parents(self.leaves_below(level))

    def pieces(self, leaves: Span) -> list[tuple[int, Span]]:
        """A range of leaves cut where it goes on below a branch that is computed already.

        Returns:
            Per piece the first level to compute and its leaves; above that level a piece has a
            single branch, computed before, from that level on none.

        Raises:
            LeafError: there are no such leaves.
        """
        self._check_span(leaves)
        pieces = []
        start = leaves.start
        while start < leaves.stop:
            partial = [b for b in range(self.levels) if start % self.leaves_below(b)]
            below = self.leaves_below(partial[-1]) if partial else self.leaves
            stop = min(leaves.stop, (start // below + 1) * below)
            pieces.append((partial[-1] + 1 if partial else 0, Span(start, stop)))
            start = stop
        return pieces

    def path(self, leaf: int) -> tuple[int, ...]:
        """The branch index at each level on the way from the root to `leaf`.

        Raises:
            LeafError: the leaf does not exist.
        """
        self.check_leaf(leaf)
        return tuple(leaf // self.leaves_below(level) for level in range(self.levels))

    def branch_count(self, leaves: int) -> tuple[int, ...]:
        """Branches run at each level for the first `leaves` leaves.

        Raises:
            LeafError: there are not that many leaves.
        """
        self.check_size(leaves)
        return tuple(self.span(level, Span(0, leaves)).size for level in range(self.levels))

    def check_leaf(self, leaf: int) -> None:
        """Raise LeafError unless `0 <= leaf < L`."""
        if isinstance(leaf, bool) or not isinstance(leaf, int) or not 0 <= leaf < self.leaves:
            raise LeafError(
                f"leaf {described(leaf)} does not exist.",
                expected=f"an integer from 0 to {self.leaves - 1}",
                next_step="Leaves are numbered depth-first from 0.",
            )

    def _check_span(self, leaves: Span) -> None:
        """Raise LeafError unless it is a range of this tree's leaves."""
        is_span = isinstance(leaves, Span) and all(type(end) is int for end in leaves)
        if is_span and 0 <= leaves.start <= leaves.stop <= self.leaves:
            return
        ends = leaves if isinstance(leaves, Span) else (leaves,)
        raise LeafError(
            "there are no such leaves.",
            expected=f"a Span of integers from 0 to {self.leaves}",
            found=" to ".join(map(described, ends)),
            next_step="Leaves are numbered depth-first from 0, and a span ends before its stop.",
        )

    def check_size(self, leaves: int) -> None:
        """Raise LeafError unless `1 <= leaves <= L`."""
        if (
            isinstance(leaves, bool)
            or not isinstance(leaves, int)
            or not 1 <= leaves <= self.leaves
        ):
            raise LeafError(
                f"{described(leaves)} leaves were asked for.",
                expected=f"an integer from 1 to {self.leaves}, e.g. one of {self.nested_sizes}",
                next_step="Ask for fewer, or leave the number out for all of them.",
            )

    def first(self, leaves: int) -> tuple[int, Tree]:
        """The tree of the first `leaves` leaves.

        Returns:
            How many splits at the top fall away because one branch is left below them, and the
            tree that remains.

        Raises:
            LeafError: the first `leaves` leaves do not form a tree with equal children.
        """
        counts = self.branch_count(leaves)
        steps = zip(pairwise(counts), self.fanouts, strict=True)
        # Every parent has all its children, or there is one parent with some of them.
        if any(above > 1 and below != above * fanout for (above, below), fanout in steps):
            raise LeafError(
                f"the first {leaves} leaves do not form a tree with equally many children.",
                expected=f"one of the nested sizes {self.nested_sizes}",
                next_step="Ask for one of them, or for single leaves: hne.leaf(index).",
            )
        fanouts = [below // above for above, below in pairwise(counts)]
        dropped = sum(fanout == 1 for fanout in fanouts)
        return dropped, Tree(tuple(fanouts[dropped:]))

    def __str__(self) -> str:
        """The tree drawn with one line per branch, siblings beyond the first two elided."""
        header = f"{self.leaves} leaves, branches per level {' '.join(map(str, self.branches))}"
        return "\n".join([header, "level 0", *self._draw(1, "", 0)])

    def _draw(self, level: int, indent: str, branch: int) -> list[str]:
        """A line for each child at `level` of a branch, and below the first one its children's."""
        if level == self.levels:
            return []
        fanout, width = self.fanouts[level - 1], self.leaves_below(level)
        lines = []
        for child in range(fanout):
            index = branch * fanout + child
            last = child == fanout - 1
            leaves = f"leaves {index * width}-{(index + 1) * width - 1}"
            span = leaves if width > 1 else f"leaf {index}"
            lines.append(f"{indent}{'└─' if last else '├─'} level {level} branch {index}: {span}")
            if branch == 0 and child == 0:
                lines += self._draw(level + 1, indent + ("   " if last else "│  "), index)
        return lines


def fanouts_for(leaves: int, explicit: Sequence[int | None]) -> tuple[int, ...]:
    """Fanouts whose product is `leaves`, where those given as None share one value.

    Raises:
        SplitError: no such fanouts exist.
    """
    for value in range(2, max(leaves, 2) + 1):  # any one will do where no fanout is None
        fanouts = tuple(value if fanout is None else fanout for fanout in explicit)
        if prod(fanouts) == leaves:
            return fanouts
    raise SplitError(
        f"{leaves} models cannot be the leaves of a tree with {len(explicit)} splits.",
        expected="as many models as the product of the fanouts",
        found=f"fanouts {tuple(explicit)}",
        next_step="Give every split its fanout: splits=['layer2:2', 'layer3:3'] for 6 models.",
    )
