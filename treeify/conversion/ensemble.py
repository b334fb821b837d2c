"""The hierarchical neural ensemble: a tree of networks as one `nn.Module`."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from treeify.anytime.confidence import Budget, Prediction, answer, thresholds_for
from treeify.anytime.deadline import (
    Latencies,
    Slowdown,
    advance_until,
    check_deadline,
    find,
    measure,
)
from treeify.anytime.session import Answer, Session, answers, mean_over_leaves
from treeify.conversion import splits as split_module
from treeify.conversion.initialize import State, pack_states
from treeify.conversion.rewrite import rewrite, without_in_place
from treeify.conversion.splits import Splits
from treeify.engine.forms import Form
from treeify.engine.packed_tensors import Packer, Slot, get_parent, get_tensor, named_tensors, slots
from treeify.engine.plan import Plan, Planner, Situation, Tuning
from treeify.engine.preserve import preserve_modes
from treeify.engine.program import PACKED, NodeReport, Program
from treeify.engine.tuning import tune
from treeify.errors import InputError
from treeify.fusion.fuser import FusedTwin
from treeify.rules import widen_rules
from treeify.tracing.side_effects import undo_side_effects
from treeify.tracing.trace import Traced
from treeify.tree import Span, Tree

if TYPE_CHECKING:
    from treeify.models.architecture import Architecture

# Called with an answer on the way and the positions `[M]` in the batch of the images it is for.
Observer = Callable[[Answer, Tensor], None]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did: the splits and how every node runs.

    Args:
        splits: the split points.
        nodes: every node of the evaluation graph.
        training_nodes: every node of the training graph.
        notes: what a user should know, e.g. modules that could not re-initialise themselves.
    """

    splits: Splits
    nodes: tuple[NodeReport, ...]
    training_nodes: tuple[NodeReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def packed_share(self) -> float:
        """Share of the branches' MACs (level 1 and up) that runs packed, 0 to 1."""
        branched = [node for node in self.nodes if node.level > 0]
        total = sum(node.macs for node in branched)
        packed = sum(node.macs for node in branched if node.form is not Form.BRANCHES)
        return packed / total if total else 1.0

    @property
    def fallbacks(self) -> dict[str, int]:
        """Reasons why nodes run per branch, with how many nodes each concerns."""
        reasons = Counter(
            f"{node.operation}: {node.reason}" for node in self.nodes if node.form is Form.BRANCHES
        )
        return dict(reasons.most_common())

    def __str__(self) -> str:
        """One line a level, then the reasons for what runs per branch."""
        lines = [f"splits: {', '.join(self.splits.specs) or 'none'}"]
        for level, branches in enumerate(self.splits.tree.branches):
            counts = Counter(node.form.value for node in self.nodes if node.level == level)
            forms = ", ".join(f"{count} {form}" for form, count in sorted(counts.items()))
            lines.append(f"level {level} x {branches}: {forms or 'nothing'}")
        lines.append(f"{self.packed_share:.1%} of the branches' MACs run packed")
        lines += [f"per branch: {count} x {reason}" for reason, count in self.fallbacks.items()]
        lines += list(self.notes)
        return "\n".join(lines)


class HierarchicalEnsemble(nn.Module):
    """A tree of `L` networks that share their early layers; maps images to every leaf's logits.

    Parameters carry the base model's own names; each holds the branches of its level, concatenated
    along dim 0. Made by `treeify.hierarchicalize`, `treeify.pack` and `treeify.load`, which fill
    the tensors that this constructor only allocates.

    What was measured is kept with it and saved: `latencies` by situation (see `calibrate`),
    `tunings` (see `tune`), and `budgets`, confidence thresholds by their mean MACs per image
    (see `treeify.anytime.confidence.budget`).

    Args:
        traced: the base model, traced.
        splits: where it splits.
        like: the base model, for the tensors' devices, dtypes and mode.
        architecture: how to build the base model again, if known.
        notes: for the conversion report.
    """

    def __init__(
        self,
        traced: Traced,
        splits: Splits,
        like: nn.Module,
        architecture: Architecture | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self._traced = traced
        self._splits = splits
        self._architecture = architecture
        self._given_notes = notes
        levels = {
            training: split_module.levels(graph, splits.names)
            for training, graph in traced.graphs.items()
        }
        uses = [(node, level) for known in levels.values() for node, level in known.items()]
        self._slots = slots(traced.skeleton, uses)
        calls = [(str(node.target), level) for node, level in uses if node.op == "call_module"]
        whole = {target for target, level in calls if level == 0} - {
            target for target, level in calls if level > 0
        }
        packer = Packer(self._slots, splits.tree, widen_rules(), dict(named_tensors(like)), whole)
        packer.pack_children(self, traced.skeleton)
        base = without_in_place(traced.skeleton)
        self._programs = {
            training: rewrite(traced, base, training, own, self._slots, self, splits.tree)
            for training, own in levels.items()
        }
        _allow_in_place(self, self._programs[False], self._programs[True])
        self._fused = FusedTwin(self._programs[False])
        # A fused layer does not call the modules it stands for, nor their hooks.
        self._hooks = [
            hooks
            for module in self.children()
            for below in module.modules()
            for hooks in (below._forward_hooks, below._forward_pre_hooks)
        ]
        self._planner = Planner(splits.tree.levels)
        self.latencies: dict[Situation, Latencies] = {}
        self._slowdowns: dict[Situation, Slowdown] = {}
        self.budgets: dict[int, Budget] = {}
        self._shared_buffers = _shared_buffers(traced.skeleton, self._slots, calls)
        self._conversion = Conversion(
            splits,
            self._programs[False].nodes,
            self._programs[True].nodes,
            (*notes, *_notes(self._shared_buffers), *_tracing_notes(traced)),
        )
        # What the base model's own `train` leaves in evaluation mode, such as frozen batch norms.
        with undo_side_effects(traced.skeleton):
            traced.skeleton.train()
            self._evaluating = [path for path, own in _named(traced.skeleton) if not own.training]
        self.train(like.training)
        _take_modes(self, like)

    def fill(self, source: Callable[[int], State], *, by_leaf: bool = False) -> None:
        """Fill the packed tensors, uninitialised so far; see `initialize.pack_states`."""
        pack_states(self, self._slots.values(), self.tree, source, by_leaf=by_leaf)

    @property
    def tree(self) -> Tree:
        """The tree's shape: fanouts, branches per level, nested sizes."""
        return self._splits.tree

    @property
    def leaves(self) -> int:
        """Number of leaves `L`."""
        return self.tree.leaves

    @property
    def conversion(self) -> Conversion:
        """Every node's level, whether it runs packed or per branch, and why."""
        return self._conversion

    def forward(self, x: Tensor, leaves: int | None = None) -> Any:
        """Logits of the first `leaves` leaves, depth-first.

        Args:
            x: images, `[N, C, H, W]`.
            leaves: how many; all if not given. Only the branches those leaves need are computed.

        Returns:
            `[N, leaves, K]`. Where the base model returns several tensors, its own structure, each
            tensor with the leaf dim at 1.

        Raises:
            LeafError: there are not that many leaves.
            InputError: the input is no batch of images with the base model's channels.
        """
        count = self.leaves if leaves is None else leaves
        self.tree.check_size(count)
        self.check_input(x)
        return self.run(x, count, self.plan(x))

    def train(self, mode: bool = True) -> HierarchicalEnsemble:
        """Training or evaluation mode, but for modules that the base's own `train` leaves alone."""
        if mode or self.training:
            self._fused.forget()
        super().train(mode)
        for path in self._evaluating:
            self.get_submodule(path).training = False
        return self

    def run(self, x: Tensor, leaves: int, plan: Plan) -> Any:
        """Logits of the first `leaves` leaves by a plan of one's own, as `forward` gives them."""
        return self._program(plan).run(plan.arrange(x), Span(0, leaves), plan.execution)

    def _program(self, plan: Plan) -> Program:
        """The program that runs a plan in the present mode."""
        # Folded weights have no gradients of their own, and compiling folds by itself.
        allowed = not (self.training or torch.is_grad_enabled() or _is_recorded())
        if plan.fuse and allowed and not any(self._hooks):
            return self._fused.usable()
        return self._programs[self.training]

    @property
    def execution(self) -> str | tuple[str, ...]:
        """How levels run: `packed`, `looped`, `auto` (as tuned, else packed), or one per level.

        - `packed` runs all branches of a level as one grouped operation;
        - `looped` runs branch by branch over the same parameters, consecutive looped levels
          depth-first.
        """
        return self._planner.setting

    @execution.setter
    def execution(self, setting: str | Sequence[str]) -> None:
        self._planner.set(setting)

    @property
    def tunings(self) -> dict[Situation, Tuning]:
        """What `tune` measured and chose, by situation; saved with the ensemble."""
        return self._planner.tunings

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
            InputError: the input does not fit the model, or has no images.
        """
        self.check_input(x)
        with preserve_modes(self):
            self.train(self.training if training is None else training)
            run = partial(self.run, x, self.leaves)
            return tune(self, self._planner, run, x, loss=loss, repeats=repeats, budget=budget)

    def plan(self, x: Tensor) -> Plan:
        """How an input like `x` runs in the present mode."""
        plan = self._planner.plan(x, training=self.training, tuned=not _is_recorded())
        if self.training and self._shared_buffers:
            # The mean of the branches' updates needs all branches at once.
            return replace(plan, execution=(PACKED,) * self.tree.levels)
        return plan

    @overload
    def predict(
        self,
        x: Tensor,
        leaves: int | None = None,
        *,
        deadline: float | None = None,
        confidence: None = None,
        observe: Observer | None = None,
    ) -> Tensor: ...

    @overload
    def predict(
        self,
        x: Tensor,
        leaves: int | None = None,
        *,
        deadline: float | None = None,
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
            `[N, K]`; with confidence a `Prediction`: logits `[N, K]` and leaves per image `[N]`.

        Raises:
            LeafError: there are not that many leaves.
            InputError: the input does not fit, several of the three are given, the ensemble is in
                training mode, or it has not been calibrated for this input.

        Source: Ruiz & Verbeek, AAAI 2021, section 3.1.
        """
        begin = time.perf_counter()
        if sum(limit is not None for limit in (leaves, deadline, confidence)) > 1:
            raise InputError(
                "several limits were given.", expected="leaves, deadline or confidence"
            )
        observer: Observer = observe or (lambda answer, images: None)

        def for_all(step: Answer) -> None:
            observer(step, torch.arange(len(x), device=x.device))

        if deadline is not None:
            check_deadline(deadline)
            session = self.session(x)
            known = self._latencies_for(x)
            slowdown = self._slowdowns.setdefault(known.situation, Slowdown())
            advance_until(session, known, deadline, begin, slowdown=slowdown, observe=for_all)
            return session.logits
        if confidence is not None:
            sizes = self.tree.nested_sizes
            thresholds = thresholds_for(confidence, sizes)
            return answer(self.session(x), sizes, thresholds, observe=observer)
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
        if self.training:
            raise InputError(
                "anytime inference needs running statistics, not those of the batch.",
                expected="an ensemble in evaluation mode",
                next_step="Call hne.eval() first.",
            )
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
        start = partial(self.session, x)
        found = measure(
            *(start, situation, self.plan(x), self.tree.nested_sizes),
            repeats=repeats,
            budget=budget,
        )
        self.latencies[situation] = found
        self._slowdowns.pop(situation, None)
        return found

    def _latencies_for(self, x: Tensor) -> Latencies:
        return find(self.latencies, Situation.of(x, training=False), self.plan(x))

    def leaf(self, index: int) -> nn.Module:
        """The untouched base architecture with a copy of one leaf's weights, in the same modes.

        Raises:
            LeafError: the leaf does not exist.
        """
        parts = self._branch(index)
        # Copying the skeleton with the leaf's tensors in the place of its own keeps tied ones tied.
        memo: dict[int, Any] = {}
        for key, base in named_tensors(self._traced.skeleton):
            if id(base) not in memo:
                value = parts[key].detach().clone()
                if isinstance(base, nn.Parameter):
                    value = nn.Parameter(value, requires_grad=get_tensor(self, key).requires_grad)
                memo[id(base)] = value
        leaf = copy.deepcopy(self._traced.skeleton, memo).train(self.training)
        _take_modes(leaf, self)
        return leaf

    def _branch(self, leaf: int) -> dict[str, Tensor]:
        """Views of one leaf's tensors, under the base model's keys and in its shapes."""
        return {key: self.part(key, leaf, get_tensor(self, key)) for key in self._slots}

    def part(self, key: str, leaf: int, packed: Tensor) -> Tensor:
        """What belongs to one leaf of a tensor packed like the parameter or buffer `key`; a view.

        Args:
            key: state-dict key.
            leaf: the leaf whose branch is meant.
            packed: the tensor itself, its gradient, an optimizer's momentum, ...: `[G*D0, ...]`.

        Returns:
            A tensor of the base model's shape `[D0, ...]`.
        """
        slot = self._slots[key]
        return slot.branch(packed, self.branches_of(key), self.tree.path(leaf)[slot.level])

    def branches_of(self, key: str) -> int:
        """How many branches the parameter or buffer `key` is packed from."""
        return self.tree.branches[self._slots[key].level]

    def sub_ensemble(self, leaves: int) -> HierarchicalEnsemble:
        """A smaller ensemble of the first `leaves` leaves, with its own copy of what they need.

        Raises:
            LeafError: the first `leaves` leaves form no tree; every nested size does.
        """
        dropped, tree = self.tree.first(leaves)
        kept = self._splits.points[dropped:]
        smaller = HierarchicalEnsemble(
            self._traced, Splits(kept, tree), self, self._architecture, self._given_notes
        )
        smaller.fill(self._branch, by_leaf=True)
        return smaller

    @property
    def traced(self) -> Traced:
        """The base model, traced."""
        return self._traced

    @property
    def architecture(self) -> Architecture | None:
        """How to build the base model again; None for a module of the user's own."""
        return self._architecture

    @property
    def skeleton(self) -> nn.Module:
        """The untouched base architecture on the meta device, without weights."""
        return self._traced.skeleton

    @property
    def shared_buffers(self) -> tuple[str, ...]:
        """Buffers of modules called at several levels: branches share the mean of their updates."""
        return self._shared_buffers

    @property
    def example(self) -> tuple[int, ...]:
        """The shape of an image `(C, H, W)` that the ensemble was converted for."""
        return self._traced.example

    def example_images(self, count: int) -> Tensor:
        """Random images of the example's shape, `[count, C, H, W]`, on the ensemble's device."""
        like = next(self.parameters())
        return torch.rand(count, *self.example, device=like.device, dtype=like.dtype)

    def count_parameters(self, leaves: int | None = None) -> int:
        """Parameters in the branches that the first `leaves` leaves need; of all if not given."""
        counts = self.tree.branch_count(self.leaves if leaves is None else leaves)
        return sum(
            parameter.numel() // self.tree.branches[level] * counts[level]
            for name, parameter in self.named_parameters()
            for level in (self._slots[name].level,)
        )

    def count_macs(self, leaves: int | None = None) -> int:
        """MACs per image for the first `leaves` leaves: each level's times its branches.

        Source: Ruiz & Verbeek, AAAI 2021, section 3.1.
        """
        counts = self.tree.branch_count(self.leaves if leaves is None else leaves)
        return sum(node.macs * counts[node.level] for node in self._conversion.nodes)

    def extra_repr(self) -> str:
        """The tree and the splits."""
        return f"{self.leaves} leaves, splits {', '.join(self._splits.specs) or 'none'}"

    def check_input(self, x: Tensor) -> None:
        """Refuse what cannot be images for this model.

        Raises:
            InputError: it is no `[N, C, H, W]` with the model's channels, or its only size.
        """
        example = self._traced.example
        fixed = len(example) if self._traced.limits.one_size else 1
        if (
            not isinstance(x, Tensor)
            or x.ndim != len(example) + 1
            or x.shape[1 : 1 + fixed] != example[:fixed]
        ):
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            hint = " (H and W as far as the base model allows)"
            raise InputError(
                "the input does not fit the model.",
                expected=f"images of shape [N, {', '.join(map(str, example))}]"
                + ("" if self._traced.limits.one_size else hint),
                found=found,
            )


def _is_recorded() -> bool:
    """Whether the forward pass is being compiled, traced or transformed, as by `torch.func`."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    is_dual = torch.autograd.forward_ad._current_level >= 0
    return is_dual or torch._C._functorch.peek_interpreter_stack() is not None


def _shared_buffers(
    skeleton: nn.Module, layout: Mapping[str, Slot], calls: Sequence[tuple[str, int]]
) -> tuple[str, ...]:
    keys = {
        f"{target}.{name}"
        for target, level in calls
        for name, _ in skeleton.get_submodule(target).named_buffers()
        if layout[f"{target}.{name}"].level < level
    }
    return tuple(sorted(keys))


def _named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules(remove_duplicate=False))


def _take_modes(model: nn.Module, like: nn.Module) -> None:
    """Put modules in the mode of those of the same path."""
    modules = dict(_named(model))
    for path, own in _named(like):
        if path in modules:
            modules[path].training = own.training


def _notes(shared_buffers: Sequence[str]) -> tuple[str, ...]:
    if not shared_buffers:
        return ()
    return (
        "updated at several levels, so that branches share the mean of their training updates: "
        + ", ".join(shared_buffers),
    )


def _tracing_notes(traced: Traced) -> Iterator[str]:
    limits = traced.limits
    if limits.one_size:
        size = " x ".join(map(str, traced.example[1:]))
        yield f"takes images of {size} alone, since what the model does depends on their size"
    if limits.fixed:
        yield "does what these buffers said when it was converted: " + ", ".join(limits.fixed)
    if limits.recomputed:
        yield "keeps all activations in training: torch.utils.checkpoint is left out"
    if limits.assigned:
        more = f" and {len(limits.assigned) - 3} more" if len(limits.assigned) > 3 else ""
        yield "does not set the attributes " + ", ".join(limits.assigned[:3]) + more
    for path, reason in traced.leaf_modules.items():
        kind = type(traced.skeleton.get_submodule(path)).__name__
        yield f"{path} ({kind}) runs as one call, since its inside cannot be traced: {reason}"


def _allow_in_place(root: nn.Module, *programs: Program) -> None:
    """Switch in-place activations on again where every program finds them safe."""
    verdicts: dict[str, bool] = {}
    for program in programs:
        for target, safe in program.in_place.items():
            verdicts[target] = verdicts.get(target, True) and safe
    for target, safe in verdicts.items():
        holder, name = get_parent(root, target)
        storage = holder._modules[name]
        if safe and hasattr(storage, "inplace"):
            storage.inplace = True  # type: ignore[union-attr]
