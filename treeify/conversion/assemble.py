"""The one way from a module to an ensemble: trace it, choose splits, allocate, fill."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.initialize import Source
from treeify.conversion.splits import choose
from treeify.data.conventions import of_trained_weights
from treeify.errors import InputError, described
from treeify.models.architecture import Architecture
from treeify.models.image_size import example_shape
from treeify.rules import leaf_types
from treeify.tracing.trace import Traced, trace


def assemble(
    base: nn.Module,
    architecture: Architecture | None,
    splits: int | str | Sequence[str],
    source: Source | None = None,
    *,
    fanout: int = 2,
    leaves: int | None = None,
    example_input: Tensor | None = None,
    traced: Traced | None = None,
    saved: bool = False,
) -> HierarchicalEnsemble:
    """An ensemble of a base model.

    Args:
        base: the base model, for the tensors' devices, dtypes and modes. Not modified.
        architecture: how to build it again, if that is known.
        splits: as in `treeify.hierarchicalize`.
        source: where its weights come from; without one they are not filled yet, see
            `HierarchicalEnsemble.fill`.
        fanout: children per split that names none.
        leaves: how many it shall have; splits that name no fanout share the one that fits.
        example_input: an input of the size the model expects, `[N, C, H, W]`; found if not given.
        traced: the base model traced before, in place of an example.
        saved: whether the splits are those of a saved ensemble.

    Raises:
        SplitError: a split is unknown, repeated or out of order, or fanouts do not fit.
        TraceError: the model cannot be traced.
        InputError: the model does not run on the example input.
    """
    traced = traced or trace_model(base, architecture, example_input)
    if traced.changed_by_hooks and architecture is not None and ":" not in architecture.name:
        architecture = None  # libraries build models without hooks
    chosen = choose(traced, splits, fanout, leaves, saved=saved)
    hne = HierarchicalEnsemble(traced, chosen, base, architecture)
    if architecture is not None:
        hne.preparation = of_trained_weights(architecture.name, hne.example)
    if source is not None:
        hne.fill(source)
    return hne


def trace_model(
    base: nn.Module, architecture: Architecture | None = None, example_input: Tensor | None = None
) -> Traced:
    """Trace a base model on an example of the size it expects.

    Raises:
        TraceError: it cannot be traced.
        InputError: it does not run on the example.
    """
    if example_input is None:
        example_input = blank_image(base, example_shape(base, architecture))
    is_tensor = isinstance(example_input, Tensor)
    if not is_tensor or example_input.ndim < 2 or 0 in example_input.shape:
        raise InputError(
            "example_input is no batch.",
            expected="a tensor of shape [N, C, H, W], of at least one image",
            found=f"shape {tuple(example_input.shape)}" if is_tensor else described(example_input),
            next_step="Pass an image of a size the model takes, as torch.zeros(1, 3, 224, 224).",
        )
    return trace(base, example_input, leaf_types())


def blank_image(base: nn.Module, shape: Sequence[int], batch: int = 1) -> Tensor:
    """Blank images, `[batch, C, H, W]`, in the precision of the model's parameters."""
    parameters = (parameter for parameter in base.parameters() if parameter.is_floating_point())
    dtype = next((parameter.dtype for parameter in parameters), torch.float32)
    return torch.zeros(batch, *shape, dtype=dtype)
