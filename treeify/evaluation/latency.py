"""How long an answer of every nested size takes on this machine."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.engine import timing


@torch.no_grad()
def answer_seconds(
    hne: HierarchicalEnsemble, x: Tensor, *, budget: float = 3.0
) -> dict[int, float]:
    """The median seconds of an answer, by number of leaves.

    Args:
        hne: the ensemble, in evaluation mode.
        x: images `[N, C, H, W]` to answer at once.
        budget: seconds after which no more rounds begin.
    """
    actions = {str(size): partial(hne.predict, x, leaves=size) for size in hne.tree.nested_sizes}
    times = timing.alternate(actions, x.device, repeats=51, budget=budget)
    return {int(size): seconds for size, seconds in timing.medians(times).items()}
