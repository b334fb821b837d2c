"""Images and labels of a data set, and image files to make one of."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from treeify import data


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
