"""A user's afternoon from nothing: an own network on Fashion-MNIST, on the command line alone.

    pytest -m slow -n 0 -s tests/cases/test_afternoon.py

prints what every step took, and the accuracy of the original and of every nested size. The images
are those of Debian's package dataset-fashion-mnist.
"""

import csv
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FILES = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat"]
CLASSES += ["sandal", "shirt", "sneaker", "bag", "boot"]
# All that the user writes: a network, and the loop that trained it.
SHIRTS = """\
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def stage(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.early, self.middle, self.late = stage(1, 16), stage(16, 32), stage(32, 64)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.middle(self.pool(self.early(x)))
        return self.head(self.late(self.pool(x)).mean((2, 3)))


def images(part):
    steps = [transforms.Grayscale(), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    return datasets.ImageFolder(f"photos/{part}", transforms.Compose(steps))


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for x, y in DataLoader(images("train"), 128, shuffle=True):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save({"epoch": 1, "model": model.state_dict()}, "shirts.pth")
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum() for x, y in DataLoader(images("val"), 500))
    print(100 * right.item() / 10_000)
"""


def export(folder: Path, part: str, name: str) -> None:
    """Class folders of PNGs from the gzipped files."""
    pixels = gzip.decompress((FILES / f"{name}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((FILES / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    scans = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)
    for label in CLASSES:
        (folder / part / label).mkdir(parents=True)
    for index, (scan, label) in enumerate(zip(scans, labels[8:], strict=True)):
        Image.fromarray(scan).save(folder / part / CLASSES[label] / f"{index:05}.png")


@pytest.mark.slow
@pytest.mark.skipif(not FILES.is_dir(), reason="needs apt-get install dataset-fashion-mnist")
def test_a_users_afternoon_from_nothing(tmp_path: Path) -> None:
    times: list[str] = []

    def step(*command: str) -> str:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        times.append(f"{time.perf_counter() - start:6.1f} s  {' '.join(command)}")
        return done.stdout

    def treeify(*arguments: str) -> str:
        return step("-m", "treeify", *arguments)

    export(tmp_path / "photos", "train", "train")
    export(tmp_path / "photos", "val", "t10k")
    (tmp_path / "shirts.py").write_text(SHIRTS)
    original = float(step("shirts.py"))

    network = ("shirts:Net", "--weights", "shirts.pth", "--input-size", "28")
    assert "fraction after" in treeify("splits", *network)
    # The noise of `perturb` comes before batch norms, and fine-tuning is what it is for.
    converted = treeify(
        "convert", *network, "--splits", "middle,late", "--mean", "0.5", "--std", "0.5"
    )
    assert "Parity with the base architecture holds" in converted
    data = ("--data", "name=image_folder", "--data", "root=photos")
    before = json.loads(treeify("eval", "converted/shirts_Net", "--trust", "--json", *data))
    assert before["scores"][0]["accuracy"] == pytest.approx(original, abs=0.011)

    tuning = ("model.splits=[middle,late]", "data.mean=[0.5]", "data.std=[0.5]", "--epochs", "1")
    arguments = ("--data", "photos", "--model", *network, *tuning, "--out", "runs/shirts")
    trained = treeify("train", *arguments)
    assert "Images: 1 x 28 x 28, mean 0.5, std 0.5" in trained
    after = json.loads(
        treeify("eval", "runs/shirts", "--trust", "--weights", "shirts.pth", "--json")
    )
    assert after["base"]["accuracy"] == pytest.approx(original, abs=0.011)
    assert all(score["accuracy"] > original for score in after["scores"])

    treeify("calibrate", "runs/shirts", "--trust", "--target-ms", "5")
    answered = treeify(
        "predict", "runs/shirts", "--trust", "photos/val/bag/00018.png", "--deadline", "20ms"
    )
    assert "bag" in answered
    assert "Deadline of 20 ms" in answered
    treeify(
        "predict",
        "runs/shirts",
        "--trust",
        "photos/val/boot",
        "--deadline",
        "1s",
        "--csv",
        "boots.csv",
    )
    with (tmp_path / "boots.csv").open() as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert labels.count("boot") > 800

    print(*times, f"the original: {original:.2f} %", sep="\n")
    for name, scores in (("converted", before["scores"]), ("fine-tuned", after["scores"])):
        sizes = (f"{score['leaves']}: {score['accuracy']:.2f} %" for score in scores)
        print(f"{name}, by leaves: {', '.join(sizes)}")
