"""A small ensemble as the command line finds it, and digits as the files it reads."""

from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

import treeify
from treeify.anytime.confidence import Budget
from treeify.data import DIGITS, Preparation
from treeify.deploy.exporter import export as write
from treeify.models.architecture import Architecture

RECIPE = Path(__file__).parents[2] / "recipes" / "digits_hne.yaml"


def save(path: Path, preparation: Preparation | None = None) -> None:
    """Write an ensemble of 6 leaves for 8 x 8 digits."""
    hne = treeify.hierarchicalize(
        Architecture("small:build", {"classes": 10}),
        ["stage1", "stage2:3"],
        init="fresh",
        example_input=torch.zeros(1, 3, 8, 8),
    )
    with torch.no_grad():  # fresh heads are never sure of anything
        hne.head.weight *= 10
    hne.preparation = preparation
    treeify.save(hne, path)


def export(
    source: Path, path: Path, sizes: tuple[int, ...] | None = None, batch: int | str = "dynamic"
) -> None:
    """Export an ensemble for images prepared as digits are."""
    hne = treeify.load(source, trust=True).eval()
    mean, std = DIGITS
    hne.preparation = Preparation((8, 8), mean, std)
    least, most = hne.count_macs(1), hne.count_macs()
    target = (least + most) // 2
    hne.budgets[target] = Budget(target, (1, 3, 6), (0.5, 0.9), 0.0, 0.0, (0.0,) * 3, 1)
    write(hne, path, sizes=sizes, batch=batch, tune=False)


def write_digits(directory: Path, count: int) -> tuple[list[str], Tensor]:
    """Files of the first digits, and their pixels in 0 to 1, `[count, 3, 8, 8]`."""
    directory.mkdir(exist_ok=True)
    scans = (torch.from_numpy(load_digits().images[:count]) * (255 / 16)).round().to(torch.uint8)
    files = [directory / f"{number}.png" for number in range(count)]
    for file, scan in zip(files, scans, strict=True):
        Image.fromarray(scan.numpy()).save(file)
    return [str(file) for file in files], scans[:, None].expand(-1, 3, -1, -1) / 255
