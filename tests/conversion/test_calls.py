"""How a base model is called, what it returns, and what goes on around its forward."""

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import treeify
from treeify.errors import ParityError, TraceError


def test_arguments_with_defaults_keep_them() -> None:
    class Optional(small.SmallNet):
        def forward(self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
            x = super().forward(x) * scale
            return x if mask is None else x * mask

    model = Optional().eval()
    hne = treeify.hierarchicalize(
        model, ["stage1"], init="copy", example_input=small.EXAMPLE
    ).eval()
    x = small.images()
    assert_close(hne(x)[:, 1], model(x))


class Variadic(small.SmallNet):
    def forward(self, *images: Tensor, negative: bool = False, **others: float) -> Tensor:
        x = super().forward(*images)
        return -x if negative or others else x


class Patched(small.SmallNet):
    """Its `forward` was replaced, as people do with models they cannot edit."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = types.MethodType(  # type: ignore[method-assign]
            lambda own, x: 2 * small.SmallNet.forward(own, x), self
        )


def scaled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(forward)
    def call(*args: Any) -> Tensor:
        return forward(*args, scale=2.0)

    return call


class Decorated(small.SmallNet):
    @scaled
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return super().forward(x) * scale


@pytest.mark.parametrize(
    "model",
    [
        Variadic(),
        Patched(),
        Decorated(),
        nn.DataParallel(small.SmallNet()),
        torch.compile(small.SmallNet(), backend="eager"),
    ],
    ids=["variadic", "patched", "decorated", "parallel", "compiled"],
)
def test_a_forward_of_any_signature_is_given_images(model: nn.Module) -> None:
    hne = small.converted(model, ["stage1"])
    x = small.images()
    assert_close(hne.eval()(x)[:, 0], model.eval()(x))
    assert treeify.verify(hne, x).worst <= 1


class Scaled(small.SmallNet):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return super().forward(x) * scale


class ScaledByName(small.SmallNet):
    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return super().forward(x) * scale


@pytest.mark.parametrize("model", [Scaled, ScaledByName])
def test_a_forward_that_needs_more_than_images_is_refused(model: type[nn.Module]) -> None:
    with pytest.raises(TraceError, match=r"with images alone: missing .* 'scale'"):
        small.converted(model(), ["stage1"])


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_scripted_modules_are_refused() -> None:
    model = small.SmallNet()
    with pytest.raises(TraceError, match="the model is scripted"):
        small.converted(torch.jit.script(model), ["stage1"])
    model.stage2 = torch.jit.script(model.stage2)
    with pytest.raises(TraceError, match="stage2 is scripted"):
        small.converted(model, ["stage1"])


def test_a_forward_that_calls_the_given_model_is_refused() -> None:
    model = small.SmallNet()
    original = model.forward
    model.forward = lambda x: 2 * original(x)  # type: ignore[method-assign]
    with pytest.raises(TraceError, match=r"replaced by a function(.|\n)*types\.MethodType"):
        small.converted(model, ["stage1"])


def test_assigning_to_the_data_of_a_weight_is_refused() -> None:
    class Normalizing(small.SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            self.head.weight.data = F.normalize(self.head.weight.data)
            return super().forward(x)

    with pytest.raises(TraceError, match=r"assigns to a tensor's data(.|\n)*in forward: self.head"):
        small.converted(Normalizing(), ["stage1"])


@dataclass
class Output:
    logits: Tensor
    features: Tensor


class Describing(small.SmallNet):
    def forward(self, x: Tensor) -> Output:
        x = self.stage1(self.stem(x))
        return Output(self.head(x.mean((2, 3))), x)


def test_a_dataclass_comes_back_with_the_leaf_dim_in_every_tensor() -> None:
    model = Describing()
    hne = small.converted(model, ["stage1"])
    x = small.images(2)
    assert treeify.verify(hne, x).worst <= 1
    found, expected = hne.eval()(x), model.eval()(x)
    assert type(found) is Output
    assert found.features.shape == (2, 2, 8, 8, 8)
    assert_close(found.logits[:, 0], expected.logits)
    assert hne(x, leaves=1).logits.shape == (2, 1, small.CLASSES)


class Enlarging(small.SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.up(self.down(x), output_size=x.shape[2:]) + x
        return self.head(x.mean((2, 3)))


def test_transposed_convolutions_are_given_their_output_size() -> None:
    hne = small.converted(Enlarging(), ["down"])
    assert hne.conversion.packed_fraction == 1
    assert treeify.verify(hne, small.images()).worst <= 1


class Forms(small.SmallNet):
    """Calls that rules know, in forms that they do not pack; `[N, 3, 8, 8] -> [N, 5]`."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        shapes = {
            "vector": (8,),
            "wide bias": (4, 8),
            "layout": (8, 8, 3, 3),
            "moved": (8, 8, 3, 3),
        }
        self.weight = nn.Parameter(torch.rand(*shapes.get(case, (1, 1, 8))))
        self.bias = nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x)))
        tokens = self.head.weight.mean(0) + x.flatten(2).transpose(1, 2)
        if self.case == "expand":
            tokens = tokens + self.weight.expand(size=(tokens.shape[0], -1, -1))
        elif self.case == "repeat":
            tokens = tokens + self.weight.repeat(repeats=(tokens.shape[0], 1, 1))
        elif self.case == "vector":
            tokens = F.linear(tokens, self.weight)[..., None].expand(-1, -1, 8)
        elif self.case == "wide bias":
            tokens = F.linear(tokens, self.weight, self.bias).repeat(1, 1, 2)
        elif self.case == "layout":
            weight = self.weight.contiguous(memory_format=torch.channels_last)
            tokens = F.conv2d(x, weight).flatten(2).transpose(1, 2)
        else:
            weight = self.weight.to(memory_format=torch.channels_last)
            tokens = F.conv2d(x, weight).flatten(2).transpose(1, 2)
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("case", ["expand", "repeat", "vector", "wide bias", "layout", "moved"])
def test_what_a_rule_does_not_take_runs_per_branch(case: str) -> None:
    torch.manual_seed(0)
    hne = small.converted(Forms(case), ["stage1:3"])
    assert treeify.verify(hne, small.images(2)).worst <= 1


