"""Single inputs that ended in raw errors, or never: each is refused at once, in one message."""

import io
import json
import os
import re
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import small
import torch
from faults import ensembles
from faults.fuzzing import assert_readable, limited
from hostile import unseal
from PIL import Image
from runner import run
from safetensors.torch import load_file, save_file
from torch import nn

import treeify
from treeify.cli.app import main
from treeify.cli.image_files import image_files
from treeify.conversion import checksums
from treeify.conversion.saved_config import CONFIG, WEIGHTS
from treeify.data.image_files import UnreadableImageError, open_image
from treeify.data.tar_images import folders_in_tar
from treeify.data.webdataset_shards import expanded, webdataset
from treeify.errors import CheckpointError, DataError, InputError, RecipeError, TreeifyError
from treeify.models.load_weights import load_into
from treeify.models.weights import Weights, read_weights
from treeify.training import yaml_values
from treeify.training.ablation import load_grid
from treeify.training.recipe_file import load_recipe
from treeify.training.state_file import read_state


def nested(depth: int) -> str:
    return f"a: {'[' * depth}{']' * depth}"


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "\n".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10)
)
LADDER = "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 200))
YAML: dict[str, tuple[str, str]] = {
    "aliases of aliases": (BOMB, "more than 30,000 values"),
    "merged aliases of aliases": (MERGES, "more than 30,000 values"),
    "aliases one in the other": (LADDER, "nested deeper than 50 levels"),
    "an alias of itself": ("a: &a [*a]", "an alias of what it is a part of"),
    "nested deeply": (nested(60), "nested deeper than 50 levels"),
    "nested beyond recursion": ("a: " + "[" * 100_000, "nested deeper than 50 levels"),
    "nested mappings": ("{a: " * 100_000, "nested deeper than 50 levels"),
    "blocks": ("- " * 100_000, "nested deeper than 50 levels"),
    "a long file": ("# " + "x" * 2**20, "larger than 1,048,576 bytes"),
    "a null character": ("name: a\x00b", "special characters are not allowed"),
    "an escape sequence": ("name: \x1b[31m", "special characters are not allowed"),
    "a Python object": ("name: !!python/object/apply:os.getcwd []", "could not determine a constr"),
    "a date that does not exist": ("name: 2024-13-45", "does not fit its tag"),
    "a tag without sense": ("name: !!timestamp x", "does not fit its tag"),
    "a number without sense": ("seed: !!int x", "does not fit its tag"),
    "a number of many digits": ("seed: 0x" + "f" * 5000, "a number of more than 64 bits"),
    "half a character": ('name: "\\uDCFF"', "half a character"),
    "a list as a key": ("? [a]\n: b", "unhashable"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document"),
}


@pytest.mark.parametrize(("text", "part"), YAML.values(), ids=YAML)
def test_a_recipe_and_a_grid_that_nobody_would_write(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    for read in (load_recipe, load_grid):
        with limited(), pytest.raises(RecipeError) as caught:
            read(file)
        assert part in str(caught.value)
        assert_readable(str(caught.value))


def test_a_recipe_of_more_values_than_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_values, "MOST_VALUES", 100)
    (tmp_path / "recipe.yaml").write_text("a: [" + "1, " * 200 + "]")
    with pytest.raises(RecipeError, match="more than 100 values"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("value", ["[" * 10_000, "!!int x", "{a: 1, a: 2}", "&a [*a]", "\x1b"])
def test_an_override_that_nobody_would_write(tmp_path: Path, value: str) -> None:
    with limited(), pytest.raises(RecipeError, match="not valid YAML") as caught:
        load_recipe(runs.tiny(tmp_path), [f"model.kwargs={value}"])
    assert_readable(str(caught.value))


def test_a_recipe_with_thousands_of_unknown_keys_lists_some(tmp_path: Path) -> None:
    file = runs.tiny(tmp_path)
    file.write_text(file.read_text() + "".join(f"key{n}: 1\n" for n in range(3000)))
    with limited(), pytest.raises(RecipeError, match="and 2,980 more keys") as caught:
        load_recipe(file)
    assert_readable(str(caught.value))


def test_a_chain_of_recipes_has_an_end(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    with pytest.raises(RecipeError, match="extends itself, or 20 others"):
        load_recipe(tmp_path / "0.yaml")
    (tmp_path / "0.yaml").write_text('extends: "a\\0b"\n')
    with pytest.raises(RecipeError, match="null byte"):
        load_recipe(tmp_path / "0.yaml")


def test_a_key_twice_inside_of_a_list_is_said(tmp_path: Path) -> None:
    file = runs.tiny(tmp_path)
    file.write_text(file.read_text().replace("[1, 1, 1, 1]", "[{a: 1, a: 2}]"))
    with pytest.raises(RecipeError, match="the key is there twice"):
        load_recipe(file)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


PLACES: dict[str, Any] = {
    "a recipe": load_recipe,
    "a grid": load_grid,
    "an image": open_image,
    "weights": read_weights,
    "a tar file": folders_in_tar,
    "shards": lambda path: webdataset(train=str(path), held_out=str(path), classes=2),
}


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("read", PLACES.values(), ids=PLACES)
def test_a_pipe_or_a_device_in_the_place_of_a_file(pipe: Path, read: Any, device: bool) -> None:
    with limited(), pytest.raises(TreeifyError, match=r"a pipe|a device"):
        read(Path("/dev/zero") if device else pipe)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_pipe_in_a_saved_ensemble(tmp_path: Path, name: str) -> None:
    treeify.save(small.ensemble(), tmp_path / "hne")
    (tmp_path / "hne" / name).unlink()
    os.mkfifo(tmp_path / "hne" / name)
    with limited(), pytest.raises(CheckpointError, match=re.escape(name)):
        treeify.load(tmp_path / "hne", model=small.build())


def test_a_pipe_among_the_photos(tmp_path: Path) -> None:
    os.mkfifo(runs.photos(tmp_path / "photos", each=1) / "train" / "dark" / "1.png")
    for name in ("image_folder", "timm"):
        options = {"held_out_split": "val"} if name == "timm" else {}
        source = treeify.data.SOURCES[name](root=str(tmp_path / "photos"), size=8, **options)
        with limited(), pytest.raises(UnreadableImageError, match="a pipe"):
            for index in range(len(source.train)):
                source.train[index]


def test_labels_from_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    treeify.save(small.ensemble(), "hne")
    Image.new("RGB", (8, 8)).save("a.png")
    line = ["predict", "hne", "a.png", "--mean", "0.5", "--std", "0.5", "--labels", "/dev/zero"]
    with limited():
        result = run(*line)
    assert (result.exit_code, "a device, not a file" in result.stderr) == (2, True)


def test_answers_are_not_written_over_a_device(tmp_path: Path) -> None:
    treeify.save(small.ensemble(), tmp_path / "hne")
    os.mkfifo(tmp_path / "pipe")
    result = run("predict", str(tmp_path / "hne"), "a.png", "--csv", str(tmp_path / "pipe"))
    assert result.exit_code == 2
    assert "Found a pipe or a device" in result.stderr


def write_tar(path: Path, size: int, kind: bytes = tarfile.REGTYPE, name: str = "a/1.png") -> Path:
    """A tar file of one member that says it has so many bytes, and has 512."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    path.write_bytes(info.tobuf() + bytes(512) + bytes(1024))
    return path


@pytest.mark.parametrize("size", [10**15, 2**40, 10**6, -512])
@pytest.mark.parametrize("name", ["a/1.png", "a/1.cls"])
def test_a_member_that_says_it_is_huge(tmp_path: Path, size: int, name: str) -> None:
    shard = write_tar(tmp_path / "train.tar", size, name=name)
    readers = ("shards",) if name.endswith(".cls") else ("a tar file", "shards")
    for reader in readers:
        with limited(), pytest.raises(DataError, match=re.escape(f"{size:,} bytes")):
            PLACES[reader](shard)


def test_a_member_that_is_no_image_may_be_large(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, content in (("a/1.png", file.getvalue()), ("a/notes.npz", bytes(2**16))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    images, classes = folders_in_tar(tmp_path / "train.tar")
    assert (len(images), classes, images[0][0].size) == (1, ("a",), (8, 8))


def test_a_member_with_holes(tmp_path: Path) -> None:
    """GNU's sparse file, of 512 bytes and 10^15 bytes of nothing."""
    info = tarfile.TarInfo("a/1.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\x0000000001000\x00"  # where its one piece is, and how long
    header[483:495] = b"\x80" + (10**15).to_bytes(11, "big")
    header[148:156] = b"%06o\x00 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    path = tmp_path / "train.tar"
    path.write_bytes(bytes(header) + bytes(512 + 1024))
    for read in (PLACES["a tar file"], PLACES["shards"]):
        with limited(), pytest.raises(DataError, match="stored with holes"):
            read(path)


def test_a_compressed_tar_file_is_refused(tmp_path: Path) -> None:
    """Its images would be read from places that are those of the file before it was compressed."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    with tarfile.open(tmp_path / "train.tar", "w:gz") as tar:
        info = tarfile.TarInfo("a/1.png")
        info.size = len(file.getvalue())
        tar.addfile(info, io.BytesIO(file.getvalue()))
    with pytest.raises(DataError, match="not compressed"):
        folders_in_tar(tmp_path / "train.tar")


@pytest.mark.parametrize("pattern", ["a-{0..1000000000}.tar", "{0..999}{0..999}.tar"])
def test_a_pattern_of_a_billion_shards(pattern: str) -> None:
    with limited(), pytest.raises(DataError, match=r"names 1,000,00\d|names 1,000,000,001 shards"):
        expanded(pattern)


@pytest.mark.parametrize("pattern", ["a-{5..3}.tar", "a-{" + "9" * 5000 + "..1}.tar", "{..}", "{"])
def test_a_pattern_of_no_shards(pattern: str) -> None:
    with limited():
        assert len(expanded(pattern)) <= 1


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "a million splits": ({"splits": ["stage1:2"] * 10**6}, "at most 1000 items"),
    "a million children": ({"splits": ["stage1:1000000"]}, "splits with 1000000 leaves"),
    "as many as atoms": ({"splits": [f"stage1:{10**17}"] * 9}, "far more leaves"),
    "a fanout of many digits": ({"splits": ["stage1:" + "9" * 900]}, "not a number"),
    "an example beyond memory": ({"example": [10**9, 8, 8]}, "at most 268,435,456 values"),
    "a negative size": ({"example": [-3, 8, 8]}, "example.0"),
    "a size in words": ({"example": [3, "8", 8]}, "example.1"),
    "a batch beyond memory": ({"batch": 10**9}, "at most 268,435,456 values"),
    "frozen by number": ({"frozen": 5}, "frozen"),
    "channels beyond memory": (
        {"preparation": {"size": [8, 8], "mean": [0.5], "std": [0.5], "channels": 10**9}},
        "channels of images is no integer in range",
    ),
    "images beyond memory": ({"preparation": {"size": [10**9, 10**9]}}, "from 1 to 32,768"),
}


@pytest.mark.parametrize(("changes", "part"), DAMAGE.values(), ids=DAMAGE)
def test_a_configuration_that_cannot_be(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    treeify.save(small.ensemble(), tmp_path / "hne")
    config = json.loads((tmp_path / "hne" / CONFIG).read_text())
    # Whoever writes such a configuration can write its checksum, too.
    (tmp_path / "hne" / CONFIG).write_text(checksums.seal({**config, **changes}))
    with limited(), pytest.raises(CheckpointError, match=re.escape(part)) as caught:
        treeify.load(tmp_path / "hne", model=small.build())
    assert_readable(str(caught.value))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\x00", "\ufeff{}", "9" * 9999])
def test_a_configuration_that_is_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG).write_text(text)
    with limited(), pytest.raises(CheckpointError, match="is damaged"):
        treeify.load(tmp_path)
    (tmp_path / "trainer.json").write_text(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_state(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float16])
def test_a_tensor_of_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    hne = small.ensemble()
    treeify.save(hne, tmp_path / "hne")
    unseal(tmp_path / "hne")
    file = tmp_path / "hne" / WEIGHTS
    identity = json.loads((tmp_path / "hne" / CONFIG).read_text())["identity"]
    tensors = load_file(file)
    save_file(
        {**tensors, "head.weight": tensors["head.weight"].to(dtype)},
        file,
        metadata={"identity": identity},
    )
    if dtype == torch.float16:  # of another precision
        assert treeify.load(tmp_path / "hne", model=small.build()).head.weight.dtype == dtype
        return
    with pytest.raises(CheckpointError, match=f"Found {dtype}"):
        treeify.load(tmp_path / "hne", model=small.build())


def test_weights_of_integers_are_not_taken_for_floats() -> None:
    model = nn.Linear(2, 1)
    state = {"weight": torch.tensor([[1, 2]]), "bias": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"of other numbers: weight torch\.int64"):
        load_into(model, Weights(state, "a file"))
    sparse = {"weight": torch.ones(1, 2).to_sparse(), "bias": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="of other numbers"):
        load_into(model, Weights(sparse, "a file"))


def test_more_splits_than_points_are_refused_at_once() -> None:
    with limited(), pytest.raises(TreeifyError, match="split"):
        small.ensemble(splits=10**6)  # type: ignore[arg-type]


def test_a_link_to_its_own_folder_ends(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("one", "two", "three"):
        (tmp_path / name).symlink_to(tmp_path)
    with limited():
        assert [file.path for file in image_files([str(tmp_path)])] == [tmp_path / "a.png"]


@pytest.mark.parametrize(
    "line",
    [
        ["predict", "x" * 5000, "a.png"],
        ["train", "x" * 5000],
        ["convert", "small:build", "--weights", "x" * 5000],
        ["eval", "link"],
        ["predict", "link", "link"],
    ],
)
def test_a_path_that_no_file_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("link")
    result = run(*line)
    assert result.exit_code == 2
    assert "This is a bug" not in result.output


ESCAPES = "\x1b[31m\x07\u202e[bold red]x[/bold red]:cat:\x9b"


def test_names_of_files_and_classes_are_shown_and_not_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hne = ensembles.buildable()
    labels = tuple(f"{number}{ESCAPES}" for number in range(10))
    hne.preparation = treeify.data.Preparation((8, 8), (0.5,), (0.5,), classes=labels)
    treeify.save(hne, "hne")
    names = [f"a{ESCAPES.replace('/', '')}.png", "b\udcff.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(name)
    shown = run("predict", "hne", *names)
    assert shown.exit_code == 0, shown.output
    assert "\\x1b[31m\\x07\\u202e[bold red]x[/bold red]:cat:\\x9b" in shown.stdout
    assert "b\\udcff.png" in shown.stdout
    refused = run("predict", "hne", f"no{ESCAPES}.png")
    unknown = run("predict", f"--{ESCAPES}", "hne", "a.png")
    written = run("predict", "hne", *names, "--csv", "a.csv")
    text = Path("a.csv").read_bytes()
    assert b"b\xff.png" in text  # the file's name, whatever its encoding
    for output in (shown.output, refused.output, unknown.output, written.output, str(text)):
        assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(output)
    assert not set(b"\x1b\x07") & set(text)


def test_a_warning_shows_names_and_obeys_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # restored afterwards
    monkeypatch.setattr("treeify.cli.app.app", lambda: None)
    main()
    text = warnings.formatwarning("\x1b[31mred", UserWarning, "a.py", 1)
    assert "UserWarning: \\x1b[31mred" in text
    assert "\x1b" not in text


def test_a_png_that_says_it_is_huge(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file)
    content = bytearray(file.read_bytes())
    content[16:24] = b"\x7f\xff\xff\xff" * 2
    file.write_bytes(content)
    with limited(), pytest.raises(UnreadableImageError):
        open_image(file)


def test_a_size_of_images_beyond_memory() -> None:
    with pytest.raises(InputError, match="from 1 to 32,768"):
        treeify.data.Preparation(size=(10**9, 8))
