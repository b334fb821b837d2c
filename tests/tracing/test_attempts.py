"""Tracing with sizes unknown, with known ones, and with leaf modules: what stops it is named."""

import sys
from pathlib import Path

import pytest
import small
import timm
import torch
from leaf_modules import Counting
from torch import Tensor, nn

import treeify
from treeify.conversion.assemble import trace_model
from treeify.errors import InputError, TraceError


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.mean() > 0:
            x = -x
        return x.mean((2, 3))


def test_a_model_that_cannot_be_traced_names_the_line() -> None:
    with pytest.raises(TraceError, match=r"test_attempts.py:\d+ in forward: if x.mean\(\) > 0:"):
        treeify.hierarchicalize(Branching(), 1, init="fresh", example_input=small.EXAMPLE)


class Wrapped(nn.Module):
    """A module that stops the tracer, deep inside, in training mode another one too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Sequential(nn.ReLU(), Flipping()))
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Flipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)
        self.picky = Picky()

    def forward(self, x: Tensor) -> Tensor:
        x = self.picky(self.inner(x))
        if x.mean() > 0:
            x = -x
        return x


class Picky(nn.Module):
    """Can be traced in evaluation mode only."""

    def forward(self, x: Tensor) -> Tensor:
        return x if not self.training or x.sum() > 0 else x * 2


def test_a_module_that_stops_the_tracer_is_a_leaf_module_and_no_other() -> None:
    for model, leaf in ((Wrapped(), "body.1.1"), (nn.Sequential(Wrapped()), "0.body.1.1")):
        traced = trace_model(model, example_input=small.EXAMPLE)
        assert "if x.mean() > 0:" in traced.leaf_modules[leaf]
        for graph in traced.graphs.values():
            calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
            assert leaf in calls
            assert not any(call.startswith(f"{leaf}.") for call in calls)
            assert leaf.replace("1.1", "0") in calls
        hne = treeify.hierarchicalize(model, 1, init="fresh", example_input=small.EXAMPLE)
        x = small.images(3)
        assert treeify.verify(hne, x).worst <= 1
        assert any(f"{leaf} (Flipping) runs as one call" in note for note in hne.conversion.notes)
        (reason,) = (own for own in hne.conversion.fallbacks if own.startswith("Flipping: "))
        assert "its inside cannot be traced: " in reason
        assert "if x.mean() > 0:" in reason
        assert Path(__file__).name in reason
        assert not any(folder in reason for folder in sys.path if folder)


def test_a_leaf_module_of_one_mode_is_one_in_the_other() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Picky(), nn.Flatten(), nn.Linear(4 * 64, 2))
    traced = trace_model(model, example_input=small.EXAMPLE)
    assert list(traced.leaf_modules) == ["1"]
    targets = [
        [node.target for node in graph.nodes if node.op == "call_module"]
        for graph in traced.graphs.values()
    ]
    assert targets[0] == targets[1] == ["0", "1", "2", "3"]


class Sized(nn.Module):
    """Looks at the size of its images, and makes tensors of as many rows as there are images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3 or x.dim() == 3:
            x = x[None]
        if x.shape[-1] % 4 or x.size(2) % 4 or x.size()[3] % 4:
            raise ValueError("sides must be divisible by 4")
        places = torch.arange(x.shape[-1], device=x.device).expand(x.shape[0], -1)
        x = self.stem(x) + (places - torch.ones(x.shape[0], 1))[:, None, None]
        return self.head(x.mean((2, 3)))


def test_a_model_that_looks_at_the_size_is_traced_for_one() -> None:
    hne = treeify.hierarchicalize(Sized(), ["stem:3"], init="perturb", example_input=small.EXAMPLE)
    assert hne.traced.limits.one_size
    assert not hne.traced.leaf_modules
    side = small.EXAMPLE.shape[-1]
    assert any(f"takes images of {side} x {side} alone" in note for note in hne.conversion.notes)
    for count in (1, 5):
        assert treeify.verify(hne, small.images(count + 1)).worst <= 1
        assert hne(small.images(count)).shape == (count, 3, 5)
    with pytest.raises(InputError) as caught:
        hne(torch.rand(2, 3, side + 4, side + 4))
    assert f"[N, 3, {side}, {side}]" in str(caught.value)
    assert "as far as the base model allows" not in str(caught.value)


def test_a_model_that_makes_tensors_of_as_many_rows_takes_any_size() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).mean((2, 3))
            more = torch.full((x.shape[0], 4), 2.0) + torch.zeros(x.size(0), 4)
            return x * more

    hne = treeify.hierarchicalize(Rows(), ["stem:3"], init="perturb", example_input=small.EXAMPLE)
    assert not hne.traced.limits.one_size
    assert treeify.verify(hne, torch.rand(4, 3, 12, 20)).worst <= 1


def test_a_module_that_assigns_to_its_buffers_is_a_leaf_module() -> None:
    counting = Counting(4, evaluating=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), counting, nn.Flatten(), nn.Linear(4 * 64, 3))
    hne = treeify.hierarchicalize(model, ["1:3"], init="perturb", example_input=small.EXAMPLE)
    assert hne.traced.leaf_modules == {
        "1": "it assigns to its buffer 'steps', which no graph shows"
    }
    assert treeify.verify(hne, small.images(2)).worst <= 1
    hne.train()(small.images(2))
    hne(small.images(2))
    assert hne.leaf(2)[1].steps == 2
    assert hne.leaf(2)[1].sum == 6
    with pytest.raises(TraceError, match="assigns to its buffer 'steps'"):
        treeify.hierarchicalize(counting, [], init="fresh", example_input=torch.zeros(1, 4, 8, 8))


def test_control_flow_of_gemma_is_traced() -> None:
    """Asks for the number of dims, the sides, and whether a mask holds anything."""
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2, "head_dim": 16, "intermediate_size": 48}
    model = timm.create_model("gemma4_vit_167m_enc", **options, position_embedding_size=8)
    example = torch.rand(2, 3, 96, 96)
    hne = treeify.hierarchicalize(model, ["blocks.0"], init="perturb", example_input=example)
    assert not hne.traced.leaf_modules
    assert treeify.verify(hne, example).worst <= 1


class Ready(small.SmallNet):
    """Centres its images once a flag is set."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.full((3,), 2.0))
        self.register_buffer("is_ready", torch.tensor(True))
        self.register_buffer("times", torch.tensor(2))

    def forward(self, x: Tensor) -> Tensor:
        centre = self.centre.view(-1, 1, 1)
        return super().forward(x - centre * int(self.times) if self.is_ready else x)


def test_buffers_beside_one_that_decides_stay_buffers() -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(
        Ready(), ["stage1"], init="perturb", example_input=small.EXAMPLE
    ).eval()
    assert hne.traced.limits.fixed == ("is_ready", "times")
    assert any("is_ready, times" in note for note in hne.conversion.notes)
    x = small.images(2)
    before = hne(x)
    hne.get_buffer("centre").fill_(-1.0)
    assert not torch.allclose(hne(x), before)
    assert treeify.verify(hne, x).worst <= 1
