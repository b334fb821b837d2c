"""Graphs run node by node: what is recorded of each, and on which device."""

import pytest
import small
from torch import Tensor, fx, nn
from torch.testing import assert_close

from treeify.errors import InputError
from treeify.tracing.meta_interpreter import GraphRunner
from treeify.tracing.model_copy import meta_copy
from treeify.tracing.side_effects import StateError


@fx.wrap
def halve_rows(x: Tensor) -> int:
    """Changes its input, though its name does not say so."""
    x[::2] *= 0.5
    return 2 * len(x)


@fx.wrap
def nonzero(x: Tensor) -> Tensor:
    return x.nonzero() if not x.is_meta else x.tolist()


class Halving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        x = self.conv(x)
        return x, halve_rows(x)


class LookingAtValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nonzero(x)


class Calls(nn.Module):
    """Counts its calls, or remembers a size."""

    def __init__(self, *, counts: bool) -> None:
        super().__init__()
        self.counts, self.number = counts, 0

    def forward(self, x: Tensor) -> Tensor:
        self.number = self.number + 1 if self.counts else x.shape[-1]
        return x


class Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def prepared(model: nn.Module, *, training: bool = False) -> tuple[GraphRunner, fx.Graph]:
    graph = Leaves().trace(model)
    return GraphRunner(model, meta_copy(model), small.EXAMPLE, training), graph


def test_shapes_numbers_macs_and_changed_inputs_are_recorded() -> None:
    runner, graph = prepared(Halving())
    recorded = runner.record(graph, 2)
    nodes = {node.name: node for node in graph.nodes}
    conv, call = nodes["conv"], nodes["halve_rows"]
    assert recorded.shapes[conv] == (2, 4, 8, 8)
    assert recorded.others[call] == 4
    assert recorded.macs[conv] == 2 * 3 * 4 * 8 * 8
    assert recorded.mutating_calls == {call: [conv]}


@pytest.mark.parametrize(("batch", "training"), [(3, False), (2, True)])
def test_macs_are_counted_once(batch: int, training: bool) -> None:
    runner, graph = prepared(Halving(), training=training)
    assert not any(runner.record(graph, batch).macs.values())


def test_all_values_are_kept_and_the_weights_left_alone() -> None:
    runner, graph = prepared(Halving())
    before = {key: value.clone() for key, value in runner.model.state_dict().items()}
    assert list(runner.values(graph)) == list(graph.nodes)
    assert_close(runner.model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in runner.model.parameters())


def test_models_that_look_at_values_run_with_them() -> None:
    runner, graph = prepared(LookingAtValues())
    recorded = runner.record(graph, 2)
    assert recorded.shapes[next(reversed(graph.nodes))] == (0, 4)


def test_a_size_may_be_remembered_and_calls_not_counted() -> None:
    runner, graph = prepared(nn.Sequential(Calls(counts=False)))
    runner.record(graph, 2)
    assert runner.model[0].number == 0
    runner, graph = prepared(nn.Sequential(Calls(counts=True)))
    with pytest.raises(StateError, match="changes its attribute 'number' at every call"):
        runner.record(graph, 2)


def test_an_example_that_does_not_fit_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1))
    runner, graph = prepared(model)
    with pytest.raises(InputError, match=r"Sequential does not run .* shape \[N, 3, 8, 8\]"):
        runner.record(graph, 2)
