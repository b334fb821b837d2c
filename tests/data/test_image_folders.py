"""Folders of images: classes, sizes and damaged files."""

import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from pictures import images_of, labels_of, make_folders
from PIL import Image

from treeify import data
from treeify.errors import DataError
from treeify.training.loaders import Order, training_loader


def test_image_folder_reads_sizes_and_classes(tmp_path: Path) -> None:
    root = make_folders(tmp_path, {"cat": 3, "dog": 2}, {"cat": 1, "dog": 2})
    folder = data.image_folder(root=str(root), size=16)
    assert folder.classes == ("cat", "dog")
    assert images_of(folder.train).shape == (5, 3, 16, 16)
    assert images_of(folder.held_out).shape == (3, 3, 16, 16)
    assert labels_of(folder.held_out) == [0, 1, 1]
    padded = data.image_folder(root=str(root), size=16, crop_padding=2)
    assert images_of(padded.train).shape == (5, 3, 16, 16)


@pytest.mark.parametrize(
    ("train", "val", "match"),
    [
        ({}, {}, "no images"),
        ({"cat": 1}, {}, "not divided.*Rename the folder of images held out"),
        ({"cat": 1, "dog": 0}, {"cat": 1, "dog": 1}, "no images.*train"),
        (
            {"cat": 1, "dog": 1},
            {"cat": 1, "bird": 1},
            "val has classes that are not trained on: 'bird'",
        ),
    ],
)
def test_image_folders_that_do_not_fit_are_refused(
    tmp_path: Path, train: dict, val: dict, match: str
) -> None:
    root = make_folders(tmp_path, train, val)
    with pytest.raises(DataError, match=f"(?s){match}"):
        data.image_folder(root=str(root))


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    root = make_folders(tmp_path, {"cat": 1}, {"cat": 1})
    (root / "val" / "cat" / "0.png").write_bytes(b"no image")
    folder = data.image_folder(root=str(root), size=16)
    with pytest.raises(DataError, match=re.escape("0.png")):
        folder.held_out[0]


def test_photographs_follow_a_trained_model(tmp_path: Path) -> None:
    make_folders(tmp_path, {"a": 1, "b": 1}, {"a": 1, "b": 1})
    for name, mean in (("tf_efficientnet_lite0", 0.5), ("torchvision/resnet18", 0.485)):
        photos = data.image_folder(root=str(tmp_path), size=32, like=name)
        config = data.transform_options(name)
        assert config["mean"][0] == mean
        expected = timm.data.create_transform(input_size=32, **config)
        image = Image.open(tmp_path / "val" / "a" / "0.png")
        assert torch.equal(photos.held_out[0][0], expected(image))
        assert photos.train[0][0].shape == (3, 32, 32)
    with pytest.raises(DataError, match="nothing is known"):
        data.image_folder(root=str(tmp_path), like="no_such_model")
    with pytest.raises(DataError, match="no room"):
        data.image_folder(root=str(tmp_path), like="resnet18", crop_padding=1)


def test_augmentations_of_timm_are_drawn_anew(tmp_path: Path) -> None:
    make_folders(tmp_path, {"a": 1, "b": 1}, {"a": 1, "b": 1})
    photos = data.image_folder(
        root=str(tmp_path), size=32, auto_augment="rand-m9-mstd0.5", random_erasing=1.0
    )
    first, second = photos.train[0][0], photos.train[0][0]
    assert not torch.equal(first, second)
    order = Order(2, 2, 0)
    (one,), (two,) = list(training_loader(photos, order)), list(training_loader(photos, order))
    assert torch.equal(one.images, two.images)
    with pytest.raises(DataError, match="no policy"):
        data.image_folder(root=str(tmp_path), auto_augment="no-such-policy")


def test_folders_of_classes_alone_are_divided_by_class_and_seed(tmp_path: Path) -> None:
    make_folders(tmp_path / "parts", {"cat": 10, "dog": 5, "owl": 1}, {})
    root = (tmp_path / "parts" / "train").rename(tmp_path / "photos")
    photos = data.image_folder(root=str(root), size=16, crop_padding=0, flip=False)
    assert labels_of(photos.held_out) == [0, 0, 1]
    assert len(photos.train) == 13
    assert "the 3 of 16 images of " in photos.split
    assert "20% of each class by split_seed=0" in photos.split
    assert photos.split.endswith("none of 'owl'")

    def held_out(folder: Path, **options: int | float) -> set[str]:
        part = data.image_folder(root=str(folder), size=16, **options).held_out.examples
        files = [part.dataset.samples[index][0] for index in part.indices]
        return {str(Path(file).relative_to(folder)) for file in files}

    chosen = held_out(root)
    assert chosen < held_out(root, held_out=0.5)
    assert any(held_out(root, split_seed=seed) != chosen for seed in (1, 2, 3))
    elsewhere = shutil.copytree(root, tmp_path / "elsewhere" / "photos")
    assert held_out(elsewhere) == chosen


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        (("train", "val"), {"held_out": 0.2}, "has images held out already"),
        (("train", "test"), {}, "Rename the folder of images held out to 'val'"),
        (("Training", "cat"), {}, "is not divided"),
        (("val",), {}, "is not divided"),
    ],
)
def test_folders_of_parts_are_no_classes(
    tmp_path: Path, names: tuple[str, ...], options: dict, match: str
) -> None:
    for name in names:
        make_folders(tmp_path / "made", {"a": 1}, {})
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "made" / "train").rename(tmp_path / "photos" / name)
    with pytest.raises(DataError, match=f"(?s){match}"):
        data.image_folder(root=str(tmp_path / "photos"), **options)


def test_the_crop_is_an_option_and_said(tmp_path: Path) -> None:
    make_folders(tmp_path, {"a": 1, "b": 1}, {"a": 1, "b": 1})
    usual = data.image_folder(root=str(tmp_path), size=16).preparation
    assert "0.875 of the sides kept" in str(usual)
    whole = data.image_folder(root=str(tmp_path), size=16, crop_pct=1.0).preparation
    assert whole.crop_pct == 1
    assert "cropped" not in str(whole)
    with pytest.raises(DataError, match="no room"):
        data.image_folder(root=str(tmp_path), crop_pct=0.9, crop_padding=1)


def test_links_that_lead_in_circles_are_passed_over(tmp_path: Path) -> None:
    """Two of them in a folder made 2^40 ways through it."""
    root = make_folders(tmp_path / "photos", {"cat": 2, "dog": 3}, {"cat": 1, "dog": 1})
    more = tmp_path / "more"
    make_folders(more, {"cat": 2}, {})
    cats, dogs = (root / "train" / name for name in ("cat", "dog"))
    for number in range(3):
        (cats / f"self{number}").symlink_to(cats)
        (cats / f"up{number}").symlink_to(root)  # its dogs are no cats
        (dogs / f"more{number}").symlink_to(more / "train" / "cat")  # counted once
        (more / "train" / "cat" / f"back{number}").symlink_to(dogs)
    photos = data.image_folder(root=str(root), size=16)
    assert labels_of(photos.train) == [0] * 2 + [1] * 5
    assert len(photos.held_out) == 2
