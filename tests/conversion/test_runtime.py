"""What users do with an ensemble but call it: pickle, transform, export, train it."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import treeify
from treeify.engine.plan import Plan, Situation, Tuning

FUSED = Plan(("packed",) * 3, fuse=True)


class WithoutNorms(nn.Module):
    """Nothing counts its training steps; `[N, 3, 8, 8] -> [N, 5]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))


def tune_as(hne: treeify.HierarchicalEnsemble, x: Tensor, plan: Plan) -> None:
    """As if a plan had been found to be the fastest."""
    situation = Situation.of(x, training=False)
    hne.tunings[situation] = Tuning(situation, plan)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.SGD])
def test_prepared_weights_follow_fused_optimizers(kind: Callable[..., Any]) -> None:
    hne = small.converted(WithoutNorms()).eval()
    x = small.images(2)
    optimizer = kind(hne.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            assert_close(hne.run(x, 4, FUSED), hne.run(x, 4, Plan(FUSED.execution)))
        hne(x).square().mean().backward()
        optimizer.step()


def test_prepared_weights_are_forgotten_when_training_ends_after_a_tuning_for_inference() -> None:
    hne = small.converted(WithoutNorms()).train()
    x = small.images(2)
    hne.tune(x, training=False, repeats=1)
    for parameter in hne.parameters():
        parameter.data.mul_(1.5)
    hne.eval()
    with torch.no_grad():
        assert_close(hne.run(x, 4, FUSED), hne.run(x, 4, Plan(FUSED.execution)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own formulas
def test_forward_derivatives_are_those_of_the_plain_plan() -> None:
    hne = small.converted(small.SmallNet()).eval()
    x, direction = small.images(2), small.images(2, seed=2)
    with torch.no_grad():
        hne.run(x, 4, FUSED)
        found = torch.func.jvp(lambda own: hne.run(own, 4, FUSED), (x,), (direction,))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, direction)
            other = torch.autograd.forward_ad.unpack_dual(hne.run(dual, 4, FUSED)).tangent
    plain = hne.run(x.requires_grad_(), 4, Plan(FUSED.execution))
    weights = torch.ones_like(plain, requires_grad=True)
    (gradient,) = torch.autograd.grad(plain, x, weights, create_graph=True)
    (expected,) = torch.autograd.grad(gradient, weights, direction)  # twice backward is forward
    assert expected.abs().max() > 0
    assert_close(found, expected)
    assert_close(other, expected)


def test_an_ensemble_can_be_pickled() -> None:
    hne = small.converted(small.SmallNet()).eval()
    x = small.images(2)
    file = io.BytesIO()
    torch.save(hne, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(x), hne(x))
    assert treeify.verify(again, x).worst <= 1
    assert again.conversion.splits.specs == hne.conversion.splits.specs


def test_tuned_ensembles_can_be_transformed() -> None:
    hne = small.converted(small.SmallNet()).eval()
    x = small.images(3)
    expected = hne(x)
    tune_as(hne, x[:1], Plan(FUSED.execution, channels_last=True, fuse=True))
    with torch.no_grad():
        assert_close(torch.func.vmap(lambda image: hne(image[None])[0])(x), expected)
        assert_close(torch.compile(hne, fullgraph=True, backend="eager")(x), expected)


@pytest.mark.parametrize("tuned", [False, True])
def test_packed_ensembles_are_exported_for_any_number_of_images(tuned: bool) -> None:
    hne = small.converted(small.SmallNet()).eval()
    x = small.images(3)
    if tuned:
        hne.tune(x, repeats=1)
    with torch.no_grad():
        exported = torch.export.export(hne, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
        for count in (2, 5):
            images = small.images(count)
            assert_close(exported.module()(images), hne(images))


class Deep(small.SmallNet):
    """Has weights of five dims beside those of four."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        return self.head(self.stage2(self.deep(x[:, None]).mean(1)).mean((2, 3)))


def test_models_with_weights_of_five_dims_are_tuned(tmp_path: Path) -> None:
    hne = small.converted(Deep()).eval()
    x = small.images(2)
    expected = hne(x)
    hne.tune(x, repeats=1)
    assert_close(hne(x), expected)
    tune_as(hne, x, Plan(FUSED.execution, channels_last=True))
    treeify.save(hne, tmp_path / "deep")
    again = treeify.load(tmp_path / "deep", model=Deep())
    assert_close(again(x), expected)
    assert again.get_parameter("stage1.0.weight").is_contiguous(memory_format=torch.channels_last)


class Extra(nn.Module):
    """Stays closed, and has an extra state; `[N, C, H, W] -> [N, C, H, W]`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state["version"] == 3

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if x.mean() < 100 else x


def with_extra() -> small.SmallNet:
    model = small.SmallNet()
    model.stem = nn.Sequential(model.stem, Extra())
    return model


def test_a_module_with_an_extra_state_is_saved(tmp_path: Path) -> None:
    hne = small.converted(with_extra(), ["stage1"]).eval()
    treeify.save(hne, tmp_path / "extra")
    x = small.images(2)
    assert_close(treeify.load(tmp_path / "extra", model=with_extra())(x), hne(x))
