"""Decisions -> one segment per level: an fx graph module that runs its level for any span.

Nothing is decided here. Values flow from lower to higher levels only, so running a tree is running
its segments in order; what a level reads of those below it is its segment's input.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from treeify.conversion.decide import Decision, grows_with_batch, has_batch
from treeify.engine.forms import Convert, Form, Leaves, Multiply
from treeify.engine.program import OUTPUT, Crossing, Program, Segment
from treeify.rules.operations.branchwise import Contiguous
from treeify.tracing.facts import facts
from treeify.tree import Tree

_SUFFIXES = {Form.PACKED: "packed", Form.BATCH: "batch", Form.BRANCHES: "branches"}


@dataclass
class _Draft:
    """A segment being written."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: dict[str, fx.Node] = field(default_factory=dict)
    # The nodes of this graph for a value of the base graph, by form; None: as it was made.
    values: dict[tuple[fx.Node, Form | None], fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.span = self.graph.placeholder("span")

    def call(self, name: str, module: nn.Module, args: Any, kwargs: Any = None) -> fx.Node:
        """Call a module of the segment under a node's name."""
        # A graph module's own attributes must not be hidden by a node called `half` or `apply`.
        while name in self.modules or hasattr(fx.GraphModule, name):
            name += "_"
        self.modules[name] = module
        return self.graph.create_node("call_module", name, args, kwargs or {}, name=name)

    def placeholder(self, name: str) -> fx.Node:
        """One more input, after those there are."""
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        taken = {"self", *(str(node.target) for node in placeholders)}  # names of arguments
        while name in taken:
            name += "_"
        with self.graph.inserting_after(placeholders[-1]):
            return self.graph.placeholder(name)

    def segment(self, level: int) -> Segment:
        """The segment as written."""
        self.graph.output(tuple(self.outputs.values()))
        self.graph.lint()
        module = fx.GraphModule(self.modules, self.graph, class_name=f"Level{level}")
        return Segment(level, module, tuple(self.inputs), tuple(self.outputs))


class Emitter:
    """Writes the segments of one graph, by a decision for each of its nodes but the output."""

    def __init__(self, decisions: Mapping[fx.Node, Decision], tree: Tree) -> None:
        self._decisions, self._tree = decisions, tree
        self._drafts = [_Draft() for _ in range(tree.levels)]
        self._crossings: dict[str, Crossing] = {}

    def run(self, graph: fx.Graph) -> Program:
        """The program of the decisions' graph."""
        (images,) = (node for node in graph.nodes if node.op == "placeholder")
        self._crossings[images.name] = self._crossing(images)
        for node in graph.nodes:
            if node.op == "output":
                self._write_output(node)
            elif node is not images:
                self._write(node, self._decisions[node])
        segments = tuple(draft.segment(level) for level, draft in enumerate(self._drafts))
        return Program(self._tree, segments, images.name, self._crossings)

    def _write(self, node: fx.Node, decision: Decision) -> None:
        """Write one node as decided."""
        level, module = decision.level, decision.module
        draft = self._drafts[level]
        first = next((arg for arg in node.args if isinstance(arg, fx.Node)), None)

        def read(source: fx.Node) -> fx.Node:
            of_parents = decision.reads_parents and source is first
            if decision.reads is not Form.SHARED and not of_parents:
                return self._value(source, level, decision.reads)
            raw = self._raw(source, level)
            if not decision.reads_contiguous or not facts(source).tensors:
                return raw
            return draft.call(f"{source.name}_contiguous", Contiguous(), (draft.span, raw))

        args, kwargs = map_arg(node.args, read), map_arg(node.kwargs, read)
        if module is None:
            call = draft.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        else:
            span = (draft.span,) if decision.takes_span else ()
            call = draft.call(node.name, module, (*span, *args), kwargs)
        draft.values[node, None] = call

    def _raw(self, node: fx.Node, level: int) -> fx.Node:
        """The value as it was made, inside the segment of `level`."""
        draft = self._drafts[level]
        if (node, None) not in draft.values:
            if node.op != "placeholder":
                # The first reader above makes it cross: an output of its own level's segment.
                source = self._drafts[self._decisions[node].level]
                source.outputs[node.name] = source.values[node, None]
                self._crossings[node.name] = self._crossing(node)
            draft.values[node, None] = draft.placeholder(node.name)
            draft.inputs.append(node.name)
        return draft.values[node, None]

    def _value(self, node: fx.Node, level: int, form: Form) -> fx.Node:
        """The value in a form, for the branches of `level`."""
        step = self._step(node, level, form)
        if step is None:
            return self._raw(node, level)
        draft = self._drafts[level]
        if (node, form) not in draft.values:
            args = (draft.span, self._raw(node, level))
            draft.values[node, form] = draft.call(f"{node.name}_{_SUFFIXES[form]}", step, args)
        return draft.values[node, form]

    def _step(self, node: fx.Node, level: int, form: Form) -> nn.Module | None:
        """What brings a value into a form for the branches of `level`; None if it is so already."""
        info, decision = facts(node), self._decisions[node]
        if decision.form is Form.SHARED:
            if not info.tensors and form is Form.BATCH:
                # A number of the base model's batch, for the branches' images together.
                return Multiply(info.grows) if grows_with_batch(node) else None
            differs = {Form.PACKED: bool(info.tensors), Form.BATCH: has_batch(node)}
            if not differs.get(form):  # looped branches read it as it is
                return None
        branches = 1 if decision.form is Form.SHARED else self._tree.branches[decision.level]
        ratio = self._tree.branches[level] // branches
        if decision.form is form and ratio == 1:
            return None
        return Convert(info.value, decision.form, form, ratio)

    def _write_output(self, node: fx.Node) -> None:
        """The last level's result, with the leaf dim at 1 of every tensor."""
        level = self._tree.levels - 1
        draft = self._drafts[level]

        def leaves(source: fx.Node) -> fx.Node:
            if not facts(source).tensors:
                return self._raw(source, level)
            in_batch = self._decisions[source].form is Form.BATCH
            form = Form.BATCH if in_batch else Form.PACKED
            together = self._value(source, level, form)
            separate = Leaves(facts(source).value, form)
            return draft.call(f"{source.name}_leaves", separate, (draft.span, together))

        result: Any = map_arg(node.args[0], leaves)
        draft.outputs[OUTPUT] = result
        tensors = [fact for source in node.all_input_nodes for fact in facts(source).tensors]
        rows = all(fact.batched for fact in tensors)
        self._crossings[OUTPUT] = Crossing(level, Form.LEAVES, None, rows)

    def _crossing(self, node: fx.Node) -> Crossing:
        info, decision = facts(node), self._decisions[node]
        return Crossing(decision.level, decision.form, info.value, info.rows)
