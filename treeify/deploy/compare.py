"""What was exported against the ensemble it was exported from: every step, and the whole chain."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.deploy.runtime import Anytime
from treeify.errors import ExportError
from treeify.parity.tolerance import deviation, scale_of

# So many times PyTorch's own rounding an ill-conditioned network may be off, see `parity.verify`.
_AMPLIFIED = 10.0


@torch.no_grad()
def compare(
    hne: HierarchicalEnsemble, folder: Path, batches: Sequence[int]
) -> list[dict[str, Any]]:
    """Run an export beside `hne.session` on random images.

    Args:
        hne: the ensemble, in evaluation mode.
        folder: the export.
        batches: numbers of images to try.

    Returns:
        Per step, `largest_difference` of a leaf's outputs in fractions of the largest one, and
        `batches`.

    Raises:
        ExportError: a difference exceeds the tolerance, and is not of the network's own rounding.
    """
    model = Anytime(folder, threads=1, preload="none")
    exact: list[HierarchicalEnsemble] = []  # the ensemble in float64, where one is needed
    largest = [0.0] * len(model.sizes)
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        x = torch.rand(batch, *hne.example, generator=generator)
        expected, actual = hne.session(x), model.session(x.numpy())
        for number, size in enumerate(model.sizes):
            answers = expected.advance(to=size), actual.advance(to=size)
            pairs = [
                (expected.leaf_logits, _tensors(actual.leaf_logits)),
                (answers[0].logits, _tensors(answers[1].logits)),
            ]
            for reference, exported in pairs:
                worst = deviation(exported, reference, scale_of(reference))
                if worst > 1 and not _is_rounding(hne, exact, x, size, pairs[0]):
                    raise ExportError(
                        f"step {number + 1} of {len(largest)} answers differently.",
                        expected="the logits of hne.session, to rounding (rtol 1e-4, atol 1e-5)",
                        found=f"a deviation of {worst:.3g} times the tolerance, {batch} images",
                        next_step="Please report it with the model's name. --no-verify"
                        " (verify=False) writes the files all the same.",
                    )
                largest[number] = max(largest[number], _relative(exported, reference))
    return [{"largest_difference": value, "batches": list(batches)} for value in largest]


def _tensors(value: Any) -> Any:
    """NumPy's arrays as tensors."""
    return tree_map_only(np.ndarray, torch.from_numpy, value)


def _relative(actual: Any, expected: Any) -> float:
    """The largest difference in fractions of the largest value."""
    pairs = [
        (one.double(), other.double())
        for one, other in zip(tree_leaves(actual), tree_leaves(expected), strict=True)
        if isinstance(other, Tensor) and other.numel()
    ]
    largest = max((other.abs().max().item() for _, other in pairs), default=0.0)
    difference = max(((one - other).abs().max().item() for one, other in pairs), default=0.0)
    return difference / largest if largest else difference


def _is_rounding(
    hne: HierarchicalEnsemble,
    exact: list[HierarchicalEnsemble],
    x: Tensor,
    size: int,
    pair: tuple[Any, Any],
) -> bool:
    """Whether PyTorch's own float32 answer is about as far from that in float64."""
    if not exact:
        exact.append(copy.deepcopy(hne).double())
    reference = tree_map_only(Tensor, Tensor.double, exact[0](x.double(), leaves=size))
    own, exported = (tree_map_only(Tensor, Tensor.double, value) for value in pair)
    scale = scale_of(reference)
    return deviation(exported, reference, scale) <= _AMPLIFIED * deviation(own, reference, scale)
