"""The directory of an export: what it needs, whether it may be written, and writing it at once."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from treeify import files
from treeify.deploy.formats import FORMAT, MANIFEST, PACKAGES
from treeify.errors import ExportError


def require_packages() -> None:
    """Raise ExportError unless what exporting needs is installed."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise ExportError(
            f"exporting needs what is not installed: {', '.join(missing)}.",
            next_step="pip install 'treeify[onnx]'",
        )


def is_export(path: Path) -> bool:
    """Whether a directory was written by `export`, or says so."""
    try:
        text = files.read_bytes(path / MANIFEST, 2**24)
        return bool(json.loads(text).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


def check_writable(final: Path, *, overwrite: bool) -> None:
    """Raise ExportError unless an export may be written there."""
    if not (overwrite and final.is_dir()):
        next_step = "Choose another one, or pass --overwrite (overwrite=True)."
        files.check_new(final, ExportError, next_step)
    elif any(final.iterdir()) and not is_export(final):
        raise ExportError(
            f"{final} holds something else than an export, and is not overwritten.",
            expected=f"a directory with {MANIFEST}",
            next_step="Choose another one.",
        )


def publish(final: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Make the directory at once; what was there stays until then.

    Args:
        final: its name.
        write: fills a directory of another name; what it raises is passed on.
        overwrite: whether what is there then is removed.

    Raises:
        OSError: it cannot be written, or holds something; nothing has changed.
    """
    made = [parent for parent in final.absolute().parents if not parent.exists()]
    fresh = files.unused(final.with_name(f"{final.name}-new"))
    try:
        files.publish(fresh, write)
        if overwrite and final.is_dir() and any(final.iterdir()):
            files.withdraw(final)
        elif final.is_dir():
            final.rmdir()  # fails where others have put something there in between
        fresh.rename(final)
    except BaseException:
        if final.exists() or not overwrite:  # else it may be all there is
            shutil.rmtree(fresh, ignore_errors=True)
        for parent in made:  # the innermost first; others may have put something there
            with suppress(OSError):
                parent.rmdir()
        raise
