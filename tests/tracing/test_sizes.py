"""What nodes give at two batch sizes, asked for before the graph is complete."""

import random
from typing import Any

import numpy as np
import pytest
import small
import torch
from torch import Tensor, fx, nn

from treeify.tracing.model_copy import meta_copy
from treeify.tracing.sizes import BATCHES, Sizes


@fx.wrap
def jittered(x: Tensor) -> Tensor:
    """Draws from all three generators."""
    return x * (random.random() + np.random.rand() + torch.rand(()).item())


class Parts(nn.Module):
    """`[N, 3, 8, 8] -> [N, 2, 8, 8]`, with parts of channels and of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, _ = torch.chunk(self.conv(x), 2, 1)
        torch.unbind(x, 0)
        torch.nonzero(x)
        return jittered(first * self.scale[:2])


@pytest.fixture
def model() -> nn.Module:
    return Parts()


@pytest.fixture
def nodes(model: nn.Module) -> dict[str, fx.Node]:
    graph = fx.symbolic_trace(model).graph
    return {node.name: node for node in graph.nodes}


@pytest.fixture
def sizes(model: nn.Module) -> Sizes:
    return Sizes(model, meta_copy(model), tuple(small.EXAMPLE.shape[1:]))


def test_shapes_at_both_batch_sizes(sizes: Sizes, nodes: dict[str, fx.Node]) -> None:
    assert sizes.shapes(nodes["conv"]) == tuple((batch, 4, 8, 8) for batch in BATCHES)
    assert sizes.shapes(nodes["scale"]) == ((4, 1, 1), (4, 1, 1))


def test_what_is_no_tensor_or_depends_on_values_has_no_shape(
    sizes: Sizes, nodes: dict[str, fx.Node]
) -> None:
    assert sizes.shapes(nodes["chunk"]) is None
    assert sizes.shapes(nodes["nonzero"]) is None


def test_lengths_of_tuples_that_do_not_depend_on_the_batch(
    sizes: Sizes, nodes: dict[str, fx.Node]
) -> None:
    assert sizes.tuple_length(nodes["chunk"]) == 2
    assert sizes.tuple_length(nodes["unbind"]) is None
    assert sizes.tuple_length(nodes["conv"]) is None


def random_states() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist()


def test_asking_draws_no_random_numbers(sizes: Sizes, nodes: dict[str, fx.Node]) -> None:
    before = random_states()
    assert sizes.shapes(nodes["jittered"]) is not None
    assert random_states() == before


def test_a_new_pass_has_its_own_mode_and_puts_the_old_one_back(
    model: nn.Module, sizes: Sizes
) -> None:
    model.eval()
    model.conv.train()
    with sizes.new_pass(training=True):
        assert all(module.training for module in model.modules())
    assert not model.training
    assert model.conv.training
