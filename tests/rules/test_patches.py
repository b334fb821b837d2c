"""Convolutions as products of patches: the same numbers, and only where they pay."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_equals_networks
from torch import Tensor, nn
from torch.testing import assert_close

import treeify
from treeify.rules.operations import patches


class Net(nn.Module):
    """A convolution between others, on `[N, 3, size, size]`."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, conv.in_channels, 1)
        self.conv = conv
        self.head = nn.Linear(conv.out_channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.conv(self.stem(x))
        return self.head(features.mean((2, 3)))  # type: ignore[no-any-return]


@contextmanager
def noted() -> Iterator[list[int]]:
    """Yields the parents of every convolution run as a product."""
    calls: list[int] = []
    convolve = patches.convolve

    def noting(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parents: int) -> Tensor:
        calls.append(parents)
        return convolve(conv, x, weight, bias, parents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches, "convolve", noting)
        yield calls


@contextmanager
def everywhere() -> Iterator[list[int]]:
    """Let products be used whatever the size; yields the parents of each."""
    with pytest.MonkeyPatch.context() as patch, noted() as calls:
        patch.setattr(patches, "_LEAST_WEIGHTS", 0)
        patch.setattr(patches, "_MOST_PIXELS", 1000)
        yield calls


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(2, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    bias=st.booleans(),
    where=st.sampled_from((["conv:3"], ["stem:2", "conv:2"], ["stem:3"])),
    execution=st.sampled_from(("packed", "looped")),
    channels_last=st.booleans(),
    data=st.data(),
)
def test_products_equal_separate_convolutions(
    channels: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    bias: bool,
    where: list[str],
    execution: str,
    channels_last: bool,
    data: st.DataObject,
) -> None:
    torch.manual_seed(0)
    model = Net(nn.Conv2d(*channels, kernel, stride, padding, bias=bias)).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    hne = treeify.hierarchicalize(model, where, init="perturb", example_input=x)
    if channels_last:
        hne.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    hne.execution = execution
    count = data.draw(st.integers(1, hne.leaves))
    with everywhere() as calls:
        assert_equals_networks(hne, x, count, ["conv"])
    assert calls


def _late_layer(size: int, split: str = "conv") -> tuple[treeify.HierarchicalEnsemble, Tensor]:
    torch.manual_seed(0)
    model = Net(nn.Conv2d(384, 384, 3, padding=1))
    x = torch.randn(2, 3, size, size)
    return treeify.hierarchicalize(model, [split], init="perturb", example_input=x), x


@pytest.fixture
def products() -> Iterator[list[int]]:
    """The parents of every convolution run as a product."""
    with noted() as calls:
        yield calls


@pytest.mark.parametrize("execution", ["packed", "looped"])
def test_few_pixels_and_many_weights_are_a_product(products: list[int], execution: str) -> None:
    hne, x = _late_layer(2)
    hne.execution = execution
    hne(x)
    assert products == ([1] if execution == "packed" else [1, 1])


def test_many_pixels_few_weights_and_inference_are_convolutions(products: list[int]) -> None:
    hne, x = _late_layer(4)
    hne(x)
    with torch.no_grad():
        _late_layer(2)[0](x[:, :, :2, :2])
    small = treeify.hierarchicalize(
        Net(nn.Conv2d(8, 8, 3, padding=1)), ["conv:2"], init="fresh", example_input=x[:, :, :2, :2]
    )
    small(x[:, :, :2, :2])
    assert products == []


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 1),
        nn.Conv1d(4, 4, 3),
    ],
    ids=lambda conv: repr(conv).replace(" ", ""),
)
def test_other_convolutions_are_not_products(conv: nn.Module) -> None:
    assert patches.has_patches(nn.Conv2d(4, 4, 3))
    assert not patches.has_patches(conv)


def test_a_hook_on_the_convolution_is_called(products: list[int]) -> None:
    hne, x = _late_layer(2, split="stem")
    calls: list[str] = []
    hne.get_submodule("conv").register_forward_hook(lambda *_: calls.append("hook"))
    hne(x)
    assert calls == ["hook"]
    assert products == []


def test_a_product_compiles_in_one_graph(products: list[int]) -> None:
    hne, x = _late_layer(2)
    expected = hne(x)
    compiled = torch.compile(hne, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), expected)
    assert len(products) >= 2
