"""WebDataset shards read by index, so that a run can find its place in them again."""

import math
import re
import tarfile
from collections import defaultdict
from glob import glob
from itertools import chain, product, zip_longest
from pathlib import Path

from pydantic import PositiveInt

from treeify.arguments import require_type
from treeify.data.augmentation import ResizedCrop
from treeify.data.conventions import of_files
from treeify.data.data_set import Data, in_parts, register
from treeify.data.tar_images import IMAGES, Entry, TarImages, opened, whole_members
from treeify.errors import DataError
from treeify.registry import Channels, Crop, FilePath, Fraction, ImageSize, Numbers

_LABEL = "cls"
_DIGITS = 100  # of a label's number, with spaces around it
_MOST_SHARDS = 100_000


@register("webdataset")
def webdataset(
    *,
    train: FilePath,
    held_out: FilePath,
    classes: PositiveInt | list[str],
    size: ImageSize = 224,
    like: str | None = None,
    channels: Channels | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    crop_pct: Crop | None = None,
    flip: bool = True,
    auto_augment: str | None = None,
    random_erasing: Fraction = 0.0,
) -> Data:
    """Shards of WebDataset: tar files of `KEY.jpg` (or png, webp) and `KEY.cls`, local or mounted.

    They are read by index, not as a stream: every image once an epoch, in an order over all shards,
    which a resumed run finds again. Their headers are read once at the start.

    Args:
        train: shards to train on, e.g. `data/train-{0000..0099}.tar` or `data/train-*.tar`.
        held_out: shards held out.
        classes: how many there are, or their names in the order of their numbers.
        size: height and width in pixels, `[H, W]` if they differ.
        like: timm or torchvision name of the model whose trained weights are used.
        channels: 1 for grey, 3 for colour, 4 with opacity; null is as many as the model takes.
        mean: of each channel, pixels in 0 to 1, or one for all; instead of those of `like`.
        std: the same; with `mean`.
        crop_pct: fraction of the resized image that the held-out images' centre crop keeps, 1.0 to
            crop nothing of a square; instead of that of `like`, or 0.875.
        flip: mirror half of the training images.
        auto_augment: one of timm's policies, e.g. `rand-m9-mstd0.5`.
        random_erasing: probability of blanking a rectangle.

    Returns:
        As many classes as were said.

    Raises:
        DataError: there are no such shards, one is damaged, or a class is out of range.
    """
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
    first, second = (TarImages(_entries(pattern, len(names))) for pattern in (train, held_out))
    preparation = of_files(
        size,
        like=like,
        channels=channels,
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        source="held-out images of webdataset",
    )
    augment = ResizedCrop(preparation, flip, auto_augment, random_erasing)
    labels = [entry.label for entry in second.entries]
    return in_parts(first, second, augment, preparation, names, f"images of {held_out}", labels)


def _entries(pattern: str, classes: int) -> list[Entry]:
    """Every image of the shards that a pattern names."""
    require_type("a pattern of shards", pattern, str, "text", error=DataError)
    paths = sorted({path for name in expanded(pattern) for path in glob(name)})  # noqa: PTH207
    if not paths:
        raise DataError(
            f"no shards are called {pattern!r}.",
            expected="local tar files, e.g. data/train-{0000..0099}.tar",
            next_step="Set data.train and data.held_out to where they are.",
        )
    return [entry for path in paths for entry in _index(path, classes)]


def expanded(pattern: str) -> list[str]:
    """`a-{08..10}.tar` as three names; DataError if they are more than anybody has."""
    parts = re.split(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}", pattern)
    ranges = [
        (len(begin), range(int(begin), int(end) + 1))
        for begin, end in zip(parts[1::3], parts[2::3], strict=True)
    ]
    count = math.prod(len(numbers) for _, numbers in ranges)
    if count > _MOST_SHARDS:
        raise DataError(
            f"{pattern!r} names {count:,} shards.",
            expected=f"{_MOST_SHARDS:,} at most",
            next_step="Name those that exist, or use a pattern: data/train-*.tar",
        )
    choices = ([f"{number:0{width}d}" for number in numbers] for width, numbers in ranges)
    return [
        "".join(chain.from_iterable(zip_longest(parts[::3], numbers, fillvalue="")))
        for numbers in product(*choices)
    ]


def _index(path: str, classes: int) -> list[Entry]:
    """Every image of one shard and its class, by the key that the two members of a sample share."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    problems: dict[str, list[str]] = defaultdict(list)
    with opened(Path(path)) as tar:
        for member in whole_members(tar, (*IMAGES, _LABEL)):
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if extension.lower() in IMAGES:
                images[key] = member
            elif extension.lower() == _LABEL:
                file = tar.extractfile(member)
                labels[key] = -1 if file is None else int(file.read(_DIGITS))
    for key in sorted(images.keys() | labels.keys()):
        if key not in images:
            problems[f"no image ({', '.join(IMAGES)})"].append(key)
        elif key not in labels:
            problems[f"no .{_LABEL}"].append(key)
        elif not 0 <= labels[key] < classes:
            problems[f"class {labels[key]}, of {classes}"].append(key)
    if problems:
        examples = (f"{problem}: {', '.join(keys[:3])}" for problem, keys in problems.items())
        raise DataError(
            f"shard {path!r} has samples that cannot be used.",
            expected=f"an image and a .{_LABEL} for every key",
            found="; ".join(examples),
        )
    return [
        Entry(path, key, member.offset_data, member.size, labels[key])
        for key, member in images.items()
    ]
