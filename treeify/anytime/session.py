"""Anytime inference: leaves added bit by bit, from the activations kept at the splits.

After `n` leaves at most one branch per level is computed but not complete, since leaves are
numbered depth-first. The values that its children will read are all that is kept meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from treeify.arguments import require_iterable
from treeify.engine import timing
from treeify.engine.forms import Form, join
from treeify.engine.plan import Plan
from treeify.engine.program import PACKED, CrossingValue, Program, Walk
from treeify.errors import InputError, LeafError, described
from treeify.tree import Span


@dataclass(frozen=True)
class Answer:
    """The answer of a session's leaves so far.

    Args:
        leaves: how many leaves it averages.
        logits: their mean, `[N, K]`.
        elapsed: seconds of computing since the session began.
        macs: multiply-accumulates per image since the session began.
    """

    leaves: int
    logits: Any
    elapsed: float
    macs: int


class Prediction(NamedTuple):
    """What became of a limit: of a deadline, or of a confidence.

    Args:
        logits: the mean over each image's leaves, `[N, K]`.
        leaves: how many leaves each image used, `[N]` integers; by a deadline all used as many.
        seconds: from the call to the answer.
        met: whether that was within the deadline; None if there was none.
    """

    logits: Any
    leaves: Tensor
    seconds: float
    met: bool | None = None


class Session:
    """Anytime inference on one batch that can be stopped and resumed; made by `hne.session`.

    Nothing is computed twice: all answers together cost the MACs of one call. Between them the leaf
    logits so far are kept and, per level, the values of at most one branch. The program is that of
    evaluation mode; `macs` maps `n` to the MACs per image of the first `n` leaves.
    """

    def __init__(self, program: Program, plan: Plan, x: Tensor, macs: Callable[[int], int]) -> None:
        self._program, self._plan, self._macs = program, plan, macs
        self._device = x.device
        self._images = len(x)
        self._start = program.start(plan.arrange(x))
        self._kept: dict[int, dict[str, CrossingValue]] = {}
        self._leaf_logits: Any = None
        self._leaves = 0
        self._elapsed = 0.0

    @property
    def leaves(self) -> int:
        """How many leaves are computed."""
        return self._leaves

    @property
    def done(self) -> bool:
        """Whether all leaves are computed."""
        return self._leaves == self._program.tree.leaves

    @property
    def elapsed(self) -> float:
        """Seconds spent computing; the time between answers does not count."""
        return self._elapsed

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image so far."""
        return self._macs(self._leaves) if self._leaves else 0

    @property
    def leaf_logits(self) -> Any:
        """Logits of every leaf so far, `[N, leaves, K]`.

        Raises:
            LeafError: no leaf is computed yet.
        """
        if not self._leaves:
            raise LeafError("no leaf is computed yet.", next_step="Call session.advance() first.")
        return self._leaf_logits

    @property
    def logits(self) -> Any:
        """The present answer, the mean over the leaves so far: `[N, K]`.

        Raises:
            LeafError: no leaf is computed yet.
        """
        return mean_over_leaves(self.leaf_logits)

    @property
    def cached_bytes(self) -> int:
        """Memory of the activations kept for the next answers."""
        tensors = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for values in self._kept.values()
            for value in values.values()
            for tensor in value.tensors()
        }
        return sum(tensors.values())

    @property
    def droppable(self) -> bool:
        """Whether images can leave the batch: no value between levels mixes or counts them."""
        program = self._program
        return all(program.crossings[name].rows for name in program.last_reader)

    def select(self, images: Tensor | Sequence[int]) -> None:
        """Go on with some of the images only.

        Args:
            images: their positions in the present batch, `[M]` integers, or a mask of it, `[N]`
                booleans.

        Raises:
            InputError: it is neither; or the model carries the batch size from level to level, see
                `droppable`. Nothing has changed then.
        """
        if not self.droppable:
            raise InputError(
                "images cannot leave this session's batch.",
                expected="a model whose values between levels have one row per image",
                next_step="Run all images and ignore those that are answered.",
            )
        rows = _positions(images, self._images, self._device)
        for level, values in self._kept.items():
            self._kept[level] = {name: value.select(rows) for name, value in values.items()}
        self._start = {name: value.select(rows) for name, value in self._start.items()}
        if self._leaves:
            self._leaf_logits = tree_map_only(
                Tensor, lambda logits: logits.index_select(0, rows), self._leaf_logits
            )
        self._images = len(rows)

    @torch.no_grad()
    def advance(self, to: int | None = None) -> Answer:
        """Add leaves.

        Args:
            to: how many leaves to reach; the next nested size if not given.

        Returns:
            The answer with these leaves.

        Raises:
            LeafError: all leaves are computed, or there are not that many, or more are already.
        """
        to = self._next_size() if to is None else to
        self._program.tree.check_size(to)
        if to < self._leaves:
            raise LeafError(
                f"{self._leaves} leaves are computed already, {to} were asked for.",
                expected=f"a size from {self._leaves} to {self._program.tree.leaves}",
                next_step="Ask for smaller sizes first, or start another session.",
            )
        self._elapsed += timing.timed(lambda: self._compute(to), self._device)
        return Answer(self._leaves, self.logits, self._elapsed, self.macs)

    def _next_size(self) -> int:
        sizes = [size for size in self._program.tree.nested_sizes if size > self._leaves]
        if not sizes:
            raise LeafError(
                f"all {self._leaves} leaves are computed.",
                next_step="Ask session.done before advancing.",
            )
        return sizes[0]

    def _compute(self, to: int) -> None:
        program, tree = self._program, self._program.tree
        pieces = tree.pieces(Span(self._leaves, to))
        if len(pieces) > 1 and all(execution == PACKED for execution in self._plan.execution):
            # One call per level rather than one per piece and level: fewer calls, the same MACs.
            leaves = Span(self._leaves, to)
            walk = Walk(program, self._plan.execution, leaves.stop)
            self._add(walk.extend(leaves, self._start, self._kept), walk, leaves)
            return
        for level, leaves in pieces:
            values = dict(self._start)
            for above in range(level):
                values |= self._kept[above]
            walk = Walk(program, self._plan.execution, leaves.stop)
            self._add(walk.descend(level, leaves, program.needed(values, level)), walk, leaves)

    def _add(self, logits: Any, walk: Walk, leaves: Span) -> None:
        """Add leaves, keep what the walk kept, and drop what belongs to completed branches."""
        self._kept |= walk.kept
        for level in list(self._kept):
            if leaves.stop % self._program.tree.leaves_below(level) == 0:
                del self._kept[level]
        if self._leaves:
            logits = join([self._leaf_logits, logits], Form.LEAVES, None)
        self._leaf_logits = logits
        self._leaves = leaves.stop
        if self.done:
            self._start = {}
        else:
            # The images are the user's: their memory is not to be held where no later level reads
            # them.
            self._start = self._program.needed(self._start, 1)


