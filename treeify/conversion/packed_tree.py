"""A tree of networks as one module: packed tensors, and the programs that run them."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from treeify.arguments import (
    is_recorded,
    require_integer,
    require_iterable,
    require_member,
    require_type,
)
from treeify.conversion import initialize
from treeify.conversion.converted_model import ConvertedModel
from treeify.conversion.decide import Decider, Decision, overwriting, without_in_place
from treeify.conversion.emit import Emitter
from treeify.conversion.initialize import Source
from treeify.conversion.input_check import InputCheck
from treeify.conversion.levels import levels
from treeify.conversion.report import Conversion, notes
from treeify.conversion.splits import Splits
from treeify.engine.memory import require_memory
from treeify.engine.packed_tensors import (
    Packer,
    Slot,
    get_submodule,
    get_tensor,
    named_tensors,
    slots,
)
from treeify.engine.plan import Plan, Planner
from treeify.engine.preserve import preserve_modes
from treeify.engine.program import PACKED, Program
from treeify.errors import InputError, described
from treeify.fusion.fuser import FusedTwin
from treeify.rules import widen_rules
from treeify.tracing.side_effects import undo_side_effects
from treeify.tracing.trace import Traced
from treeify.tree import Span, Tree

_Self = TypeVar("_Self", bound="PackedTree")


class PackedTree(ConvertedModel):
    """What an ensemble computes: `L` networks that share their early layers, without measurements.

    The arguments are those of `HierarchicalEnsemble`.
    """

    def __init__(self, traced: Traced, splits: Splits, like: nn.Module) -> None:
        """Allocate the packed tensors, decide how every node runs and write both programs."""
        super().__init__(traced)
        self._splits = splits
        self._input = InputCheck(traced.example, one_size=traced.limits.one_size)
        skeleton, tree = traced.skeleton, splits.tree
        node_levels = {
            training: levels(graph, splits.names) for training, graph in traced.graphs.items()
        }
        uses = [use for mode_levels in node_levels.values() for use in mode_levels.items()]
        self._slots = slots(skeleton, uses)
        tensors = dict(named_tensors(like))
        require_memory(self._slots, tree, tensors)
        calls = [(str(node.target), level) for node, level in uses if node.op == "call_module"]
        # Modules called before the first split only have one branch: they stay what they are.
        unbranched = {path for path, level in calls if level == 0}
        unbranched -= {path for path, level in calls if level > 0}
        packer = Packer(self._slots, tree, widen_rules(), tensors, unbranched)
        packer.pack_children(self, skeleton)
        self._shared_buffers = _shared_buffers(skeleton, self._slots, calls)
        base = without_in_place(skeleton)
        decisions: dict[bool, dict[fx.Node, Decision]] = {}
        self._programs: dict[bool, Program] = {}
        for training, graph in traced.graphs.items():
            decider = Decider(traced, base, node_levels[training], self._slots, self, tree)
            decisions[training] = decider.run(graph)
            self._programs[training] = Emitter(decisions[training], tree).run(graph)
        for path in overwriting(decisions.values()):
            storage = get_submodule(self, path)
            if hasattr(storage, "inplace"):
                storage.inplace = True  # type: ignore[assignment]
        self._nodes = {training: _reported(mode) for training, mode in decisions.items()}
        self._fused = FusedTwin(self._programs[False])
        self._hooks = _hook_tables(self)
        self._planner = Planner(tree.levels)
        self._notes_on_weights: tuple[str, ...] = ()
        self._evaluating = _left_evaluating(skeleton)
        self.train(like.training)
        _copy_modes(like, self)  # `train` knows one mode for all; parts may be in another

    def fill(self, source: Source) -> None:
        """Fill the packed tensors, which the constructor leaves uninitialised.

        Raises:
            InputError: the source is none.
        """
        require_type("source", source, Source, "a treeify.conversion.initialize.Source")
        slots = self._slots.values()
        initialize.fill(self, slots, self.tree, source)
        drawn = initialize.require_drawn(self, slots, self.tree) if source.drawn else []
        self._notes_on_weights = (*source.notes, *drawn)

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
        facts = (*self._notes_on_weights, *notes(self._traced, self._shared_buffers))
        return Conversion(self._splits, self._nodes[False], self._nodes[True], facts)

    def forward(self, x: Tensor, leaves: int | None = None) -> Any:
        """Logits of the first `leaves` leaves, depth-first.

        Args:
            x: images, `[N, C, H, W]`.
            leaves: how many; all if not given. Only the branches those leaves need are computed.

        Returns:
            `[N, leaves, K]`. Where the base model returns several tensors, its own structure, each
            tensor with the leaf dim at 1. To train on, give them to a loss of `treeify.losses`.

        Raises:
            LeafError: there are not that many leaves.
            InputError: the input is no batch of images with the base model's channels.
        """
        count = self.leaves if leaves is None else leaves
        self.tree.check_size(count)
        self.check_input(x)
        return self.run(x, count, self.plan(x))

    def train(self: _Self, mode: bool = True) -> _Self:
        """Training or evaluation mode, but for modules that the base's own `train` leaves alone."""
        if mode or self.training:
            self._fused.forget()
        super().train(mode)
        for path in self._evaluating:
            self.get_submodule(path).training = False
        return self

    @property
    def evaluating(self) -> tuple[str, ...]:
        """Paths of the modules that stay in evaluation mode when the rest is trained."""
        return tuple(self._evaluating)

    def keep_evaluating(self, paths: Iterable[str]) -> None:
        """Leave modules in evaluation mode whenever the rest is trained, as frozen batch norms.

        Raises:
            InputError: a path is that of no module.
        """
        modules = dict(self.named_modules(remove_duplicate=False))
        require_iterable("paths", paths, "a list of paths of modules")
        named = list(paths)
        for path in named:
            require_member("module", path, modules, "dict(hne.named_modules())")
        self._evaluating = sorted({*self._evaluating, *named})
        self.train(self.training)

    def run(self, x: Tensor, leaves: int, plan: Plan) -> Any:
        """Logits of the first `leaves` leaves by a plan of one's own, as `forward` gives them.

        Raises:
            LeafError: there are not that many leaves.
            InputError: the plan is none, or for another number of levels.
        """
        self.tree.check_size(leaves)
        require_type("plan", plan, Plan, "a treeify.engine.plan.Plan, such as hne.plan(x)")
        require_integer("the plan's levels", len(plan.execution), *2 * [self.tree.levels])
        return self._program(plan).run(plan.arrange(x), Span(0, leaves), plan.execution)

    @property
    def evaluation_program(self) -> Program:
        """The program of evaluation mode, nothing fused."""
        return self._programs[False]

    @property
    def packed_tensors(self) -> dict[str, Tensor]:
        """Every packed parameter and buffer by its key."""
        return {key: get_tensor(self, key) for key in self._slots}

    def level_of(self, key: str) -> int:
        """The level whose branches each have the parameter or buffer `key`."""
        require_member("parameter or buffer", key, self._slots, "hne.state_dict()")
        return self._slots[key].level

    def _program(self, plan: Plan) -> Program:
        """The program that runs a plan in the present mode."""
        # Folded weights have no gradients of their own, and compiling folds by itself.
        allowed = not (self.training or torch.is_grad_enabled() or is_recorded())
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

    def plan(self, x: Tensor) -> Plan:
        """How an input like `x` runs in the present mode.

        Raises:
            InputError: it is no batch of images with the base model's channels.
        """
        self._input.check_shape(x)
        plan = self._planner.plan(x, training=self.training, tuned=not is_recorded())
        if self.training and self._shared_buffers:
            # The mean of the branches' updates needs all branches at once.
            return replace(plan, execution=(PACKED,) * self.tree.levels)
        return plan

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
        _copy_modes(self, leaf)
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

        Raises:
            LeafError: the leaf does not exist.
            InputError: there is no such key, or the tensor is of no such branches.
        """
        branches, slot = self.branches_of(key), self._slots[key]
        require_type("packed", packed, Tensor, f"a tensor like {key!r}")
        like = get_tensor(self, key)
        if packed.ndim != like.ndim or packed.shape[0] != like.shape[0]:
            raise InputError(
                f"the tensor is not packed like {key!r}.",
                expected=f"as many dims and rows as {described(like)}",
                found=described(packed),
                next_step="Give the parameter, its gradient, or an optimizer's state of its shape.",
            )
        return slot.branch(packed, branches, self.tree.path(leaf)[slot.level])

    def branches_of(self, key: str) -> int:
        """How many branches the parameter or buffer `key` is packed from.

        Raises:
            InputError: there is no such key.
        """
        require_member("parameter or buffer", key, self._slots, "hne.state_dict()")
        return self.tree.branches[self._slots[key].level]

    @property
    def shared_buffers(self) -> tuple[str, ...]:
        """Buffers of modules called at several levels: branches share the mean of their updates."""
        return self._shared_buffers

    def count_parameters(self, leaves: int | None = None) -> int:
        """Parameters in the branches that the first `leaves` leaves need; of all if not given.

        Raises:
            LeafError: there are not that many leaves.
        """
        counts = self.tree.branch_count(self.leaves if leaves is None else leaves)
        return sum(
            parameter.numel() // self.tree.branches[level] * counts[level]
            for name, parameter in self.named_parameters()
            for level in (self._slots[name].level,)
        )

    def count_macs(self, leaves: int | None = None) -> int:
        """MACs per image for the first `leaves` leaves: each level's times its branches.

        Raises:
            LeafError: there are not that many leaves.

        Source: Ruiz & Verbeek, AAAI 2021, section 3.1.
        """
        counts = self.tree.branch_count(self.leaves if leaves is None else leaves)
        return sum(node.macs * counts[node.level] for node in self._nodes[False])

    def extra_repr(self) -> str:
        """The tree and the splits."""
        return f"{self.leaves} leaves, splits {', '.join(self._splits.specs) or 'none'}"

    def check_input(self, x: Tensor) -> None:
        """Refuse what cannot be images for this model.

        Raises:
            InputError: it is no `[N, C, H, W]` with the model's channels, or its only size, or of
                a dtype or on a device that the model cannot compute with; or there is none, in
                training mode or where the model cannot compute that.
        """
        self._input.check_shape(x)
        if self.training:
            self._input.require_images(x)
        first = None if is_recorded() else next(self.parameters(), None)
        if first is not None:
            run = partial(_error, self)
            self._input.check_place(x, first.device, run)
            self._input.check_dtype(x, first.dtype, run)


def _reported(decisions: Mapping[fx.Node, Decision]) -> tuple[Decision, ...]:
    """Decisions without modules: who keeps a report does not want to keep the weights."""
    return tuple(
        replace(decision, module=None)
        for node, decision in decisions.items()
        if node.op != "placeholder"
    )


def _left_evaluating(skeleton: nn.Module) -> list[str]:
    """What the base model's own `train` leaves in evaluation mode, such as frozen batch norms."""
    with undo_side_effects(skeleton):
        skeleton.train()
        modules = skeleton.named_modules(remove_duplicate=False)
        return [path for path, module in modules if not module.training]


