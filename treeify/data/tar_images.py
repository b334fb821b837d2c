"""Images inside tar files, read by their place in the file: nothing stays open or is unpacked."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from treeify import files
from treeify.data.image_files import UnreadableImageError, is_visible, open_image
from treeify.data.image_folders import check_numbered
from treeify.errors import DataError

MOST_BYTES = 2**30  # of one image
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


@contextmanager
def opened(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar file, to be read; where that fails, a DataError says which one is damaged."""
    try:
        files.check_regular(path)
        # Not compressed: images are read by their place in the file.
        with tarfile.open(path, "r:") as tar:
            yield tar
    # A header can say anything; what comes of it are errors of any kind.
    except (OSError, ValueError, OverflowError, RecursionError, tarfile.TarError) as error:
        raise DataError(
            f"{str(path)!r} is damaged, or no tar file.",
            expected="a tar file that is not compressed",
            found=str(error),
        ) from error


def whole_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The visible files in an opened tar file.

    Yields:
        Each of them, in its order.

    Raises:
        tarfile.ReadError: one is stored with holes, or is larger than the tar file.
    """
    end = Path(str(tar.name)).stat().st_size
    for member in tar:
        if member.size < 0:  # the next one would be before it, for ever
            raise tarfile.ReadError(f"{member.name!r} says that it has {member.size:,} bytes")
        if not member.isfile() or not is_visible(member.name):
            continue
        if member.issparse():
            raise tarfile.ReadError(f"{member.name!r} is stored with holes: write it in full")
        if member.size > min(MOST_BYTES, end - member.offset_data):
            raise tarfile.ReadError(
                f"{member.name!r} says that it has {member.size:,} bytes: the tar file has fewer,"
                f" or they are too many for an image"
            )
        yield member


def folders_in_tar(
    path: Path, numbered: Sequence[str] | None = None
) -> tuple[TarImages, tuple[str, ...]]:
    """The images of a tar file with one folder per class, and the classes.

    They are numbered in alphabetical order, or as the training part's are.

    Raises:
        DataError: the file is damaged, has no images, or classes that are not trained on.
    """
    with opened(path) as tar:
        members = [info for info in whole_members(tar) if _is_image(info.name)]
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
    return name.rpartition(".")[2].lower() in IMAGES