def _positions(images: Tensor | Sequence[int], batch: int, device: torch.device) -> Tensor:
    """Positions in a batch, `[M]`, from such or from a mask of it."""
    try:
        chosen = torch.as_tensor(images, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of what is no list of numbers
        raise _no_images(described(images), batch) from None
    mask = chosen.dtype == torch.bool
    if mask and chosen.shape == (batch,):
        return chosen.nonzero().flatten()
    integers = not (mask or chosen.is_floating_point() or chosen.is_complex())
    inside = integers and bool(((chosen >= 0) & (chosen < batch)).all())
    if chosen.shape == (0,) or (chosen.ndim == 1 and inside):
        return chosen.long()
    values = chosen.flatten()[:8].tolist()
    raise _no_images(f"{chosen.dtype} of shape {tuple(chosen.shape)}: {values}", batch)


def _no_images(found: str, batch: int) -> InputError:
    return InputError(
        "these are no images of this session's batch.",
        expected=f"positions from 0 to {batch - 1}, [M] integers, or [{batch}] booleans",
        found=found,
        next_step="Positions count from those selected last; `leaf_logits` has as many rows.",
    )


def mean_over_leaves(leaf_logits: Any) -> Any:
    """The ensemble's answer, `[N, leaves, K] -> [N, K]`, in the output's structure.

    Of integers and truth values, such as classes, the one that most leaves give.

    Source: Ruiz & Verbeek, AAAI 2021, section 3.1.
    """
    return tree_map_only(Tensor, _mean, leaf_logits)


def _mean(leaf_logits: Tensor) -> Tensor:
    dim = min(1, leaf_logits.ndim - 1)
    if leaf_logits.is_floating_point() or leaf_logits.is_complex():
        return leaf_logits.mean(dim)
    return leaf_logits.long().mode(dim).values.to(leaf_logits.dtype)


def answers(session: Session, sizes: Sequence[int]) -> Iterator[Answer]:
    """Advance a session through increasing sizes, one answer each.

    Yields:
        The answer of each size.

    Raises:
        LeafError: they are no sizes, or do not increase.
    """
    require_iterable("sizes", sizes, "increasing numbers of leaves", error=LeafError)
    for size in sizes:
        session._program.tree.check_size(size)  # None would be the next one
        if size == session.leaves:
            raise LeafError(
                f"{size} leaves are asked for twice.",
                expected="increasing sizes",
                next_step="Name each size once.",
            )
        yield session.advance(to=size)
