"""The slow way that an ensemble is held against: its leaves as separate networks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.testing import assert_close

import treeify


def assert_equals_networks(
    hne: treeify.HierarchicalEnsemble, x: Tensor, count: int, branched: Sequence[str]
) -> None:
    """Compare the first leaves' outputs and gradients with those of their networks.

    Args:
        hne: the ensemble, without gradients.
        x: images.
        count: how many leaves.
        branched: names, or their beginnings, of what every leaf has of its own: only there are the
            gradients those of one network.
    """
    networks = [hne.leaf(index) for index in range(count)]
    actual = hne(x, leaves=count)
    expected = torch.stack([network(x) for network in networks], dim=1)
    assert_close(actual, expected)
    weight = torch.randn_like(expected)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for index, network in enumerate(networks):
        for key, parameter in network.named_parameters():
            if key.startswith(tuple(branched)) and parameter.grad is not None:
                packed = hne.get_parameter(key).grad
                assert packed is not None
                assert_close(hne.part(key, index, packed), parameter.grad)
