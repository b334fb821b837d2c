"""Image files become what the ensemble was trained to see."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from cli import saved_ensembles as saved
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_data_config
from torch.testing import assert_close

from treeify.data import CIFAR10, Preparation, digits, image_folder
from treeify.data.conventions import of_data_set, of_trained_weights
from treeify.data.preparation import PREPARATION, read_files
from treeify.errors import DataError, InputError
from treeify.training.recipe_file import load_recipe

SHAPE = (3, 64, 64)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A crop of a photograph, 120 x 90 pixels."""
    file = tmp_path / "photo.png"
    Image.fromarray(load_sample_images().images[0][100:190, 200:320]).save(file)
    return file


def folders_of(photo: Path) -> str:
    """A directory with the photograph to train on and held out, of one class."""
    root = photo.with_name("photos")
    for part in ("train", "val"):
        (root / part / "china").mkdir(parents=True)
        Image.open(photo).save(root / part / "china" / "1.png")
    return str(root)


PIXELS = Preparation(size=SHAPE[1:], mean=(0.0,), std=(1.0,))


def of_run(shape: tuple[int, int, int], *options: str) -> Preparation:
    """How images are prepared for an ensemble that an earlier version trained on some data set."""
    section = load_recipe(saved.RECIPE, [f"data.{option}" for option in options]).data
    preparation = of_data_set(section.name, section.options, shape)
    assert preparation is not None
    return preparation


def test_a_run_on_digits_sees_its_held_out_images(tmp_path: Path) -> None:
    files, _ = saved.write_digits(tmp_path / "digits", 200)
    images = read_files([Path(file) for file in files], of_run((3, 8, 8)))
    held_out = torch.stack([image for image, _ in digits().held_out])
    distances = torch.cdist(held_out.flatten(1), images.flatten(1), p=1)
    assert (distances.min(0).values < 1e-3).sum() > 20  # about a fifth of all are held out


@pytest.mark.parametrize("padding", ["null", "2"])
def test_a_run_on_a_folder_sees_its_held_out_images(photo: Path, padding: str) -> None:
    root = folders_of(photo)
    options = ("name=image_folder", f"root={root}", "size=64", f"crop_padding={padding}")
    expected = image_folder(root=root, size=64, crop_padding=None if padding == "null" else 2)
    assert_close(read_files([photo], of_run(SHAPE, *options))[0], expected.held_out[0][0])


@pytest.mark.parametrize(
    "like", ["tf_efficientnet_lite0", "torchvision/convnext_small", "vit_base_patch16_clip_224"]
)
def test_a_run_on_a_folder_sees_its_images_as_the_model_it_follows_did(
    photo: Path, like: str
) -> None:
    root = folders_of(photo)
    options = ("name=image_folder", f"root={root}", "size=64", f"like={like}")
    expected = image_folder(root=root, size=64, like=like)
    assert_close(read_files([photo], of_run(SHAPE, *options))[0], expected.held_out[0][0])


def test_timm_and_torchvision_say_what_their_models_saw(photo: Path) -> None:
    image = Image.open(photo)
    preparation = of_trained_weights("mobilenetv2_140", SHAPE)
    noted = timm.get_pretrained_cfg("mobilenetv2_140").to_dict()
    way = create_transform(**resolve_data_config({"input_size": (3, 64, 64)}, pretrained_cfg=noted))
    assert_close(read_files([photo], preparation)[0], way(image))
    assert "timm's for mobilenetv2_140" in str(preparation)

    preparation = of_trained_weights("torchvision/resnet18", (3, 224, 224))
    weights = torchvision.models.get_model_weights("resnet18").DEFAULT
    assert_close(read_files([photo], preparation)[0], weights.transforms()(image))
    assert "torchvision's for torchvision/resnet18" in str(preparation)


