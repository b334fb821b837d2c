"""What a graph computes stays when it is written for ONNX; what ONNX cannot say is one message."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import treeify
from treeify.deploy import export
from treeify.deploy.runtime import Anytime
from treeify.errors import ExportError


class Net(nn.Module):
    """A convolution, something in the middle, and a classifier."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.split = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head, self.middle = nn.Linear(8, 4), middle

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.split(self.stem(x)))
        return self.head(x.mean((2, 3)))


def windows(x: Tensor) -> Tensor:
    """Attention within windows of every image: five dims."""
    parts = x.flatten(2).unflatten(2, (4, 16)).permute(0, 2, 3, 1).unsqueeze(2)
    mixed = F.scaled_dot_product_attention(parts, parts.flip(3), parts)
    return mixed.squeeze(2).permute(0, 3, 1, 2).flatten(2).unflatten(2, (8, 8))


def masked(x: Tensor) -> Tensor:
    """Attention of three dims, with a mask of as many, as relative positions give it."""
    parts = x.flatten(2).transpose(1, 2)
    mask = parts @ parts.transpose(1, 2)
    mixed = F.scaled_dot_product_attention(parts, parts.flip(2), parts, mask)
    return mixed.transpose(1, 2).unflatten(2, (8, 8))


def repeated(x: Tensor) -> Tensor:
    return x + x[:, :1].repeat_interleave(8, dim=1)


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 1.0
    return y.mul_(2).add_(x)


@pytest.mark.parametrize(
    "middle", [windows, masked, repeated, in_place], ids=lambda each: each.__name__
)
def test_answers_stay(
    middle: Callable[[Tensor], Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 3, 8, 8)
    hne = treeify.hierarchicalize(Net(middle), ["split"], init="fresh", example_input=x).eval()
    out = export(hne, tmp_path_factory.mktemp("exports") / "out", tune=False)
    logits = torch.from_numpy(Anytime(out.path, threads=1).predict(x.numpy()))
    assert_close(logits, hne.predict(x), rtol=1e-4, atol=1e-5)


def untranslated(x: Tensor) -> Tensor:
    return torch.special.bessel_j1(x)


def test_what_cannot_be_written_is_one_message(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("exports")
    x = torch.rand(3, 3, 8, 8)
    net = Net(untranslated)
    hne = treeify.hierarchicalize(net, ["split"], init="fresh", example_input=x).eval()
    with pytest.raises(ExportError, match=r"cannot be written as ONNX.*\n.*\n.*bessel_j1"):
        export(hne, folder / "out", tune=False)
    assert not list(folder.iterdir())
