"""What an ensemble's weights take is known before they are allocated."""

import pytest
import small
import torch

import treeify
from treeify.engine.memory import free_bytes, packed_bytes, require_memory
from treeify.engine.packed_tensors import named_tensors
from treeify.errors import SplitError
from treeify.tree import Tree


def test_bytes_are_those_of_the_ensemble() -> None:
    hne = small.ensemble()
    expected = sum(tensor.nbytes for tensor in {id(t): t for _, t in named_tensors(hne)}.values())
    like = dict(named_tensors(hne.leaf(0)))
    assert packed_bytes(hne._slots, hne.tree, like) == expected


def test_without_values_everything_fits() -> None:
    hne = small.ensemble()
    like = dict(named_tensors(hne.leaf(0)))
    large = Tree((1000, 1000))
    require_memory(hne._slots, large, {key: tensor.to("meta") for key, tensor in like.items()})
    with pytest.raises(SplitError, match="1,000,000 leaves"):
        require_memory(hne._slots, large, like)


def test_the_system_has_memory() -> None:
    assert free_bytes(torch.device("cpu")) > 10**6


def test_models_on_the_meta_device_still_convert() -> None:
    hne = treeify.hierarchicalize(
        small.SmallNet().to("meta"), ["head"], init="copy", example_input=small.EXAMPLE
    )
    assert hne.head.bias.is_meta
