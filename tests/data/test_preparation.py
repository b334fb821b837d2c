"""Image files become what the ensemble was trained to see."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from cli import saved_ensembles as saved
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_data_config
from torch.testing import assert_close

from treeify.data.preparation import preparation, read
from treeify.data import CIFAR10, digits, image_folder
from treeify.errors import DataError, InputError
from treeify.training.recipe_file import dump_recipe, load_recipe


def config(name: str | None = None, shape: tuple[int, ...] = (3, 64, 64)) -> dict[str, Any]:
    architecture = None if name is None else {"name": name, "kwargs": {}}
    return {"architecture": architecture, "example": list(shape)}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A crop of a photograph, 120 x 90 pixels."""
    file = tmp_path / "photo.png"
    Image.fromarray(load_sample_images().images[0][100:190, 200:320]).save(file)
    return file


def run_of(path: Path, *data: str) -> Path:
    """The checkpoint of a run on some data set."""
    recipe = load_recipe(saved.RECIPE, [f"data.{option}" for option in data])
    (path / "last").mkdir(parents=True)
    (path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return path / "last"


def test_a_run_on_digits_sees_its_held_out_images(tmp_path: Path) -> None:
    path = run_of(tmp_path / "run")
    files, _ = saved.write_digits(tmp_path / "digits", 200)
    found = read([Path(file) for file in files], preparation(path, config(shape=(3, 8, 8))))
    held_out = torch.stack([image for image, _ in digits().held_out])
    distances = torch.cdist(held_out.flatten(1), found.flatten(1), p=1)
    assert (distances.min(0).values < 1e-3).sum() > 20  # about a fifth of all are held out


@pytest.mark.parametrize("padding", ["null", "2"])
def test_a_run_on_a_folder_sees_its_held_out_images(
    tmp_path: Path, photo: Path, padding: str
) -> None:
    for part in ("train", "val"):
        (tmp_path / "photos" / part / "china").mkdir(parents=True)
        Image.open(photo).save(tmp_path / "photos" / part / "china" / "1.png")
    root = str(tmp_path / "photos")
    path = run_of(
        tmp_path / "run", "name=image_folder", f"root={root}", "size=64", f"crop_padding={padding}"
    )
    expected = image_folder(root=root, size=64, crop_padding=None if padding == "null" else 2)
    assert_close(read([photo], preparation(path, config()))[0], expected.held_out[0][0])


@pytest.mark.parametrize(
    "like", ["tf_efficientnet_lite0", "torchvision/convnext_small", "vit_base_patch16_clip_224"]
)
def test_a_run_on_a_folder_sees_its_images_as_the_model_it_follows_did(
    tmp_path: Path, photo: Path, like: str
) -> None:
    for part in ("train", "val"):
        (tmp_path / "photos" / part / "china").mkdir(parents=True)
        Image.open(photo).save(tmp_path / "photos" / part / "china" / "1.png")
    root = str(tmp_path / "photos")
    path = run_of(tmp_path / "run", "name=image_folder", f"root={root}", "size=64", f"like={like}")
    expected = image_folder(root=root, size=64, like=like)
    assert_close(read([photo], preparation(path, config()))[0], expected.held_out[0][0])


def test_timm_and_torchvision_say_what_their_models_saw(tmp_path: Path, photo: Path) -> None:
    image = Image.open(photo)
    found = preparation(tmp_path, config("mobilenetv2_140"))
    noted = timm.get_pretrained_cfg("mobilenetv2_140").to_dict()
    way = create_transform(**resolve_data_config({"input_size": (3, 64, 64)}, pretrained_cfg=noted))
    assert_close(read([photo], found)[0], way(image))
    assert "timm's for mobilenetv2_140" in str(found)

    found = preparation(tmp_path, config("torchvision/resnet18", (3, 224, 224)))
    weights = torchvision.models.get_model_weights("resnet18").DEFAULT
    assert_close(read([photo], found)[0], weights.transforms()(image))
    assert "torchvision's for torchvision/resnet18" in str(found)


def test_else_pixels_are_0_to_1_or_as_the_user_says(tmp_path: Path, photo: Path) -> None:
    found = preparation(tmp_path, config("small:build", (3, 90, 60)))
    assert "mean 0 0 0, std 1 1 1 (pixels in 0 to 1" in str(found)
    pixels = torchvision.transforms.functional.to_tensor(Image.open(photo))
    assert_close(read([photo], found)[0], pixels[:, :, 30:90])
    given = preparation(tmp_path, config("small:build", (3, 90, 60)), (0.5,), (0.5, 0.25, 0.1))
    expected = (pixels[:, :, 30:90] - 0.5) / torch.tensor([0.5, 0.25, 0.1])[:, None, None]
    assert_close(read([photo], given)[0], expected)


def test_grey_models_read_colours_as_grey(tmp_path: Path, photo: Path) -> None:
    path = run_of(tmp_path / "run", "name=cifar10")
    found = preparation(path, config(shape=(1, 32, 32)))
    assert read([photo], found).shape == (1, 1, 32, 32)
    assert found.mean == pytest.approx((sum(CIFAR10[0]) / 3,))


def test_photos_are_turned_as_they_say(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    found = read([tmp_path / "turned.png"], preparation(tmp_path, config(shape=(3, 8, 8))))
    assert found[0, 0, 7, 7] == 1


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "CMYK", "1"])
def test_every_kind_of_pixels_is_read(tmp_path: Path, photo: Path, mode: str) -> None:
    file = tmp_path / f"image.{'tiff' if mode == 'CMYK' else 'png'}"
    Image.open(photo).convert(mode).save(file)
    assert read([file], preparation(tmp_path, config())).shape == (1, 3, 64, 64)


def test_all_bad_files_are_named(tmp_path: Path, photo: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:5000])
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    files = [photo, *(tmp_path / name for name in ("text.png", "cut.png", "deep.png", "none.png"))]
    with pytest.raises(DataError, match="4 images of 5 cannot be read") as caught:
        read([*files], preparation(tmp_path, config()))
    for part in ("text.png", "cut.png", "deep.png': more than 8 bits", "none.png': No such file"):
        assert part in str(caught.value)


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--mean has 2 numbers, images have 3 channels"):
        preparation(tmp_path, config(), (1.0, 2.0), (1.0,))
    with pytest.raises(InputError, match="--mean was given alone"):
        preparation(tmp_path, config(), (1.0,))
    with pytest.raises(InputError, match=r"inputs of shape \(7,\), not files"):
        preparation(tmp_path, config(shape=(7,)))
