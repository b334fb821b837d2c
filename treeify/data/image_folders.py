"""Data sets of photographs, prepared by timm: folders, tar files and Hugging Face's data sets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from pydantic import NonNegativeInt, PositiveInt
from timm.data import create_dataset, create_transform, resolve_data_config
from torch.utils.data import Dataset
from torchvision import datasets, models
from torchvision.transforms import v2

from treeify.data.data_set import (
    IMAGENET,
    Data,
    Transform,
    UnreadableImageError,
    augmentation,
    in_parts,
    prepare,
    register,
)
from treeify.data.tar_images import folders_in
from treeify.errors import DataError
from treeify.models.builders import TIMM, TORCHVISION
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
            share of the centre crop and interpolation are followed.
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
        crop, fit = transforms(size, like, flip, auto_augment, random_erasing)
    else:
        resize = v2.Resize([size, size], antialias=True)
        fit = prepare(IMAGENET, resize)
        crop = prepare(IMAGENET, resize, *augmentation(size, crop_padding, flip))
    where = f"images of {Path(root) / 'val'}"
    return in_parts(train, held_out, crop, fit, train.classes, where)


@register("timm")
def timm_dataset(
    *,
    dataset: str = "",
    root: str = "data",
    train_split: str = "train",
    held_out_split: str = "validation",
    class_map: str | None = None,
    download: bool = False,
    size: PositiveInt = 224,
    like: str | None = None,
    flip: bool = True,
    auto_augment: str | None = None,
    random_erasing: Fraction = 0.0,
) -> Data:
    """Whatever `timm.data.create_dataset` reads by index: folders, tar files, Hugging Face's.

    Streams (`wds/`, `tfds/`, `hfids/`) are refused: a run that is resumed could not find its place.

    Args:
        dataset: timm's name: empty for folders and tar files, `hfds/...` (after `pip install
            datasets`), `torch/...` for torchvision's.
        root: directory of the data, or of `train.tar` and `validation.tar` with a folder per class.
        train_split: what is trained on.
        held_out_split: what is held out.
        class_map: file that numbers the classes.
        download: fetch what is missing, where timm can.
        size: height and width in pixels.
        like: timm or torchvision name of the model whose trained weights are used.
        flip: mirror half of the training images.
        auto_augment: one of timm's policies, e.g. `rand-m9-mstd0.5`.
        random_erasing: probability of blanking a rectangle.

    Returns:
        As many classes as the data set has.

    Raises:
        DataError: it cannot be read by index, is not there, or its parts have different classes.
    """
    (train, classes), (held_out, others) = (
        _timm_part(dataset, Path(root), split, class_map, download)
        for split in (train_split, held_out_split)
    )
    if not dataset and _root(train) == _root(held_out):
        raise DataError(
            f"{root!r} has no parts {train_split!r} and {held_out_split!r}.",
            expected="folders or tar files of these names: what is held out is not trained on",
            next_step="Set train_split and held_out_split to the names of the parts.",
        )
    if classes != others:
        raise DataError(
            f"{train_split!r} and {held_out_split!r} of {dataset or root!r} differ in classes.",
            expected="the same in both",
            found=f"{len(classes)} and {len(others)}",
            next_step="Give a class_map.",
        )
    crop, fit = transforms(size, like, flip, auto_augment, random_erasing)
    return in_parts(train, held_out, crop, fit, classes, f"images of {held_out_split!r}")


class _Indexed(Dataset[Any]):
    """Images and classes of timm's data set, damaged ones named instead of passed over."""

    def __init__(self, dataset: Any) -> None:
        # A reader gives files; without one, torchvision gives images.
        self.dataset, self.reader = dataset, getattr(dataset, "reader", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if self.reader is None:
            image, label = self.dataset[index]
            return image.convert("RGB"), int(label)
        try:
            file, label, *_ = self.reader[index]
            with file:
                return Image.open(file).convert("RGB"), int(label)
        except OSError as error:
            name = str(self.reader.filename(index, absolute=True))
            raise UnreadableImageError(name, error) from error


def _classes(source: Any) -> tuple[str, ...]:
    """Names of the classes, as the data set knows them."""
    numbered = getattr(source, "class_to_idx", None)
    if numbered:
        return tuple(str(name) for name in sorted(numbered, key=numbered.__getitem__))
    features = getattr(getattr(source, "dataset", None), "features", {})
    names = next((own.names for own in features.values() if hasattr(own, "names")), None)
    if names is None:
        raise DataError(
            "the data set does not say how many classes it has.",
            next_step="Give a class_map, or write a data set of your own (docs/recipes.md).",
        )
    return tuple(map(str, names))


def _timm_part(
    dataset: str, root: Path, split: str, class_map: str | None, download: bool
) -> tuple[Any, tuple[str, ...]]:
    """The images of a part and the names of its classes."""
    tar = root / f"{split}.tar"
    if not dataset and tar.is_file():
        return folders_in(tar)
    if dataset.split("/")[0] in ("wds", "tfds", "hfids"):
        raise DataError(
            f"{dataset!r} is a stream.",
            expected="a data set that is read by index: folders, tar files, hfds/..., torch/...",
            next_step="WebDataset's shards are read by index too: data.name=webdataset.",
        )
    options: dict[str, Any] = {"split": split, "is_training": False, "download": download}
    if class_map:
        options["class_map"] = class_map
    try:
        found = _Indexed(create_dataset(dataset, str(root), **options))
        return found, _classes(found.reader if found.reader is not None else found.dataset)
    except (OSError, RuntimeError, ValueError, AssertionError, ImportError) as error:
        raise DataError(
            f"the split {split!r} of {dataset or str(root)!r} cannot be read.",
            expected="what timm.data.create_dataset reads",
            found=f"{type(error).__name__}: {error}",
            next_step="Set data.root, data.dataset and the names of the splits.",
        ) from error


def _root(part: Any) -> object:
    """Where timm found a part's folders; a tar file is a part by itself."""
    return getattr(getattr(part, "reader", part), "root", part)


def transforms(
    size: int, like: str | None, flip: bool, auto_augment: str | None, random_erasing: float
) -> tuple[Transform, Transform]:
    """Timm's for training and for held-out images."""
    config: dict[str, Any] = {"input_size": size, **preparation(like)}
    try:
        crop = create_transform(
            **config,
            is_training=True,
            hflip=0.5 if flip else 0.0,
            color_jitter=0.0,
            auto_augment=auto_augment,
            re_prob=random_erasing,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise DataError(
            f"auto_augment={auto_augment!r} is no policy of timm's: {error}",
            expected="e.g. rand-m9-mstd0.5, augmix-m3-w3 or original",
        ) from error
    return crop, create_transform(**config)


def preparation(like: str | None) -> dict[str, Any]:
    """How images are prepared for a model, as arguments of `timm.data.create_transform`.

    Args:
        like: timm or torchvision name of a model with trained weights; none for ImageNet's usual
            way.

    Raises:
        DataError: nothing is known of such a model.
    """
    if like is None:
        mean, std = IMAGENET
        return {"mean": mean, "std": std, "crop_pct": 0.875, "interpolation": "bilinear"}
    try:
        if like.startswith(TORCHVISION):
            name = like.removeprefix(TORCHVISION)
            usual = models.get_model_weights(name).DEFAULT.transforms()
            return {
                "mean": tuple(usual.mean),
                "std": tuple(usual.std),
                "crop_pct": usual.crop_size[0] / usual.resize_size[0],
                "interpolation": usual.interpolation.value,
            }
        known = timm.get_pretrained_cfg(like.removeprefix(TIMM))
    except (ValueError, RuntimeError):
        known = None
    if known is None:
        raise DataError(
            f"nothing is known of how images for {like!r} were prepared.",
            expected="the timm or torchvision name of a model with trained weights",
            next_step="Leave `like` out for ImageNet's usual way.",
        )
    found: dict[str, Any] = resolve_data_config(pretrained_cfg=asdict(known))  # type: ignore[no-untyped-call]
    return {key: found[key] for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation")}


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
