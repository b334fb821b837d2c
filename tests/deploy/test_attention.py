"""Attention among tensors of any number of dims, which ONNX has for four alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import treeify
from treeify.deploy.check import check_export
from treeify.errors import ExportError


class Attention(nn.Module):
    """Attention among the pixels of images, of so many dims, with a mask of as many or fewer."""

    def __init__(self, dims: int, mask: int | None = None) -> None:
        super().__init__()
        self.dims, self.mask = dims, mask
        self.tokens = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x.flatten(2).transpose(1, 2))
        windows = tokens if self.dims == 3 else tokens.unflatten(1, (2, 2, 4))
        q, k, v = windows.chunk(3, -1)
        mask = None
        if self.mask is not None:
            mask = (q @ k.transpose(-1, -2))[(0,) * (self.dims - self.mask)]
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
        return found.reshape(x.shape[0], 16, 4).transpose(1, 2).reshape(x.shape)


class Bessel(nn.Module):
    """An operation that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def ensemble(attention: nn.Module) -> treeify.HierarchicalEnsemble:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), attention, nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    )
    return treeify.hierarchicalize(
        net, ["1:3"], init="fresh", example_input=torch.zeros(1, 3, 4, 4)
    )


@pytest.mark.parametrize(
    ("dims", "mask"),
    [(5, 5), *(pytest.param(*case, marks=pytest.mark.thorough) for case in ((3, None), (3, 3)))],
)
def test_attention_of_other_dims_than_four_is_exported(dims: int, mask: int | None) -> None:
    assert check_export(ensemble(Attention(dims, mask)))["steps"][1]["leaves"] == 3


def test_what_onnx_does_not_have_is_one_message() -> None:
    with pytest.raises(ExportError, match="cannot be written as ONNX") as error:
        check_export(ensemble(Bessel()))
    assert "bessel_j0" in str(error.value)
