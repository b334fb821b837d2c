import io
import pickle
import re
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch.testing import assert_close

from treeify import data
from treeify.errors import DataError
from treeify.training.loaders import Order, training_loader


def images_of(examples: data.Examples) -> torch.Tensor:
    return torch.stack([examples[index][0] for index in range(len(examples))])


def labels_of(examples: data.Examples) -> list[int]:
    return [int(examples[index][1]) for index in range(len(examples))]


def make_folders(root: Path, train: dict[str, int], val: dict[str, int]) -> Path:
    generator = np.random.default_rng(0)
    for part, classes in (("train", train), ("val", val)):
        for name, count in classes.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def test_digits_split_is_fixed_stratified_and_disjoint() -> None:
    first, again, other = data.digits(), data.digits(), data.digits(split_seed=1)
    assert (len(first.train), len(first.held_out)) == (1437, 360)
    assert labels_of(first.held_out) == labels_of(again.held_out)
    assert labels_of(first.held_out) != labels_of(other.held_out)
    shares = torch.bincount(torch.tensor(labels_of(first.held_out))) / 360
    everywhere = torch.bincount(torch.from_numpy(load_digits().target)) / 1797
    assert_close(shares, everywhere, atol=1 / 360, rtol=0)
    assert "360 of 1,797" in first.split
    assert "random_state=0" in first.split


def sorted_rows(images: torch.Tensor) -> list[tuple]:
    return sorted(map(tuple, (images[:, 0] * 1000).round().flatten(1).tolist()))


def test_every_digit_is_on_one_side_of_the_split() -> None:
    digits = data.digits()
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images) * (255 / 16)
    mean, std = data.DIGITS[0][0], data.DIGITS[1][0]
    everything = ((pixels.round() / 255 - mean) / std).float()[:, None]
    both = torch.cat([images_of(digits.train), images_of(digits.held_out)])
    assert sorted_rows(both) == sorted_rows(everything)


def test_digits_are_three_equal_normalised_channels() -> None:
    digits = data.digits()
    train = images_of(digits.train)
    assert train.shape == (1437, 3, 8, 8)
    assert_close(train[:, 0], train[:, 2])
    assert abs(train.mean().item()) < 0.02
    assert abs(train.std().item() - 1) < 0.02
    assert digits.classes == tuple("0123456789")


def test_digits_can_be_resized() -> None:
    image, _ = data.digits(size=16).held_out[0]
    assert image.shape == (3, 16, 16)


def test_augmentation_is_random_pads_with_black_and_spares_the_held_out() -> None:
    plain, augmented = data.digits(), data.digits(crop_padding=2, flip=True)
    assert_close(images_of(plain.held_out), images_of(augmented.held_out))
    draws = torch.stack([augmented.train[0][0] for _ in range(20)])
    assert len(draws.flatten(1).unique(dim=0)) > 5
    black = images_of(plain.train).min()
    assert_close(draws.min(), black)


def test_too_large_a_held_out_part_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be held out"):
        data.digits(held_out=1795)


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
        ({"cat": 1}, {}, "no images.*val"),
        ({"cat": 1, "dog": 0}, {"cat": 1, "dog": 1}, "no images.*train"),
        ({"cat": 1, "dog": 1}, {"cat": 1, "bird": 1}, r"only in train: \['dog'\].*\['bird'\]"),
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


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_missing_downloads_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"data\.download=true") as caught:
        data.SOURCES[name](root=str(tmp_path / "nowhere"))
    assert "nowhere" in str(caught.value)


def fake_cifar10(root: str, *, train: bool, download: bool):
    """What torchvision's class looks like to us: PIL images, labels, class names."""
    images = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (0, 255)]

    class Fake(list):
        classes = ("dark", "light")

    return Fake(zip(images, (0, 1), strict=True))


def test_torchvision_images_are_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake_cifar10)
    cifar = data.cifar10(crop_padding=0, flip=False)
    (mean, *_), (std, *_) = data.CIFAR10
    for index, pixel in enumerate((0.0, 1.0)):
        image, label = cifar.held_out[index]
        assert image.shape == (3, 32, 32)
        assert label == index
        assert_close(image[0], torch.full((32, 32), (pixel - mean) / std))
        assert_close(cifar.train[index][0], image)


def test_workers_change_no_image() -> None:
    digits = data.digits(crop_padding=2)

    def images(seed: int, workers: int = 0, epoch: int = 0) -> torch.Tensor:
        order = Order(32, 8, seed)
        order.epoch = epoch
        return torch.cat([batch.images for batch in training_loader(digits, order, workers)])

    assert torch.equal(images(3), images(3, workers=2))
    assert not torch.equal(images(3), images(4))
    assert not torch.equal(images(3), images(3, epoch=1))


def test_data_sets_can_be_sent_to_worker_processes() -> None:
    digits = data.digits(crop_padding=1)
    assert len(pickle.loads(pickle.dumps(digits.train))) == 1437


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


