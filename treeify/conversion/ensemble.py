"""The hierarchical neural ensemble: a tree of networks as one `nn.Module`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from treeify.anytime.confidence import Budget, answer, thresholds_for
from treeify.anytime.deadline import (
    Latencies,
    Slowdown,
    advance_until,
    check_deadline,
    find,
    measure,
)
from treeify.anytime.session import (
    Answer,
    Prediction,
    Session,
    answers,
    mean_over_leaves,
)
from treeify.arguments import require_callable, require_flag, require_type
from treeify.conversion.initialize import Source
from treeify.conversion.packed_tree import PackedTree
from treeify.conversion.splits import Splits
from treeify.data.preparation import Preparation
from treeify.engine.packed_tensors import set_memory_format
from treeify.engine.plan import AUTO, Situation, Tuning
from treeify.engine.preserve import preserve_modes
from treeify.engine.tuning import tune
from treeify.errors import InputError, described
from treeify.models.architecture import Architecture
from treeify.tracing.trace import Traced
from treeify.tree import Tree

# Called with an answer on the way and the positions `[M]` in the batch of the images it is for.
Observer = Callable[[Answer, Tensor], None]


@dataclass(frozen=True)
class Measurements:
    """What was measured of an ensemble, one value that is saved beside the weights.

    Args:
        execution: the setting of `hne.execution`.
        tunings: what `hne.tune` chose, one for each situation.
        latencies: what `hne.calibrate` measured, one for each situation.
        budgets: confidence thresholds, one for each mean of MACs per image.
    """

    execution: str | tuple[str, ...] = AUTO
    tunings: tuple[Tuning, ...] = ()
    latencies: tuple[Latencies, ...] = ()
    budgets: tuple[Budget, ...] = ()


# To and from JSON values.
MEASUREMENTS = TypeAdapter(Measurements)


def require_ensemble(hne: object) -> None:
    """Raise InputError unless it is an ensemble, or a module around one, as of `torch.compile`."""
    if not (isinstance(hne, nn.Module) and isinstance(getattr(hne, "tree", None), Tree)):
        raise InputError(
            "this is no ensemble.",
            expected="what treeify.hierarchicalize, pack or load returns",
            found=described(hne),
            next_step="Convert the model: treeify.hierarchicalize(model, splits=...).",
        )


class HierarchicalEnsemble(PackedTree):
    """A tree of `L` networks that share their early layers; maps images to every leaf's logits.

    Parameters carry the base model's own names; each holds the branches of its level, concatenated
    along dim 0. Made by `treeify.hierarchicalize`, `treeify.pack` and `treeify.load`, which fill
    the tensors that this constructor only allocates.

    What was measured is kept with it and saved: `latencies` by situation (see `calibrate`),
    `tunings` (see `tune`), and `budgets`, confidence thresholds by their mean MACs per image
    (see `treeify.anytime.confidence.budget`). So is `preparation`: what image files go through, and
    the names of the classes; None where nobody said.

    Args:
        traced: the base model, traced.
        splits: where it splits.
        like: the base model, for the tensors' devices, dtypes and mode.
        architecture: how to build the base model again, if known.
    """

    def __init__(
        self,
        traced: Traced,
        splits: Splits,
        like: nn.Module,
        architecture: Architecture | None = None,
    ) -> None:
        super().__init__(traced, splits, like)
        self._architecture = architecture
        self.latencies: dict[Situation, Latencies] = {}
        self._slowdowns: dict[Situation, Slowdown] = {}
        self.budgets: dict[int, Budget] = {}
        self.preparation: Preparation | None = None
        # By directory, as of when it was last read or written: what differs since then is new.
        self.saved_measurements: dict[Path, Measurements] = {}

    @property
    def tunings(self) -> dict[Situation, Tuning]:
        """What `tune` measured and chose, by situation; saved with the ensemble."""
        return self._planner.tunings

    @property
    def measurements(self) -> Measurements:
        """All that was measured, as one value."""
        return Measurements(
            self.execution,
            tuple(self.tunings.values()),
            tuple(self.latencies.values()),
            tuple(self.budgets.values()),
        )

    @measurements.setter
    def measurements(self, measurements: Measurements) -> None:
        require_type("measurements", measurements, Measurements, "what hne.measurements gives")
        self.execution = measurements.execution
        self._planner.tunings = {tuning.situation: tuning for tuning in measurements.tunings}
        self.latencies = {latencies.situation: latencies for latencies in measurements.latencies}
        self.budgets = {budget.target_macs: budget for budget in measurements.budgets}
        if any(tuning.plan.channels_last for tuning in measurements.tunings):
            set_memory_format(self, torch.channels_last)

    def tune(
        self,
        x: Tensor,
        *,
        training: bool | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        repeats: int = 7,
        budget: float = 10.0,
    ) -> Tuning:
        """Measure the ways to run inputs like `x` on this machine and keep the fastest.

        Levels are tried packed and looped, in both memory formats. Inference is measured without
        gradients and with batch norms folded into convolutions. The choice is kept in
        `hne.tunings`, saved with the ensemble, and used where `hne.execution` is `auto`, for other
        batch sizes too until those are tuned themselves. Parameters take the chosen memory format;
        values, gradients, buffers and the random state stay as they are.

        Args:
            x: images, `[N, C, H, W]`.
            training: tune a training step, forward and backward; by default the present mode.
            loss: of the leaf logits, for a training step; by default their mean square.
            repeats: rounds of each comparison, of which medians are compared.
            budget: seconds of each comparison; after it no further round begins, however few there
                were. There is one comparison per memory format and one per level.

        Returns:
            The plan chosen and every measurement in seconds; prints as a table.

        Raises:
            InputError: the input does not fit the model, or has no images; or another argument is
                of a wrong type.
        """
        self.check_input(x)
        if training is not None:
            require_flag("training", training)
        if loss is not None:
            require_callable("loss", loss, "the leaf logits")
        with preserve_modes(self):
            self.train(self.training if training is None else training)
            run = partial(self.run, x, self.leaves)
            return tune(self, self._planner, run, x, loss=loss, repeats=repeats, budget=budget)

    @overload
    def predict(
        self,
        x: Tensor,
        leaves: int | None = None,
        *,
        deadline: None = None,
        confidence: None = None,
        observe: Observer | None = None,
    ) -> Tensor: ...

    @overload
    def predict(
        self,
        x: Tensor,
        leaves: int | None = None,
        *,
        deadline: float,
        confidence: None = None,
        observe: Observer | None = None,
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        x: Tensor,
        leaves: int | None = None,
        *,
        deadline: None = None,
        confidence: float | Sequence[float] | Budget,
        observe: Observer | None = None,
    ) -> Prediction: ...

    def predict(
        self,
        x: Tensor,
        leaves: int | None = None,
        *,
        deadline: float | None = None,
        confidence: float | Sequence[float] | Budget | None = None,
        observe: Observer | None = None,
    ) -> Any:
        """Mean logits, of as many leaves as asked for or as there is time or need for.

        Args:
            x: images, `[N, C, H, W]`.
            leaves: average the first `leaves` leaves; all if nothing is given.
            deadline: seconds from the call; the largest nested size expected to end in time, at
                least one leaf. Needs `calibrate` for this shape on this machine. How slow the last
                calls were against it is remembered, and expected of the next.
            confidence: stop adding leaves to an image once the probability of its likeliest class
                reaches this; one value, one for every nested size but the last, or what
                `treeify.anytime.confidence.budget` chose. Sure images leave the batch.
            observe: called with every answer on the way and the positions `[M]` of the images it is
                for. Its time counts towards a deadline. Without deadline or confidence there are
                answers of every nested size below `leaves` then, and evaluation mode is needed.

        Returns:
            `[N, K]`; with a deadline or confidence a `Prediction`: logits `[N, K]`, leaves per
            image `[N]`, the seconds it took, and whether a deadline was met.

        Raises:
            LeafError: there are not that many leaves.
            InputError: the input does not fit, several of the three are given, the ensemble is in
                training mode, or it has not been calibrated for this input.

        Source: Ruiz & Verbeek, AAAI 2021, section 3.1.
        """
        begin = time.perf_counter()
        _require_one_limit(leaves, deadline, confidence)
        if observe is not None:
            require_callable("observe", observe, "an answer and the positions of its images")
        observer: Observer = observe or (lambda answer, images: None)

        def for_all(step: Answer) -> None:
            observer(step, torch.arange(len(x), device=x.device))

        if deadline is not None:
            check_deadline(deadline)
            session = self.session(x)
            situation = Situation.of(x, training=False)
            latencies = find(self.latencies, situation, self.plan(x))
            slowdown = self._slowdowns.setdefault(situation, Slowdown())
            advance_until(session, latencies, deadline, begin, slowdown=slowdown, observe=for_all)
            logits, used = session.logits, torch.full((len(x),), session.leaves)
            seconds = time.perf_counter() - begin
            return Prediction(logits, used, seconds, seconds <= deadline)
        if confidence is not None:
            sizes = self.tree.nested_sizes
            thresholds = thresholds_for(confidence, sizes)
            logits, used = answer(self.session(x), sizes, thresholds, observe=observer)
            return Prediction(logits, used, time.perf_counter() - begin)
        if observe is None:
            return mean_over_leaves(self(x, leaves=leaves))
        last = self.leaves if leaves is None else leaves
        self.tree.check_size(last)
        session = self.session(x)
        for step in answers(session, [*(s for s in self.tree.nested_sizes if s < last), last]):
            for_all(step)
        return session.logits

    def session(self, x: Tensor) -> Session:
        """Anytime inference on a batch, to be advanced, stopped and resumed as you like.

        Args:
            x: images, `[N, C, H, W]`.

        Raises:
            InputError: the input does not fit, or the ensemble is in training mode.
        """
        self.check_input(x)
        _require_evaluation(self)
        with torch.no_grad():
            plan = self.plan(x)
            return Session(self._program(plan), plan, x, self.count_macs)

    def anytime(self, x: Tensor, sizes: Sequence[int] | None = None) -> Iterator[Answer]:
        """Answers that get better: one step for every size, nothing computed twice.

        Args:
            x: images, `[N, C, H, W]`.
            sizes: increasing numbers of leaves; the nested sizes if not given.

        Yields:
            An `Answer`: leaves, their mean logits `[N, K]`, seconds and MACs per image so far.

        Raises:
            LeafError: a size does not exist, or sizes do not increase.
            InputError: the input does not fit, or the ensemble is in training mode.
        """
        yield from answers(self.session(x), self.tree.nested_sizes if sizes is None else sizes)

    def calibrate(self, x: Tensor, *, repeats: int = 50, budget: float = 30.0) -> Latencies:
        """Measure how long the ways to each nested size take for inputs like `x` on this machine.

        `predict(x, deadline=...)` goes by it. Calibrate under the load you expect, and after
        `tune`: a change of how levels run asks for it again. Saved with the ensemble.

        Args:
            x: images, `[N, C, H, W]`.
            repeats: rounds to measure, each with every transition: from 0 leaves straight to every
                nested size, and from every size to the next.
            budget: seconds after which no more are begun, once five are measured.

        Returns:
            The seconds of every transition; prints as a table.

        Raises:
            InputError: the input does not fit, the ensemble is in training mode, or fewer than two
                rounds are asked for.
        """
        self.session(x)
        situation = Situation.of(x, training=False)
        start, plan, sizes = partial(self.session, x), self.plan(x), self.tree.nested_sizes
        latencies = measure(start, situation, plan, sizes, repeats=repeats, budget=budget)
        self.latencies[situation] = latencies
        self._slowdowns.pop(situation, None)
        return latencies

    def sub_ensemble(self, leaves: int) -> HierarchicalEnsemble:
        """A smaller ensemble of the first `leaves` leaves, with its own copy of what they need.

        Raises:
            LeafError: the first `leaves` leaves form no tree; every nested size does.
        """
        dropped, tree = self.tree.first(leaves)
        splits = Splits(self._splits.points[dropped:], tree)
        smaller = HierarchicalEnsemble(self._traced, splits, self, self._architecture)
        smaller.preparation = self.preparation
        smaller.keep_evaluating(self.evaluating)
        smaller.fill(Source(self._branch, by_leaf=True, notes=self._notes_on_weights))
        return smaller

    @property
    def architecture(self) -> Architecture | None:
        """How to build the base model again; None for a module of the user's own."""
        return self._architecture


def _require_one_limit(*limits: object) -> None:
    if sum(limit is not None for limit in limits) > 1:
        raise InputError(
            "several limits were given.",
            expected="leaves, deadline or confidence",
            next_step="Give one of them.",
        )


def _require_evaluation(hne: HierarchicalEnsemble) -> None:
    if hne.training:
        raise InputError(
            "anytime inference needs running statistics, not those of the batch.",
            expected="an ensemble in evaluation mode",
            next_step="Call hne.eval() first.",
        )
