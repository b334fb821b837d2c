"""Walking through folders whose links may lead anywhere, in circles too."""

import os
from collections.abc import Iterator
from pathlib import Path

from treeify.errors import DataError


def walk(top: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder below one, and the names of the files in it, in alphabetical order.

    Links are followed, but none to a folder that they lie in: that is where circles begin. A folder
    that several links lead to is passed once, and what begins with a dot not at all.

    Yields:
        Each folder's path, beginning with `top`, and the names.
    """
    places: set[str] = set()
    for root, folders, names in os.walk(top, followlinks=True):
        place = os.path.realpath(root)
        if place in places or (places and _leads_back(root, place)):
            folders.clear()
            continue
        places.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield root, sorted(name for name in names if not name.startswith("."))


def require_no_circles(top: str | Path) -> None:
    """Let nobody else walk in circles.

    Raises:
        DataError: a link leads to a folder that it lies in.
    """
    places: set[str] = set()
    for root, folders, _ in os.walk(top, followlinks=True):
        place = os.path.realpath(root)
        if places and _leads_back(root, place):
            raise DataError(
                f"{root!r} is a link to a folder that it lies in.",
                expected="folders that end",
                found=f"a link to {place!r}",
                next_step="Remove it, or read the images by data.name=image_folder, which passes"
                " over such links.",
            )
        if place in places:
            folders.clear()
        places.add(place)


def _leads_back(root: str, place: str) -> bool:
    """Whether a folder is a link to one that holds it, or any link on the way to it."""
    return Path(root).is_symlink() and any(
        Path(os.path.realpath(parent)).is_relative_to(place) for parent in Path(root).parents
    )
