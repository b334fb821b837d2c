"""Images as they are named on the command line: files, folders and patterns."""

import glob
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from treeify.data.folders import walk
from treeify.errors import DataError, InputError


class ImageFile(NamedTuple):
    """A file, and whether it was named itself rather than found in a folder or by a pattern."""

    path: Path
    named: bool


def image_files(words: Sequence[str]) -> list[ImageFile]:
    """The files that are meant, in the order of the words.

    Of a folder, those below it with an extension of torchvision's for images, sorted; what begins
    with a dot is passed over. Patterns have `*`, `?`, `[...]` and `**`. A file that does not exist
    is left to whoever reads it.

    Raises:
        InputError: a word is an address.
        DataError: a folder or pattern has no images.
    """
    return [file for word in words for file in _of_word(word)]


def _of_word(word: str) -> Iterator[ImageFile]:
    """The files of one word, each once; those that a folder or pattern holds were not named."""
    if re.match(r"[a-z][a-z0-9+.-]*://", word, re.IGNORECASE):
        raise InputError(
            f"{word} is an address, not a file.",
            expected="files, folders or patterns such as 'photos/*.jpg'",
            next_step="Download it first.",
        )
    path = Path(word)
    if path.is_dir():
        files = _in_folder(path)
    elif path.exists() or not glob.has_magic(word):
        yield ImageFile(path, named=True)
        return
    else:
        # Unlike `Path.glob`, it takes absolute patterns.
        matches = map(Path, sorted(glob.glob(word, recursive=True)))  # noqa: PTH207
        lists = (_in_folder(match) if match.is_dir() else [match] for match in matches)
        files = list(chain.from_iterable(lists))
    if not files:
        raise DataError(
            f"{word!r} holds no images.",
            expected=f"files that end in {', '.join(IMG_EXTENSIONS)}",
            next_step="Name files of other endings themselves.",
        )
    yield from (ImageFile(file, named=False) for file in dict.fromkeys(files))


def _in_folder(folder: Path) -> list[Path]:
    """The images below a folder, links to folders included; each folder once, whatever links it."""
    return sorted(
        Path(root, name)
        for root, names in walk(folder)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    )
