"""Files, directories and links that are written completely or not at all, whatever happens.

A writer that is killed leaves a draft behind, `.NAME.PID-RANDOM`, and nothing else.
"""

import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from treeify.errors import CheckpointError, DataError, TreeifyError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_file(path: Path) -> bool:
    """Whether there is a file; none has a name that is too long, of which `Path` raises OSError."""
    return os.path.isfile(path)  # noqa: PTH113


def is_directory(path: Path) -> bool:
    """Whether there is a directory, likewise."""
    return os.path.isdir(path)  # noqa: PTH112


def check_new(
    folder: Path, error_class: type[TreeifyError], next_step: str = "Choose another one."
) -> None:
    """Raise an error of some class unless a directory is new or empty."""
    exists = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not exists.is_dir():
        raise error_class(f"{exists} is a file.", expected="a directory, new or empty")
    if folder.is_dir() and any(folder.iterdir()):
        raise error_class(
            f"{folder} is not empty.", expected="a new or empty directory", next_step=next_step
        )


def check_writable_file(path: Path, name: str) -> None:
    """Look, before anything is computed, whether a file can be written.

    Args:
        path: of the file, which may be there.
        name: what the message calls it.

    Raises:
        DataError: it cannot.
    """
    folder = path.parent
    problem = None
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        problem = f"{folder} as its directory"
    elif path.exists() and not path.is_file():
        problem = "a directory" if path.is_dir() else "a pipe or a device"
    if problem is not None:
        raise DataError(
            f"{name} cannot be written.",
            expected="a file in a directory that exists",
            found=problem,
        )


def check_regular(path: Path) -> None:
    """Let nobody wait for a pipe that nothing is written to, or read a device that has no end.

    Raises:
        OSError: there is no file of this name, or something else.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except ValueError as error:  # no file system has such a name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if kind in _KINDS:
        raise OSError(errno.EINVAL, f"it is {_KINDS[kind]}, not a file", str(path))


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a file.

    Args:
        path: of the file.
        most: how many bytes are read.

    Raises:
        OSError: there is none, it cannot be read, or is larger.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes", str(path))
    return content


def replace_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text, as `replace_bytes` does."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file, as `replace_file` does."""
    replace_file(path, lambda draft: draft.write_bytes(content))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file.

    Args:
        path: its name.
        write: writes an empty file of another name; what it raises is passed on.

    Raises:
        OSError: it cannot be written; it is as it was.
    """
    draft = _draft(path)
    try:
        draft.touch()
        mode = draft.stat().st_mode
        write(draft)
        draft.chmod(mode)  # safetensors lets nobody else read its files
        # A rename can reach the disk before the content: a power cut would leave an empty file.
        _bring_to_disk(draft)
        draft.replace(path)
        _bring_to_disk(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def replace_all(contents: Mapping[Path, bytes]) -> None:
    """Write several files: none is replaced before all are on the disk.

    Args:
        contents: of each file, by its name.

    Raises:
        OSError: one cannot be written; all are as they were.
    """
    drafts = {path: _draft(path) for path in contents}
    try:
        for path, content in contents.items():
            if path.is_dir():  # which no rename replaces
                raise OSError(errno.EISDIR, "it is a directory, not a file", str(path))
            drafts[path].write_bytes(content)
            _bring_to_disk(drafts[path])
        for path, draft in drafts.items():
            draft.replace(path)
        for folder in {path.parent for path in contents}:
            _bring_to_disk(folder)
    finally:
        for draft in drafts.values():
            with suppress(OSError):
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
        draft.mkdir(parents=True)
        write(draft)
        for path in [*draft.rglob("*"), draft]:
            _bring_to_disk(path)
        try:
            draft.rename(final)
        except OSError:
            if not final.is_dir():  # which another writer may have made in between
                raise
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
    # A link cannot be overwritten, but renaming one over another takes a single moment.
    draft.symlink_to(os.path.relpath(target, link.parent))
    try:
        if link.is_dir() and not link.is_symlink():
            link.rename(unused(link.with_name(f"copied-{link.name}")))
        draft.replace(link)
        _bring_to_disk(link.parent)
    finally:
        draft.unlink(missing_ok=True)


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
    """What killed writers left in a folder, where a regular expression tells what they wrote.

    Nobody else may be writing there: to others, a draft looks the same.
    """
    pattern = re.compile(rf"\.({names})\.\d+(-[0-9a-f]+)?")  # earlier versions: the process alone
    return [path for path in folder.glob(".*") if pattern.fullmatch(path.name)]


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with all its files, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def withdraw(directory: Path) -> None:
    """Remove a directory that others may look for: whole until one moment, gone from the next."""
    draft = directory.rename(_draft(directory))
    shutil.rmtree(draft)


def unused(path: Path) -> Path:
    """The path, or the first of `path-2`, `path-3`, ... that does not exist yet."""
    names = (path.name if number == 1 else f"{path.name}-{number}" for number in count(1))
    return next(other for other in map(path.with_name, names) if not os.path.lexists(other))


@contextmanager
def locked(directory: Path, patience: float = 60.0) -> Iterator[None]:
    """Let one writer at a time, process or thread, change what is in a directory.

    The system gives a lock up when its process ends, even if killed. Windows, and file systems that
    have no locks, let everybody in.

    Args:
        directory: it exists.
        patience: seconds to wait for others.

    Raises:
        TimeoutError: others were writing all the time.
        OSError: the directory cannot be opened.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        _lock(descriptor, directory, patience)
        yield
    finally:
        # Not by closing alone: a process that was forked meanwhile has it open, too.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(descriptor: int, directory: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # noqa: PERF203 - it waits anyway
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "others are writing", str(directory)) from None
            time.sleep(0.01)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            return  # the file system has no such locks
        else:
            return


def _draft(path: Path) -> Path:
    """A name that no other process or thread takes."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


def _bring_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, would survive a power cut."""
    if os.name == "nt":  # does so only for files that are open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
