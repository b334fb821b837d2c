"""In-place operations of a graph are replaced, get copies, or are refused."""

import pytest
import small
import torch
from torch import Tensor, nn

import treeify
from treeify.conversion.assemble import trace_model
from treeify.errors import TraceError


@torch.fx.wrap
def halved(x: Tensor) -> Tensor:
    """Changes what it is given, and its name does not say so."""
    x[:] = x / 2
    return x


class Halving(nn.Module):
    """Changes its input in place, and cannot be traced into."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        x -= 1
        return x


class Sly(nn.Module):
    def __init__(self, *, late: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.close = Halving()
        self.head = nn.Conv2d(4, 5, 1)
        self.late = late

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = halved(self.close(x))
        return self.head(y + x if self.late else y).mean((2, 3))


@pytest.mark.parametrize("split", ["input", "close", "halved", "head"])
def test_calls_that_change_their_inputs_unasked_get_copies(split: str) -> None:
    """Else siblings that share the input would read what the first of them made of it."""
    hne = treeify.hierarchicalize(
        Sly(late=False), [f"{split}:3"], init="perturb", example_input=small.EXAMPLE
    )
    x = small.images(2)
    assert treeify.verify(hne, x).worst <= 1
    hne.eval()
    for execution in ("packed", "looped"):
        hne.execution = execution
        steps = list(hne.anytime(x, sizes=(1, 2, 3)))
        own = torch.stack([hne.leaf(leaf)(x) for leaf in range(3)], dim=1)
        assert torch.allclose(steps[-1].logits, own.mean(1), atol=1e-5)


class SlyView(Sly):
    """What is changed unasked is a part of what is read again."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = halved(x[:, :, 1:])
        return self.head(x).mean((2, 3)) + y.mean((1, 2, 3))[:, None]


def test_a_part_that_was_changed_unasked_is_refused_if_the_whole_is_read_again() -> None:
    with pytest.raises(TraceError, match="in place, a view of stem, which head reads afterwards"):
        treeify.hierarchicalize(
            SlyView(late=False), ["head"], init="fresh", example_input=small.EXAMPLE
        )


def test_an_input_that_was_changed_unasked_and_is_read_again_is_refused() -> None:
    with pytest.raises(TraceError, match="in place, which add reads afterwards"):
        treeify.hierarchicalize(Sly(late=True), ["head"], init="fresh", example_input=small.EXAMPLE)


def test_in_place_on_a_view_that_is_read_later_is_refused() -> None:
    class View(small.SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x[:, :2].mul_(2)
            return self.head(self.stage1(x).mean((2, 3)))

    with pytest.raises(TraceError, match="a view of"):
        treeify.hierarchicalize(View(), ["stage1"], init="fresh", example_input=small.EXAMPLE)


class Outer(nn.Module):
    """Reads what a module in it has changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), Doubling())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner[1](x[:, 1:3]).sum(1, keepdim=True) + self.inner[0](x)


class Doubling(nn.Module):
    """Changes its input in place, and says so."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Around(nn.Module):
    """A module that cannot be made functional, in the midst of others."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.odd = nn.Sequential(odd)
        self.head = nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.odd(self.stem(x))).mean((2, 3))


class Overlapping(nn.Module):
    """Changes a part of what it reads again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        part, rest = x[:, :2], x[:, 1:]
        part += 1
        return self.conv(x) + rest.sum(1, keepdim=True)


class LateReader(nn.Module):
    """Reads what a leaf module has changed, though nothing about that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.close = Halving()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.close(x) * x


class Nested(nn.Module):
    """Reads what a module in it has changed, that is a leaf module for its own sake already."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Overlapping()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * x


@pytest.mark.parametrize("split", ["stem", "odd.0", "head"])
@pytest.mark.parametrize("odd", [Overlapping, Outer, LateReader, Nested])
def test_a_module_that_reads_what_it_changed_in_place_is_a_leaf_module(
    odd: type[nn.Module], split: str
) -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(
        Around(odd()), [f"{split}:3"], init="perturb", example_input=small.EXAMPLE
    )
    assert list(hne.traced.leaf_modules) == ["odd.0"]
    (note,) = (note for note in hne.conversion.notes if "odd.0" in note)
    assert "in place" in note and "reads afterwards" in note
    assert treeify.verify(hne, small.images(2)).worst <= 1


class RunningMean(small.SmallNet):
    """Updates a buffer in place, several times in one statement."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.mul_(0.9).add_(x.detach().mean((0, 2, 3))[:, None, None], alpha=0.1)
        return super().forward(x - self.seen)


@pytest.mark.parametrize("splits", [["stem"], ["stage1"]])
def test_buffers_may_be_changed_several_times_in_one_statement(splits: list[str]) -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(
        RunningMean(), splits, init="perturb", example_input=small.EXAMPLE
    )
    assert treeify.verify(hne, small.images(2) + 1).worst <= 1
    hne.train()(small.images(2) + 1)
    assert hne.get_buffer("seen").abs().min() > 0


def test_modules_and_parameters_may_be_called_as_methods_are() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stride = nn.Conv2d(3, 4, 1)
            self.as_strided = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.stride(x) * self.as_strided

    graph = trace_model(Called(), example_input=small.EXAMPLE).graphs[False]
    assert [node.op for node in graph.nodes if node.target == "stride"] == ["call_module"]
    assert [node.op for node in graph.nodes if node.target == "as_strided"] == ["get_attr"]
