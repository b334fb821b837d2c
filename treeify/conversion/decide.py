"""Graph + levels + rules -> how every node runs: one decision each, before anything is written.

A decision reads only those of the node's inputs, so one pass in the graph's order makes them all.
`treeify.conversion.emit` writes the segments they describe, and `hne.conversion` shows them.
"""

import copy
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from treeify.engine.forms import Form
from treeify.engine.packed_tensors import Slot, get_submodule, named_tensors
from treeify.rules.call import Call, Unpackable, kind_of
from treeify.rules.operations.attributes import Constant, ReadTensor
from treeify.rules.operations.branchwise import (
    EachBranch,
    EachBranchModule,
    FirstBranch,
    SharedModule,
    is_opaque,
)
from treeify.rules.shapes import SHAPE_READINGS
from treeify.rules.table import Rule, rules_of
from treeify.tracing.facts import facts
from treeify.tracing.functionalize import is_isolating_copy
from treeify.tracing.hooks import has_hooks
from treeify.tracing.trace import Traced
from treeify.tree import Tree

_NO_RULE = "no rule for"


@dataclass(frozen=True)
class Decision:
    """How one node of the base graph runs.

    Args:
        path: module path or function path of the node.
        operation: name of what it does.
        level: its level in the tree.
        form: how its value is held.
        reason: why it does not run packed; empty where it does.
        macs: multiply-accumulates per image and branch; counted for evaluation only.
        module: what its segment calls; None for the node's own function or method.
        takes_span: whether the module is one of ours, which take the span of branches first.
        reads: the form it reads its arguments in; shared: as each was made.
        reads_parents: whether the first argument is an exception, of which the module reads one
            value for all siblings.
        reads_contiguous: whether tensors must be given contiguous.
        overwrites: whether an in-place activation may stay so; None if it is none.
    """

    path: str
    operation: str
    level: int
    form: Form
    reason: str
    macs: int
    module: nn.Module | None = field(default=None, repr=False, compare=False)
    takes_span: bool = True
    reads: Form = Form.SHARED
    reads_parents: bool = False
    reads_contiguous: bool = False
    overwrites: bool | None = None


def without_in_place(skeleton: nn.Module) -> nn.Module:
    """A copy to run branch by branch: its in-place flags are off, see `functionalize`."""
    base = copy.deepcopy(skeleton)
    for module in base.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return base


