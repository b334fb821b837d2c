"""Tracing: what stops it is named, and what it finds out is right."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import small
import timm
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing import assert_close

import treeify
from treeify.conversion.assemble import trace_model
from treeify.engine.forms import Form
from treeify.errors import InputError, ModelError, ParityError, TraceError
from treeify.tracing.facts import facts


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
    with pytest.raises(TraceError, match=r"test_trace.py:\d+ in forward: if x.mean\(\) > 0:"):
        treeify.hierarchicalize(Branching(), 1, example_input=small.EXAMPLE)


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


def test_a_module_that_stops_the_tracer_stays_closed_and_the_rest_is_opened() -> None:
    for model, closed in ((Wrapped(), ["body.1.1"]), (nn.Sequential(Wrapped()), ["0.body.1.1"])):
        traced = trace_model(model, example_input=small.EXAMPLE)
        assert "if x.mean() > 0:" in traced.leaf_modules[closed[0]]
        for graph in traced.graphs.values():
            calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
            assert closed[0] in calls
            assert not any(call.startswith(f"{closed[0]}.") for call in calls)
            assert closed[0].replace("1.1", "0") in calls
        hne = treeify.hierarchicalize(model, 1, example_input=small.EXAMPLE)
        x = small.images(3)
        assert treeify.verify(hne, x).worst <= 1
        assert any(
            f"{closed[0]} (Flipping) runs as one call" in note for note in hne.conversion.notes
        )
        (reason,) = (own for own in hne.conversion.fallbacks if own.startswith("Flipping: "))
        assert "its inside cannot be traced: " in reason
        assert "if x.mean() > 0:" in reason
        assert Path(__file__).name in reason
        assert not any(folder in reason for folder in sys.path if folder)


def test_what_is_closed_in_one_mode_is_closed_in_the_other() -> None:
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


@register_notrace_module
class Marked(nn.Module):
    """Could be opened, and its author does not want that."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_module_marked_by_its_author_stays_closed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Marked(), nn.Flatten(), nn.Linear(4 * 64, 3))
    traced = trace_model(model, example_input=small.EXAMPLE)
    for graph in traced.graphs.values():
        calls = [node.target for node in graph.nodes if node.op == "call_module"]
        assert calls == ["0", "1", "2", "3"]


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


@torch.fx.wrap
def halved(x: Tensor) -> Tensor:
    """Changes what it is given, and its name does not say so."""
    x[:] = x / 2
    return x


class Halving(nn.Module):
    """The same as a module that stays closed."""

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
        treeify.hierarchicalize(SlyView(late=False), ["head"], example_input=small.EXAMPLE)


def test_an_input_that_was_changed_unasked_and_is_read_again_is_refused() -> None:
    with pytest.raises(TraceError, match="in place, which add reads afterwards"):
        treeify.hierarchicalize(Sly(late=True), ["head"], example_input=small.EXAMPLE)


class Counting(nn.Module):
    """Counts its training steps by assignment, which leaves no node behind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)
        self.register_buffer("steps", torch.tensor(0.0))
        self.register_buffer("sum", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            self.sum = self.sum + 2 * self.steps
        return self.inner(x)


def test_a_module_that_assigns_to_its_buffers_stays_closed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Counting(), nn.Flatten(), nn.Linear(4 * 64, 3))
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
        treeify.hierarchicalize(Counting(), [], example_input=torch.zeros(1, 4, 8, 8))


def test_control_flow_of_gemma_is_opened() -> None:
    """Asks for the number of dims, the sides, and whether a mask holds anything."""
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2, "head_dim": 16, "intermediate_size": 48}
    model = timm.create_model("gemma4_vit_167m_enc", **options, position_embedding_size=8)
    example = torch.rand(2, 3, 96, 96)
    hne = treeify.hierarchicalize(model, ["blocks.0"], init="perturb", example_input=example)
    assert not hne.traced.leaf_modules
    assert treeify.verify(hne, example).worst <= 1


def test_a_learned_query_that_is_expanded_is_counted() -> None:
    """timm's attention pooling: a view of a parameter goes into a module."""
    model = timm.create_model("test_vit3", img_size=32, num_classes=3)
    example = torch.rand(2, 3, 32, 32)
    hne = treeify.hierarchicalize(model, ["blocks.1"], init="perturb", example_input=example)
    assert all(parameter.requires_grad for parameter in hne.parameters())
    assert treeify.verify(hne, example).worst <= 1


def test_an_example_that_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"does not run on an input of shape \[N, 1, 8, 8\]"):
        treeify.hierarchicalize(small.SmallNet(), 1, example_input=torch.zeros(1, 1, 8, 8))