class Noisy(small.SmallNet):
    """Noise from torch, in training or always."""

    def __init__(self, source: str, *, always: bool = False) -> None:
        super().__init__()
        self.source, self.always = source, always

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        if self.training or self.always:
            x = x * (1 + self.noise(x))
        return self.head(x.mean((2, 3)))

    def noise(self, x: Tensor) -> Tensor:
        sizes = (x.shape[0], 1, 1, 1)
        if self.source == "like":
            return torch.randn_like(x) + torch.rand_like(x)
        if self.source == "sizes":
            return torch.rand(*sizes, device=x.device) + torch.randn(sizes, device=x.device)
        if self.source == "in place":
            return x.new_empty(sizes).normal_(1) + x.new_empty(sizes).uniform_(-1, 2)
        if self.source == "chances":
            return torch.bernoulli(x.sigmoid()) + x.new_empty(sizes).bernoulli_(0.2)
        if self.source == "dropout":
            return F.dropout(x, 0.5)
        return torch.poisson(x.abs())


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("source", ["like", "sizes", "in place", "chances", "dropout"])
def test_random_draws_are_held_at_their_mean_by_verify(source: str, always: bool) -> None:
    hne = small.converted(Noisy(source, always=always), ["stage1"])
    assert treeify.verify(hne, small.images(2)).worst <= 1
    hne.train(not always)
    logits = hne(small.images(2))
    assert not torch.equal(logits, hne(small.images(2)))  # outside of verify they are random


def test_noise_that_cannot_be_held_is_not_taken_for_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    hne = small.converted(Noisy("elsewhere"), ["stage1"])
    message = "times the tolerance in float64.*, and the base architecture itself gives other"
    with pytest.raises(ParityError, match=f"(leaf_train|gradient) .*{message}"):
        treeify.verify(hne, small.images(2))
    # Nor is a bug in the other mode taken for noise.
    run = treeify.HierarchicalEnsemble.run
    monkeypatch.setattr(treeify.HierarchicalEnsemble, "run", lambda *given: run(*given) + 1)
    with pytest.raises(ParityError, match=r"leaf_eval (.|\n)*This is a bug in treeify"):
        treeify.verify(hne, small.images(2))


class Recomputing(small.SmallNet):
    def __init__(self, *, reentrant: bool, noise: bool = False) -> None:
        super().__init__()
        self.reentrant, self.noise = reentrant, noise

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.stage1, self.stem(x), use_reentrant=self.reentrant)
        if self.noise:
            x = checkpoint(self.stage2, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:None of the inputs:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_left_out_and_the_notes_say_so(reentrant: bool) -> None:
    torch.manual_seed(0)
    hne = small.converted(Recomputing(reentrant=reentrant), ["stage1"])
    assert any("torch.utils.checkpoint is left out" in note for note in hne.conversion.notes)
    # The base model updates the statistics of its batch norms twice in a step; see verify.
    assert treeify.verify(hne, small.images(4)).worst <= 1
    # No draw is held when activations are recomputed: the base model's own gradients are random.
    hne = small.converted(Recomputing(reentrant=reentrant, noise=True), ["stage1"])
    with pytest.raises(ParityError, match=r"gradient parity .* itself gives other values"):
        treeify.verify(hne, small.images(4))


def test_hooks_that_observe_are_not_called_by_the_ensemble() -> None:
    model = small.SmallNet()
    seen: list[object] = []
    model.stage1.register_forward_hook(lambda *args: seen.append(args))
    model.stage1[0].register_forward_pre_hook(lambda *args: seen.append(args))
    hne = treeify.hierarchicalize(model, ["stage2"], init="fresh", example_input=small.EXAMPLE)
    assert hne.conversion.notes[-1] == "leaves out the hooks of stage1, stage1.0"
    assert len(seen) == 4  # to see whether they change anything, once in each mode
    seen.clear()
    hne(small.images())
    hne.leaf(0)(small.images())
    assert seen == []
    model.eval()(small.images())
    assert len(seen) == 2
