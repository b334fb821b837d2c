"""Images inside tar files, read by their place in the file: nothing stays open or is unpacked."""

import io
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from treeify.data.data_set import UnreadableImageError
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
        try:
            with open(entry.tar, "rb") as file:  # noqa: PTH123 - thousands of times an epoch
                file.seek(entry.offset)
                image = Image.open(io.BytesIO(file.read(entry.size))).convert("RGB")
        except OSError as error:
            raise UnreadableImageError(f"{entry.tar}:{entry.key}", error) from error
        return image, entry.label


def folders_in(path: Path) -> tuple[TarImages, tuple[str, ...]]:
    """The images of a tar file with one folder per class, and the classes."""
    try:
        with tarfile.open(path) as tar:
            members = [info for info in tar if info.isfile() and _extension(info.name) in IMAGES]
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{str(path)!r} is damaged.", found=str(error)) from error
    members.sort(key=lambda member: natural_key(member.name))  # type: ignore[no-untyped-call]
    labels = [Path(member.name).parent.name for member in members]
    classes = tuple(sorted(set(labels), key=natural_key))
    if not classes or "" in classes:
        raise DataError(
            f"{str(path)!r} has no folder per class with images in it.",
            expected=f"members such as 'cat/1.jpg', of {', '.join(IMAGES)}",
        )
    entries = [
        Entry(str(path), member.name, member.offset_data, member.size, classes.index(label))
        for member, label in zip(members, labels, strict=True)
    ]
    return TarImages(entries), classes


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()
