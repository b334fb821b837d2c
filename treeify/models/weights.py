"""Trained weights in files, as people save them, read without running any code of theirs.

`timm`'s train.py, Lightning, torchvision's references and plain loops each wrap a state dict in
their own way, and data parallelism, `torch.compile` and averaging put prefixes before its keys.
"""

import argparse
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from treeify.errors import CheckpointError, joined, quoted

# Under which keys checkpoints hold a state dict, the likeliest first: averaged weights are what
# training measured.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_CURRENT = ("state_dict", "model_state_dict", "model", "net", "weights")
# What checkpoints hold beside tensors, and what is harmless to build: timm saves its options.
_SCALAR = np.float64(0).__reduce__()[0]  # what pickles of NumPy's numbers call
_HARMLESS: list[Any] = [
    *(argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath, np.dtype),
    *{type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"},
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


@dataclass(frozen=True)
class Weights:
    """Tensors of a base model.

    Args:
        state: under the model's keys, but for prefixes that wrappers add.
        source: where they come from, for messages.
    """

    state: Mapping[str, Tensor]
    source: str


def read_weights(path: str | pathlib.Path) -> Weights:
    """Read a file of weights on the CPU: a state dict, or a checkpoint that holds one.

    Averaged weights are preferred to those of the last step. Pickles are read with
    `weights_only=True`, which runs no code of theirs.

    Args:
        path: safetensors or what `torch.save` wrote, whatever its ending.

    Raises:
        CheckpointError: the file is missing or damaged, holds Python objects such as a whole
            module, or no state dict.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no file of weights {str(path)!r}.",
            expected="a state dict: .pth, .pt, .ckpt, .safetensors",
            found="a directory"
            if path.is_dir()
            else "a pipe or a device"
            if path.exists()
            else f"nothing there, from {pathlib.Path.cwd()}",
        )
    content = _read(path)
    states = {}
    if isinstance(content, Mapping):
        states = {
            str(key): value
            for key, value in content.items()
            if _is_state(value) and not str(key).endswith(_EXTRA_STATE_KEY_SUFFIX)
        }
    usual = [name for name in (*_AVERAGED, *_CURRENT) if name in states]
    if len(states) > 1 and not usual:
        raise CheckpointError(
            f"{path} holds several state dicts.",
            found=", ".join(map(repr, states)),
            next_step="Save the one that is meant in a file of its own.",
        )
    if states:
        name = next(iter([*usual, *states]))
        others = [repr(other) for other in states if other != name]
        source = f"{path}, {name!r}" + (f" and not {' or '.join(others)}" if others else "")
        return Weights(_tensors(states[name]), source)
    if not _is_state(content):
        keys = quoted([*content]) if isinstance(content, Mapping) else ""
        raise CheckpointError(
            f"{path} holds no state dict.",
            expected="tensors by name, or a checkpoint with them under 'state_dict', 'model', ...",
            found=f"the keys {keys}" if keys else f"{type(content).__name__} {content!r:.60}",
        )
    return Weights(_tensors(content), str(path))


def _read(path: pathlib.Path) -> Any:
    """What a file holds; its tensors may be mapped from it."""
    try:
        with path.open("rb") as file:
            # Eight bytes of length, then JSON: whatever the file's name is.
            is_safetensors = file.read(9)[8:] == b"{"
        if is_safetensors:
            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
    except pickle.UnpicklingError as error:
        raise _not_weights_only(path, error) from error
    except Exception as error:  # whatever a damaged or foreign file makes torch raise
        if "TorchScript" in str(error):
            raise _not_weights_only(path, error) from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as weights: {reason}",
            expected="what torch.save or safetensors wrote",
        ) from error


def _not_weights_only(path: pathlib.Path, error: Exception) -> CheckpointError:
    """The way out for a file that holds more than tensors and plain values."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it is no checkpoint at all, or a TorchScript archive
        names = []
    if not names and "TorchScript" not in str(error):
        return CheckpointError(
            f"{path} cannot be read as weights.",
            expected="what torch.save or safetensors wrote",
            found="a file of another kind, or a damaged one",
        )
    return CheckpointError(
        f"{path} holds Python objects and not weights alone; to read them would run their code.",
        expected="a state dict, as torch.save(model.state_dict(), 'weights.pth') writes it",
        found=joined(names) if names else "a TorchScript module",
        next_step="If you trust the file, open it in Python (torch.load(..., weights_only=False) or"
        " torch.jit.load), then save the state_dict() of the model in it, or pass that model to"
        " treeify.hierarchicalize.",
    )


def _is_state(value: object) -> bool:
    """Whether a value of a checkpoint is a state dict; options and schedules hold no tensors."""
    return isinstance(value, Mapping) and any(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()
    )


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, which may hold a module's extra state and notes besides."""
    return {
        key: value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
