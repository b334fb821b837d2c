"""Digits and torchvision's data sets: their splits, pixels and augmentation."""

import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from pictures import images_of, labels_of
from PIL import Image
from sklearn.datasets import load_digits
from torch.testing import assert_close

from treeify import data
from treeify.errors import DataError
from treeify.training.loaders import Order, training_loader


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


def test_digits_are_grey_where_the_model_is() -> None:
    grey, colour = data.digits(channels=1), data.digits()
    assert grey.train[0][0].shape == (1, 8, 8)
    assert_close(grey.held_out[0][0][0], colour.held_out[0][0][2])


def test_digits_can_be_resized() -> None:
    image, _ = data.digits(size=16).held_out[0]
    assert image.shape == (3, 16, 16)
    oblong = data.digits(size=[8, 12], crop_padding=1)
    assert oblong.train[0][0].shape == oblong.held_out[0][0].shape == (3, 8, 12)


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
