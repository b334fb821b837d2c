"""Fresh weights and statistics hide no mistakes."""

from collections.abc import Callable
from typing import Any

import pytest
import small
import torch
import torchvision
from torch import nn

import treeify
from treeify.parity.fresh_weights import fit_statistics


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        key: value.clone() for key, value in (*model.named_parameters(), *model.named_buffers())
    }


# What a fresh network may have, behind which its first stage leaves hardly a trace.
FRESH: dict[str, Callable[[small.SmallNet], object]] = {
    "a head of zeros": lambda model: nn.init.zeros_(model.head.weight),
    "a last scale of zeros": lambda model: nn.init.zeros_(model.stage1[1].weight),  # type: ignore[arg-type]
    "small logits": lambda model: (model.head.weight.mul_(1e-7), model.head.bias.zero_()),
    "nothing": lambda model: None,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fresh", FRESH)
def test_fresh_weights_hide_no_mistake(fresh: str, training: bool) -> None:
    torch.manual_seed(0)
    model, x = small.SmallNet(), small.images(3)
    with torch.no_grad():
        FRESH[fresh](model)
    hne = treeify.hierarchicalize(
        model, ["stage1", "stage2:3"], init="copy", example_input=small.EXAMPLE
    )
    before = _state(hne)
    assert treeify.verify(hne, x).worst <= 1
    for name, value in _state(hne).items():
        assert torch.equal(value, before[name]), name

    def mistaken(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.flip(-1) if module.training == training else output

    hne.get_submodule("stage1.2").register_forward_hook(mistaken)
    with pytest.raises(treeify.TreeifyError, match="parity is off by"):
        treeify.verify(hne, x)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "splits"),
    [("mobilenet_v3_small", 0), ("mobilenet_v3_small", 1), ("efficientnet_b0", 1)],
)
def test_logits_that_vanish_in_evaluation_mode_hide_no_mistake(name: str, splits: int) -> None:
    """Fresh statistics leave them 1e-10 and less: anything was within 1e-5 of that."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 64)
    hne = treeify.hierarchicalize(
        torchvision.models.get_model(name), splits, init="fresh", example_input=x
    )
    assert hne.eval()(x).abs().max() < 1e-8
    assert treeify.parity.verify.verify_outputs(hne, x) <= 1
    assert treeify.verify(hne, x).worst <= 1
    if splits:  # what only the first leaves alone get wrong
        hook = hne.register_forward_hook(lambda module, _, out: 1.01 * out)
        with pytest.raises(treeify.TreeifyError, match="prefix parity is off by"):
            treeify.parity.verify.verify_outputs(hne, x)
        hook.remove()
    last = [own for own in hne.modules() if isinstance(own, nn.Conv2d)][-1]
    last.register_forward_hook(lambda module, _, out: out if module.training else 1.01 * out)
    for check in (treeify.parity.verify.verify_outputs, treeify.verify):
        with pytest.raises(treeify.TreeifyError, match="leaf_eval parity is off by"):
            check(hne, x)


def test_batch_norms_are_checked_with_statistics_near_those_of_the_images() -> None:
    hne = small.ensemble(["stem:3"])
    norms = [own for own in hne.modules() if isinstance(own, torch.nn.BatchNorm2d)]
    torch.manual_seed(0)
    images = small.images(64)
    fit_statistics(hne, images)
    assert [own.momentum for own in norms] == [0.1, 0.1]
    assert not hne.training
    leaf = hne.leaf(0)
    x, norm = leaf.stem[0](images), leaf.stem[1]
    near = norm.running_var / x.var((0, 2, 3))
    apart = (norm.running_mean - x.mean((0, 2, 3))) / x.std((0, 2, 3))
    assert near.min() > 0.75
    assert near.max() < 1.35
    assert apart.abs().max() < 0.5
    assert min(near.std(), apart.std()) > 0.02  # near, and not the very same
    assert not torch.equal(hne.leaf(0).stage1[1].running_mean, hne.leaf(1).stage1[1].running_mean)
