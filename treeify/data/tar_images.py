"""Images inside tar files, read by their place in the file: nothing stays open or is unpacked."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from treeify.data.image_files import UnreadableImageError, is_visible, open_image
from treeify.data.image_folders import check_numbered
from treeify.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm")


class Entry(NamedTuple):
    """Where the `size` bytes of one image lie in a tar file, and its class; `key` names it."""

    tar: str
    key: str
    offset: int
    size: int
    label: int


class TarImages(Dataset[Any]):
    """The images of tar files and their classes, read by index."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        entry = self.entries[index]
        name = f"{entry.tar}:{entry.key}"
        try:
            with open(entry.tar, "rb") as file:  # noqa: PTH123 - thousands of times an epoch
                file.seek(entry.offset)
                content = io.BytesIO(file.read(entry.size))
        except OSError as error:
            raise UnreadableImageError(name, error) from error
        return open_image(content, name), entry.label


def folders_in_tar(
    path: Path, numbered: Sequence[str] | None = None
) -> tuple[TarImages, tuple[str, ...]]:
    """The images of a tar file with one folder per class, and the classes.

    They are numbered in alphabetical order, or as the training part's are.

    Raises:
        DataError: the file is damaged, has no images, or classes that are not trained on.
    """
    try:
        with tarfile.open(path) as tar:
            members = [info for info in tar if info.isfile() and _is_image(info.name)]
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{str(path)!r} is damaged.", found=str(error)) from error
    members.sort(key=lambda member: natural_key(member.name))  # type: ignore[no-untyped-call]
    labels = [Path(member.name).parent.name for member in members]
    names = sorted(set(labels))
    if not names or "" in names:
        raise DataError(
            f"{str(path)!r} has no folder per class with images in it.",
            expected=f"members such as 'cat/1.jpg', of {', '.join(IMAGES)}",
        )
    if numbered is not None:
        check_numbered(names, numbered, str(path))
    classes = tuple(names if numbered is None else numbered)
    entries = [
        Entry(str(path), member.name, member.offset_data, member.size, classes.index(label))
        for member, label in zip(members, labels, strict=True)
    ]
    return TarImages(entries), classes


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGES and is_visible(name)
