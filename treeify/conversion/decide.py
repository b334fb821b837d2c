"""Graph + levels + rules -> one segment per level, and the report of what runs how.

A segment is an fx graph module that runs one level for any span of its branches. Values flow from
lower to higher levels only, so running a tree is running its segments in order.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from treeify.engine.forms import Convert, Form, Leaves, Multiply
from treeify.engine.packed_tensors import Slot, submodule, tensors
from treeify.engine.program import OUTPUT, Crossing, NodeReport, Program, Segment
from treeify.rules.operations.branchwise import (
    Constant,
    Dense,
    EachBranch,
    EachBranchModule,
    FirstBranch,
    ReadTensor,
    SharedModule,
    is_closed,
)
from treeify.rules.shape import SHAPE_READINGS
from treeify.rules.table import (
    WIDEN,
    Call,
    Rule,
    Unpackable,
    find,
    find_in_batch,
    is_in_batch_first,
    is_known,
    is_pure,
    takes_counts,
)
from treeify.tracing.facts import facts
from treeify.tracing.functionalize import is_isolating_copy
from treeify.tracing.trace import Traced
from treeify.tree import Tree

_SUFFIXES = {Form.PACKED: "packed", Form.BATCH: "batch", Form.BRANCHES: "branches"}
_NO_RULE = "no rule for"
_Find = Callable[[Call], Rule | None]


def without_in_place(skeleton: nn.Module) -> nn.Module:
    """A copy to run branch by branch: its in-place flags are off, see `functionalize`."""
    base = copy.deepcopy(skeleton)
    for module in base.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return base


def rewrite(
    traced: Traced,
    base: nn.Module,
    training: bool,
    levels: Mapping[fx.Node, int],
    layout: Mapping[str, Slot],
    root: nn.Module,
    tree: Tree,
) -> Program:
    """Rewrite one mode's graph.

    Args:
        traced: the base model.
        base: its architecture `without_in_place`.
        training: which of its graphs.
        levels: level of every node.
        layout: slot of every tensor.
        root: the ensemble that holds the packed tensors.
        tree: the tree.
    """
    return _Rewriter(traced, base, training, levels, layout, root, tree).run()


@dataclass
class _Draft:
    """A segment being written."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: dict[str, fx.Node] = field(default_factory=dict)
    values: dict[tuple[fx.Node, Form | None], fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.span = self.graph.placeholder("span")


class _Rewriter:
    def __init__(
        self,
        traced: Traced,
        base: nn.Module,
        training: bool,
        levels: Mapping[fx.Node, int],
        layout: Mapping[str, Slot],
        root: nn.Module,
        tree: Tree,
    ) -> None:
        self.graph = traced.graphs[training]
        self.skeleton, self.constants = traced.skeleton, traced.constants
        self.leaf_modules = traced.leaf_modules
        self.base = base
        self.levels, self.layout, self.root, self.tree = levels, layout, root, tree
        self.forms: dict[fx.Node, Form] = {}
        self.reports: list[NodeReport] = []
        self.in_place: dict[str, bool] = {}
        self.drafts = [_Draft() for _ in range(tree.levels)]
        self.crossings: dict[str, Crossing] = {}

    def run(self) -> Program:
        (images,) = (node for node in self.graph.nodes if node.op == "placeholder")
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.forms[node] = Form.SHARED
                self.crossings[node.name] = _crossing(node, 0, Form.SHARED)
            elif node.op == "output":
                self._write_output(node)
            else:
                self._write(node)
        return Program(
            self.tree,
            tuple(self._finish(level) for level in range(self.tree.levels)),
            images.name,
            self.crossings,
            tuple(self.reports),
            self.in_place,
        )

    def _finish(self, level: int) -> Segment:
        draft = self.drafts[level]
        draft.graph.output(tuple(draft.outputs.values()))
        draft.graph.lint()
        module = fx.GraphModule(draft.modules, draft.graph, class_name=f"Level{level}")
        return Segment(level, module, tuple(draft.inputs), tuple(draft.outputs))

    def _branches(self, node: fx.Node) -> int:
        """Branches a value comes in: one where it is shared."""
        if self.forms[node] is Form.SHARED:
            return 1
        return self.tree.branches[self.levels[node]]

    def _raw(self, node: fx.Node, level: int) -> fx.Node:
        """The value as it was made, inside the segment of `level`."""
        draft = self.drafts[level]
        key = (node, None)
        if key not in draft.values:
            source = self.levels[node]
            if node.op != "placeholder":
                self.drafts[source].outputs[node.name] = self.drafts[source].values[key]
                self.crossings[node.name] = _crossing(node, source, self.forms[node])
            draft.values[key] = self._placeholder(draft, node.name)
            draft.inputs.append(node.name)
        return draft.values[key]

    def _dense(self, node: fx.Node, level: int) -> fx.Node:
        """The same for what was not traced: see `Dense`."""
        raw = self._raw(node, level)
        if not facts(node).tensors:
            return raw
        return self._call(level, f"{node.name}_dense", Dense(), (raw,), {})

    def _placeholder(self, draft: _Draft, name: str) -> fx.Node:
        there = [node for node in draft.graph.nodes if node.op == "placeholder"]
        taken = {"self", *(str(node.target) for node in there)}  # names of arguments
        while name in taken:
            name += "_"
        with draft.graph.inserting_after(there[-1]):
            return draft.graph.placeholder(name)

    def _value(self, node: fx.Node, level: int, form: Form) -> fx.Node:
        """The value in a form, for the branches of `level`."""
        known = facts(node)
        made = self.forms[node]
        shared = made is Form.SHARED
        ratio = self.tree.branches[level] // self._branches(node)
        if shared and not known.tensors and form is Form.BATCH:
            return self._multiplied(node, level)
        if (made is form and ratio == 1) or (shared and not _differs(node, form)):
            return self._raw(node, level)
        draft = self.drafts[level]
        key = (node, form)
        if key not in draft.values:
            step = Convert(known.value, made, form, ratio)
            name = f"{node.name}_{_SUFFIXES[form]}"
            draft.values[key] = self._call(level, name, step, (self._raw(node, level),), {})
        return draft.values[key]

    def _multiplied(self, node: fx.Node, level: int) -> fx.Node:
        """A number of the base model's batch, for the branches' images together."""
        grows = facts(node).grows
        if not _any(grows):
            return self._raw(node, level)
        draft = self.drafts[level]
        key = (node, Form.BATCH)
        if key not in draft.values:
            name = f"{node.name}_{_SUFFIXES[Form.BATCH]}"
            raw = self._raw(node, level)
            draft.values[key] = self._call(level, name, Multiply(grows), (raw,), {})
        return draft.values[key]

    def _call(self, level: int, name: str, operation: nn.Module, args: Any, kwargs: Any) -> fx.Node:
        """Call an operation of ours, which takes the span first."""
        return self._add(level, name, operation, (self.drafts[level].span, *args), kwargs)

    def _add(self, level: int, name: str, operation: nn.Module, args: Any, kwargs: Any) -> fx.Node:
        draft = self.drafts[level]
        # A graph module's own attributes must not be hidden by a node called `half` or `apply`.
        while name in draft.modules or hasattr(fx.GraphModule, name):
            name += "_"
        draft.modules[name] = operation
        return draft.graph.create_node("call_module", name, args, kwargs, name=name)

    def _write(self, node: fx.Node) -> None:
        level = self.levels[node]
        if node.op == "get_attr":
            made, form, reason = self._write_attribute(node, level)
        elif level == 0 or self._is_shared(node):
            made, form, reason = self._write_shared(node, level), Form.SHARED, ""
        else:
            made, form, reason = self._write_branches(node, level)
        self.forms[node] = form
        self.drafts[level].values[(node, None)] = made
        known = facts(node)
        self.reports.append(
            NodeReport(known.path, self._operation(node), level, form, reason, known.macs)
        )

    def _operation(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self._module(node)).__name__
        return getattr(node.target, "__name__", str(node.target))

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.base.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _is_shared(self, node: fx.Node) -> bool:
        """Whether siblings see the same inputs and so may share one result."""
        inputs = node.all_input_nodes
        if any(self.forms[source] is not Form.SHARED for source in inputs):
            return False
        module = self._module(node)
        if module is not None:
            return is_pure(node, module) and not any(True for _ in tensors(module))
        touches = any(facts(source).tensors for source in inputs)
        makes_tensor = bool(facts(node).tensors)
        return is_pure(node, None) or not (touches or makes_tensor)

    def _write_attribute(self, node: fx.Node, level: int) -> tuple[fx.Node, Form, str]:
        target = str(node.target)
        slot = self.layout.get(target)
        if slot is None:
            constant = Constant(self.constants[target])
            return self._call(level, node.name, constant, (), {}), Form.SHARED, ""
        form = Form.SHARED if level == 0 else Form.PACKED
        read = ReadTensor(self.root, slot, self.tree.branches, level, form)
        return self._call(level, node.name, read, (), {}), form, ""

    def _write_shared(self, node: fx.Node, level: int) -> fx.Node:
        module = self._module(node)
        kind: Any = node.target if module is None else type(module)
        read = self._dense if is_closed(kind) and not is_known(kind) else self._raw
        args, kwargs = self._arguments(node, lambda source: read(source, level))
        if module is None:
            return self.drafts[level].graph.create_node(
                node.op, node.target, args, kwargs, name=node.name
            )
        storage = submodule(self.root, str(node.target))
        if type(storage) is not kind:
            shared = SharedModule(module, storage, self._slots(node), self.tree.branches, level)
            return self._call(level, node.name, shared, args, kwargs)
        self._note_in_place(node)
        return self._add(level, node.name, storage, args, kwargs)

    def _arguments(self, node: fx.Node, convert: Any) -> tuple[Any, Any]:
        return map_arg(node.args, convert), map_arg(node.kwargs, convert)

    def _slots(self, node: fx.Node) -> dict[str, Slot]:
        module = self._module(node)
        assert module is not None
        return {name: self.layout[f"{node.target}.{name}"] for name, _ in tensors(module)}

    def _write_branches(self, node: fx.Node, level: int) -> tuple[fx.Node, Form, str]:
        try:
            call = self._described(node, level)
            form, operation = self._together(node, level, call)
        except Unpackable as verdict:
            return self._write_each(node, level, str(verdict))
        made = self._write_together(node, level, operation, form)
        return made, form if facts(node).tensors else Form.SHARED, ""

    def _together(self, node: fx.Node, level: int, call: Call) -> tuple[Form, nn.Module]:
        """The better form whose rule takes the call, and the operation.

        Raises:
            Unpackable: neither does.
        """
        reasons = []
        for form, find_rule in self._candidates(node, call):
            try:
                return form, self._operation_in(form, node, level, call, find_rule)
            except Unpackable as verdict:  # noqa: PERF203 - two rounds at most
                reasons.append(str(verdict))
        found = (own for own in reasons if not own.startswith(_NO_RULE))
        raise Unpackable(next(found, reasons[0]))

    def _described(self, node: fx.Node, level: int) -> Call:
        """The call as rules see it.

        Raises:
            Unpackable: no rule may run it.
        """
        module = self._module(node)
        storage = None
        if module is not None:
            storage = submodule(self.root, str(node.target))
            if any(slot.level != level for slot in self._slots(node).values()):
                raise Unpackable("its parameters are shared with another level")
        inputs = node.all_input_nodes
        per_branch = [source for source in inputs if self.forms[source] is Form.BRANCHES]
        if any(not facts(source).tensors for source in per_branch):
            raise Unpackable("it reads a number that may differ from branch to branch")
        free = module is None or not any(True for _ in tensors(module))
        tensor_inputs = [source for source in inputs if facts(source).tensors]
        if free and tensor_inputs and set(tensor_inputs) <= set(per_branch):
            raise Unpackable("its inputs are per branch, packing them would only copy")
        own = frozenset(source for source in inputs if self.forms[source] is not Form.SHARED)
        return Call(node, module, storage, self.tree.branches[level], 1, own)

    def _candidates(self, node: fx.Node, call: Call) -> list[tuple[Form, _Find]]:
        """The forms to try, the better one first: the one that needs less copying."""
        packed, in_batch = (Form.PACKED, find), (Form.BATCH, find_in_batch)
        inputs = [source for source in node.all_input_nodes if source in call.varying]
        forms = {self.forms[source] for source in inputs if _has_batch(source)}
        batch_first = is_in_batch_first(call) or (Form.BATCH in forms and Form.PACKED not in forms)
        return [in_batch, packed] if batch_first else [packed, in_batch]

    def _operation_in(
        self, form: Form, node: fx.Node, level: int, call: Call, find_rule: _Find
    ) -> nn.Module:
        """The operation of a node with its branches in one tensor.

        Raises:
            Unpackable: there is no rule, or it refuses.
        """
        first = next((arg for arg in node.args if isinstance(arg, fx.Node)), None)
        if first is not None and self.forms[first] in (Form.SHARED, form):
            ratio = self.tree.branches[level] // self._branches(first)
            call = replace(call, ratio=ratio)
        rule = find_rule(call)
        if rule is None and (reason := self.leaf_modules.get(str(node.target))):
            raise Unpackable(f"its inside cannot be traced: {reason}")
        if rule is None:
            raise Unpackable(f"{_NO_RULE} {self._operation(node)}")
        if form is Form.BATCH:
            for source in node.all_input_nodes:
                self._require_images(source)
                if _any(facts(source).grows) and not takes_counts(call):
                    raise Unpackable("it computes with the number of images")
            if any(fact.batch_dim is None for fact in facts(node).tensors):
                raise Unpackable("its result has no batch dim")
        return rule(call)

    def _require_images(self, source: fx.Node) -> None:
        """Raise Unpackable unless a value can be brought into the batch."""
        known = facts(source)
        if not known.tensors:
            if known.grows is None:
                raise Unpackable("it reads a number that is not proportional to the batch")
        elif self.forms[source] is not Form.BATCH and any(
            fact.batch_dim is not None and not fact.counts_images for fact in known.tensors
        ):
            raise Unpackable("it reads several rows for each image in an order of their own")

    def _write_together(
        self, node: fx.Node, level: int, operation: nn.Module, form: Form
    ) -> fx.Node:
        """Call an operation on all branches at once."""
        reads_parents = getattr(operation, "ratio", 1) > 1
        first = next((arg for arg in node.args if isinstance(arg, fx.Node)), None)

        def convert(source: fx.Node) -> fx.Node:
            if source is first and reads_parents:
                return self._raw(source, level)
            return self._value(source, level, form)

        if node.op == "call_module":
            self._note_in_place(node)
        args, kwargs = self._arguments(node, convert)
        return self._call(level, node.name, operation, args, kwargs)

    def _write_each(self, node: fx.Node, level: int, reason: str) -> tuple[fx.Node, Form, str]:
        module = self._module(node)
        form = Form.BRANCHES
        target: Any = node.target
        operation: nn.Module
        if module is not None:
            storage = submodule(self.root, str(node.target))
            copies = any(is_isolating_copy(source) for source in node.all_input_nodes)
            slots, branches = self._slots(node), self.tree.branches
            operation = EachBranchModule(module, storage, slots, branches, level, copies=copies)
        elif self._reads_shape(node):
            operation, form, reason = FirstBranch(target), Form.SHARED, ""
        else:
            operation = EachBranch(target)
        args, kwargs = self._arguments(
            node, lambda source: self._value(source, level, Form.BRANCHES)
        )
        return self._call(level, node.name, operation, args, kwargs), form, reason

    def _reads_shape(self, node: fx.Node) -> bool:
        return node.target in SHAPE_READINGS and not facts(node).tensors

    def _note_in_place(self, node: fx.Node) -> None:
        """Note whether an activation may overwrite its input: nothing else can see that input."""
        if not getattr(self.skeleton.get_submodule(str(node.target)), "inplace", False):
            return
        source = node.args[0] if node.args else None
        safe = (
            isinstance(source, fx.Node)
            and len(source.users) == 1
            and self.levels[source] == self.levels[node]
            and self.forms[source] is not Form.BRANCHES
            and self._is_fresh(source)
        )
        target = str(node.target)
        self.in_place[target] = safe and self.in_place.get(target, True)

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether the value is a new tensor that no other value looks into."""
        module = self._module(node)
        if module is None:
            return node.target in (torch.add, operator.add, "add")
        return any(True for _ in module.parameters()) and type(module) in WIDEN

    def _write_output(self, node: fx.Node) -> None:
        level = self.tree.levels - 1
        draft = self.drafts[level]

        def leaves(source: fx.Node) -> fx.Node:
            if not facts(source).tensors:
                return self._raw(source, level)
            form = self.forms[source]
            form = form if form is Form.BATCH else Form.PACKED
            together = self._value(source, level, form)
            name = f"{source.name}_leaves"
            return self._call(level, name, Leaves(facts(source).value, form), (together,), {})

        result: Any = map_arg(node.args[0], leaves)
        draft.outputs[OUTPUT] = result
        outputs = [fact for source in node.all_input_nodes for fact in facts(source).tensors]
        rows = all(fact.batched for fact in outputs)
        self.crossings[OUTPUT] = Crossing(level, Form.LEAVES, None, rows)


def _differs(node: fx.Node, form: Form) -> bool:
    """Whether a shared value takes another shape in a form."""
    if form is Form.BATCH:
        return _has_batch(node)
    return form is Form.PACKED and bool(facts(node).tensors)


def _has_batch(node: fx.Node) -> bool:
    return any(fact.batch_dim is not None for fact in facts(node).tensors)


def _any(grows: Any) -> bool:
    return any(bool(own) for own in tree_leaves(grows))


def _crossing(node: fx.Node, level: int, form: Form) -> Crossing:
    known = facts(node)
    return Crossing(level, form, known.value, known.rows)