def test_an_example_that_fails_an_assertion_without_a_word() -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] != 16:
                raise AssertionError  # as an assert outside of tests does
            return x

    model = nn.Sequential(Sized(), small.SmallNet())
    with pytest.raises(InputError, match=r"does not run on an input.*AssertionError(?s:.*)size"):
        treeify.hierarchicalize(model, 1, example_input=small.EXAMPLE)


def test_what_is_no_model() -> None:
    with pytest.raises(ModelError, match="is no model"):
        treeify.hierarchicalize(3)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="resnet50"):
        treeify.hierarchicalize("resnet5O")


def test_facts_of_a_traced_model() -> None:
    traced = trace_model(small.SmallNet(), example_input=small.EXAMPLE)
    known = {facts(node).path: facts(node) for node in traced.graphs[False].nodes}
    assert known["stage1.0"].macs == 64 * 9 * 8 * 8
    assert known["stage1.0"].tensors[0].shape == (2, 8, 8, 8)
    assert known["stage1.0"].tensors[0].batched
    assert "add" in known
    assert "add_1" in known


def test_in_place_on_a_view_that_is_read_later_is_refused() -> None:
    class View(small.SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x[:, :2].mul_(2)
            return self.head(self.stage1(x).mean((2, 3)))

    with pytest.raises(TraceError, match="a view of"):
        treeify.hierarchicalize(View(), ["stage1"], example_input=small.EXAMPLE)


class Aliasing(nn.Module):
    """Values that lie in one another's memory while one of them is changed in place.

    Args:
        case: what is changed and what is read afterwards.
    """

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.same = nn.Identity()
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + 0.1
        if self.case == "identity":
            other = self.same(x).relu_()
        elif self.case == "identity, the other way":
            other = self.same(x)
            x.relu_()
        elif self.case == "dropout and contiguous":
            other = nn.functional.dropout(x, 0.5, self.training).contiguous()
            x = x.mul_(0.5) if not self.training else x
        elif self.case == "narrow":
            first, second = x.narrow(1, 0, 2), x.narrow(1, 2, 2)
            first.mul_(2.0)
            x = other = torch.cat((first, second), dim=1)
        elif self.case == "slices":
            other, rest = x[:, :2], x[:, 2:]
            rest.add_(1.0)
            x = other = torch.cat((other, rest), dim=1)
        elif self.case == "a part":
            other = x[:, 1:].repeat(1, 2, 1, 1)[:, :4] + 1
            part = x[:, :3]
            x.add_(1.0)
            other = other + part.sum(1, keepdim=True)
        else:
            part, other = x[:, :3], x[:, 2:]
            part.add_(1.0)
            x = other = torch.cat((part, other), dim=1)[:, :4]
        return self.head((self.body(x) + other).mean((2, 3)))


@pytest.mark.parametrize(
    "case",
    ["identity", "identity, the other way", "dropout and contiguous", "narrow", "slices"],
)
def test_values_of_one_memory_change_together_or_not_at_all(case: str) -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(
        Aliasing(case), ["body"], init="perturb", example_input=small.EXAMPLE
    )
    assert treeify.verify(hne, small.images(2)).worst <= 1


@pytest.mark.parametrize("case", ["a part", "overlapping parts"])
def test_a_part_of_what_is_changed_in_place_must_not_be_read_later(case: str) -> None:
    with pytest.raises(TraceError, match=r"in place, and getitem.* with it, which .* afterwards"):
        treeify.hierarchicalize(Aliasing(case), ["body"], example_input=small.EXAMPLE)


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
    """Reads what a closed module has changed, though nothing about that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.close = Halving()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.close(x) * x


class Nested(nn.Module):
    """Reads what a module in it has changed, that stays closed for its own sake already."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Overlapping()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * x


@pytest.mark.parametrize("split", ["stem", "odd.0", "head"])
@pytest.mark.parametrize("odd", [Overlapping, Outer, LateReader, Nested])
def test_a_module_that_reads_what_it_changed_in_place_stays_closed(
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
def test_a_module_that_does_what_no_graph_shows_stays_closed(case: str) -> None:
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
        treeify.hierarchicalize(Root(case), ["conv"], example_input=small.EXAMPLE)


def test_numbers_that_change_while_a_model_runs_are_refused() -> None:
    """Branches cannot have one each, as they have of buffers."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Unseen("counter"), nn.Flatten())
    with pytest.raises(TraceError, match=r"Unseen changes its attribute 'calls'.*(?s:.*) a buffer"):
        treeify.hierarchicalize(model, ["0"], example_input=small.EXAMPLE)


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


def test_a_closed_module_may_keep_a_size() -> None:
    hne = stateful("width")
    assert list(hne.traced.leaf_modules) == ["1"]
    assert treeify.verify(hne, small.images()).worst <= 1


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
    hne = treeify.hierarchicalize(model, ["stage1"], example_input=small.EXAMPLE)
    assert hne.training and hne.get_submodule("stem").training
    assert not hne.get_submodule("stage1").training


class Named(nn.Module):
    """Gives modules their input by name, picks channels by a buffer, writes through `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4)
        self.register_buffer("picked", torch.tensor([2, 0]))
        self.register_buffer("passes", torch.ones(2, 1, 1))
        self.weight = nn.Parameter(torch.randn(2, dtype=torch.cfloat))
        self.head = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(input=self.stem(input=x)).index_select(1, self.picked)
        if self.training:
            self.passes.data.mul_(0.5)
        x = torch.fft.ifft(torch.fft.fft(x, dim=1) * self.weight[:, None, None], dim=1).real
        return self.head((x * self.passes).mean((2, 3)))


class Keywords(nn.Module):
    """Names arguments that others give by their place, and computes dims."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 1), nn.LayerNorm(4)
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.movedim(x * x.size(dim=1), source=1, destination=-1)
        x = self.norm(x).permute(dims=(0, 3, 1, 2))
        x = x.transpose(1, x.ndim - 1).transpose(dim0=1, dim1=3)
        x = torch.flatten(input=x, start_dim=2).mean(dim=2) * (x.size(dim=1) + x.size(dim=0) - 6)
        return F.linear(input=torch.relu(input=x), weight=self.weight)


@pytest.mark.parametrize("splits", [["input"], ["stem"], ["norm"]])
def test_arguments_may_be_named(splits: list[str]) -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(Keywords(), splits, init="perturb", example_input=small.EXAMPLE)
    assert treeify.verify(hne, small.images(3)).worst <= 1
    assert treeify.verify(hne, small.images(4)).worst <= 1


class Deciding(small.SmallNet):
    """Answers with classes, beside the logits if wanted."""

    def __init__(self, logits: bool) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = super().forward(x)
        found = {"class": logits.argmax(1)}
        return {**found, "logits": logits} if self.logits else found


def test_outputs_without_gradients_are_checked_beside_those_that_have_them() -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(
        Deciding(True), ["stage1"], init="perturb", example_input=small.EXAMPLE
    )
    assert treeify.verify(hne, small.images(2)).worst <= 1
    hne = treeify.hierarchicalize(Deciding(False), ["stage1"], example_input=small.EXAMPLE)
    with pytest.raises(ParityError, match="no output has a gradient"):
        treeify.verify(hne, small.images(2))


@pytest.mark.parametrize("splits", [["stem"], ["norm"]])
def test_inputs_by_name_own_indices_and_complex_weights(splits: list[str]) -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(Named(), splits, init="perturb", example_input=small.EXAMPLE)
    with torch.no_grad():
        assert treeify.verify(hne, small.images(2)).worst <= 1
    assert not torch.equal(hne.leaf(0).weight, hne.leaf(1).weight)


@pytest.mark.parametrize(
    "norm", [nn.utils.spectral_norm, lambda own: prune.l1_unstructured(own, "weight", 0.5)]
)
def test_weights_computed_by_hooks_are_refused_with_a_way_out(norm: Any) -> None:
    model = small.SmallNet()
    norm(model.stage1[0])
    with pytest.raises(TraceError, match=r"weights of stage1\.0.*(?s:.*)parametrizations"):
        treeify.hierarchicalize(model, ["stage1"], example_input=small.EXAMPLE)


def test_weight_norm_is_architecture() -> None:
    model = small.SmallNet()
    nn.utils.parametrizations.weight_norm(model.stage1[0])
    hne = treeify.hierarchicalize(
        model, ["stage1", "stage2"], init="perturb", example_input=small.EXAMPLE
    )
    assert treeify.verify(hne, small.images()).worst <= 1


def test_the_report_says_what_runs_how() -> None:
    class Unknown(small.SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.fft.fft2(x).real)

    hne = treeify.hierarchicalize(
        Unknown(), ["input", "stage2"], init="perturb", example_input=small.EXAMPLE
    )
    by_path = {node.path: node for node in hne.conversion.nodes}
    assert by_path["fft_fft2"].form is Form.BRANCHES
    assert "no rule for fft_fft2" in by_path["fft_fft2"].reason
    assert by_path["stage1.0"].form is Form.PACKED
    assert "no rule for fft_fft2" in str(hne.conversion)
    assert treeify.verify(hne, small.images()).worst <= 1