def test_what_is_not_known_is_refused_until_the_user_says_it(photo: Path) -> None:
    preparation = Preparation(size=(90, 60), classes=("china",))
    assert "mean and std unknown" in str(preparation)
    with pytest.raises(InputError, match="--mean 0 --std 1 for pixels"):
        read_files([photo], preparation)
    pixels = torchvision.transforms.functional.to_tensor(Image.open(photo))
    preparation = preparation.with_statistics((0.5,), (0.5, 0.25, 0.1), "--mean and --std")
    expected = (pixels[:, :, 30:90] - 0.5) / torch.tensor([0.5, 0.25, 0.1])[:, None, None]
    assert_close(read_files([photo], preparation)[0], expected)
    assert preparation.classes == ("china",)


def test_a_preparation_is_the_same_from_json() -> None:
    folder = Preparation(
        size=[96, 160], mean=[0.5], std=[0.25], channels=1, crop_pct=0.9, classes=["a", "b"]
    )
    assert folder.shape == (1, 96, 160)
    again = PREPARATION.validate_json(PREPARATION.dump_json(folder))
    assert again == folder
    assert hash(again) == hash(folder)


def test_grey_models_read_colours_as_grey(photo: Path) -> None:
    preparation = of_run((1, 32, 32), "name=cifar10")
    assert read_files([photo], preparation).shape == (1, 1, 32, 32)
    assert preparation.mean == pytest.approx((sum(CIFAR10[0]) / 3,))


def test_photos_are_turned_as_they_say(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    images = read_files(
        [tmp_path / "turned.png"], Preparation(size=(8, 8), mean=(0.0,), std=(1.0,))
    )
    assert images[0, 0, 7, 7] == 1


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "CMYK", "1"])
def test_every_kind_of_pixels_is_read(tmp_path: Path, photo: Path, mode: str) -> None:
    file = tmp_path / f"image.{'tiff' if mode == 'CMYK' else 'png'}"
    Image.open(photo).convert(mode).save(file)
    assert read_files([file], PIXELS).shape == (1, 3, 64, 64)


def test_all_bad_files_are_named(tmp_path: Path, photo: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:5000])
    Image.new("F", (8, 8)).save(tmp_path / "deep.tif")
    files = [photo, *(tmp_path / name for name in ("text.png", "cut.png", "deep.tif", "none.png"))]
    with pytest.raises(DataError, match="4 images of 5 cannot be read") as caught:
        read_files([*files], PIXELS)
    for part in ("text.png", "cut.png", "deep.tif': pixels are floats", "none.png': No such file"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"mean": (1.0, 2.0), "std": (1.0,)}, "mean has 2 numbers, images have 3 channels"),
        ({"mean": (1.0,)}, "mean was given alone"),
        ({"mean": (0.0,), "std": (0.0,)}, "divides pixels"),
        ({"size": (0, 8)}, "no height and width"),
        ({"size": "ab"}, "no height and width"),
        ({"size": (8, 10**6)}, r"no height and width(.|\n)*\[8, 1000000\]"),
        # It had a number for each of them in memory.
        ({"channels": 10**9, "mean": (0.5,), "std": (0.5,)}, "channels of images is no integer"),
        ({"channels": "x"}, "channels of images is no integer"),
        ({"crop_pct": "x"}, "crop_pct is no number"),
        ({"mean": 0.5, "std": 0.5}, "mean is of a wrong type"),
        ({"mean": ("x",), "std": (0.5,)}, "a number of mean is no number"),
        ({"mean": (0.5,), "std": (float("nan"),)}, "a number of std is no number"),
        ({"classes": 3}, "classes cannot be gone through"),
        ({"crop_mode": "middle"}, "no such crop_mode(.|\\n)*'middle'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(values: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        Preparation(**{"size": (8, 8), **values})


def test_no_file_has_twelve_channels(photo: Path) -> None:
    with pytest.raises(InputError, match="not files of images"):
        read_files([photo], Preparation(size=(8, 8), channels=12, mean=(0.0,), std=(1.0,)))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_way_to_crop_works_in_every_shape(photo: Path, crop_mode: str, channels: int) -> None:
    preparation = Preparation(
        size=(32, 48),
        mean=(0.5,),
        std=(0.25,),
        channels=channels,
        crop_mode=crop_mode,
        crop_pct=0.9,
        interpolation="bicubic",
    )
    assert read_files([photo], preparation).shape == (1, channels, 32, 48)
