"""What a pass does besides computing makes a module a leaf module, is undone, or is refused."""

import random
from typing import Any

import pytest
import small
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import treeify
from treeify.errors import TraceError
from treeify.tracing.side_effects import Snapshot, StateError, undo_side_effects


class Caching(nn.Module):
    """Remembers what it made for a size, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)
        self.register_buffer("places", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.places.shape[0] != x.shape[-1]:
            self.places = torch.arange(x.shape[-1]).float().to(x.device)
        return self.inner(x) * self.places


def test_a_cache_made_while_tracing_is_not_left_behind() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Caching(), nn.Flatten(), nn.Linear(4 * 64, 3))
    hne = treeify.hierarchicalize(model, ["1"], init="perturb", example_input=small.EXAMPLE)
    assert torch.equal(model[1].places, torch.zeros(1))
    assert not hne.traced.leaf_modules
    assert treeify.verify(hne, small.images(3)).worst <= 1


class Keyed(nn.Module):
    """Keeps what it computed under a key, and then looks at the size of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)
        self.known: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self.known:
            self.known["scale"] = self.inner.weight.mean().exp()
        x = self.inner(x) * self.known["scale"]
        return x.flip(-1) if x.shape[-1] > 4 else x


def test_a_cache_by_key_is_made_anew_in_every_try() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Keyed(), nn.Flatten(), nn.Linear(4 * 64, 3))
    hne = treeify.hierarchicalize(model, ["1"], init="perturb", example_input=small.EXAMPLE)
    assert model[1].known == {}
    assert not hne.traced.leaf_modules
    assert treeify.verify(hne, small.images(3)).worst <= 1


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Unseen(nn.Module):
    """Does what no graph shows; `[N, C, H, W] -> [N, C, H, W]`."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.calls = case, 0
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.case == "no_grad":
            with torch.no_grad():
                return x + self.conv(x)
        if self.case == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return x + self.conv(x).float()
        if self.case == "disabled":
            with torch.autocast("cpu", enabled=False):
                return x + self.conv(x)
        if self.case == "counter":
            self.calls += self.training
            return self.conv(x) * min(1.0, 0.25 * self.calls + 0.5)
        if self.case == "random" and self.training and random.random() < 2:
            return 2 * self.conv(x)
        return Reversed.apply(self.conv(x)) if self.case == "function" else self.conv(x)


UNSEEN = {
    "no_grad": "it switches gradients or autocast",
    "autocast": "it switches gradients or autocast",
    "disabled": "it switches gradients or autocast",
    "random": "it draws random numbers",
    "function": "Reversed has a backward of its own",
}


@pytest.mark.parametrize("case", UNSEEN)
def test_a_module_that_does_what_no_graph_shows_is_a_leaf_module(case: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 4, stride=4), Unseen(case), nn.Conv2d(4, 2, 2), nn.Flatten()
    )
    hne = treeify.hierarchicalize(model, ["0"], init="perturb", example_input=small.EXAMPLE)
    assert list(hne.traced.leaf_modules) == ["1"]
    assert hne.traced.leaf_modules["1"].startswith(UNSEEN[case])
    x = small.images(2)
    if (
        case != "autocast"
    ):  # in float64, where verify looks when rounding is coarse, it does nothing
        assert treeify.verify(hne, x).worst <= 1
    hne.eval()
    for leaf in range(hne.leaves):
        assert_close(hne(x)[:, leaf], hne.leaf(leaf)(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", UNSEEN)
def test_a_model_whose_own_forward_does_it_is_refused(case: str) -> None:
    class Root(Unseen):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :1].expand(-1, 4, -1, -1)).mean((2, 3))

    with pytest.raises(TraceError, match=UNSEEN[case]):
        treeify.hierarchicalize(Root(case), ["conv"], init="fresh", example_input=small.EXAMPLE)


def test_numbers_that_change_while_a_model_runs_are_refused() -> None:
    """Branches cannot have one each, as they have of buffers."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Unseen("counter"), nn.Flatten())
    with pytest.raises(TraceError, match=r"Unseen changes its attribute 'calls'.*(?s:.*) a buffer"):
        treeify.hierarchicalize(model, ["0"], init="fresh", example_input=small.EXAMPLE)


