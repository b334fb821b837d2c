"""Which level a value belongs to, and how it gets from one to another."""

from typing import Any

import pytest
import small
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import treeify
from treeify.engine import program
from treeify.errors import ParityError


class Bounded(small.SmallNet):
    """Keeps a weight behind the split within bounds, by a statement that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        self.scale.data.clamp_(0.7, 1.2)
        return self.head(self.stage2(x * self.scale).mean((2, 3)))


class Counting(small.SmallNet):
    """Reads a counter, then counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x)) + 0.1 * self.seen)
        if self.training:
            self.seen.add_(1)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("splits", [["input"], ["stem"], ["stem", "stage1"]], ids=str)
@pytest.mark.parametrize(("model", "key"), [(Bounded, "scale"), (Counting, "seen")])
def test_state_that_is_changed_by_a_statement_belongs_to_its_readers_level(
    model: type[nn.Module], key: str, splits: list[str]
) -> None:
    torch.manual_seed(0)
    hne = small.converted(model(), splits)
    assert hne.branches_of(key) == hne.leaves
    assert treeify.verify(hne, small.images(2)).worst <= 1
    hne.train()
    for _ in range(2):
        hne(small.images(2))
    value = hne.state_dict()[key]
    if key == "scale":
        assert_close(value, value.clamp(0.7, 1.2))
    else:
        assert value.tolist() == [2.0] * hne.leaves


class Named(small.SmallNet):
    """Has a module of a given name whose value crosses a split."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = getattr(self, self.name)(self.stage1(self.stem(x)))
        return self.head((self.stage2(x) + x).mean((2, 3)))


@pytest.mark.parametrize("name", ["output", "span", "self", "span_", "return_"])
def test_a_module_may_have_any_name(name: str) -> None:
    torch.manual_seed(0)
    model = Named(name)
    hne = small.converted(model, ["stage1", "stage2:3"]).eval()
    x = small.images(2)
    assert treeify.verify(hne, x).worst <= 1
    *_, last = hne.anytime(x)
    assert_close(last.logits, hne(x).mean(1))
    assert_close(hne(x)[:, 0], model.eval()(x))


class Scaled(small.SmallNet):
    """Two levels read the same parameters directly, and return one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.gain = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stage1(self.stem(x)) * self.scale * self.gain
        x = self.stage2(x) * self.scale * self.gain
        return self.head(x.mean((2, 3))), self.scale


class Weighted(small.SmallNet):
    """A number for each image goes from level to level."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        weight = x.mean((1, 2, 3))
        x = self.stage2(x)
        return self.head((x + weight[:, None, None, None]).mean((2, 3)))


MIXED = [("packed", "packed", "looped"), ("packed", "looped", "packed")]


@pytest.mark.parametrize("ways", MIXED, ids=str)
@pytest.mark.parametrize("model", [Scaled, Weighted])
def test_stacked_values_go_between_packed_and_looped_levels(
    model: type[nn.Module], ways: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    hne = small.converted(model(), ["stem", "stage2"]).double().eval()
    x = small.images(3).double()
    hne.execution = ways
    assert treeify.verify(hne, x).worst <= 1
    found: Any = hne(x)
    for leaf in range(hne.leaves):
        expected = hne.leaf(leaf).eval()(x)
        if model is Scaled:
            assert_close(found[1][:, leaf], expected[1])
            assert_close(found[0][:, leaf], expected[0])
        else:
            assert_close(found[:, leaf], expected)


def test_verify_runs_levels_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hne = small.converted(Weighted(), ["stem", "stage1"])
    right = program.unpack

    def misplaced(*args: Any, **options: Any) -> Any:
        """The branches the other way round, which only a looped level under a packed one reads."""
        return type(parts := right(*args, **options))(reversed(parts))

    monkeypatch.setattr(program, "unpack", misplaced)
    with pytest.raises(ParityError, match="leaf_eval"):
        treeify.verify(hne, small.images(2))


def test_images_leave_a_session_with_the_numbers_that_are_theirs() -> None:
    torch.manual_seed(0)
    hne = small.converted(Weighted(), ["stem", "stage2"]).eval()
    x = small.images(4)
    session = hne.session(x)
    session.advance(2)
    session.select(torch.tensor([1, 3]))
    session.advance(4)
    assert_close(session.logits, hne(x[[1, 3]]).mean(1))


class Indexed(small.SmallNet):
    """Has whole numbers for a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.randperm(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(self.stem(x))[:, self.order]).mean((2, 3)))


def test_parameters_of_whole_numbers_are_checked_without_gradients() -> None:
    torch.manual_seed(0)
    figures = treeify.verify(small.converted(Indexed(), ["stem"]), small.images(2))
    assert figures.worst <= 1
    assert "order" in figures.ungraded