@pytest.mark.parametrize("kind", ["folders", "tar"])
def test_what_timm_reads_is_read(tmp_path: Path, kind: str) -> None:
    make_folders(tmp_path, {"a": 2, "b": 1}, {"a": 1, "b": 2})
    (tmp_path / "val").rename(tmp_path / "validation")
    damaged = tmp_path / "train" / "a" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    plain = data.image_folder(root=str(_renamed(tmp_path)), size=32)
    if kind == "tar":
        for part in ("train", "validation"):
            with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
                for path in sorted((tmp_path / part).rglob("*.png")):
                    tar.add(path, path.relative_to(tmp_path / part))
    photos = data.timm_dataset(root=str(tmp_path), size=32)
    assert photos.classes == plain.classes == ("a", "b")
    assert labels_of(photos.held_out) == [0, 1, 1]
    assert torch.equal(images_of(photos.held_out), images_of(plain.held_out))
    with pytest.raises(data.UnreadableImageError, match=r"1\.png"):
        photos.train[1]
    assert pickle.loads(pickle.dumps(photos.train))[0][1] == 0


def test_hugging_faces_data_sets_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder it prepares by itself, as it would one from its hub."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make_folders(tmp_path / "photos", {"a": 2, "b": 1}, {"a": 1, "b": 2})
    plain = data.image_folder(root=str(tmp_path / "photos"), size=32)
    photos = data.timm_dataset(
        dataset=f"hfds/{tmp_path / 'photos'}", root=str(tmp_path / "cache"), size=32
    )
    assert photos.classes == plain.classes == ("a", "b")
    assert len(photos.train) == 3
    assert labels_of(photos.held_out) == labels_of(plain.held_out)
    assert torch.equal(images_of(photos.held_out), images_of(plain.held_out))
    assert pickle.loads(pickle.dumps(photos.train))[0][1] == 0
    (batch,) = training_loader(photos, Order(3, 3, 0), workers=1)
    assert sorted(batch.target.tolist()) == [0, 0, 1]


def _renamed(folder: Path) -> Path:
    """Links to the parts under the names `image_folder` knows."""
    other = folder / "linked"
    other.mkdir()
    (other / "train").symlink_to(folder / "train")
    (other / "val").symlink_to(folder / "validation")
    return other


def test_what_timm_cannot_read_is_an_error(tmp_path: Path) -> None:
    for options, match in (
        ({"dataset": "wds/shards"}, "is a stream"),
        ({"root": str(tmp_path / "nowhere")}, "cannot be read"),
        ({"root": str(make_folders(tmp_path / "x", {"a": 1}, {"a": 1}) / "train")}, "has no parts"),
    ):
        with pytest.raises(DataError, match=match):
            data.timm_dataset(**options)


@pytest.mark.thorough
def test_a_dataset_that_cannot_be_fetched_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a network it is tried again for 20 seconds, most of them spent waiting.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(DataError, match="cannot be read"):
        data.timm_dataset(dataset="hfds/no/such")


def make_shards(folder: Path, part: str, shards: int, each: int) -> list[np.ndarray]:
    pictures = []
    for shard in range(shards):
        with tarfile.open(folder / f"{part}-{shard:04d}.tar", "w") as tar:
            for index in range(each):
                pixels = np.full((20, 30, 3), 10 * shard + index, dtype=np.uint8)
                pictures.append(pixels)
                image = io.BytesIO()
                Image.fromarray(pixels).save(image, "png")
                for name, content in (
                    (f"{index:03d}.png", image.getvalue()),
                    (f"{index:03d}.cls", str(index % 2).encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return pictures


def test_shards_are_read_by_index(tmp_path: Path) -> None:
    make_shards(tmp_path, "train", 3, 4)
    pictures = make_shards(tmp_path, "val", 2, 3)
    options = {
        "train": str(tmp_path / "train-{0000..0002}.tar"),
        "held_out": str(tmp_path / "val-*.tar"),
        "size": 16,
    }
    shards = data.webdataset(**options, classes=["even", "odd"])
    assert (len(shards.train), len(shards.held_out)) == (12, 6)
    assert labels_of(shards.held_out) == [0, 1, 0, 0, 1, 0]
    expected = timm.data.create_transform(input_size=16, **data.transform_options(None))
    for index, pixels in enumerate(pictures):
        assert torch.equal(shards.held_out[index][0], expected(Image.fromarray(pixels)))
    assert pickle.loads(pickle.dumps(shards.train))[11][1] == 1
    with pytest.raises(DataError, match=r"class 1, of 1: 001"):
        data.webdataset(**options, classes=1)
    with pytest.raises(DataError, match="no shards"):
        data.webdataset(**{**options, "train": str(tmp_path / "no-*.tar")}, classes=2)
    whole = (tmp_path / "val-0001.tar").read_bytes()
    (tmp_path / "val-0001.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match="val-0001"):
        data.webdataset(**options, classes=2)
    where = whole.index(b"PNG")
    (tmp_path / "val-0001.tar").write_bytes(whole[:where] + b"XXX" + whole[where + 3 :])
    with pytest.raises(data.UnreadableImageError, match=r"val-0001.tar:000"):
        data.webdataset(**options, classes=2).held_out[3]
