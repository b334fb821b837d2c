"""Operations alone, on packed tensors whose branches are known one by one."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from treeify.rules.operations.direct import Direct, ToBatch
from treeify.rules.operations.linear import EinsumOfBranches
from treeify.rules.operations.packed import ConcatenateChannels, PackedOperation
from treeify.rules.operations.shapes import BranchShape, Element, ExpandEach, Reshape
from treeify.tree import Span

BRANCHES = 3
SPAN = Span(0, BRANCHES)


@pytest.fixture
def branches() -> list[Tensor]:
    """Each branch's images `[2, 4, 6, 5]`."""
    torch.manual_seed(0)
    return [torch.randn(2, 4, 6, 5) for _ in range(BRANCHES)]


def test_in_the_batch_each_image_is_treated_alone(branches: list[Tensor]) -> None:
    packed = torch.cat(branches, 1)
    expected = torch.cat([branch.softmax(1) for branch in branches], 1)
    assert_close(ToBatch("softmax")(SPAN, packed, 1), expected)
    # Packed channels as they stand are normalised across branches.
    assert not torch.allclose(Direct("softmax")(SPAN, packed, 1), expected)


def test_results_of_several_tensors_are_packed_one_by_one(branches: list[Tensor]) -> None:
    left, right = ToBatch(torch.chunk)(SPAN, torch.cat(branches, 1), 2, dim=1)
    assert_close(left, torch.cat([branch[:, :2] for branch in branches], 1))
    assert_close(right, torch.cat([branch[:, 2:] for branch in branches], 1))
    assert Element()(SPAN, (left, right), 1) is right


def test_sizes_are_those_of_a_branch(branches: list[Tensor]) -> None:
    packed, in_batch = torch.cat(branches, 1), torch.cat(branches, 0)
    assert BranchShape("size", 1)(SPAN, packed) == (2, 4, 6, 5)
    assert BranchShape("size", 0)(SPAN, in_batch, 0) == 2
    assert BranchShape(getattr, 1)(SPAN, packed, "shape") == (2, 4, 6, 5)


@pytest.mark.parametrize("shape", [(2, 2, 2, 30), (-1, 8, 15), (2, -1, 5)])
def test_reshapes_stay_within_a_branch(branches: list[Tensor], shape: tuple[int, ...]) -> None:
    expected = torch.cat([branch.reshape(shape) for branch in branches], 1)
    packed = torch.cat(branches, 1)
    assert_close(Reshape()(SPAN, packed, *shape), expected)
    assert_close(Reshape()(SPAN, packed, shape), expected)


@pytest.mark.parametrize("target", ["expand", "repeat"])
def test_each_branch_s_token_goes_to_each_of_its_images(target: str) -> None:
    tokens = torch.randn(BRANCHES, 1, 4)
    images, size = 2, -1 if target == "expand" else 1
    expanded = ExpandEach(target, 0)(SPAN, tokens[:, None], BRANCHES * images, size, size)
    assert_close(expanded, tokens.repeat_interleave(images, 0))


def test_channels_are_joined_branch_by_branch(branches: list[Tensor]) -> None:
    packed = torch.cat(branches, 1)
    joined = ConcatenateChannels()(SPAN, [packed, 2 * packed])
    assert_close(joined, torch.cat([torch.cat([x, 2 * x], 1) for x in branches], 1))


def test_einsum_has_a_letter_for_the_branches(branches: list[Tensor]) -> None:
    weights = torch.randn(BRANCHES, 4, 7)
    product = EinsumOfBranches(["nchw", "co"], "nohw", [0, None], 0)
    assert product.equation == "anchw,aco->anohw"
    expected = [
        torch.einsum("nchw,co->nohw", x, weight)
        for x, weight in zip(branches, weights, strict=True)
    ]
    assert_close(product(SPAN, "", torch.cat(branches), weights), torch.cat(expected))


def test_the_parts_of_packed_tensors_are_views() -> None:
    module = nn.Sequential(nn.Linear(2, 4 * BRANCHES, bias=False))
    operation = PackedOperation(module, BRANCHES)
    part = operation.part(Span(1, 3), "0.weight")
    assert part is not None
    assert part.data_ptr() == module[0].weight[4:].data_ptr()
    assert part.shape == (8, 2)
    assert operation.part(SPAN, "0.bias") is None
    assert operation.part(SPAN, "0.weight") is module[0].weight
