"""Weights of an ensemble for another of its kind."""

from pathlib import Path

import small
import torch

import treeify
from treeify.conversion.trained import load_trained


def test_a_module_of_the_users_own_goes_on_in_its_modes_and_with_what_no_state_dict_holds(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    first = treeify.hierarchicalize(
        small.DrawnNet(), ["stage1"], init="perturb", example_input=small.EXAMPLE
    ).eval()
    first.requires_grad_(False)
    treeify.save(first, tmp_path / "first")
    base = small.DrawnNet()
    trained = load_trained(base, tmp_path / "first")
    assert all(parameter.requires_grad for parameter in trained.model.parameters())
    assert trained.model.training
    again = treeify.hierarchicalize(
        base, ["stage1"], weights=tmp_path / "first", example_input=small.EXAMPLE
    ).eval()
    x = small.images()
    assert torch.equal(again(x), first(x))
    assert not torch.equal(base.mixing, trained.model.mixing)
