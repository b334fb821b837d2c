"""Base models without memory for their weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from treeify.errors import ModelError
from treeify.models.architecture import Architecture

# What initialisers do to weights.
_FILLING = frozenset(
    {
        *(Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.clamp_, Tensor.fill_),
        *(Tensor.zero_, Tensor.copy_, Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_),
    }
)


def skeleton(architecture: Architecture) -> nn.Module:
    """A model on the meta device: shapes without weights, and mostly without memory for any.

    Raises:
        ModelError: the name is unknown or its builder refuses the arguments.
    """
    return build_without_weights(architecture).to("meta")


def build_without_weights(architecture: Architecture) -> nn.Module:
    """A model whose parameters are on the meta device, unless its constructor reads them."""
    try:
        with ParametersOnMeta():
            return architecture.build()
    except ModelError:
        return architecture.build()


class ParametersOnMeta(TorchFunctionMode):
    """While entered, layers are built without memory for their weights.

    Layers ask `torch.empty` for them, and nothing else is put on the meta device:
    `torch.device("meta")` would do the same to the tensors that some constructors compute widths
    and rates with, and then fail to read.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        if func in _FILLING and args and getattr(args[0], "is_meta", False):
            return args[0]  # there is nothing to fill, and to try takes milliseconds
        return func(*args, **kwargs)