def _error(hne: PackedTree, x: Tensor) -> Exception | None:
    """What one leaf raises for some images, if it does."""
    try:
        with preserve_modes(hne), torch.no_grad():
            hne.eval()
            hne._programs[False].run(x, Span(0, 1))
    except Exception as error:  # whatever the operations of a model raise
        return error
    return None


def _shared_buffers(
    skeleton: nn.Module, layout: Mapping[str, Slot], calls: Iterable[tuple[str, int]]
) -> tuple[str, ...]:
    """Buffers that are stored for a lower level than one of their module's calls."""
    keys = {
        key
        for path, level in calls
        for name, _ in skeleton.get_submodule(path).named_buffers()
        for key in (f"{path}.{name}",)
        if layout[key].level < level
    }
    return tuple(sorted(keys))


def _hook_tables(root: nn.Module) -> list[dict[int, Any]]:
    """Where hooks stand that fused layers would pass over: they do not call what they stand for."""
    return [
        table
        for module in root.modules()
        if module is not root
        for table in (module._forward_hooks, module._forward_pre_hooks)
    ]


def _copy_modes(source: nn.Module, target: nn.Module) -> None:
    """Put the target's modules in the mode of the source's of the same path."""
    modules = dict(target.named_modules(remove_duplicate=False))
    for path, module in source.named_modules(remove_duplicate=False):
        if path in modules:
            modules[path].training = module.training
