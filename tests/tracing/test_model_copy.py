"""What a copy of a model would share with it or lose is refused, and named."""

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import small
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing import assert_close

import treeify
from treeify.errors import TraceError


class Holding(small.SmallNet):
    """Its second stage is called through something that holds it."""

    def __init__(self, hold: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.held = hold(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((self.held(x) + x).mean((2, 3)))


class Parent(nn.Module):
    """Reached from a stage by a weak reference."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.child = nn.ReLU()
        self.child.parent = weakref.ref(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.conv(x)).mean((2, 3))


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "a function's variable": lambda net: lambda x: net.stage1(x),
    "a function's default": lambda net: lambda x, stage=net.stage1: stage(x),
    "a function's default by name": lambda net: lambda x, *, stage=net.stage1: stage(x),
    "a method in a function": lambda net: (lambda call: lambda x: call(x))(net.stage1.forward),
    "a cache of a method": lambda net: functools.cache(net.stage1.forward),
    "a cache of a function": lambda net: functools.cache(lambda x: net.stage1(x)),
    "a partial function": lambda net: functools.partial(lambda stage, x: net.stage1(x), None),
    "a method made of a function": lambda net: types.MethodType(lambda _, x: net.stage1(x), 0),
    "a list of functions": lambda net: [lambda x: net.stage1(x)],
}


@pytest.mark.parametrize("case", HOLDERS)
def test_functions_that_hold_the_models_own_modules_are_refused(case: str) -> None:
    with pytest.raises(TraceError, match=r"'held' of the model is a function, .*(?s:.*)method"):
        treeify.hierarchicalize(
            Holding(HOLDERS[case]), 1, init="fresh", example_input=small.EXAMPLE
        )


def test_weak_references_to_the_models_own_modules_are_refused() -> None:
    with pytest.raises(
        TraceError, match=r"'parent' of child is a function, cache or weak reference"
    ):
        treeify.hierarchicalize(Parent(), 1, init="fresh", example_input=small.EXAMPLE)


def unfinished() -> Callable[[Tensor], Tensor]:
    """A function one of whose variables has no value yet."""

    def call(x: Tensor) -> Tensor:
        return x if x is not None else later

    if call is None:
        later = torch.zeros(())
    return call


@pytest.mark.parametrize("held", [lambda x: x.relu(), unfinished()])
def test_other_functions_are_not(held: Any) -> None:
    torch.manual_seed(0)
    model = Holding(lambda net: held)
    hne = treeify.hierarchicalize(model, ["stem"], init="perturb", example_input=small.EXAMPLE)
    x = small.images(2)
    assert treeify.verify(hne, x).worst <= 1
    assert_close(hne.eval()(x)[:, 0], model.eval()(x))


class Watching(small.SmallNet):
    """Answers from what its own hook has kept."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.kept: Tensor | None = None
        hooks = {
            "bound": self.keep,
            "function": lambda module, args, out: self.keep(module, args, out),
            "partial": functools.partial(functools.partial(self.keep)),
        }
        self.stage2.register_forward_hook(hooks[case])
        with torch.no_grad():
            self(small.images(1))

    def keep(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.kept = out

    def forward(self, x: Tensor) -> Tensor:
        self.stage2(self.stage1(self.stem(x)))
        assert self.kept is not None
        return self.head(self.kept.mean((2, 3)))


@pytest.mark.parametrize("case", ["bound", "function", "partial"])
def test_a_hook_of_the_models_own_is_refused(case: str) -> None:
    with pytest.raises(TraceError, match=r"a hook of stage2 belongs to the model itself"):
        treeify.hierarchicalize(Watching(case), 1, init="fresh", example_input=small.EXAMPLE)


class Keeping(small.SmallNet):
    """Keeps an activation for whoever wants to look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.stage1(self.stem(x))
        return self.head(self.stage2(self.kept).mean((2, 3)))


def test_an_activation_kept_from_training_is_left_out() -> None:
    torch.manual_seed(0)
    model = Keeping()
    model(small.images(2)).sum().backward()
    kept = model.kept
    hne = treeify.hierarchicalize(model, 1, init="copy", example_input=small.EXAMPLE)
    assert model.kept is kept
    assert "does not set the attributes kept" in hne.conversion.notes
    x = small.images(3)
    assert treeify.verify(hne, x).worst <= 1
    with torch.no_grad():
        assert_close(hne.eval()(x)[:, 1], model.eval()(x))


@pytest.mark.parametrize(
    "norm", [nn.utils.spectral_norm, lambda own: prune.l1_unstructured(own, "weight", 0.5)]
)
def test_weights_computed_by_hooks_are_refused_with_a_way_out(norm: Any) -> None:
    model = small.SmallNet()
    norm(model.stage1[0])
    with pytest.raises(TraceError, match=r"weights of stage1\.0.*(?s:.*)parametrizations"):
        treeify.hierarchicalize(model, ["stage1"], init="fresh", example_input=small.EXAMPLE)


def test_weight_norm_is_architecture() -> None:
    model = small.SmallNet()
    nn.utils.parametrizations.weight_norm(model.stage1[0])
    hne = treeify.hierarchicalize(
        model, ["stage1", "stage2"], init="perturb", example_input=small.EXAMPLE
    )
    assert treeify.verify(hne, small.images()).worst <= 1
