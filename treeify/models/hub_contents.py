"""What a folder of a repository holds, by the files that say so, which anybody may have written."""

import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from yaml import YAMLError

from treeify import files

CONFIG, MANIFEST, CARD = "config.json", "ensemble.json", "README.md"
_MOST_BYTES = 2**24
_WEIGHTS = "model.safetensors"
_TAG = "treeify"


def kind_of(folder: Path) -> str | None:
    """Which file says that a folder holds something of treeify's; None if it does not."""
    config = content(folder / CONFIG)
    if isinstance(config, dict) and {"format", "splits", "fingerprint"} <= config.keys():
        return CONFIG
    manifest = content(folder / MANIFEST)
    is_export = isinstance(manifest, dict) and manifest.get("format") == "treeify-export"
    return MANIFEST if is_export and config is None else None


def content(file: Path) -> Any:
    """What a file holds, which anybody may have written; None if that is no JSON."""
    with suppress(OSError, ValueError, RecursionError):
        return json.loads(files.read_bytes(file, _MOST_BYTES))
    return None


def is_of_timm(config: Any) -> bool:
    """Whether the content of `config.json` is timm's."""
    return isinstance(config, dict) and "architecture" in config and "format" not in config


def is_tagged(card: Path) -> bool:
    """Whether a card says in its first lines that treeify wrote what it is about."""
    from huggingface_hub.repocard import metadata_load

    try:
        values = metadata_load(card) or {}
    except (OSError, ValueError, RecursionError, YAMLError):  # none, or anybody's
        return False
    tags = values.get("tags")
    return values.get("library_name") == _TAG or (isinstance(tags, list) and _TAG in tags)


def missing_files(folder: Path, names: Collection[str]) -> list[str]:
    """The files that an ensemble or an export says it has, and that are not there.

    Args:
        folder: with the file that describes it.
        names: of the files that are there.
    """
    if CONFIG in names:
        needed = _listed(content(folder / CONFIG), "files") or [_WEIGHTS]
    else:
        steps = _listed(content(folder / MANIFEST), "steps")
        rows = [step for step in steps if isinstance(step, dict)]
        entries = [entry for row in rows for entry in (row, row.get("data"))]
        needed = [entry["file"] for entry in entries if isinstance(entry, dict) and "file" in entry]
    return [str(name) for name in needed if name not in names]


def _listed(values: Any, key: str) -> list[Any]:
    """What a file of somebody's lists under a key; nothing if that is no list."""
    found = values.get(key) if isinstance(values, dict) else None
    return [*found] if isinstance(found, dict | list) else []
