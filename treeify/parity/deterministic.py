"""Random draws that give their mean, and precision that no cast lowers, to compare networks."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# What promotes no dtypes by itself, or takes over that of an operand.
_UNPROMOTED = {
    *("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "einsum"),
    *("addmm", "baddbmm", "linear", "bilinear", "conv1d", "conv2d", "conv3d"),
    *("scaled_dot_product_attention", "cdist", "type_as", "to"),
}


@contextmanager
def deterministic(dtype: torch.dtype) -> Iterator[None]:
    """Let random draws give their mean and, where that is float64, let no cast lower precision.

    For the runs of networks alone: copying or reading their state goes through the modes too.
    """
    with ExitStack() as modes:
        if dtype == torch.float64:
            # Innermost, so that its looking at dtypes goes through no other mode.
            modes.enter_context(FullPrecision())
        modes.enter_context(MeanNoise())
        yield


class FullPrecision(TorchFunctionMode):
    """Lets casts of float64 to float32 be none, for models that compute parts in float32.

    Products of both are in float64.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function with float64 in the place of float32, where there is any float64."""
        kwargs = kwargs or {}
        arguments = list(_leaves((args, kwargs)))
        if any(_is(torch.float64, argument) for argument in arguments):
            if func is Tensor.float:
                return args[0].double()
            promotes = getattr(func, "__name__", "") not in _UNPROMOTED
            if any(_is_single(argument, tensors_too=not promotes) for argument in arguments):
                doubled = partial(_doubled, tensors_too=not promotes)
                args, kwargs = tree_map(doubled, (args, kwargs))
        return func(*args, **kwargs)


def _leaves(value: Any) -> Iterator[Any]:
    """What `tree_leaves` gives, but faster: every call in a compared network comes by here."""
    if isinstance(value, (tuple, list)):
        for element in value:
            yield from _leaves(element)
    elif isinstance(value, dict):
        for element in value.values():
            yield from _leaves(element)
    else:
        yield value


def _is(dtype: torch.dtype, value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype


def _is_single(value: Any, *, tensors_too: bool) -> bool:
    return value is torch.float32 or (tensors_too and _is(torch.float32, value))


def _doubled(value: Any, *, tensors_too: bool) -> Any:
    if not _is_single(value, tensors_too=tensors_too):
        return value
    return value.double() if isinstance(value, Tensor) else torch.float64


class MeanNoise(TorchFunctionMode):
    """Replaces random draws by their mean: dropout and stochastic depth become the identity.

    Replaced are `torch.rand` and `torch.randn` (`_like` too), `torch.bernoulli` and the methods
    `bernoulli_`, `normal_` and `uniform_`.
    """

    # The methods' parameters with their defaults, and the mean.
    _IN_PLACE: ClassVar[dict[Any, tuple[dict[str, Any], Callable[..., Any]]]] = {
        Tensor.bernoulli_: ({"p": 0.5}, lambda p: p),
        Tensor.normal_: ({"mean": 0.0, "std": 1.0}, lambda mean, std: mean),
        Tensor.uniform_: ({"from": 0.0, "to": 1.0}, lambda **ends: sum(ends.values()) / 2),
    }
    _MEANS: ClassVar[dict[Any, float]] = {
        **dict.fromkeys((torch.randn, torch.randn_like), 0.0),
        **dict.fromkeys((torch.rand, torch.rand_like), 0.5),
    }

    _IDENTITY = (
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout),
        *(F.feature_alpha_dropout, torch.dropout),
    )
    # Where attention functions take their dropout rate.
    _ATTENTION_DROPOUT: ClassVar[dict[Any, int]] = {
        F.scaled_dot_product_attention: 4,
        F.multi_head_attention_forward: list(
            inspect.signature(F.multi_head_attention_forward).parameters
        ).index("dropout_p"),
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, or give the mean of what it would draw."""
        kwargs = kwargs or {}
        if func in self._IDENTITY:
            return args[0] if args else kwargs["input"]
        if func in self._IN_PLACE:
            names, mean = self._IN_PLACE[func]
            values = {**names, **dict(zip(names, args[1:], strict=False)), **kwargs}
            return args[0].copy_(torch.as_tensor(mean(**{name: values[name] for name in names})))
        if func in (torch.bernoulli, Tensor.bernoulli):
            chance = args[1] if len(args) > 1 else kwargs.get("p")
            return args[0].clone() if chance is None else torch.full_like(args[0], chance)
        if func in self._MEANS:
            return torch.full_like(func(*args, **kwargs), self._MEANS[func])
        position = self._ATTENTION_DROPOUT.get(func)
        if position is not None and len(args) > position:
            args = (*args[:position], 0.0, *args[position + 1 :])
        elif position is not None:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)
