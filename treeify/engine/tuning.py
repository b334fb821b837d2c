"""Choosing how an ensemble runs by measuring it, for one input shape, mode and machine."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from treeify.arguments import require_integer, require_number
from treeify.engine import timing
from treeify.engine.packed_tensors import set_memory_format
from treeify.engine.plan import Plan, Planner, Situation, Tuning
from treeify.engine.preserve import preserve_buffers
from treeify.engine.program import EXECUTIONS, LOOPED, PACKED
from treeify.errors import InputError, described

_log = logging.getLogger(__name__)

# A plan this much slower in its first round is not measured again: noise on an idle machine is a
# few percent, so that more rounds would cost time and change nothing.
_HOPELESS = 1.3
# A change of one level must gain this much, since each is measured with noise; and this much where
# there was time for one or two rounds only, whose medians are worth less.
_GAIN = 0.98
_GAIN_OF_FEW = 0.93


def tune(
    model: nn.Module,
    planner: Planner,
    run: Callable[[Plan], Any],
    x: Tensor,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    repeats: int = 7,
    budget: float = 10.0,
) -> Tuning:
    """Measure plans of an ensemble, in its present mode, and choose the fastest.

    All levels packed and all looped are measured in both memory formats; from the fastest, the
    execution of one level after the other is changed, and the outcome has to win against the
    fastest once more. Inference is measured without gradients and with batch norms folded; a
    training step is forward and backward.

    The planner remembers the choice; `run` computes the leaves' logits of `x` by a plan. All else
    is as in `HierarchicalEnsemble.tune`.

    Raises:
        InputError: there are no images, or the rounds or the budget are out of range.
    """
    require_integer("repeats", repeats, 1)
    require_number("budget", budget, 0, finite=False, expected="seconds of at least 0")
    if x.numel() == 0:
        raise InputError(
            "there is nothing to measure.",
            expected="at least one image",
            found=described(x),
            next_step="Pass images, as many as are to be answered at once.",
        )
    contest = _Contest(model, planner.levels, run, x, loss or _mean_square, repeats, budget)
    # Parameters that got their memory format in inference mode could never be trained again.
    gradients = _preserve_gradients(model) if model.training else torch.no_grad()
    with torch.inference_mode(False), gradients, preserve_buffers(model):
        plan = contest.fastest()
    tuning = Tuning(Situation.of(x, training=model.training), plan, contest.seconds)
    planner.tunings[tuning.situation] = tuning
    _log.info("%s", tuning)
    return tuning


def _mean_square(logits: Any) -> Tensor:
    """A loss of every output that gradients can come from, whatever the output's structure."""
    outputs = [leaf for leaf in tree_leaves(logits) if isinstance(leaf, Tensor)]
    losses = [output.square().mean() for output in outputs if output.requires_grad]
    return torch.stack(losses).sum()


@contextmanager
def _preserve_gradients(model: nn.Module) -> Iterator[None]:
    """Put gradients and the random state back after training steps."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in gradients:
        parameter.grad = None
    with torch.random.fork_rng(), torch.enable_grad():
        try:
            yield
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient


@dataclass
class _Contest:
    """Plans measured against one another.

    Trying every combination of levels would take `2^levels` measurements; this takes one more per
    level, by changing them one at a time.
    """

    model: nn.Module
    levels: int
    run_plan: Callable[[Plan], Any]
    x: Tensor
    loss: Callable[[Any], Tensor]
    repeats: int
    budget: float
    seconds: dict[str, float] = field(default_factory=dict)

    def fastest(self) -> Plan:
        """The plan that wins."""
        formats = (True, False) if self.x.ndim == 4 else (None,)
        uniform = best = min(map(self._best_uniform, formats), key=self._time)
        set_memory_format(self.model, best.memory_format)
        for level in range(1, self.levels):
            best = self._challenge(best, level)
        # Several wins by a little may be luck: together they must win again.
        return uniform if best == uniform else self._better(uniform, best)

    def _time(self, plan: Plan) -> float:
        return self.seconds[str(plan)]

    def _best_uniform(self, channels_last: bool | None) -> Plan:
        """All levels packed or all looped, whichever is faster."""
        fuse = not self.model.training
        plans = [Plan((execution,) * self.levels, channels_last, fuse) for execution in EXECUTIONS]
        set_memory_format(self.model, plans[0].memory_format)
        self._measure(plans)
        return min(plans, key=self._time)

    def _challenge(self, best: Plan, level: int) -> Plan:
        """The better of a plan and the same with the execution of one level changed."""
        execution = list(best.execution)
        execution[level] = LOOPED if execution[level] == PACKED else PACKED
        other = replace(best, execution=tuple(execution))
        before = self._time(best)
        better = self._better(best, other)
        if better == best:
            # It was measured anew, perhaps in a slow spell: later ones are compared with its best.
            self.seconds[str(best)] = min(before, self._time(best))
        return better

    def _better(self, best: Plan, other: Plan) -> Plan:
        """The other plan if it is faster by enough, measured in turns."""
        gain = _GAIN if self._measure([best, other]) > 2 else _GAIN_OF_FEW
        return other if self._time(other) < gain * self._time(best) else best

    def _measure(self, plans: list[Plan]) -> int:
        """Record the median time of each plan, measured in turns.

        Returns:
            How many rounds there was time for.
        """
        device = self.x.device
        actions = {str(plan): self._action(plan) for plan in plans}
        rounds = timing.alternate(actions, device, repeats=1, warm_up=False)
        # The first calls only warm up, unless they are too long to be made twice.
        if sum(times[0] for times in rounds.values()) < self.budget:
            rounds = timing.alternate(actions, device, repeats=1, warm_up=False)
        fastest = min(times[0] for times in rounds.values())
        promising = {
            name: actions[name] for name, times in rounds.items() if times[0] <= _HOPELESS * fastest
        }
        if len(promising) > 1:
            further = timing.alternate(
                *(promising, device),
                repeats=self.repeats - 1,
                budget=self.budget - sum(times[0] for times in rounds.values()),
                at_least=0,
                warm_up=False,
            )
            for name, times in further.items():
                rounds[name] += times
        self.seconds |= {name: median(times) for name, times in rounds.items()}
        return max(map(len, rounds.values()))

    def _action(self, plan: Plan) -> Callable[[], None]:
        def infer() -> None:
            self.run_plan(plan)

        def train() -> None:
            loss = self.loss(self.run_plan(plan))
            if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
                raise InputError(
                    "the loss to tune a training step with is none.",
                    expected="one number that gradients come from",
                    found=described(loss),
                    next_step="Average it over the batch: a loss of treeify.losses does.",
                )
            loss.backward()  # type: ignore[no-untyped-call]
            self.model.zero_grad()

        return train if self.model.training else infer