class Stateful(nn.Module):
    """Keeps something from call to call that is neither a parameter nor a buffer."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.calls, self.width = case, 0, 0
        self.conv = nn.Conv2d(4, 4, 1)
        self.average = torch.zeros(())
        self.pair = (torch.zeros(()), torch.ones(()))
        self.answers: list[Tensor] = []
        self.table, self.cache = {"scale": torch.ones(())}, dict[str, Tensor]()
        self.shown: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.case == "average":
            self.average = 0.9 * self.average + 0.1 * x.detach().mean()
            x = x - self.average
        if self.case == "pair":
            x = x * self.pair[1] - self.pair[0]
            self.pair = (x.detach().mean(), self.pair[1])
        if self.case == "answers":
            self.answers.append(x.detach())
        if self.case == "table":
            x = x * self.table["scale"]
            self.table["scale"] = x.detach().mean()
        if self.case == "shown":
            self.shown = self.cache["a"] = x.detach()
        if self.case == "calls":
            self.calls += 1
            x = x * self.calls
        if self.case == "width":
            self.width = x.shape[-1]
        if self.case in ("calls", "width") and x.abs().max() > 1e4:
            x = x / self.width
        return x


def stateful(case: str) -> treeify.HierarchicalEnsemble:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Stateful(case), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return treeify.hierarchicalize(model, ["0"], init="perturb", example_input=small.EXAMPLE)


@pytest.mark.parametrize("case", ["average", "pair", "answers", "table", "calls"])
def test_states_that_branches_cannot_have_one_each_of_are_refused(case: str) -> None:
    with pytest.raises(TraceError, match=f"changes its attribute '{case}'"):
        stateful(case)


def test_a_value_that_is_put_away_and_not_read_again_is_named() -> None:
    hne = stateful("shown")
    assert "does not set the attributes 1.cache, 1.shown" in hne.conversion.notes
    assert treeify.verify(hne, small.images()).worst <= 1


def test_a_leaf_module_may_keep_a_size() -> None:
    hne = stateful("width")
    assert list(hne.traced.leaf_modules) == ["1"]
    assert treeify.verify(hne, small.images()).worst <= 1


def test_modules_that_the_models_own_train_holds_back_stay_in_evaluation_mode() -> None:
    class HeldBack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 5)

        def train(self, mode: bool = True) -> "HeldBack":
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.stem(x)).mean((2, 3)))

    torch.manual_seed(0)
    hne = treeify.hierarchicalize(HeldBack(), ["norm"], init="perturb", example_input=small.EXAMPLE)
    assert treeify.verify(hne, small.images(2) + 1).worst <= 1
    hne.train()
    assert hne.get_submodule("stem").training and not hne.get_submodule("norm").training


def test_modules_of_a_model_keep_the_modes_they_were_given() -> None:
    model = small.SmallNet().train()
    model.stage1.eval()
    hne = treeify.hierarchicalize(model, ["stage1"], init="fresh", example_input=small.EXAMPLE)
    assert hne.training and hne.get_submodule("stem").training
    assert not hne.get_submodule("stage1").training


class Remembering(nn.Module):
    """Fills caches, assigns to a buffer and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0.0))
        self.calls, self.table, self.seen = 0, dict[str, Tensor](), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.steps = self.steps + 1
        self.calls += 1
        self.table["x"] = x
        self.seen.append(x)
        self.last = x
        return x


def test_what_passes_leave_behind_is_undone_but_for_the_tracers_constants() -> None:
    model = Remembering().eval()
    steps, table = model.steps, model.table
    with undo_side_effects(model):
        model.train()
        model(torch.ones(()))
        model._tensor_constant0 = torch.ones(())
    assert model.steps is steps and model.steps == 0
    assert model.table is table and not model.table and not model.seen
    assert model.calls == 0 and not model.training and not hasattr(model, "last")
    assert torch.equal(model._tensor_constant0, torch.ones(()))


def test_a_snapshot_refuses_numbers_and_random_draws() -> None:
    model = Remembering()
    before = Snapshot(model)
    assert before.compare({}) == []
    torch.rand(())
    with pytest.raises(TraceError, match="random numbers"):
        before.compare({})
    before = Snapshot(model)
    model(torch.ones(()))
    with pytest.raises(StateError, match="changes its attribute 'calls'"):
        before.compare({})
