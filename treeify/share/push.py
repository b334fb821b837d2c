"""A directory -> a repository of the Hugging Face hub, in one commit; or its folder alone."""

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from treeify import files
from treeify.arguments import (
    as_path,
    require_callable,
    require_flag,
    require_integer,
    require_iterable,
    require_type,
)
from treeify.deploy.directory import require_packages
from treeify.errors import CheckpointError, InputError, described, nearest
from treeify.models.hub import is_repository_name
from treeify.share.folder import EXTRAS, Choices, write_folder
from treeify.share.upload import require_token, upload


@dataclass(frozen=True)
class Pushed:
    """What became of a push.

    Args:
        repository: `org/name`.
        files: relative to the folder, or in the repository.
        folder: that was written; None if it was for the upload alone.
        url: of the commit, or of the pull request; None for a dry run.
        commit: its hash; None for a dry run.
        revision: the branch or the pull request that has it, as `hf-hub:org/name@revision` names
            it; None for the main branch.
    """

    repository: str
    files: tuple[Path, ...]
    folder: Path | None = None
    url: str | None = None
    commit: str | None = None
    revision: str | None = None


def push(
    directory: str | Path,
    repository: str,
    *,
    extras: Collection[str] = (),
    as_timm: int | None = None,
    data: Sequence[str] = (),
    licence: str | None = None,
    base_model: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    out: str | Path | None = None,
    trust: bool = False,
    observe: Callable[[str], None] | None = None,
) -> Pushed:
    """Publish an ensemble on the Hugging Face hub, with a card of what was measured.

    All files are written and checked here before the hub is asked for anything; they go there in
    one commit, so that a failure leaves the repository as it was. Paths of this machine are left
    out of what is published. `treeify.load("hf-hub:org/name")` reads it back.

    Args:
        directory: a run, one of its checkpoints, or an ensemble.
        repository: `org/name`; made if it is not there.
        extras: `export`, the answers as ONNX files, and `report`, a page of figures.
        as_timm: number of a leaf, which is written as a plain model of timm's instead of the
            ensemble.
        data: keys of a recipe's data section to set for measuring, as `key=value`; a run knows its
            data, as far as they are here.
        licence: of the weights, such as `apache-2.0`; else the card says that nobody said it.
        base_model: the hub's name of the weights that it began with, such as
            `timm/resnet18.a1_in1k`.
        private: make a repository that only its owners see; one that is public is refused.
        revision: branch to commit to, made if it is not there; by default the main one.
        create_pr: open a pull request instead.
        dry_run: write the folder alone, and ask the hub for nothing.
        out: where to write it, new or empty; by default `pushed/NAME` in a dry run, and else
            nowhere that lasts.
        trust: as in `treeify.load`.
        observe: hears what is being done.

    Returns:
        What was written, and where.

    Raises:
        CheckpointError: there is no ensemble, it is damaged, the folder cannot be written, or what
            the repository holds cannot be looked at.
        DataError, RecipeError: the data that were asked for cannot be read.
        ExportError: it cannot be exported.
        InputError: an argument does not fit, or the hub cannot be written to.
        LeafError: there is no such leaf.
    """
    observe = _say_nothing if observe is None else observe
    require_callable("observe", observe, "what is being done, as text")
    texts = {"licence": licence, "base_model": base_model, "revision": revision}
    for name, text in texts.items():
        require_type(name, text, str | None, "text, or None")  # type: ignore[arg-type]
    require_iterable("extras", extras, f"some of {', '.join(EXTRAS)}")
    require_iterable("data", data, "keys and values, such as ['name=digits']")
    choices = Choices(
        repository, tuple(extras), as_timm, tuple(data), licence, base_model, trust=trust
    )
    _check(
        choices, {"private": private, "create_pr": create_pr, "dry_run": dry_run, "trust": trust}
    )
    path = as_path("directory", directory, CheckpointError)
    if dry_run and out is None:
        out = Path("pushed") / choices.name
    folder = None if out is None else as_path("out", out, CheckpointError)
    if folder is not None:
        files.check_new(folder, CheckpointError)
    if dry_run:
        assert folder is not None
        return Pushed(repository, tuple(write_folder(path, folder, choices, observe)), folder)
    require_token(repository)
    with tempfile.TemporaryDirectory() as scratch:
        written = folder or Path(scratch, choices.name)
        names = write_folder(path, written, choices, observe)
        observe("uploading")
        commit = upload(
            written,
            repository,
            private=private,
            revision=revision,
            create_pr=create_pr,
            as_timm=as_timm is not None,
        )
    return Pushed(repository, tuple(names), folder, commit.url, commit.oid, commit.revision)


def _say_nothing(what: str) -> None:
    """Hear what is being done, and leave it at that."""


def _check(choices: Choices, flags: dict[str, bool]) -> None:
    """Raise InputError for what cannot be meant."""
    for name, value in flags.items():
        require_flag(name, value)
    if not isinstance(choices.repository, str) or not is_repository_name(choices.repository):
        raise InputError(
            "there is no repository of this name.",
            expected="org/name: letters, digits, and - _ . within them, none of - . twice in a row",
            found=described(choices.repository),
            next_step="Name your account, or an organisation's, and the repository.",
        )
    for extra in choices.extras:
        if extra not in EXTRAS:
            close = nearest(str(extra), EXTRAS)
            raise InputError(
                "this cannot go with an ensemble.",
                expected=f"some of {', '.join(EXTRAS)}"
                + (f" (did you mean {close}?)" * bool(close)),
                found=described(extra),
                next_step="Leave it out, or choose among these.",
            )
    if "export" in choices.extras:
        require_packages()
    if choices.as_timm is None:
        return
    require_integer("as_timm", choices.as_timm, 0)
    if choices.extras or choices.data:
        raise InputError(
            "a leaf as timm writes it goes alone, and is not measured.",
            expected="as_timm (--as-timm) without extras (--with) and data (--data)",
            found=", ".join([*choices.extras, *choices.data]),
            next_step="Push the ensemble with them to a repository of its own.",
        )
