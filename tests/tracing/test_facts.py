"""What is found out about each node."""

import pytest
import small
import torch
from torch import Tensor, nn

import treeify
from treeify.conversion.assemble import trace_model
from treeify.tracing.facts import TensorFacts, facts, growth, merge_shapes


def test_facts_of_a_traced_model() -> None:
    traced = trace_model(small.SmallNet(), example_input=small.EXAMPLE)
    known = {facts(node).path: facts(node) for node in traced.graphs[False].nodes}
    assert known["stage1.0"].macs == 64 * 9 * 8 * 8
    assert known["stage1.0"].tensors[0].shape == (2, 8, 8, 8)
    assert known["stage1.0"].tensors[0].batched
    assert "add" in known
    assert "add_1" in known


class Shared(nn.Module):
    """Computes with the number of images: `[N, 3, 8, 8] -> [N, 5]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        return self.head((x / x.shape[0] + 0.1 * x.size(0)).mean(1))


def test_the_number_of_images_is_that_of_one_network() -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(Shared(), ["norm"], init="perturb", example_input=small.EXAMPLE)
    assert treeify.verify(hne, small.images(3)).worst <= 1


@pytest.mark.parametrize(
    ("small_shape", "large_shape", "expected"),
    [
        ((2, 4), (3, 4), TensorFacts((2, 4), True, 0)),
        ((4, 2), (4, 3), TensorFacts((4, 2), False, 1)),
        ((8, 5), (12, 5), TensorFacts((8, 5), False, 0)),  # windows of every image
        ((2, 2), (2, 2), TensorFacts((2, 2), False, None)),
        ((2, 2), (3, 3), TensorFacts((2, 2), False, None)),
        ((2, 5), (3, 6), TensorFacts((2, 5), False, None)),
        ((1, 4), (2, 4), TensorFacts((1, 4), False, None)),  # one less than the batch
        ((), (), TensorFacts((), False, None)),
    ],
)
def test_two_runs_tell_the_batch_from_what_is_as_large(
    small_shape: tuple[int, ...], large_shape: tuple[int, ...], expected: TensorFacts
) -> None:
    merged = merge_shapes(torch.Size(small_shape), torch.Size(large_shape))
    assert merged == expected


def test_numbers_grow_with_the_batch_or_not() -> None:
    assert growth([2, 7, {"rows": 4}], [3, 7, {"rows": 6}]) == (True, False, {"rows": True})
    assert growth([2, 7], [3, 8]) is None
    assert growth("2", "3") is None
