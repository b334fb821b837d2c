"""A run's state on the disk: plain values as JSON, tensors as safetensors, never pickle.

JSON has neither tensors, nor tuples, nor keys that are numbers: each is written as an object with
one key that says what it stands for. Optimizers have all three.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from treeify import files
from treeify.errors import CheckpointError

VALUES, TENSORS = "trainer.json", "trainer.safetensors"
_MOST_BYTES = 2**26
# What reading raises where a file is missing, is none of ours, or says something else.
_DAMAGE = (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError, SafetensorError)
_TENSOR, _PAIRS, _TUPLE = "tensor", "pairs", "tuple"


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts, lists, numbers, strings and tensors; TypeError for anything else."""
    tensors: dict[str, Tensor] = {}
    plain = _plain(state, tensors)
    save_file(tensors, directory / TENSORS)
    text = json.dumps(plain, indent=1, allow_nan=True) + "\n"
    (directory / VALUES).write_text(text, encoding="utf-8")
    shutil.copymode(directory / VALUES, directory / TENSORS)  # safetensors lets nobody else read it


def read_state(directory: Path) -> dict[str, Any]:
    """What `write_state` wrote, tensors on the CPU; CheckpointError if it is missing or damaged."""
    try:
        plain = files.read_json(directory / VALUES, _MOST_BYTES)
        files.check_regular(directory / TENSORS)
        state: dict[str, Any] = _nested(plain, load_file(directory / TENSORS))
    except _DAMAGE as error:
        raise CheckpointError(
            f"{directory} holds no whole trainer's state: {error}",
            expected=f"{VALUES} and {TENSORS} as treeify train wrote them",
        ) from error
    return state


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON has it; its tensors are collected under the names that stand for them."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, Mapping):  # keys may be numbers
        return {_PAIRS: [[key, _plain(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_plain(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_plain(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of a trainer's state")


def _nested(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `_plain` wrote."""
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _TUPLE in value:
            return tuple(_nested(item, tensors) for item in value[_TUPLE])
        return {key: _nested(item, tensors) for key, item in value[_PAIRS]}
    if isinstance(value, list):
        return [_nested(item, tensors) for item in value]
    return value
