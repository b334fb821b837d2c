"""Branches are views of packed tensors, and modules are called with them in place of their own."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, fx, nn
from torch.testing import assert_close

from treeify.engine.packed_tensors import (
    Packer,
    Slot,
    call_assigning,
    call_with,
    chunk_once,
    get_parent,
    get_tensor,
    named_tensors,
    narrow,
    set_memory_format,
    slots,
)
from treeify.tree import Span, Tree


class Tied(nn.Module):
    """Two levels that share a weight, and a buffer without dims."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.stem.weight
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)))


def _slots(model: nn.Module) -> dict[str, Slot]:
    """With a split at the norm, and one at the head."""
    levels = {"stem": 0, "norm": 1, "head": 2}
    nodes = fx.symbolic_trace(model).graph.nodes
    return slots(model, [(node, levels.get(str(node.target), 0)) for node in nodes])


def _widen(norm: nn.Module, branches: int) -> None:
    norm.num_features = norm.num_features * branches  # type: ignore[operator, assignment]


def test_a_span_of_branches_is_a_view() -> None:
    packed = torch.arange(12.0).view(6, 2)
    part = narrow(packed, 3, Span(1, 3))
    assert_close(part, packed[2:])
    assert part.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    assert narrow(packed, 3, Span(0, 3)) is packed


def test_a_branch_has_the_shape_of_the_base_tensor() -> None:
    assert Slot("weight", 1, scalar=False).branch(torch.zeros(6, 2), 3, 2).shape == (2, 2)
    assert Slot("count", 1, scalar=True).branch(torch.arange(3), 3, 2) == 2


@pytest.mark.parametrize("once", [True, False])
def test_gradients_of_branches_one_by_one(once: bool) -> None:
    packed = torch.arange(6.0, requires_grad=True)
    with chunk_once() if once else nullcontext():
        parts = [narrow(packed, 3, Span(index, index + 1)) for index in range(3)]
        again = narrow(packed, 3, Span(0, 1))
    assert (again is parts[0]) is once
    assert (parts[0].grad_fn is parts[1].grad_fn) is once  # one node gives all of them
    sum((index + 1) * part.sum() for index, part in enumerate(parts)).backward()
    assert packed.grad is not None
    assert packed.grad.tolist() == [1, 1, 2, 2, 3, 3]


def test_a_tensor_belongs_to_the_lowest_level_that_uses_it() -> None:
    by_key = _slots(Tied())
    assert {key: slot.level for key, slot in by_key.items()} == {
        "unused": 0,
        "stem.weight": 0,
        "stem.bias": 0,
        "norm.weight": 1,
        "norm.bias": 1,
        "norm.running_mean": 1,
        "norm.running_var": 1,
        "norm.num_batches_tracked": 1,
        "head.weight": 0,  # tied to the stem's
        "head.bias": 2,
    }
    assert [key for key, slot in by_key.items() if slot.scalar] == ["norm.num_batches_tracked"]


def test_modules_are_packed_under_the_names_of_the_base_model() -> None:
    model, root = Tied(), nn.Module()
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    tensors = dict(named_tensors(model))
    packer = Packer(_slots(model), Tree((2, 3)), {nn.BatchNorm1d: _widen}, tensors, {"stem"})
    packer.pack_children(root, model)
    shapes = {key: tuple(tensor.shape) for key, tensor in named_tensors(root)}
    assert shapes.keys() == tensors.keys()
    assert shapes["norm.weight"] == (8,)
    assert shapes["norm.num_batches_tracked"] == (2,)
    assert shapes["head.bias"] == (24,)
    assert shapes["stem.weight"] == (4, 4)
    assert type(root.get_submodule("stem")) is nn.Linear
    assert root.get_submodule("norm").num_features == 8
    assert type(root.get_submodule("head")) is nn.Module  # its tensors lie in two levels
    assert root.get_parameter("head.weight") is root.get_parameter("stem.weight")
    assert not root.get_parameter("head.bias").requires_grad
    assert [root.get_submodule(name).training for name in ("stem", "norm")] == [True, False]
    assert get_tensor(root, "norm.running_var") is root.get_buffer("norm.running_var")
    assert get_parent(root, "head.bias") == (root.get_submodule("head"), "bias")


def test_tensors_of_4_dims_get_a_memory_format() -> None:
    conv = nn.Conv2d(4, 4, 3)
    set_memory_format(conv, torch.channels_last)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    set_memory_format(conv, torch.contiguous_format)
    assert conv.weight.is_contiguous()


class Assigning(nn.Module):
    """Changes its tensors in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        for name in ("steps", "mean", "constant"):
            self.register_buffer(name, torch.zeros(2))

    def forward(self, x: Tensor, *, fail: bool = False) -> Tensor:
        self.steps = self.steps + 1
        self.mean += 1
        self.scale.data = self.scale.data * 2
        if fail:
            raise ZeroDivisionError
        return x * self.scale


def _tensors() -> dict[str, Tensor]:
    tensors = {name: torch.full((2,), 5.0) for name in ("steps", "mean", "constant")}
    return {**tensors, "scale": nn.Parameter(torch.full((2,), 3.0))}


def test_a_module_is_called_with_other_tensors() -> None:
    module, tensors = Assigning(), _tensors()
    before = dict(named_tensors(module))
    assert call_with(module, tensors, (torch.ones(2),)).tolist() == [6, 6]
    assert tensors["mean"].tolist() == [6, 6]  # in place, in the tensor itself
    with pytest.raises(ZeroDivisionError):
        call_with(module, tensors, (torch.ones(2),), {"fail": True})
    for key, tensor in named_tensors(module):
        assert tensor is before[key]
        assert_close(tensor, torch.full((2,), float(key == "scale")), check_dtype=False)


def test_what_a_module_assigns_is_returned() -> None:
    result, assigned = call_assigning(Assigning(), _tensors(), (torch.ones(2),), {})
    assert result.tolist() == [6, 6]
    assert {key: tensor.tolist() for key, tensor in assigned.items()} == {
        "steps": [6, 6],
        "scale": [6, 6],
    }
