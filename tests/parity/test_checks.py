"""Mistakes that each check has to notice."""

from collections.abc import Callable
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F

import treeify
from treeify.errors import ParityError
from treeify.parity.checks import check_shapes
from treeify.parity.verify import verify_outputs


def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last leaf alone, where the outputs are right."""
    hne = small.ensemble()
    x = small.images(4)
    assert treeify.verify(hne, x).worst <= 1
    run = treeify.HierarchicalEnsemble.run

    def broken(hne: treeify.HierarchicalEnsemble, *args: Any) -> torch.Tensor:
        out = run(hne, *args)
        doubled = torch.zeros_like(out)
        doubled[:, -1] = out[:, -1] - out[:, -1].detach()
        return out + doubled

    monkeypatch.setattr(treeify.HierarchicalEnsemble, "run", broken)
    with pytest.raises(treeify.TreeifyError, match="gradient parity is off"):
        treeify.verify(hne, x)


@pytest.mark.parametrize("key", ["stem.0.weight", "stage1.0.weight", "head.weight"])
def test_a_wrong_gradient_of_one_weight_is_noticed(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last branch alone, whether all leaves share it, some of them, or none."""
    hne = small.ensemble()
    run = treeify.HierarchicalEnsemble.run

    def nudge(gradient: torch.Tensor) -> torch.Tensor:
        return torch.cat([gradient[:-1], gradient[-1:] + 0.01])

    def broken(hne: treeify.HierarchicalEnsemble, *args: Any) -> torch.Tensor:
        weight = hne.get_parameter(key)
        if weight.requires_grad:
            weight.register_hook(nudge)
        return run(hne, *args)

    monkeypatch.setattr(treeify.HierarchicalEnsemble, "run", broken)
    with pytest.raises(treeify.TreeifyError, match="gradient parity is off"):
        treeify.verify(hne, small.images(4))


def test_a_missing_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    hne = small.ensemble()
    run = treeify.HierarchicalEnsemble.run

    def broken(hne: treeify.HierarchicalEnsemble, *args: Any) -> torch.Tensor:
        hne.head.bias.requires_grad_(False)
        return run(hne, *args)

    monkeypatch.setattr(treeify.HierarchicalEnsemble, "run", broken)
    with pytest.raises(treeify.TreeifyError, match="gradient parity is off by inf"):
        treeify.verify(hne, small.images(4))


def test_a_gradient_that_one_network_does_not_have_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hne = small.ensemble()
    leaf = treeify.HierarchicalEnsemble.leaf

    def broken(hne: treeify.HierarchicalEnsemble, index: int) -> Any:
        network: Any = leaf(hne, index)
        if index == 1:
            head = network.head
            head.forward = lambda x: F.linear(x, head.weight, head.bias.detach())
        return network

    monkeypatch.setattr(treeify.HierarchicalEnsemble, "leaf", broken)
    with pytest.raises(treeify.TreeifyError, match="gradient parity is off"):
        treeify.verify(hne, small.images(4))


def test_wrong_shapes_are_noticed() -> None:
    hne, x = small.ensemble(["stage1", "stage2"]).to("meta"), small.images().to("meta")
    check_shapes(hne, x)
    hne.run = lambda *args: torch.empty(2, 4, 6, device="meta")  # type: ignore[method-assign]
    with pytest.raises(ParityError, match="another shape"):
        check_shapes(hne, x)
    hne.run = lambda *args: torch.empty(2, 5, 5, device="meta")  # type: ignore[method-assign]
    with pytest.raises(ParityError, match="does not have"):
        check_shapes(hne, x)


@pytest.mark.parametrize(("device", "check"), [("meta", check_shapes), ("cpu", verify_outputs)])
def test_a_leaf_whose_tensors_are_held_otherwise_is_noticed(
    device: str, check: Callable[..., object]
) -> None:
    hne, x = small.ensemble().to(device), small.images().to(device)
    run = hne.run
    hne.run = lambda *args: {"logits": run(*args)}  # type: ignore[method-assign]
    with pytest.raises(ParityError, match="in another structure"):
        check(hne, x)


def test_checking_shapes_leaves_frozen_batch_norms_frozen() -> None:
    hne = small.ensemble().to("meta").train()
    hne.get_submodule("stem.1").eval()
    check_shapes(hne, small.images().to("meta"))
    assert hne.training
    assert not hne.get_submodule("stem.1").training
