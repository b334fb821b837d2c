"""What a plan is: trees to choose from, what each costs, and the one that is picked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import yaml
from pydantic import TypeAdapter

from treeify.arguments import require_integer, require_type
from treeify.evaluation.cost import Cost
from treeify.models.architecture import Architecture
from treeify.planning.limits import MACS, MB, MS, PARAMS, Budget, amount
from treeify.tree import Tree

RANKING = (
    "Ranked by leaves times mean own fraction: as many networks' worth of MACs the leaves have for"
    " themselves. Own MACs stand for diversity; accuracy is not known before training."
)


@dataclass(frozen=True)
class Candidate:
    """A tree that no other beats: none has as many leaves, as high a mean and a lower cost.

    Args:
        splits: `name:fanout`, from the input to the output: what `hierarchicalize` takes.
        fanouts: of the splits.
        nested: what every nested size costs.
        bytes: of all parameters and buffers.
        behind: the fraction of a leaf's MACs behind each split, which leaves that part there do
            not share.
        mean_own: the geometric mean of `behind`, in which a split counts as often as it doubles
            the leaves: what newcomers own, whenever the leaves double.
        forecast: seconds for one image of every nested size, if those were asked for.
        measured: the same, measured; None where the tree was not run.
    """

    splits: tuple[str, ...]
    fanouts: tuple[int, ...]
    nested: tuple[Cost, ...]
    bytes: int
    behind: tuple[float, ...]
    mean_own: float
    forecast: tuple[float, ...] | None = None
    measured: tuple[float, ...] | None = None

    @property
    def tree(self) -> Tree:
        """Its shape."""
        return Tree(self.fanouts)

    @property
    def leaves(self) -> int:
        """How many leaves it has."""
        return self.nested[-1].leaves

    @property
    def own(self) -> float:
        """The fraction of a leaf's MACs that no other leaf shares, 0 to 1."""
        return self.behind[-1]

    @property
    def worth(self) -> float:
        """What the ranking is by: leaves times `mean_own`."""
        return self.leaves * self.mean_own

    def cost(self, quantity: str) -> float:
        """What all leaves cost, in the quantity of a budget.

        Args:
            quantity: of `treeify.planning.limits.QUANTITIES`; `ms` is the forecast.

        Raises:
            InputError: times were not asked for.
        """
        if quantity == MS:
            require_type("forecast", self.forecast, tuple, "a plan made with max_ms or measure")
            assert self.forecast is not None
            return 1e3 * self.forecast[-1]
        last = self.nested[-1]
        return {MACS: last.macs, PARAMS: last.parameters, MB: self.bytes / 1e6}[quantity]

    def __str__(self) -> str:
        """One line."""
        costs = " / ".join(f"{cost.macs:,}" for cost in self.nested)
        return (
            f"{self.leaves} leaves, splits {', '.join(self.splits)}: {costs} MACs,"
            f" {self.nested[-1].parameters:,} parameters, own {self.own:.1%}"
            f" (mean {self.mean_own:.1%})"
        )


@dataclass(frozen=True)
class SplitPlan:
    """Trees to choose from within a budget, the best first.

    Args:
        model: the base model, with its builder's arguments where they are known.
        architecture: how to build it, if that is known.
        input: the shape of its images, `(C, H, W)`.
        base: what the base model, and so the first answer, costs.
        budget: the most that all leaves may cost.
        points: how many split points were searched.
        optimal: how many trees within the budget no other beats.
        candidates: of those, for each number of leaves the best within each quarter of what the
            budget adds to the base model, as `RANKING` says.
        picked: the position of the one to take, from 1 on.
        notes: what a user should know.
    """

    model: str
    architecture: Architecture | None
    input: tuple[int, ...]
    base: Cost
    budget: Budget
    points: int
    optimal: int
    candidates: tuple[Candidate, ...]
    picked: int = 1
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> Candidate:
        """The tree to take."""
        return self.candidates[self.picked - 1]

    def pick(self, position: int) -> SplitPlan:
        """The same plan with another tree picked.

        Args:
            position: of the candidate, from 1 on.

        Raises:
            InputError: there is no such candidate.
        """
        count = len(self.candidates)
        require_integer("pick", position, 1, count, next_step="Pick a row of the table.")
        return replace(self, picked=position)

    @property
    def sentence(self) -> str:
        """The pick in one sentence."""
        chosen = self.chosen
        total, first = chosen.nested[-1].macs, self.base.macs
        times = [] if chosen.forecast is None else [f"{1e3 * chosen.forecast[-1]:.3g} ms forecast"]
        costs = ", ".join([f"{total:,} MACs", *times])
        return (
            f"Pick {self.picked} of {len(self.candidates)}: {chosen.leaves} leaves for {costs}"
            f" ({total / first:.2f} x one model, {total / first / chosen.leaves:.0%} of"
            f" {chosen.leaves} independent ones); newcomers own {chosen.mean_own:.0%} of a leaf on"
            f" average, the last {chosen.own:.1%}."
        )

    @property
    def option(self) -> str:
        """What to add to `treeify convert NAME` for the tree picked."""
        return f"--splits {','.join(self.chosen.splits)}"

    @property
    def recipe(self) -> str | None:
        """The model section of a recipe; None for a module that no builder is known of."""
        if self.architecture is None:
            return None
        model: dict[str, Any] = {"name": self.architecture.name}
        if self.architecture.kwargs:
            model["kwargs"] = dict(self.architecture.kwargs)
        model["splits"] = list(self.chosen.splits)
        text: str = yaml.safe_dump({"model": model}, sort_keys=False, width=100)
        return text

    def __str__(self) -> str:
        """A line for every tree, the pick and what to paste."""
        shape = " x ".join(map(str, self.input))
        lines = [
            f"{self.model} at {shape}: {amount(self.base.macs, 'macs')}, at most {self.budget}"
        ]
        lines += [f"{number:3d}  {tree}" for number, tree in enumerate(self.candidates, 1)]
        return "\n".join([*lines, RANKING, self.sentence, self.option, *self.notes])


# To and from JSON values.
SPLIT_PLAN = TypeAdapter(SplitPlan)