@dataclass
class Decider:
    """Decides how the nodes of one graph run.

    `base` is the base architecture `without_in_place`, `root` the ensemble with the packed tensors.
    """

    traced: Traced
    base: nn.Module
    levels: Mapping[fx.Node, int]
    slots: Mapping[str, Slot]
    root: nn.Module
    tree: Tree
    _forms: dict[fx.Node, Form] = field(default_factory=dict, init=False)

    def run(self, graph: fx.Graph) -> dict[fx.Node, Decision]:
        """Decisions for all nodes of a graph but its output, in its order."""
        return {node: self.decide(node) for node in graph.nodes if node.op != "output"}

    def decide(self, node: fx.Node) -> Decision:
        """How a node runs, by the decisions about its inputs."""
        if node.op == "placeholder":
            decision = self._draft(node)
        elif node.op == "get_attr":
            decision = self._decide_attribute(node)
        elif self.levels[node] == 0 or self._is_shared(node):
            decision = self._decide_shared(node)
        else:
            decision = self._decide_branches(node)
        self._forms[node] = decision.form
        return decision

    def _draft(self, node: fx.Node, **choices: Any) -> Decision:
        """A decision with what is known of any node, shared if nothing else is chosen."""
        info, operation, level = facts(node), self._operation(node), self.levels[node]
        decision = Decision(info.path, operation, level, Form.SHARED, "", info.macs)
        return replace(decision, **choices)

    def _operation(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self._module(node)).__name__
        return getattr(node.target, "__name__", str(node.target))

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.base.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _storage(self, node: fx.Node) -> nn.Module:
        return get_submodule(self.root, str(node.target))

    def _slots_of(self, node: fx.Node) -> dict[str, Slot]:
        module = self._module(node)
        assert module is not None
        return {name: self.slots[f"{node.target}.{name}"] for name, _ in named_tensors(module)}

    def _decide_attribute(self, node: fx.Node) -> Decision:
        """A parameter, buffer or constant that the model reads by itself."""
        target, level = str(node.target), self.levels[node]
        slot = self.slots.get(target)
        if slot is None:
            return self._draft(node, module=Constant(self.traced.constants[target]))
        form = Form.SHARED if level == 0 else Form.PACKED
        module = ReadTensor(self.root, slot, self.tree.branches, level, form)
        return self._draft(node, form=form, module=module)

    def _is_shared(self, node: fx.Node) -> bool:
        """Whether siblings see the same inputs and so may share one result."""
        inputs = node.all_input_nodes
        if any(self._forms[source] is not Form.SHARED for source in inputs):
            return False
        # The same inputs do not give the same result where there are weights or chance: branches
        # have weights of their own, and each is to draw a dropout mask of its own.
        module = self._module(node)
        if module is not None:
            pure = rules_of(type(module)).pure and not has_hooks(module)
            return pure and not _has_tensors(module)
        touches = any(facts(source).tensors for source in inputs)
        makes_tensor = bool(facts(node).tensors)
        return rules_of(node.target).pure or not (touches or makes_tensor)

    def _decide_shared(self, node: fx.Node) -> Decision:
        """One call for all branches, as in the base model."""
        module = self._module(node)
        kind: Any = kind_of(node, module)
        unknown = is_opaque(kind) and not rules_of(kind).exist
        hooked = module is not None and has_hooks(module)
        draft = self._draft(node, reads_contiguous=unknown or hooked)
        if module is None:
            return replace(draft, takes_span=False)
        storage = self._storage(node)
        if type(storage) is kind:
            overwrites = self._may_overwrite(node)
            return replace(draft, module=storage, takes_span=False, overwrites=overwrites)
        branches, level = self.tree.branches, draft.level
        # Its tensors are of several levels, or nested: the storage is but a container of them.
        shared = SharedModule(module, storage, self._slots_of(node), branches, level)
        return replace(draft, module=shared)

    def _decide_branches(self, node: fx.Node) -> Decision:
        """All branches at once where a rule takes the call, else one by one."""
        try:
            form, module = self._together(node, self._call(node))
        except Unpackable as verdict:
            return self._decide_each(node, str(verdict))
        return self._draft(
            node,
            form=form if facts(node).tensors else Form.SHARED,
            module=module,
            reads=form,
            reads_parents=getattr(module, "ratio", 1) > 1,
            overwrites=self._may_overwrite(node),
        )

    def _together(self, node: fx.Node, call: Call) -> tuple[Form, nn.Module]:
        """The better form whose rule takes the call, and the operation; else raises Unpackable."""
        reasons = []
        for form, rule in self._candidates(node, call):
            try:
                return form, self._operation_in(form, node, call, rule)
            except Unpackable as verdict:  # noqa: PERF203 - two rounds at most
                reasons.append(str(verdict))
        # That one of the forms has no rule says less than why the other's rule refuses.
        refusals = (reason for reason in reasons if not reason.startswith(_NO_RULE))
        raise Unpackable(next(refusals, reasons[0]))

    def _call(self, node: fx.Node) -> Call:
        """The call as rules see it; raises Unpackable if none may run it."""
        module, storage, level = self._module(node), None, self.levels[node]
        if module is not None:
            if has_hooks(module):
                changes = "a hook in it changes what it computes"
                raise Unpackable(self.traced.leaf_modules.get(str(node.target), changes))
            storage = self._storage(node)
            if any(slot.level != level for slot in self._slots_of(node).values()):
                raise Unpackable("its parameters are shared with another level")
        inputs = node.all_input_nodes
        per_branch = [source for source in inputs if self._forms[source] is Form.BRANCHES]
        if any(not facts(source).tensors for source in per_branch):
            raise Unpackable("it reads a number that may differ from branch to branch")
        tensor_inputs = {source for source in inputs if facts(source).tensors}
        has_weights = module is not None and _has_tensors(module)
        if not has_weights and tensor_inputs and tensor_inputs <= set(per_branch):
            raise Unpackable("its inputs are per branch, packing them would only copy")
        varying = frozenset(source for source in inputs if self._forms[source] is not Form.SHARED)
        return Call(node, module, storage, self.tree.branches[level], 1, varying)

    def _candidates(self, node: fx.Node, call: Call) -> list[tuple[Form, Rule | None]]:
        """The forms to try, the better one first: the one that needs less copying."""
        rules = rules_of(call.kind)
        # Going from one form to the other copies every activation: a node stays in its inputs' form
        # where it can, unless its operation is much faster in the batch.
        packed, in_batch = (Form.PACKED, rules.packed), (Form.BATCH, rules.in_batch)
        inputs = [source for source in node.all_input_nodes if source in call.varying]
        forms = {self._forms[source] for source in inputs if has_batch(source)}
        batch_only = Form.BATCH in forms and Form.PACKED not in forms
        if batch_only or rules.prefers_batch(call):
            return [in_batch, packed]
        return [packed, in_batch]

    def _operation_in(self, form: Form, node: fx.Node, call: Call, rule: Rule | None) -> nn.Module:
        """The operation on all branches in one tensor; raises Unpackable if no rule takes it."""
        # Only the first argument is ever read once for all siblings, as an image is by a layer.
        first = next((arg for arg in node.args if isinstance(arg, fx.Node)), None)
        if first is not None and self._forms[first] in (Form.SHARED, form):
            # The rule may compute all siblings from one copy of their parent's value.
            level = 0 if self._forms[first] is Form.SHARED else self.levels[first]
            call = replace(call, ratio=call.branches // self.tree.branches[level])
        if rule is None and (reason := self.traced.leaf_modules.get(str(node.target))):
            raise Unpackable(f"its inside cannot be traced: {reason}")
        if rule is None:
            raise Unpackable(f"{_NO_RULE} {self._operation(node)}")
        if form is Form.BATCH:
            for source in node.all_input_nodes:
                self._require_images(source)
                if grows_with_batch(source) and not rules_of(call.kind).takes_counts:
                    raise Unpackable("it computes with the number of images")
            if any(fact.batch_dim is None for fact in facts(node).tensors):
                raise Unpackable("its result has no batch dim")
        return rule(call)

    def _require_images(self, source: fx.Node) -> None:
        """Raise Unpackable unless a value can be brought into the batch."""
        info = facts(source)
        if not info.tensors:
            if info.grows is None:
                raise Unpackable("it reads a number that is not proportional to the batch")
        elif self._forms[source] is not Form.BATCH and any(
            fact.batch_dim is not None and not fact.counts_images for fact in info.tensors
        ):
            raise Unpackable("it reads several rows for each image in an order of their own")

    def _decide_each(self, node: fx.Node, reason: str) -> Decision:
        """One call per branch, exactly as in the base model, which needs no rule."""
        module = self._module(node)
        draft = self._draft(node, form=Form.BRANCHES, reason=reason, reads=Form.BRANCHES)
        target: Any = node.target
        if module is not None:
            copies = any(is_isolating_copy(source) for source in node.all_input_nodes)
            slots, branches = self._slots_of(node), self.tree.branches
            storage, level = self._storage(node), draft.level
            each = EachBranchModule(module, storage, slots, branches, level, copies=copies)
            return replace(draft, module=each)
        if target in SHAPE_READINGS and not facts(node).tensors:
            # All branches have the same shapes: one may answer for all.
            return replace(draft, form=Form.SHARED, reason="", module=FirstBranch(target))
        return replace(draft, module=EachBranch(target))

    def _may_overwrite(self, node: fx.Node) -> bool | None:
        """Whether an activation may overwrite its input: nothing else can see that input."""
        if node.op != "call_module":
            return None
        if not getattr(self.traced.skeleton.get_submodule(str(node.target)), "inplace", False):
            return None
        # A value of another level is kept for the other branches and for the next leaves, and one
        # that is no new tensor may be a view into something else.
        source = node.args[0] if node.args else None
        return (
            isinstance(source, fx.Node)
            and len(source.users) == 1
            and self.levels[source] == self.levels[node]
            and self._forms[source] is not Form.BRANCHES
            and self._is_fresh(source)
        )

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether the value is a new tensor that no other value looks into."""
        module = self._module(node)
        if module is None:
            return node.target in (torch.add, operator.add, "add")
        return any(True for _ in module.parameters()) and rules_of(type(module)).widen is not None


def overwriting(modes: Iterable[Mapping[fx.Node, Decision]]) -> set[str]:
    """Paths of in-place activations that may stay so: every call of them, in both modes, is safe.

    Both modes run the same modules, and a module has one flag for all of its calls.
    """
    safe, unsafe = set[str](), set[str]()
    for node, decision in (pair for decisions in modes for pair in decisions.items()):
        if decision.overwrites is not None:
            (safe if decision.overwrites else unsafe).add(str(node.target))
    return safe - unsafe


def has_batch(node: fx.Node) -> bool:
    """Whether a tensor of a node's value has a dim that grows with the batch."""
    return any(fact.batch_dim is not None for fact in facts(node).tensors)


def grows_with_batch(node: fx.Node) -> bool:
    """Whether a number in a node's value is proportional to the batch."""
    return any(bool(grows) for grows in tree_leaves(facts(node).grows))


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in named_tensors(module))
