"""Files, directories and links that are written completely or not at all, whatever happens.

A writer that is killed leaves a draft behind, `.NAME.PID`, and nothing else.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

from treeify.errors import CheckpointError


def replace_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text, as `replace_bytes` does."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file.

    Raises:
        OSError: it cannot be written; it is as it was.
    """
    draft = _draft(path)
    try:
        draft.write_bytes(content)
        # A rename can reach the disk before the content: a power cut would leave an empty file.
        _bring_to_disk(draft)
        draft.replace(path)
        _bring_to_disk(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line in one write, on the disk when this returns.

    Raises:
        OSError: it cannot be written, or not all of it.
    """
    content = line.encode() + b"\n"
    with path.open("ab+", buffering=0) as file:
        # A line that was cut off ends here, so that this one stands alone.
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            content = content if file.read(1) == b"\n" else b"\n" + content
        written = file.write(content)
        os.fsync(file.fileno())
    if written != len(content):
        raise OSError(errno.ENOSPC, "the disk is full")


def publish(final: Path, write: Callable[[Path], None]) -> None:
    """Make a directory with all its files at once; one that exists already stays as it is.

    Args:
        final: its name.
        write: fills a directory of another name; what it raises is passed on.

    Raises:
        OSError: it cannot be written; nothing has changed.
    """
    if final.exists():
        return
    draft = _draft(final)
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
    """Let a symbolic link name something, from one moment to the next.

    A directory in the link's place, as copying may leave it, is renamed.

    Raises:
        OSError: it cannot be written.
    """
    draft = _draft(link)
    draft.unlink(missing_ok=True)
    # A link cannot be overwritten, but renaming one over another takes a single moment.
    draft.symlink_to(os.path.relpath(target, link.parent))
    if link.is_dir() and not link.is_symlink():
        link.rename(unused(link.with_name(f"copied-{link.name}")))
    draft.replace(link)
    _bring_to_disk(link.parent)


def require_inside(path: Path, folder: Path) -> None:
    """Refuse links that lead from a folder, which may be anybody's, to the outside.

    What the Hugging Face hub downloads is links to files beside its snapshots: they may.

    Raises:
        CheckpointError: they do, or lead to themselves.
    """
    try:
        target, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is a link to itself: {error}") from error
    cache = next((each.parent for each in root.parents if each.name == "snapshots"), None)
    places = [root] if cache is None else [root, cache / "blobs"]
    if not any(target.is_relative_to(place) for place in places):
        raise CheckpointError(
            f"{path} is a link that leads out of {folder}.",
            expected="files that lie in the directory",
            found=str(target),
            next_step="Copy the directory with what it links to (cp -rL). If you trust whoever"
            " made it, pass trust=True (--trust).",
        )


def drafts(folder: Path, names: str) -> list[Path]:
    """What killed writers left in a folder, where a regular expression tells what they wrote."""
    pattern = re.compile(rf"\.({names})\.\d+")
    return [path for path in folder.glob(".*") if pattern.fullmatch(path.name)]


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with all its files, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def unused(path: Path) -> Path:
    """The path, or the first of `path-2`, `path-3`, ... that does not exist yet."""
    names = (path.name if number == 1 else f"{path.name}-{number}" for number in count(1))
    return next(other for other in map(path.with_name, names) if not os.path.lexists(other))


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _bring_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
