"""Which directory a run gets: it is made and locked as it is chosen, and only then looked into."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from treeify import files
from treeify.errors import CheckpointError
from treeify.training.recipe import Recipe
from treeify.training.run_directory import RUN_FILES, RunDirectory, check_same, is_run, recipe_in
from treeify.training.run_lock import LOCK, locked


@contextlib.contextmanager
def claimed(
    recipe: Recipe, out: Path | str | None, *, overwrite: bool, warn: Callable[[str], None]
) -> Iterator[RunDirectory]:
    """Make and lock the directory of a new run; unless the run begins, it vanishes again.

    Args:
        recipe: of the run.
        out: the directory, else the recipe's, else `runs/NAME`, `runs/NAME-2`, ...
        overwrite: it may hold a run that nobody is training.
        warn: hears what is wrong.

    Yields:
        The directory, empty or with an earlier run in it, which `describe` replaces.

    Raises:
        CheckpointError: it is taken, or cannot be made.
    """
    out = out or recipe.out
    path = Path("runs") / recipe.name if out is None else Path(out)
    with _making(path):
        absent = [folder for folder in path.parents if not folder.exists()]
        if out is not None:
            _check_free(path, overwrite=overwrite)
            absent = absent if path.exists() else [path, *absent]
            path.mkdir(parents=True, exist_ok=True)
        else:
            path = _numbered(path)
            absent = [path, *absent]
    try:
        with locked(path, warn) as lock:
            _check_free(path, overwrite=overwrite)  # another run may have come first
            yield RunDirectory(path, lock)
    finally:
        with contextlib.suppress(OSError):  # the run began: they are not empty
            for folder in absent:
                folder.rmdir()


@contextlib.contextmanager
def resumed(
    path: Path | str, recipe: Recipe, warn: Callable[[str], None]
) -> Iterator[RunDirectory]:
    """Lock the directory of a run to go on with, for a recipe that has to be the run's.

    Yields:
        The directory.

    Raises:
        CheckpointError: it holds no run, one of another recipe, or one that is being trained.
    """
    recipe_in(Path(path))
    with locked(Path(path), warn) as lock:
        directory = RunDirectory(Path(path), lock)
        check_same(directory, recipe)
        yield directory


def _check_free(path: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if a run in a directory would replace what it may not."""
    is_directory = path.is_dir()
    names = {entry.name for entry in path.iterdir()} if is_directory else set()
    is_free = not names - {LOCK} if is_directory else not os.path.lexists(path)
    if not is_free and not (overwrite and is_directory):
        raise CheckpointError(
            f"run directory {str(path)!r} is taken.",
            expected="a directory that is new or empty",
            next_step="Give another --out, or --overwrite to replace the run in it.",
        )
    clashes = [name for name in RUN_FILES if name in names]
    if clashes and not is_run(path):
        raise CheckpointError(
            f"{str(path)!r} holds no run, but files that a run would replace.",
            found=", ".join(clashes),
            next_step="Give another --out.",
        )


def _numbered(path: Path) -> Path:
    """Make a directory of this name or, as others may at the same time, with the next number."""
    while True:
        numbered = files.unused(path)
        try:
            numbered.mkdir(parents=True)
        except FileExistsError:
            if not os.path.lexists(numbered):  # it is one of the parents that is no directory
                raise
        else:
            return numbered


@contextlib.contextmanager
def _making(path: Path) -> Iterator[None]:
    """Turn what keeps a directory from being made into one message."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"run directory {str(path)!r} cannot be made: {error}",
            next_step="Give another --out, or run elsewhere.",
        ) from error
