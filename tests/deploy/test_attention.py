"""Attention among tensors of any number of dims, which ONNX has for four alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import treeify
from treeify.deploy.check import check_export
from treeify.errors import ExportError


class Attention(nn.Module):
    """Attention among the pixels of images, of so many dims; with a mask or without."""

    def __init__(self, dims: int, *, masked: bool = False) -> None:
        super().__init__()
        self.dims, self.masked = dims, masked
        self.tokens = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x.flatten(2).transpose(1, 2))
        windows = tokens if self.dims == 3 else tokens.unflatten(1, (2, 2, 4))
        q, k, v = windows.chunk(3, -1)
        mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool) if self.masked else None
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
        return found.reshape(x.shape[0], 16, 4).transpose(1, 2).reshape(x.shape)


def ensemble(attention: Attention) -> treeify.HierarchicalEnsemble:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), attention, nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    )
    return treeify.hierarchicalize(
        net, ["1:3"], init="fresh", example_input=torch.zeros(1, 3, 4, 4)
    )


@pytest.mark.parametrize("dims", [pytest.param(3, marks=pytest.mark.thorough), 5])
def test_attention_of_other_dims_than_four_is_exported(dims: int) -> None:
    assert check_export(ensemble(Attention(dims)))["steps"][1]["leaves"] == 3


def test_what_onnx_does_not_have_is_one_message() -> None:
    with pytest.raises(ExportError, match="cannot be written as ONNX") as error:
        check_export(ensemble(Attention(5, masked=True)))
    assert "only 4D" in str(error.value)
