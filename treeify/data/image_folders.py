"""Folders of images, one folder per class."""

from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt
from torchvision import datasets

from treeify.data.data_set import Data, UnreadableImageError, in_parts, register
from treeify.data.preparation import IMAGENET, augmentation, prepare, stretch, timm_transforms
from treeify.errors import DataError
from treeify.registry import Fraction


@register("image_folder")
def image_folder(
    *,
    root: str,
    size: PositiveInt = 224,
    like: str | None = None,
    crop_padding: NonNegativeInt | None = None,
    flip: bool = True,
    auto_augment: str | None = None,
    random_erasing: Fraction = 0.0,
) -> Data:
    """Your own images: `root/train/CLASS/*` to train on and `root/val/CLASS/*` held out.

    They are prepared by timm: training images are random crops resized to `size`, held-out ones are
    resized to `size / 0.875` and cropped at the centre, and channels normalised by ImageNet's
    statistics; `like` takes all this from a trained model. With `crop_padding`, meant for small
    images, all are resized to `size` and training images cropped with that much padding.

    Args:
        root: directory with the folders `train` and `val`, each with one folder per class.
        size: height and width in pixels.
        like: timm or torchvision name of the model whose trained weights are used; its statistics,
            fraction of the centre crop and interpolation are followed.
        crop_padding: pixels of black border that random training crops may reach into.
        flip: mirror half of the training images.
        auto_augment: one of timm's policies, e.g. `rand-m9-mstd0.5`; not with `crop_padding`.
        random_erasing: probability of blanking a rectangle; not with `crop_padding`.

    Returns:
        As many classes as there are folders.

    Raises:
        DataError: a folder is missing or empty, `train` and `val` have different classes, nothing
            is known of the model, or an augmentation is unknown.
    """
    if crop_padding is not None and (like or auto_augment or random_erasing):
        raise DataError(
            "crop_padding leaves no room for like, auto_augment or random_erasing.",
            next_step="Leave crop_padding out, or these.",
        )
    train, held_out = (_folder(Path(root), part) for part in ("train", "val"))
    _check_same_classes(train, held_out)
    if crop_padding is None:
        crop, fit = timm_transforms(size, like, flip, auto_augment, random_erasing)
    else:
        resize = stretch((3, size, size))
        fit = prepare(IMAGENET, resize)
        crop = prepare(IMAGENET, resize, *augmentation(size, crop_padding, flip))
    where = f"images of {Path(root) / 'val'}"
    return in_parts(train, held_out, crop, fit, train.classes, where)


def _folder(root: Path, part: str) -> datasets.ImageFolder:
    try:
        return datasets.ImageFolder(root / part, loader=_read_image)
    except FileNotFoundError as error:
        raise DataError(
            f"no images to be found in {str(root / part)!r}.",
            expected="one folder per class with images in it, e.g. "
            f"{str(root / part / 'cat' / '1.jpg')!r}",
            found=str(error).splitlines()[0],
            next_step="Set data.root to the directory that holds 'train' and 'val'.",
        ) from error


def _read_image(path: str) -> Any:
    try:
        return datasets.folder.default_loader(path)
    except OSError as error:
        raise UnreadableImageError(path, error) from error


def _check_same_classes(train: datasets.ImageFolder, held_out: datasets.ImageFolder) -> None:
    if train.classes == held_out.classes:
        return
    only_train = sorted(set(train.classes) - set(held_out.classes))
    only_held_out = sorted(set(held_out.classes) - set(train.classes))
    raise DataError(
        f"{train.root} and {held_out.root} have different classes.",
        expected="the same class folders in both",
        found=f"only in train: {only_train or 'none'}; only in val: {only_held_out or 'none'}",
        next_step="Add or remove those folders.",
    )
