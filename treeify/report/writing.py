"""Files of a report: refused before anything is measured, written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from treeify import files
from treeify.errors import DataError, InputError

FORMATS = ("svg", "pdf", "png")
_PACKAGES = {"matplotlib": "matplotlib", "jinja2": "Jinja2"}


def require_packages() -> None:
    """Raise InputError unless what draws figures and writes pages is installed."""
    missing = [name for module, name in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise InputError(
            f"reports need what is not installed: {', '.join(missing)}.",
            next_step="pip install 'treeify[report]'",
        )


def check_page(path: Path, *, overwrite: bool) -> Path:
    """The file of a page, if it may be written.

    Raises:
        DataError: it may not.
    """
    files.check_writable_file(path, str(path))
    if path.exists() and not overwrite:
        raise DataError(
            f"{path} exists already.",
            expected="a new file",
            next_step="Choose another name, or pass --overwrite (overwrite=True).",
        )
    return path


def check_folder(folder: Path, *, overwrite: bool) -> Path:
    """The folder of figures, if they may be written into it.

    Raises:
        DataError: they may not.
    """
    exists = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not exists.is_dir() or not os.access(exists, os.W_OK):
        raise DataError(
            f"{folder} cannot be written.",
            expected="a directory, new or empty",
            found=f"{exists}, which is {'a file' if exists.is_file() else 'not writable'}",
        )
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise DataError(
            f"{folder} is not empty.",
            expected="a new or empty directory",
            next_step="Choose another one, or pass --overwrite (overwrite=True).",
        )
    return folder


def check_format(format: str) -> None:
    """Raise InputError unless figures can be written so."""
    if format not in FORMATS:
        raise InputError(
            f"figures cannot be written as {format!r}.", expected=f"one of {', '.join(FORMATS)}"
        )


def write_all(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files into a folder, all or none; a new one appears with all of them.

    Raises:
        OSError: they cannot be written.
    """

    def write(draft: Path) -> None:
        for name, content in contents.items():
            (draft / name).write_bytes(content)

    if folder.exists():
        files.replace_all({folder / name: content for name, content in contents.items()})
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.publish(folder, write)
    return [folder / name for name in contents]


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what keeps a file from being written into one message."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error}", next_step="What was there is as it was."
        ) from error
