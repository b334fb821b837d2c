"""A model of a saved ensemble is built for its architecture alone: no weights are read.

The file of weights from which it was once made may be gone, and the network too.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from unittest import mock

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from treeify.errors import ModelError
from treeify.models.architecture import Architecture
from treeify.models.fingerprint import fingerprint
from treeify.models.saved_architecture import is_trusted, without_weights

# What builders of the user's own read weights with; a mock stands for all that a file may hold.
_READERS = (
    "torch.load",
    "torch.hub.download_url_to_file",
    "safetensors.torch.safe_open",
    "timm.models._helpers.load_state_dict",
    "timm.models._builder.load_pretrained",
)


def rebuild(architecture: Architecture, expected: str | None) -> nn.Module:
    """Build a model again, if possible without reading the weights that its builder loads.

    Args:
        architecture: how to build it.
        expected: its fingerprint, None if it is of other versions of the libraries. A model that
            comes out another without its file, which may say how wide a layer is, is built with it.

    Raises:
        ModelError: it cannot be built.
    """
    if is_trusted(architecture.name):
        return without_weights(architecture).build()
    unread = None
    with suppress(ModelError), _weights_unread():
        unread = architecture.build()
    if unread is not None and fingerprint(unread) == expected:
        return unread
    try:
        return architecture.build()
    except ModelError:
        if unread is None or expected is not None:
            raise
        return unread


@contextmanager
def _weights_unread() -> Iterator[None]:
    """Let what reads weights read nothing, and what loads them load nothing."""
    with ExitStack() as stack, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer of width 0, say
        for name in _READERS:
            stack.enter_context(mock.patch(name))
        nothing_amiss = _IncompatibleKeys([], [])
        stack.enter_context(
            mock.patch.object(nn.Module, "load_state_dict", return_value=nothing_amiss)
        )
        yield
