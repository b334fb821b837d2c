"""One process at a time trains in a directory: a lock on a file in it.

The system gives up a lock when its process ends, however it ends: no run is locked for ever, and a
file that a killed process left behind locks nothing.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from treeify.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "treeify.lock"

_descriptors: set[int] = set()


@dataclass(frozen=True)
class Lock:
    """A locked file, by its name and by the descriptor that holds the lock."""

    file: Path
    descriptor: int

    def is_in_place(self) -> bool:
        """Whether the name still is that of the locked file, so of the locked directory."""
        try:
            return os.path.samestat(self.file.stat(), os.fstat(self.descriptor))
        except OSError:
            return False


@contextlib.contextmanager
def locked(directory: Path, warn: Callable[[str], None]) -> Iterator[Lock]:
    """Keep other processes from training in a directory.

    Args:
        directory: exists.
        warn: is told where the file system has no locks.

    Yields:
        The lock.

    Raises:
        CheckpointError: another process trains there, or nothing can be written there.
    """
    lock = _lock(directory / LOCK, warn)
    try:
        yield lock
    finally:
        # A process forked off this one may come here as well, and has no lock.
        if lock.descriptor in _descriptors:
            # Removed while it is locked: whoever opened it in between finds it not in place.
            with contextlib.suppress(OSError):
                if lock.is_in_place():
                    lock.file.unlink()
            _close(lock.descriptor)


def _lock(file: Path, warn: Callable[[str], None]) -> Lock:
    """Open a file, which is made if need be, and lock it."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(
                f"nothing can be written to {str(file.parent)!r}: {error}",
                next_step="Give another --out, or the right to write there.",
            ) from error
        _descriptors.add(descriptor)
        try:
            if fcntl is not None:  # on Windows nothing is checked
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            _close(descriptor)
            raise CheckpointError(
                f"another process trains in {str(file.parent)!r}.",
                next_step="Wait for it or stop it, then try again.",
            ) from error
        except OSError as error:
            warn(
                f"The file system of {file.parent} has no locks ({error.strerror}): see to it that"
                " no other process trains there."
            )
        lock = Lock(file, descriptor)
        if lock.is_in_place():
            return lock
        _close(descriptor)  # of a run that ended in between, and removed it


def _close(descriptor: int) -> None:
    _descriptors.discard(descriptor)
    os.close(descriptor)


def _close_in_child() -> None:
    """Leave the locks to the parent: its loaders' workers may outlive it by seconds."""
    for descriptor in list(_descriptors):
        _close(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
