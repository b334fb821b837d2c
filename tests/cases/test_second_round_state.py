"""Models in a state that other converters stumbled over: the second round (README.md)."""

import io
import threading
from pathlib import Path

import pytest
import torch
from cases.chains import X, assert_copies, assert_leaves, chain
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import treeify
from treeify.errors import TreeifyError


def test_weight_norm_after_load_state_dict() -> None:
    trained = chain(parametrizations.weight_norm(nn.Conv2d(8, 8, 3)))
    fresh = chain(parametrizations.weight_norm(nn.Conv2d(8, 8, 3)))
    nn.init.normal_(trained[2].parametrizations.weight.original0)
    fresh.load_state_dict(trained.state_dict())
    assert_copies(fresh)


def test_a_pruned_model_stays_pruned() -> None:
    model = chain()
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    model(X).sum().backward()
    with pytest.raises(TreeifyError, match=r"prune\.remove"):
        treeify.hierarchicalize(model, ["1"], init="fresh", example_input=X)
    prune.remove(model[1], "weight")
    assert_copies(model)


def test_a_lazy_layer_that_has_not_seen_an_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(5))
    with pytest.raises(TreeifyError, match=r"3\.weight(.|\n)*Run it once"):
        treeify.hierarchicalize(model, ["1"], init="fresh", example_input=X)
    model(X)
    assert_copies(model)


class Prior(nn.Module):
    """Class frequencies that the user measured: a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("prior", torch.zeros(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.prior


def prior_net() -> nn.Sequential:
    return nn.Sequential(*chain(), Prior())


def test_a_buffer_outside_of_the_state_dict_is_saved(tmp_path: Path) -> None:
    model = prior_net()
    model[-1].prior += torch.arange(5.0)
    hne = treeify.hierarchicalize(model, ["1"], init="copy", example_input=X).eval()
    treeify.save(hne, tmp_path / "saved")
    loaded = treeify.load(tmp_path / "saved", model=prior_net())
    torch.testing.assert_close(loaded.eval()(X), hne(X))
    torch.testing.assert_close(hne(X)[:, 0], model.eval()(X))


def test_a_model_in_data_parallel() -> None:
    assert_copies(nn.DataParallel(chain()))


class Tied(nn.Module):
    """One weight on both sides of the split."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.one, self.two = nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False)
        self.two.weight = self.one.weight
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.stem(x))).mean((2, 3)))


@pytest.mark.parametrize("split", ["one", "two"])
def test_a_weight_that_two_layers_share(split: str, tmp_path: Path) -> None:
    hne = assert_leaves(Tied(), split)
    treeify.save(hne, tmp_path / "saved")
    loaded = treeify.load(tmp_path / "saved", model=Tied())
    torch.testing.assert_close(loaded.eval()(X), hne.eval()(X))
    weights = hne.leaf(1)
    assert weights.one.weight is weights.two.weight


def test_a_channels_last_model_is_saved(tmp_path: Path) -> None:
    model = chain().to(memory_format=torch.channels_last)
    x = X.to(memory_format=torch.channels_last)
    assert_copies(model, x=x)
    hne = treeify.hierarchicalize(model, ["1"], init="fresh", example_input=x).eval()
    treeify.save(hne, tmp_path / "saved")
    loaded = treeify.load(tmp_path / "saved", model=chain()).eval()
    torch.testing.assert_close(loaded(x), hne(x))


def test_a_model_that_holds_what_cannot_be_copied() -> None:
    model = chain()
    model.writer = threading.Lock()
    with pytest.raises(TreeifyError, match="'writer' of the model, a lock"):
        treeify.hierarchicalize(model, ["1"], init="fresh", example_input=X)


@pytest.mark.parametrize("init", ["copy", "perturb", "fresh"])
def test_a_model_made_in_inference_mode_can_be_trained(init: str) -> None:
    with torch.inference_mode():
        model = chain()
    hne = treeify.hierarchicalize(model, ["1"], init=init, example_input=X).train()
    hne(X).sum().backward()
    assert all(tensor.grad is not None for tensor in hne.parameters())


def doubled(module: nn.Module) -> None:
    for tensor in module.parameters():
        tensor.data.mul_(2)  # behind autograd's back: no version counts it


@pytest.mark.parametrize(
    "change",
    [
        doubled,
        lambda hne: hne.load_state_dict(
            {key: 2 * value for key, value in hne.state_dict().items()}
        ),
    ],
)
def test_weights_changed_after_the_first_answer(change) -> None:
    hne = treeify.hierarchicalize(
        chain(nn.BatchNorm2d(8)), ["1"], init="fresh", example_input=X
    ).eval()
    with torch.no_grad():
        hne(X)
        change(hne)
        expected = torch.stack([hne.leaf(index).eval()(X) for index in range(2)], 1)
        torch.testing.assert_close(hne(X), expected, rtol=1e-4, atol=1e-5)


def test_training_after_answers_in_inference_mode() -> None:
    hne = treeify.hierarchicalize(
        chain(nn.BatchNorm2d(8)), ["1"], init="fresh", example_input=X
    ).eval()
    with torch.inference_mode():
        hne(X)
    hne.train()(X).sum().backward()
    assert all(tensor.grad is not None for tensor in hne.parameters())
    assert hne.eval()(X).requires_grad


def test_an_ensemble_is_pickled_whole() -> None:
    hne = treeify.hierarchicalize(
        chain(nn.BatchNorm2d(8)), ["1"], init="fresh", example_input=X
    ).eval()
    expected = hne(X)
    file = io.BytesIO()
    torch.save(hne, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(X), expected)
