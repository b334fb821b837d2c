"""Running an ensemble fused and unfused, for comparison."""

from typing import Any

import small
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import treeify
from treeify.engine.plan import Plan

EXECUTIONS = ("packed", "looped")
Ensemble = treeify.HierarchicalEnsemble


def settle(model: nn.Module) -> None:
    """Statistics, scales and shifts that no model starts with."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            tensor.data.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            tensor.data.normal_(0, 0.5)


def run(
    hne: Ensemble,
    x: Tensor,
    *,
    fuse: bool,
    execution: str = "packed",
    leaves: int | None = None,
    channels_last: bool | None = None,
) -> Tensor:
    plan = Plan((execution,) * hne.tree.levels, channels_last, fuse)
    with torch.no_grad():
        result: Tensor = hne.run(x, leaves or hne.leaves, plan)
    return result


def assert_fused_equals(hne: Ensemble, x: Tensor | None = None) -> None:
    """Packed and looped, for every number of leaves, called once and again."""
    x = small.images(3) if x is None else x
    before = x.clone()
    expected = run(hne, x, fuse=False)
    for execution in EXECUTIONS:
        for leaves in (1, hne.leaves - 1, hne.leaves, hne.leaves):
            logits = run(hne, x, fuse=True, execution=execution, leaves=leaves)
            assert_close(logits, expected[:, :leaves], rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)


def fused_modules(hne: Ensemble, kind: type[nn.Module]) -> list[Any]:
    return [
        module
        for segment in hne._fused.program.segments
        for module in segment.module.modules()
        if isinstance(module, kind)
    ]


def step(hne: Ensemble) -> None:
    """A step of training."""
    optimizer = torch.optim.SGD(hne.parameters(), lr=0.5)
    hne(small.images()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def assign_data(hne: Ensemble) -> None:
    """Other data in the same parameters."""
    for parameter in hne.parameters():
        parameter.data = parameter.data * 1.5
