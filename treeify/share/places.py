"""What is published, without the paths, commands and images of whoever publishes it."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from treeify.report.results import Answers, Result

# What is said of where it comes from; directories and commands of whoever shares it are not.
_ORIGIN = (
    *("recipe", "data", "loss", "seed", "started", "machine", "versions", "commit"),
    *("base model", "splits", "image", "saved by", "identity"),
)
# In the place of reasons that name files; they say what readers of the page can use.
_REASONS = {
    "training": "No epochs of a run are known.",
    "rates": "The learning rates do not follow from the recipe.",
    "environment": "What it was trained on and with is not known.",
    "base": "The base model's accuracy was not measured.",
    "answers": "No held-out images that fit it were at hand.",
    "times": "Answers were not timed.",
}
# An absolute path, or one from the home or working directory, up to the end: it may hold spaces.
_PLACE = re.compile(
    r"(?<![^\s'\"(\[=:,])(?:~\w*|\.{1,2}|[A-Za-z]:|file://)?(?:/(?!/)|\\)\S.*", re.DOTALL
)


def recipe_without_places(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of the last parts of its absolute paths, which are nobody else's."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [clean(inner) for inner in value]
        return Path(value).name if isinstance(value, str) and _is_place(value) else value

    cleaned: dict[str, Any] = clean({key: inner for key, inner in recipe.items() if key != "out"})
    return cleaned


def _is_place(text: str) -> bool:
    """Whether a value is an absolute path, or one from somebody's home directory."""
    return text.startswith("~") or os.path.isabs(text)  # noqa: PTH117 - it may be any text


def text_without_places(text: str) -> str:
    """A text up to its first path of this machine."""
    return _PLACE.sub("(a path, left out)", text)


def result_without_places(result: Result, name: str, recipe: str | None) -> Result:
    """What is known of a directory, as anybody may read it.

    Args:
        result: what is known.
        name: in the place of its path.
        recipe: of its run, as it is published.
    """
    conversion = result.conversion and replace(
        result.conversion, notes=tuple(map(text_without_places, result.conversion.notes))
    )
    return replace(
        result,
        path=Path(name),
        data_set=result.data_set and text_without_places(result.data_set),
        origin={
            key: text_without_places(result.origin[key]) for key in _ORIGIN if key in result.origin
        },
        recipe=recipe,
        answers=result.answers and _answers_without_places(result.answers),
        conversion=conversion,
        missing={
            key: _REASONS.get(key) or text_without_places(reason)
            for key, reason in result.missing.items()
        },
    )


def _answers_without_places(answers: Answers) -> Answers:
    """The same without images, and with numbers in the place of unreadable ones' paths."""
    return replace(
        answers,
        split=text_without_places(answers.split),
        preparation=answers.preparation and text_without_places(answers.preparation),
        thumbnails=(),
        skipped=tuple(f"image {number}" for number in range(1, len(answers.skipped) + 1)),
    )
