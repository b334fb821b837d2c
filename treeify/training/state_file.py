"""A run's state on the disk: plain values as JSON, tensors as safetensors, never pickle.

JSON has neither tensors, nor tuples, nor keys that are numbers: each is written as an object with
one key that says what it stands for. Optimizers have all three.

The JSON has the checksums of all tensors of a state, those of its ensembles too, and its own: a
state of which a part is missing, damaged or of another state is found out.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from treeify import files
from treeify.conversion import checksums
from treeify.errors import CheckpointError

VALUES, TENSORS = "trainer.json", "trainer.safetensors"
_MOST_BYTES = 2**26
_TENSOR, _PAIRS, _TUPLE = "tensor", "pairs", "tuple"
# What reading raises where a file is not what `write_state` wrote.
_DAMAGE = (
    *(FileNotFoundError, AttributeError, ValueError, KeyError, TypeError, RecursionError),
    SafetensorError,
)


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Write a state beside its ensembles, which are there already.

    Args:
        directory: of the state.
        state: nested dicts, lists, numbers, strings and tensors.

    Raises:
        TypeError: there is anything else in it.
    """
    tensors: dict[str, Tensor] = {}
    plain = _plain(state, tensors)
    save_file(tensors, directory / TENSORS)
    parts = checksums.checksums(directory.rglob("*.safetensors"), directory)
    text = checksums.seal({**plain, checksums.FILES: parts})
    (directory / VALUES).write_text(text, encoding="utf-8")
    shutil.copymode(directory / VALUES, directory / TENSORS)  # safetensors lets nobody else read it


def read_state(directory: Path) -> dict[str, Any]:
    """What `write_state` wrote, tensors on the CPU; CheckpointError if it is missing or damaged."""
    try:
        plain = checksums.read_sealed(directory / VALUES, _MOST_BYTES)
        files.check_regular(directory / TENSORS)
        for name, checksum in plain.get(checksums.FILES, {}).items():
            checksums.check_file(directory / name, checksum)
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
