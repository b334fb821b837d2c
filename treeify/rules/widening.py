"""Calls of modules that run packed as themselves, with `G` times the channels and groups."""

from torch import nn

from treeify.rules.call import Call, Unpackable
from treeify.rules.operations.widened import OfRows, Widened


def unchanged(module: nn.Module, branches: int) -> None:
    """Widen a module that is the same for any number of channels."""


def widened(call: Call, *, of_channels: bool = False) -> Widened:
    """The packed operation of a module with a widen rule; Unpackable if it reads other tensors."""
    if len(call.tensor_arguments()) > 1:
        raise Unpackable("it reads more than one tensor")
    call.input_facts()
    return Widened(call.packed_module, call.module, call.branches, of_channels=of_channels)


def of_rows(call: Call, *, of_channels: bool = False) -> OfRows:
    """The operation in the batch of a module with a widen rule; Unpackable unless of many rows."""
    # With one row for each image, branches run in the channels.
    if call.batch_first_facts(least_rank=2).branch_dim == 1:
        raise Unpackable("its input has one row for each image")
    return OfRows(Widened(call.packed_module, call.module, call.branches, of_channels=of_channels))
