"""A folder -> one commit in a repository of the Hugging Face hub that is whose it should be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from treeify.errors import InputError
from treeify.models.downloads import without_retries
from treeify.models.hub import Repository, is_of_others, quiet
from treeify.models.hub_errors import explained
from treeify.share.folder import EXPORT, REPORT
from treeify.share.picture import FILE as PICTURE
from treeify.training.run_directory import METRICS, RECIPE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What earlier pushes may have left, and this one does not write again.
_REPLACED = (
    *("model.safetensors", "model-*.safetensors", RECIPE, METRICS),
    *(f"{EXPORT}/*", REPORT, PICTURE),
)


@dataclass(frozen=True)
class Commit:
    """What the hub made of a folder: the page to look at, the commit, and a revision that has it.

    The revision is a branch or a pull request; None for the main branch.
    """

    url: str
    oid: str
    revision: str | None


def require_token(repository: str) -> None:
    """Raise InputError where nobody is logged in."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError(
            f"nobody is logged in to the hub, so {repository} cannot be written to.",
            expected="a token that may write there",
            found="none",
            next_step="Log in: hf auth login, or HF_TOKEN=... Or write the files alone: --dry-run"
            " (dry_run=True).",
        )


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool,
    revision: str | None,
    create_pr: bool,
    as_timm: bool,
) -> Commit:
    """Put a folder into a repository in one commit.

    Args:
        folder: all of its files go there.
        repository: `org/name`; made if it is not there.
        private: whether only its owners may see it.
        revision: branch to commit to, made if it is not there; None for the main one.
        create_pr: open a pull request instead.
        as_timm: whether the folder is a model as timm writes it, which may replace another.

    Raises:
        CheckpointError: what the repository holds cannot be looked at.
        InputError: it is public and should not be, holds a model of others, or cannot be written
            to.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="treeify")
    with explained(repository, InputError, writes=True), quiet(), without_retries():
        api.create_repo(repository, private=private, exist_ok=True)
        if private:
            _require_private(api, repository)
        if not create_pr:
            _require_ours(api, repository, revision, as_timm=as_timm)
        if revision is not None and not create_pr:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message="Pushed by treeify",
            delete_patterns=[*_REPLACED],
        )
    if commit.pr_url is not None:
        return Commit(commit.pr_url, commit.oid, commit.pr_revision)
    return Commit(commit.commit_url, commit.oid, revision)


def _require_private(api: HfApi, repository: str) -> None:
    """Raise InputError where everybody would see what is meant for few: it was there before."""
    if not api.model_info(repository).private:
        raise InputError(
            f"{repository} is there already, and is public.",
            expected="with --private (private=True), a private repository or a new one",
            next_step="Make it private in its settings, name another one, or leave --private out.",
        )


def _require_ours(api: HfApi, repository: str, revision: str | None, *, as_timm: bool) -> None:
    """Raise InputError where another model would be overwritten."""
    # A branch that is to be made begins as the main one.
    is_there = revision is not None and api.revision_exists(repository, revision)
    there = Repository(repository, revision=revision if is_there else None)
    if is_of_others(there, as_timm=as_timm):
        raise InputError(
            f"{there.name} holds a model of another library, and is not overwritten.",
            expected="a new repository, or one of treeify's; with --as-timm (as_timm) also a model"
            " of timm's",
            next_step="Name another one, or open a pull request: --create-pr (create_pr=True).",
        )
