"""A trainer's state on the disk: plain values as JSON, tensors as safetensors, never pickle.

A snapshot is a directory that is complete before it takes its name, so at any moment, killed or
not, the newest one with a name is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from treeify.errors import CheckpointError

VALUES, TENSORS = "trainer.json", "trainer.safetensors"
_TENSOR, _PAIRS, _TUPLE = "tensor", "pairs", "tuple"


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts, lists, numbers, strings and tensors.

    Raises:
        TypeError: there is something else in the state.
    """
    tensors: dict[str, Tensor] = {}
    plain = _plain(state, tensors)
    save_file(tensors, directory / TENSORS)
    text = json.dumps(plain, indent=1, allow_nan=True) + "\n"
    (directory / VALUES).write_text(text, encoding="utf-8")


def read_state(directory: Path) -> dict[str, Any]:
    """What `write_state` wrote, tensors on the CPU.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        plain = json.loads((directory / VALUES).read_text(encoding="utf-8"))
        state: dict[str, Any] = _nested(plain, load_file(directory / TENSORS))
    except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} holds no whole trainer's state: {error}",
            expected=f"{VALUES} and {TENSORS} as treeify train wrote them",
        ) from error
    return state


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON values; tensors are put aside and named."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, Mapping):  # keys may be numbers
        return {_PAIRS: [[key, _plain(own, tensors)] for key, own in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_plain(own, tensors) for own in value]}
    if isinstance(value, list):
        return [_plain(own, tensors) for own in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of a trainer's state")


def _nested(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _TUPLE in value:
            return tuple(_nested(own, tensors) for own in value[_TUPLE])
        return {key: _nested(own, tensors) for key, own in value[_PAIRS]}
    if isinstance(value, list):
        return [_nested(own, tensors) for own in value]
    return value


def publish(final: Path, write: Callable[[Path], None]) -> None:
    """Make a directory that is there whole or not at all; one that is there already stays.

    Args:
        final: its name.
        write: fills a directory of another name.

    Raises:
        CheckpointError: it cannot be written; nothing has changed.
    """
    if final.exists():
        return
    draft = _draft(final)
    with told(final):
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            write(draft)
            for path in [*draft.rglob("*"), draft]:
                _bring_to_disk(path)
            draft.rename(final)
            _bring_to_disk(final.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def point(link: Path, target: Path) -> None:
    """Let a symbolic link name a snapshot, from one moment to the next.

    Args:
        link: if it is a directory, as copying a run may leave it, that one is put aside.
        target: what it names.

    Raises:
        CheckpointError: it cannot be written.
    """
    draft = _draft(link)
    with told(link):
        draft.unlink(missing_ok=True)
        draft.symlink_to(os.path.relpath(target, link.parent))
        if link.is_dir() and not link.is_symlink():
            link.rename(unused(link.with_name(f"copied-{link.name}")))
        draft.replace(link)
        _bring_to_disk(link.parent)


def replace_text(path: Path, text: str) -> None:
    """Write a file that is there whole or as it was.

    Raises:
        CheckpointError: it cannot be written.
    """
    draft = _draft(path)
    with told(path):
        try:
            draft.write_text(text, encoding="utf-8")
            _bring_to_disk(draft)
            draft.replace(path)
            _bring_to_disk(path.parent)
        finally:
            draft.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file and bring it to the disk.

    Raises:
        CheckpointError: it cannot be written.
    """
    with told(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def drafts(final: Path) -> list[Path]:
    """What writers of a file, a directory or a link left behind when they were killed."""
    found = re.compile(rf"\.{re.escape(final.name)}\.\d+")
    return [path for path in final.parent.glob(".*") if found.fullmatch(path.name)]


def unused(path: Path) -> Path:
    """The path, or the first of `path-2`, `path-3`, ... that is not there yet."""
    names = (path.name if number == 1 else f"{path.name}-{number}" for number in count(1))
    return next(other for other in map(path.with_name, names) if not other.exists())


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn what keeps a file from being written into one message."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}",
            next_step="What was there is as it was. Free some space, then go on with --resume.",
        ) from error


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _bring_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def like(state: Tensor, parameter: Tensor) -> Tensor:
    """A parameter's optimizer state in the parameter's memory format, device and dtype kept."""
    if state.shape != parameter.shape:
        return state
    return torch.empty_like(parameter, dtype=state.dtype).copy_(state)
