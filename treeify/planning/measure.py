"""How long a planned tree really takes here: it is converted, tuned and run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from treeify.conversion.assemble import assemble
from treeify.conversion.initialize import initial_weights
from treeify.evaluation.cost import answer_seconds
from treeify.models.architecture import Architecture
from treeify.tracing.trace import Traced

# Seconds of a comparison of two ways to run, and of timing all nested sizes.
_TUNING, _TIMING = 1.0, 2.0


def measured(
    base: nn.Module, traced: Traced, architecture: Architecture | None, splits: Sequence[str]
) -> tuple[float, ...]:
    """Seconds for one image of every nested size, run as tuned here.

    A model that takes several images together gets as many as it needs, and each image its part
    of the time.

    Args:
        base: the base model, whose weights every branch has: they do not change what it takes.
        traced: the same, traced.
        architecture: how to build it, if that is known.
        splits: with fanouts, as in `hierarchicalize`.
    """
    source = initial_weights(base, architecture, "copy", 0)
    hne = assemble(base, architecture, splits, source, traced=traced).eval()
    x = hne.example_images(traced.batch)
    hne.tune(x, training=False, repeats=5, budget=_TUNING)
    seconds = answer_seconds(hne, x, budget=_TIMING)
    return tuple(seconds[size] / traced.batch for size in hne.tree.nested_sizes)
