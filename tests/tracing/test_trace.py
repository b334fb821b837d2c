"""Tracing as a user meets it: examples, arguments by name, outputs, and the report."""

import pytest
import small
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import treeify
from treeify.engine.forms import Form
from treeify.errors import InputError, ModelError, ParityError


def test_a_learned_query_that_is_expanded_is_counted() -> None:
    """timm's attention pooling: a view of a parameter goes into a module."""
    model = timm.create_model("test_vit3", img_size=32, num_classes=3)
    example = torch.rand(2, 3, 32, 32)
    hne = treeify.hierarchicalize(model, ["blocks.1"], init="perturb", example_input=example)
    assert all(parameter.requires_grad for parameter in hne.parameters())
    assert treeify.verify(hne, example).worst <= 1


def test_an_example_that_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"does not run on an input of shape \[N, 1, 8, 8\]"):
        treeify.hierarchicalize(
            small.SmallNet(), 1, init="fresh", example_input=torch.zeros(1, 1, 8, 8)
        )


def test_an_example_that_fails_an_assertion_without_a_word() -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] != 16:
                raise AssertionError  # as an assert outside of tests does
            return x

    model = nn.Sequential(Sized(), small.SmallNet())
    with pytest.raises(InputError, match=r"does not run on an input.*AssertionError(?s:.*)size"):
        treeify.hierarchicalize(model, 1, init="fresh", example_input=small.EXAMPLE)


def test_what_is_no_model() -> None:
    with pytest.raises(ModelError, match="is no model"):
        treeify.hierarchicalize(3)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="resnet50"):
        treeify.hierarchicalize("resnet5O")


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
    hne = treeify.hierarchicalize(
        Deciding(False), ["stage1"], init="fresh", example_input=small.EXAMPLE
    )
    with pytest.raises(ParityError, match="no output has a gradient"):
        treeify.verify(hne, small.images(2))


@pytest.mark.parametrize("splits", [["stem"], ["norm"]])
def test_inputs_by_name_own_indices_and_complex_weights(splits: list[str]) -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(Named(), splits, init="perturb", example_input=small.EXAMPLE)
    with torch.no_grad():
        assert treeify.verify(hne, small.images(2)).worst <= 1
    assert not torch.equal(hne.leaf(0).weight, hne.leaf(1).weight)


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
