"""What each nested sub-ensemble costs: MACs, parameters, and seconds on this machine.

MACs are multiply-accumulates of one image in evaluation mode, counted on what really runs by the
rules of fvcore, which the paper's figures follow: each product of a convolution, a linear layer, a
matrix product, attention or a recurrent layer counts 1, and each element that a batch norm gives 2
(without scale and shift 1). Everything else counts nothing: activations, sums, products element by
element, other norms, pooling, interpolation, and the standardisation of weights.

An ensemble knows its MACs for the image size it was converted for: `hne.count_macs`. They equal
those that fvcore counts for any size.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from treeify.arguments import require_integer, require_number, require_type
from treeify.conversion.ensemble import HierarchicalEnsemble, require_ensemble
from treeify.engine import timing
from treeify.engine.packed_tensors import named_tensors
from treeify.engine.preserve import preserve_modes
from treeify.errors import InputError
from treeify.tracing.mac_counter import MacCounter, frozen_parameters

with warnings.catch_warnings():  # fvcore uses torch.jit.script, which torch 2.14 deprecates
    warnings.simplefilter("ignore")
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import batchnorm_flop_jit, get_shape

# What fvcore would count by element.
_NOT_COUNTED = (
    "layer_norm",
    "group_norm",
    "instance_norm",
    "adaptive_avg_pool2d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "grid_sampler",
)
# What fvcore does not count, counts to four digits (einsum) or, with dims that are broadcast or
# vectors, not right (matmul).
_COUNTED_BY_TORCH = (
    *("_convolution_mode", "scaled_dot_product_attention", "einsum", "tensordot"),
    *("matmul", "baddbmm", "mv", "dot", "lstm", "gru", "rnn_tanh", "rnn_relu"),
)


@dataclass(frozen=True)
class Cost:
    """What a sub-ensemble costs.

    Args:
        leaves: its size.
        macs: multiply-accumulates per image.
        parameters: parameters its branches hold.
    """

    leaves: int
    macs: int
    parameters: int


class _Prefix(nn.Module):
    def __init__(self, hne: HierarchicalEnsemble, leaves: int) -> None:
        super().__init__()
        self.hne, self.leaves = hne, leaves

    def forward(self, x: Tensor) -> Any:
        return self.hne(x, leaves=self.leaves)


def costs(hne: HierarchicalEnsemble, x: Tensor | None = None) -> tuple[Cost, ...]:
    """Cost of every nested size.

    Args:
        hne: the ensemble.
        x: one image `[1, C, H, W]` of the size to count for; by default the conversion's size.

    Raises:
        InputError: `hne` is no ensemble, or this is no one image for it.
    """
    require_ensemble(hne)
    if x is not None:
        hne.check_input(x)
        require_integer("the number of images", len(x), 1, 1, next_step="Pass x[:1].")
    if x is None or x.shape[1:] == hne.example:
        macs = [hne.count_macs(size) for size in hne.tree.nested_sizes]
    else:
        macs = [fvcore_macs(_Prefix(hne, size), x) for size in hne.tree.nested_sizes]
    return tuple(
        Cost(size, count, hne.count_parameters(size))
        for size, count in zip(hne.tree.nested_sizes, macs, strict=True)
    )


def base_cost(hne: HierarchicalEnsemble) -> Cost:
    """Cost of the base model; `n` independent networks cost `n` times as much."""
    require_ensemble(hne)
    parameters = sum(parameter.numel() for parameter in hne.skeleton.parameters())
    return Cost(1, hne.count_macs(1), parameters)


@torch.no_grad()
def answer_seconds(
    hne: HierarchicalEnsemble, x: Tensor, *, base: nn.Module | None = None, budget: float = 3.0
) -> dict[int, float]:
    """The median seconds of an answer on this machine, by number of leaves; the base model has 0.

    Args:
        hne: the ensemble, in evaluation mode.
        x: images `[N, C, H, W]` to answer at once.
        base: the base model in evaluation mode, to time it in the same turns.
        budget: seconds after which no more rounds begin.

    Raises:
        InputError: the images do not fit, or another argument is of a wrong type.
    """
    require_ensemble(hne)
    hne.check_input(x)
    require_number("budget", budget, 0, finite=False, expected="seconds of at least 0")
    if base is not None:
        require_type("base", base, nn.Module, "the base model, an nn.Module")
    actions = {} if base is None else {"0": partial(base, x)}
    sizes = hne.tree.nested_sizes
    actions |= {str(size): partial(hne.predict, x, leaves=size) for size in sizes}
    times = timing.alternate(actions, x.device, repeats=51, budget=budget)
    return {int(size): seconds for size, seconds in timing.medians(times).items()}


def count_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """MACs of a model on the meta device, in one pass: what `fvcore_macs` counts, but faster.

    Every module's mode is put back; the shape is that of one image, `(C, H, W)`.

    Raises:
        InputError: this is no module on the meta device, or no shape that it runs on.
    """
    require_type("model", model, nn.Module, "an nn.Module")
    require_type("shape", shape, (tuple, list), "the sizes of an image, (C, H, W)")
    for size in shape:
        require_integer("a size of the image", size, 1)
    if any(not tensor.is_meta for _, tensor in named_tensors(model)):
        raise InputError(
            "the model has values, which counting does not need.",
            expected="a model on the meta device",
            found="a tensor elsewhere",
            next_step='Pass copy.deepcopy(model).to("meta"), or count with fvcore_macs.',
        )
    with preserve_modes(model), frozen_parameters(model), torch.no_grad(), MacCounter() as counter:
        model.eval()
        try:
            model(torch.zeros(1, *shape, device="meta"))
        except Exception as error:  # whatever the operations of a model raise
            raise InputError(
                "the model does not run on such an image.",
                expected="sizes (C, H, W) that it takes",
                found=f"{tuple(shape)}, which raises {type(error).__name__}: {error}",
                next_step="Pass the size that it is usually fed, such as (3, 224, 224).",
            ) from error
    return int(counter.macs)


def fvcore_macs(model: nn.Module, x: Tensor) -> int:
    """MACs of one evaluation pass, counted by fvcore; every module's mode is put back.

    Raises:
        InputError: this is no module, or no batch of images.
    """
    require_type("model", model, nn.Module, "an nn.Module")
    require_type("x", x, Tensor, "images, a tensor [N, C, H, W]")
    analysis = FlopCountAnalysis(model, x)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    analysis.set_op_handle(**{f"aten::{name}": _nothing for name in _NOT_COUNTED})
    analysis.set_op_handle(**{f"aten::{name}": _by_torch(name) for name in _COUNTED_BY_TORCH})
    analysis.set_op_handle("aten::batch_norm", _batch_norm)
    # In one operation, as without gradients, attention layers would not be counted.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with preserve_modes(model), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.eval()
            total: float = analysis.total()
            return round(total)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _nothing(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    return Counter()


def _batch_norm(inputs: list[Any], outputs: list[Any]) -> Any:
    """Fvcore's own count in evaluation mode; none for weight standardisation."""
    standardises_weights = inputs[5].toIValue()
    return Counter() if standardises_weights else batchnorm_flop_jit(inputs, outputs)


def _by_torch(name: str) -> Callable[[list[Any], list[Any]], Counter[str]]:
    """Count an operation by running it on the meta device, which shows the products in it."""

    def count(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        arguments = torch._C.parse_schema(outputs[0].node().schema()).arguments
        values = list(zip(arguments, map(_on_meta, inputs), strict=True))
        positional = [value for argument, value in values if not argument.kwarg_only]
        keywords = {argument.name: value for argument, value in values if argument.kwarg_only}
        with MacCounter() as counter:
            getattr(torch.ops.aten, name)(*positional, **keywords)
        return Counter({name: counter.macs})

    return count


def _on_meta(value: Any) -> Any:
    """An argument of a traced operation: a constant, or tensors without values."""
    if value.node().kind() == "prim::ListConstruct":
        return [_on_meta(element) for element in value.node().inputs()]
    shape = get_shape(value)
    return value.toIValue() if shape is None else torch.empty(shape, device="meta")
