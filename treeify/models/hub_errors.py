"""What the client of the Hugging Face hub raises, as one message with the way out."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from treeify.errors import CheckpointError, TreeifyError

# How a repository is named where a path is expected.
NAMED = "hf-hub:org/name, hf-hub:org/name@revision, or hf-hub:org/name/folder@revision"
_LOG_IN = "log in: hf auth login, or HF_TOKEN=..."


@contextmanager
def explained(
    subject: str, error_class: type[TreeifyError] = CheckpointError, *, writes: bool = False
) -> Iterator[None]:
    """Turn what the hub's client raises into one message.

    Args:
        subject: what is read or written, as the user named it.
        error_class: what is raised.
        writes: whether it is being written to.

    Raises:
        TreeifyError: of `error_class`.
    """
    from huggingface_hub import errors

    try:
        yield
    # Some of the client's errors are the system's, some those of its transport, and some neither.
    except (OSError, ValueError, errors.HTTPError, errors.EntryNotFoundError) as error:
        where, details = _problem(error, writes)
        raise error_class(f"{subject} {where}.", **{"found": _reason(error), **details}) from error


def _problem(error: Exception, writes: bool) -> tuple[str, Mapping[str, str]]:
    """What is wrong, and what was expected and can be done."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "is gated: its authors decide who may have it", {
            "expected": "an account that they gave access, and its token",
            "next_step": f"Ask for access on its page, then {_LOG_IN}",
        }
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is not there, or is private and not open to you", {
            "expected": NAMED,
            "next_step": f"Correct the name, or {_LOG_IN}",
        }
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such revision", {
            "expected": "a branch, a tag, or a commit in full",
            "next_step": "Leave the revision out for the newest.",
        }
    if isinstance(error, errors.HFValidationError):
        return "names no repository of the hub", {"expected": NAMED}
    if writes and _is_of_card(error):
        return "is not taken as it is", {
            "expected": "a card whose metadata the hub knows",
            "next_step": "Correct the licence's or the base model's name. Nothing was committed.",
        }
    if _status(error) in (401, 403):
        return "is not open to you", {
            "expected": f"a token that may {'write' if writes else 'read'} there",
            "next_step": f"{_LOG_IN[0].upper()}{_LOG_IN[1:]}",
        }
    if writes:
        return "cannot be written to", {
            "expected": "a connection to the hub",
            "next_step": "Nothing was committed there. Write the files alone with --dry-run"
            " (dry_run=True), and push again when the hub can be reached.",
        }
    return "cannot be fetched, and is not in the cache", {
        "expected": "a connection to the hub",
        "next_step": "Without a network, name a directory: fetch it where there is one (hf download"
        " ORG/NAME --local-dir DIR), copy it here, and load DIR, or local-dir:DIR.",
    }


def _is_of_card(error: Exception) -> bool:
    """Whether the hub refuses a card, before the upload; a proxy's page is no JSON either."""
    is_answer = not isinstance(error, json.JSONDecodeError)
    return isinstance(error, ValueError) and is_answer and _status(error) is None


def _status(error: BaseException) -> int | None:
    """The number that the hub answered with, if it did."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: BaseException) -> str:
    """What the hub says, or else the innermost cause, in one line."""
    while error.__cause__ is not None and _status(error) is None:
        error = error.__cause__
    if (status := _status(error)) is not None:
        phrase = getattr(error, "server_message", None) or error.response.reason_phrase  # type: ignore[attr-defined]
        return f"{status} {phrase:.300}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"
