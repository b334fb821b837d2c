"""The directory of an export: what it needs, whether it may be written, and writing it at once."""

import json
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
            f"exporting needs {', '.join(missing)}, which is not installed.",
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
    exists = next(each for each in (final, *final.absolute().parents) if each.exists())
    if not exists.is_dir():
        raise ExportError(f"{exists} is a file.", expected="a directory, new or empty")
    if not final.is_dir() or not any(final.iterdir()):
        return
    if not overwrite:
        raise ExportError(
            f"{final} is not empty.",
            expected="a new or empty directory",
            next_step="Choose another one, or pass --overwrite (overwrite=True).",
        )
    if not is_export(final):
        raise ExportError(
            f"{final} holds something else than an export, and is not overwritten.",
            expected=f"a directory with {MANIFEST}",
            next_step="Choose another one.",
        )


def publish(final: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Make the directory at once; what was there stays until then."""
    if not final.exists():
        made = [parent for parent in final.absolute().parents if not parent.exists()]
        try:
            files.publish(final, write)
        except BaseException:
            for parent in made:  # the innermost first; others may have put something there
                with suppress(OSError):
                    parent.rmdir()
            raise
        return
    fresh = files.unused(final.with_name(f"{final.name}-new"))
    files.publish(fresh, write)
    if any(final.iterdir()):
        assert overwrite
        files.withdraw(final)
    else:
        final.rmdir()
    fresh.rename(final)
