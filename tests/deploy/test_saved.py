"""What a directory on the command line holds."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import Dataset

from treeify.data import Data, UnreadableImageError, digits
from treeify.deploy.saved import checkpoint_in, data_section, preparation_in, training_images
from treeify.errors import CheckpointError, DataError, InputError

SAVED = Path(__file__).parents[1] / "saved"


def test_a_runs_ensemble_sees_what_its_recipe_says() -> None:
    preparation = preparation_in(checkpoint_in(SAVED / "run"))
    assert str(preparation).endswith("(held-out images of digits, from the run's recipe)")


def test_of_an_ensemble_by_itself_the_shape_is_known_and_the_user_says_the_rest() -> None:
    preparation = preparation_in(SAVED / "ensemble")
    assert not preparation.is_known
    assert preparation.shape == (3, 8, 8)
    preparation = preparation_in(SAVED / "ensemble", (0.5,), (0.25,), (8, 16))
    assert (preparation.mean, preparation.std) == ((0.5,) * 3, (0.25,) * 3)
    assert preparation.size == (8, 16)
    with pytest.raises(InputError, match="std was given alone"):
        preparation_in(SAVED / "ensemble", std=(0.25,))


def test_a_runs_own_data_set_is_imported_with_trust_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAVED / "run", "run", symlinks=True)
    recipe = yaml.safe_load(Path("run/recipe.yaml").read_text())
    recipe["data"], recipe["loss"] = {"name": "runs:noise"}, {"name": "no_such_module:loss"}
    Path("run/recipe.yaml").write_text(yaml.safe_dump(recipe))
    path = checkpoint_in(Path("run"))
    with pytest.raises(CheckpointError, match=r"would be imported: data.name='runs:noise'"):
        data_section(path, ())
    assert data_section(path, (), trust=True).name == "runs:noise"
    assert data_section(path, ["name=digits"]).name == "digits"


def test_what_a_run_fetched_is_not_fetched_again_without_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAVED / "run", "run", symlinks=True)
    recipe = yaml.safe_load(Path("run/recipe.yaml").read_text())
    recipe["data"] = {"name": "cifar10", "download": True}
    Path("run/recipe.yaml").write_text(yaml.safe_dump(recipe))
    path = checkpoint_in(Path("run"))
    assert not data_section(path, ()).options["download"]
    assert data_section(path, (), trust=True).options["download"]
    assert data_section(path, ["download=true"]).options["download"]


class _Unreadable(Dataset[tuple[torch.Tensor, int]]):
    """Images of which every second one cannot be read."""

    def __init__(self, readable: int) -> None:
        self.readable = readable

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index % 2 or index >= 2 * self.readable:
            raise UnreadableImageError(f"{index}.png")
        return torch.full((3, 4, 4), float(index)), 0

    def __len__(self) -> int:
        return 10


def test_training_images_are_the_same_every_time_and_not_augmented() -> None:
    data = digits(crop_padding=2)
    images = training_images(data, 16)
    assert torch.equal(images, training_images(data, 16))
    assert images.shape == (16, *data.example().shape)
    pixels = data.train.examples.tensors[0]
    assert all((pixels == image).flatten(1).all(1).any() for image in images)


def test_training_images_that_cannot_be_read_are_left_out() -> None:
    readable = _Unreadable(5)
    images = training_images(Data(readable, readable, ("a", "b"), "none"), 100)
    assert sorted(images[:, 0, 0, 0].tolist()) == [0, 2, 4, 6, 8]
    none = _Unreadable(0)
    with pytest.raises(DataError, match="none of the training images"):
        training_images(Data(none, none, ("a", "b"), "none"), 100)
