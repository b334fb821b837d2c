"""Context managers that put a module's modes and buffers back."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Restore every submodule's own mode, training or evaluation, at the end.

    `model.train()` instead would also wake what was in evaluation mode inside of a model in
    training, such as frozen batch norms.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        if model.training != modes[0][1]:
            model.train(modes[0][1])  # an ensemble drops the weights prepared for evaluation
        for module, training in modes:
            module.training = training


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Restore a model's buffers and their values at the end, whatever took their place."""
    buffers = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for table, name, buffer, values in buffers:
            table[name] = buffer
            buffer.data.copy_(values)
