"""Ensembles in repositories of the Hugging Face hub: `hf-hub:org/name@revision` in a path's place.

They come by way of the hub's own cache, which stays as it is: what is opened, and what is measured
beside it, is a copy of treeify's own (`huggingface_hub.cached_assets_path`), of one commit. Its
files are links to the same bytes on the disk where the file system has such links.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from treeify import files
from treeify.errors import CheckpointError, joined
from treeify.models.downloads import without_retries
from treeify.models.hub_contents import (
    CARD,
    CONFIG,
    MANIFEST,
    content,
    is_of_timm,
    is_tagged,
    kind_of,
    missing_files,
)
from treeify.models.hub_errors import NAMED, explained
from treeify.registry import HUB, LOCAL

# The files of a repository that are opened.
_OF_ENSEMBLE = (
    *(CONFIG, "model.safetensors", "model-*.safetensors"),
    *("recipe.yaml", "metrics.jsonl", "environment.json"),
)
_OF_EXPORT = (MANIFEST, "*.onnx", "*.onnx.data", "*.onnx_data")
# Files of fewer bytes are copied: somebody may edit them.
_SMALL = 2**20
# What a repository has that holds no model yet; a push replaces none but the second.
_BARE = (".gitattributes", CARD)


@dataclass(frozen=True)
class Repository:
    """A folder of a repository, which holds an ensemble or an export.

    Args:
        name: `org/name`.
        folder: inside of it; empty for all of it.
        revision: a branch, a tag or a commit; None for the newest of the main branch.
    """

    name: str
    folder: str = ""
    revision: str | None = None

    @classmethod
    def of(cls, text: str) -> "Repository":
        """What `hf-hub:...` names.

        Raises:
            CheckpointError: it names nothing that can be.
        """
        path, at, revision = text.removeprefix(HUB).partition("@")
        organisation, _, rest = path.partition("/")
        name, _, folder = rest.partition("/")
        parts = folder.split("/") if folder else []
        is_name = is_repository_name(f"{organisation}/{name}") and (bool(revision) or not at)
        if not is_name or any(not re.fullmatch(r"(?!\.+$)[\w.-]+", part) for part in parts):
            raise CheckpointError(
                f"{text!r} names no repository of the hub.",
                expected=NAMED,
                next_step="A directory of this machine is named by its path alone, or"
                " local-dir:DIRECTORY.",
            )
        return cls(f"{organisation}/{name}", folder, revision or None)

    def __str__(self) -> str:
        """As users write it."""
        folder = f"/{self.folder}" if self.folder else ""
        return f"{HUB}{self.name}{folder}" + (f"@{self.revision}" if self.revision else "")


def is_repository_name(text: str) -> bool:
    """Whether the hub may have a repository of this name, `org/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text


def is_remote(path: str | Path) -> bool:
    """Whether a path is `hf-hub:...`."""
    return isinstance(path, str | Path) and _text(path).startswith(HUB)


def local_path(path: str | Path) -> Path:
    """The path of this machine that a user means.

    Args:
        path: itself; `local-dir:DIRECTORY`; or `hf-hub:org/name@revision`, which is fetched unless
            it is here already.

    Raises:
        CheckpointError: a repository is not there, not open to the user, not treeify's, or cannot
            be reached.
    """
    text = _text(path)
    if text.startswith(LOCAL):
        return Path(text.removeprefix(LOCAL))
    return _fetched(Repository.of(text)) if text.startswith(HUB) else Path(path)


def ensemble_named(name: str) -> Path | None:
    """The directory that a name means where models' names are meant as well, as of a teacher.

    Raises:
        CheckpointError: a repository cannot be looked at.
    """
    if name.startswith(HUB):
        repository = Repository.of(name)
        return _fetched(repository) if kind_of(_description(repository)) else None
    if name.startswith(LOCAL):
        folder = local_path(name)
        return folder if kind_of(folder) or not files.is_file(folder / CONFIG) else None
    return Path(name) if files.is_directory(Path(name)) else None


def is_of_others(repository: Repository, *, as_timm: bool = False) -> bool:
    """Whether a repository holds something that treeify did not write.

    Args:
        repository: at a revision.
        as_timm: whether a model as timm writes it may be treeify's.

    Raises:
        CheckpointError: it cannot be looked at.
    """
    from huggingface_hub import HfApi

    with explained(str(repository)), without_retries():
        names = HfApi().list_repo_files(repository.name, revision=repository.revision)
    if set(names) <= {*_BARE}:
        return False
    folder = _snapshot(repository, (CONFIG, MANIFEST, *_BARE), revision=repository.revision)
    if kind_of(folder) is not None or is_tagged(folder / CARD):
        return False
    return not (as_timm and is_of_timm(content(folder / CONFIG)))


def _text(path: str | Path) -> str:
    return path.as_posix() if isinstance(path, Path) else path


def _fetched(repository: Repository) -> Path:
    """A directory with a repository's files, those of the newest commit that can be had."""
    folder = _description(repository)
    kind = kind_of(folder)
    if kind is None:
        raise _not_ours(repository, folder)
    patterns = _OF_ENSEMBLE if kind == CONFIG else _OF_EXPORT
    # By its commit: a branch may have moved on in between.
    commit = Path(*folder.parts[: -len(Path(repository.folder).parts) or None]).name
    snapshot = _snapshot(repository, patterns, revision=commit)
    return _copy(repository, snapshot, patterns, commit)


def _description(repository: Repository) -> Path:
    """A snapshot's folder with the files that say what it holds, if they are there."""
    # The last is in nearly all of them: where nothing matches, the hub's client prints a warning.
    names = (CONFIG, MANIFEST, ".gitattributes")
    return _snapshot(repository, names, revision=repository.revision)


def _snapshot(repository: Repository, names: tuple[str, ...], *, revision: str | None) -> Path:
    """The folder in the hub's cache, with those files of it that are asked for."""
    from huggingface_hub import snapshot_download

    patterns = [f"{repository.folder}/{name}" if repository.folder else name for name in names]
    # On a terminal somebody watches.
    bars = nullcontext() if sys.stderr.isatty() else quiet()
    with explained(str(repository)), bars:
        fetch = partial(
            snapshot_download, repository.name, revision=revision, allow_patterns=patterns
        )
        try:
            with without_retries():
                folder = fetch()
        except ConnectionError:  # in place of a second attempt: what is here will do
            folder = fetch(local_files_only=True)
    return Path(folder, repository.folder)


def _copy(repository: Repository, snapshot: Path, patterns: tuple[str, ...], commit: str) -> Path:
    """A directory of treeify's with a snapshot's files; one that exists stays as it is.

    No links: it may be read like any other, without trust, and writing into it changes no blob of
    the cache, since treeify replaces files and never writes into them.

    Raises:
        CheckpointError: files are missing, or it cannot be written.
    """
    from huggingface_hub import cached_assets_path
    from huggingface_hub.utils import filter_repo_objects

    names = [path.name for path in snapshot.iterdir() if path.is_file()]
    chosen = [*filter_repo_objects(names, allow_patterns=[*patterns])]
    if missing := missing_files(snapshot, chosen):
        # Without a network there is what was fetched before, maybe the description alone.
        raise CheckpointError(
            f"{repository} is not whole: files are missing that it names.",
            expected="all of them, in the repository or, without a network, in the hub's cache",
            found=f"no {joined(missing)}",
            next_step="Try again with a connection to the hub, or ask its author to push again.",
        )

    def write(draft: Path) -> None:
        for name in chosen:
            source = (snapshot / name).resolve()
            if source.stat().st_size < _SMALL or not _linked(source, draft / name):
                shutil.copyfile(source, draft / name)

    # What exports of it are called.
    name = "--".join([repository.name.partition("/")[2], *filter(None, [repository.folder])])
    try:
        parent = cached_assets_path("treeify", namespace=repository.name, subfolder=commit)
        final = parent / name.replace("/", "--")
        files.publish(final, write)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{repository} cannot be copied out of the hub's cache: {error}",
            next_step="Free some space, or set HF_HOME to a directory that can be written.",
        ) from error
    return final


def _linked(source: Path, target: Path) -> bool:
    """Give a file a second name; False on another file system, or one that has no such links."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _not_ours(repository: Repository, folder: Path) -> CheckpointError:
    """Says what a repository is instead, and how that is used."""
    config = content(folder / CONFIG)
    if not isinstance(config, dict):
        found, next_step = f"no {CONFIG}, and no {MANIFEST}", None
    elif is_of_timm(config):
        found = f"a model of timm, {str(config['architecture'])!r:.100}"
        next_step = (
            "Make an ensemble of it: treeify.hierarchicalize(timm.create_model("
            f"'{repository}', pretrained=True), splits=4, init='perturb')"
        )
    else:
        found, next_step = f"a {CONFIG} of another library", None
    return CheckpointError(
        f"{repository} is no repository of treeify's.",
        expected=f"{CONFIG} of an ensemble, or {MANIFEST} of an export, as treeify push writes",
        found=found,
        next_step=next_step or "Look for another: those of treeify's have the tag treeify.",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the hub's client from drawing bars of progress, as it does even in a pipe."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
