"""How a base model is called, what it returns, and what goes on around its forward."""

import types
from dataclasses import dataclass

import pytest
import small
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import treeify
from treeify.errors import ParityError, TraceError


def converted(model: nn.Module, splits: list[str]) -> treeify.HierarchicalEnsemble:
    return treeify.hierarchicalize(model, splits, init="perturb", example_input=small.EXAMPLE)


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


@pytest.mark.parametrize(
    ("model", "split"),
    [
        (Variadic(), "stage1"),
        (Patched(), "stage1"),
        (nn.DataParallel(small.SmallNet()), "module.stage1"),
    ],
    ids=["variadic", "patched", "parallel"],
)
def test_a_forward_of_any_signature_is_given_images(model: nn.Module, split: str) -> None:
    hne = converted(model, [split])
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
        converted(model(), ["stage1"])


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
def test_scripted_modules_are_refused() -> None:
    model = small.SmallNet()
    model.stage2 = torch.jit.script(model.stage2)
    with pytest.raises(TraceError, match="stage2 is scripted"):
        converted(model, ["stage1"])


def test_assigning_to_the_data_of_a_weight_is_refused() -> None:
    class Normalizing(small.SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            self.head.weight.data = F.normalize(self.head.weight.data)
            return super().forward(x)

    with pytest.raises(TraceError, match=r"assigns to a tensor's data(.|\n)*in forward: self.head"):
        converted(Normalizing(), ["stage1"])


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
    hne = converted(model, ["stage1"])
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
    hne = converted(Enlarging(), ["down"])
    assert hne.conversion.packed_share == 1
    assert treeify.verify(hne, small.images()).worst <= 1


class Noisy(small.SmallNet):
    """Noise in training, from torch in three ways, or from elsewhere."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        if self.training:
            x = x * (1 + self.noise(x))
        return self.head(x.mean((2, 3)))

    def noise(self, x: Tensor) -> Tensor:
        if self.source == "like":
            return torch.randn_like(x)
        if self.source == "sizes":
            return torch.rand(x.shape[0], 1, 1, 1, device=x.device)
        if self.source == "in place":
            return x.new_empty(x.shape[0], 1, 1, 1).normal_()
        return torch.poisson(x.abs())


@pytest.mark.parametrize("source", ["like", "sizes", "in place"])
def test_random_draws_are_held_at_their_mean_by_verify(source: str) -> None:
    hne = converted(Noisy(source), ["stage1"])
    assert treeify.verify(hne, small.images(2)).worst <= 1
    logits = hne.train()(small.images(2))
    assert not torch.equal(logits, hne(small.images(2)))  # in training the draws are random


def test_noise_that_cannot_be_held_is_not_taken_for_a_bug() -> None:
    hne = converted(Noisy("elsewhere"), ["stage1"])
    with pytest.raises(ParityError, match="itself gives other values each time in training mode"):
        treeify.verify(hne, small.images(2))


class Recomputing(small.SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.stage1, self.stem(x), use_reentrant=False)
        return self.head(x.mean((2, 3)))


def test_checkpointing_is_left_out_and_the_notes_say_so() -> None:
    torch.manual_seed(0)
    hne = converted(Recomputing(), ["stage1"])
    assert any("torch.utils.checkpoint is left out" in note for note in hne.conversion.notes)
    # The base model updates the statistics of its batch norms twice in a step; see verify.
    assert treeify.verify(hne, small.images(4)).worst <= 1


def test_hooks_of_the_user_are_not_called() -> None:
    model = small.SmallNet()
    seen: list[object] = []
    model.stage1.register_forward_hook(lambda *args: seen.append(args))
    model.stage1[0].register_forward_pre_hook(lambda *args: seen.append(args))
    hne = treeify.hierarchicalize(model, ["stage2"], example_input=small.EXAMPLE)
    assert hne.conversion.notes == ("leaves out the forward hooks of stage1, stage1.0",)
    hne(small.images())
    hne.leaf(0)(small.images())
    assert seen == []
    model.eval()(small.images())
    assert len(seen) == 2
