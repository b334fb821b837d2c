"""What timm reads by index: folders, tar files and Hugging Face's data sets."""

import pickle
import tarfile
import time
from pathlib import Path

import pytest
import torch
from pictures import images_of, labels_of, make_folders

from treeify import data
from treeify.errors import DataError
from treeify.training.loaders import Order, training_loader


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


def test_links_that_lead_in_circles_are_refused(tmp_path: Path) -> None:
    """timm itself would follow them without end."""
    make_folders(tmp_path, {"a": 1}, {"a": 1})
    (tmp_path / "val").rename(tmp_path / "validation")
    photos = tmp_path / "train" / "a"
    (photos / "elsewhere").symlink_to(tmp_path / "validation" / "a")
    assert len(data.timm_dataset(root=str(tmp_path), size=32).train) == 2
    for number in range(2):
        (tmp_path / "validation" / "a" / f"back{number}").symlink_to(photos)
    with pytest.raises(DataError, match=r"back\d' is a link to a folder that it lies in.\n.*"):
        data.timm_dataset(root=str(tmp_path), size=32)


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
