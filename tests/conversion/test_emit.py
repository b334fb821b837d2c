"""Segments are written as decided: nothing but the decisions says what they hold."""

from dataclasses import replace

import small
import torch
from torch import Tensor, nn

from treeify.conversion.decide import Decision
from treeify.conversion.emit import Emitter
from treeify.engine.forms import Convert, Form
from treeify.engine.program import OUTPUT, Program
from treeify.tree import Span, Tree


class Doubled(nn.Module):
    """Two functions, one before and one after the split."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.neg(torch.abs(x))


class Negate(nn.Module):
    def forward(self, span: Span, x: Tensor) -> Tensor:
        return -x


def program(form: Form) -> Program:
    """Both functions on a tree of two leaves, the second one in the form given."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Doubled())
    graph = small.converted(model, ["0"]).traced.graphs[False]
    decisions = {}
    for node in graph.nodes:
        level = int(node.target is torch.neg)
        decision = Decision(node.name, str(node.target), level, Form.SHARED, "", 0)
        if node.op == "call_module":
            decision = replace(decision, module=nn.Identity(), takes_span=False)
        elif level and form is not Form.SHARED:
            decision = replace(decision, form=form, module=Negate(), reads=form)
        if node.op != "output":
            decisions[node] = decision
    return Emitter(decisions, Tree((2,))).run(graph)


def read_by_neg(program: Program) -> list[str]:
    """What the second function's call reads, by the names of the segment's nodes."""
    (neg,) = (node for node in program.segments[1].module.graph.nodes if node.name == "neg")
    return [source.name for source in neg.all_input_nodes]


def test_what_a_level_reads_of_those_below_crosses_to_it() -> None:
    shared = program(Form.SHARED)
    assert [segment.outputs for segment in shared.segments] == [("abs_1",), (OUTPUT,)]
    assert shared.segments[1].inputs == ("abs_1",)
    assert shared.crossings["abs_1"].level == 0
    assert shared.crossings["abs_1"].form is Form.SHARED


def test_a_node_reads_its_arguments_in_the_form_decided() -> None:
    assert read_by_neg(program(Form.SHARED)) == ["abs_1"]
    packed = program(Form.PACKED)
    assert read_by_neg(packed) == ["span", "abs_1_packed"]
    step = packed.segments[1].module.get_submodule("abs_1_packed")
    assert isinstance(step, Convert)
    assert (step.source, step.target, step.ratio) == (Form.SHARED, Form.PACKED, 2)


def test_a_program_runs_what_was_written() -> None:
    x = small.images()
    for form in (Form.SHARED, Form.PACKED, Form.BATCH):
        expected = -x.abs()[:, None].expand(-1, 2, -1, -1, -1)
        assert torch.equal(program(form).run(x, Span(0, 2)), expected)
