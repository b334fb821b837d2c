"""Fingerprints tell structures apart, and nothing else."""

import odd_models
import pytest
import torch
from torch import nn

from treeify.errors import ModelError
from treeify.models.fingerprint import fingerprint


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Dropout(0.1))


@pytest.mark.parametrize("build", [*odd_models.MODELS, small], ids=lambda build: build.__name__)
def test_a_fingerprint_ignores_weights_and_mode(build: object) -> None:
    torch.manual_seed(0)
    first = build()
    torch.manual_seed(1)
    second = build().eval().requires_grad_(False)
    assert fingerprint(first) == fingerprint(second)


def test_a_fingerprint_ignores_the_device() -> None:
    assert fingerprint(Plain()) == fingerprint(Plain().to("meta"))


class Plain(nn.Module):
    def __init__(self, rate: float = 0.1, act: object = torch.relu, buffer: bool = True) -> None:
        super().__init__()
        self.rate, self.act = rate, act
        self.register_buffer("scale", torch.ones(3), persistent=buffer)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)


def shared_module() -> nn.Module:
    model = Plain()
    model.second = model.first
    return model


def shared_weight() -> nn.Module:
    model = Plain()
    model.second.weight = model.first.weight
    return model


VARIANTS = {
    "plain": Plain,
    "rate": lambda: Plain(rate=0.2),
    "function": lambda: Plain(act=torch.tanh),
    "not saved": lambda: Plain(buffer=False),
    "shared module": shared_module,
    "shared weight": shared_weight,
    "dtype": lambda: Plain().double(),
    "conv": lambda: nn.Conv2d(4, 4, 3),
    "stride": lambda: nn.Conv2d(4, 4, 3, stride=2),
    "groups": lambda: nn.Conv2d(4, 4, 3, groups=2),
    "padding mode": lambda: nn.Conv2d(4, 4, 3, padding_mode="reflect"),
    "no bias": lambda: nn.Conv2d(4, 4, 3, bias=False),
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "approximate gelu": lambda: nn.GELU("tanh"),
    "dropout": nn.Dropout,
    "less dropout": lambda: nn.Dropout(0.1),
}


def test_fingerprints_tell_structures_apart() -> None:
    prints = {name: fingerprint(build()) for name, build in VARIANTS.items()}
    assert len(set(prints.values())) == len(prints)


def test_a_model_without_shapes_is_refused() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(ModelError, match=r"Found 0\.weight(.|\n)*1\.running_mean"):
        fingerprint(model)
    model(torch.zeros(1, 3, 8, 8))
    assert len(fingerprint(model)) == 64
