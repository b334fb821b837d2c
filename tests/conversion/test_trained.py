"""Weights of an ensemble for another of its kind."""

from pathlib import Path

import pytest
import small
import torch

import treeify
from treeify.conversion.trained import load_trained
from treeify.errors import CheckpointError


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


def test_a_directory_of_weights_may_name_the_function_that_the_user_names(tmp_path: Path) -> None:
    options = {"example_input": small.EXAMPLE}
    hne = treeify.hierarchicalize("small:build", ["stage1"], init="fresh", **options)
    treeify.save(hne, tmp_path / "hne")
    named = treeify.hierarchicalize("small:build", ["stage1"], weights=tmp_path / "hne", **options)
    assert torch.equal(named.head.weight, hne.head.weight)
    # Nothing is built either where the user has the very model.
    given = treeify.hierarchicalize(
        small.SmallNet(), ["stage1"], weights=tmp_path / "hne", **options
    )
    assert torch.equal(given.head.weight, hne.head.weight)
    for model in (small.SmallNet(), "small:SmallNet"):
        kwargs = {"weights": tmp_path / "hne", "splits": ["stage1"], **options}
        assert treeify.hierarchicalize(model, trust=True, **kwargs).leaves == 2
    with pytest.raises(CheckpointError, match="'small:build' would be imported"):
        treeify.hierarchicalize(small.SmallNet(7), ["stage1"], weights=tmp_path / "hne", **options)
