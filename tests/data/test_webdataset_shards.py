"""Shards of WebDataset are read by index."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pictures import labels_of
from PIL import Image

from treeify import data
from treeify.errors import DataError


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
