"""What every benchmark shares: models, environment, and a table that is kept as it grows."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import timm
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import treeify
from treeify.engine import timing
from treeify.models import cifar_resnet50, mobilenetv2_hne

RESULTS = Path(__file__).parent / "results"
BLOCKS = ("block1", "block2", "block3", "block4")


@dataclass(frozen=True)
class Case:
    """A base model and where it splits.

    Args:
        name: in the table.
        build: the base model.
        size: height and width of its images.
        splits: of the 16-leaf ensemble.
    """

    name: str
    build: Callable[[], nn.Module]
    size: int
    splits: int | Sequence[str] = 4

    def base(self) -> nn.Module:
        """The base model, in evaluation mode and channels_last, as its users would run it."""
        torch.manual_seed(0)
        return self.build().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def ensemble(self, base: nn.Module) -> treeify.HierarchicalEnsemble:
        """Its 16-leaf ensemble."""
        example = torch.zeros(1, 3, self.size, self.size)
        return treeify.hierarchicalize(
            base, self.splits, init="perturb", example_input=example
        ).eval()

    def images(self, count: int) -> Tensor:
        """Random images, channels_last."""
        images = torch.randn(count, 3, self.size, self.size)
        return images.contiguous(memory_format=torch.channels_last)


CIFAR = (
    Case("HNE_small", lambda: cifar_resnet50(width=0.5), 32, BLOCKS),
    Case("HNE", cifar_resnet50, 32, BLOCKS),
)
# As transformers are built for images of that size: 8x8 patches of 4x4 pixels.
CIFAR_VIT = Case(
    "vit_tiny at 32x32",
    partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10),
    32,
)
IMAGENET = (
    Case("MobileNetV2 HNE", mobilenetv2_hne, 224, ("block2", "block3", "block4", "block5")),
    Case("resnet18", torchvision.models.resnet18, 224),
    *(
        Case(name, partial(timm.create_model, name), 224)
        for name in (
            *("convnext_atto", "vit_tiny_patch16_224", "efficientnet_b0", "convnext_tiny"),
            *("deit_small_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224"),
        )
    ),
)


def arguments(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", nargs="+", help="rows whose name holds one of these words")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds per row and column")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    return parser


def environment() -> dict[str, Any]:
    """Versions, processor and commit of a measurement; rows written before it change no code."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", ":/", f":(exclude){RESULTS}")
    return {
        "machine": timing.describe(torch.device("cpu")),
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "treeify": treeify.__version__,
        "commit": f"{commit}-dirty" if changed else commit,
    }


def _git(*command: str) -> str:
    done = subprocess.run(
        ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def spread(times: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and count of some seconds."""
    low, middle, high = (
        quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    )
    return {"median": middle, "quartiles": [low, high], "rounds": len(times)}


def milliseconds(times: Sequence[float]) -> str:
    """For the table: median and half the distance between the quartiles."""
    found = spread(times)
    low, high = found["quartiles"]
    return f"{1e3 * median(times):.1f} ±{500 * (high - low):.1f}"


# Side of the square matrices whose product shows how fast the machine can multiply.
_SIDE = 1024


def product() -> Callable[[], Tensor]:
    """A large matrix product, to be timed among the others: the machine's own speed."""
    left, right = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)
    return lambda: left @ right


def columns(times: timing.Times, ratio: float, macs: int) -> dict[str, Any]:
    """What every comparison of `base`, `packed`, `looped`, `auto` and `product` reports.

    Args:
        times: seconds of every round, by name.
        ratio: MACs of the ensemble over the base model's.
        macs: multiply-accumulates of the ensemble in one round.
    """
    typical = timing.medians(times)
    peak = _SIDE**3 / typical["product"]
    return {
        "macs_ratio": ratio,
        **{name: milliseconds(own) for name, own in times.items()},
        "GMAC/s": macs / typical["auto"] / 1e9,
        "product_GMAC/s": peak / 1e9,
        "share_of_product": macs / typical["auto"] / peak,
        "E": typical["base"] * ratio / typical["auto"],
        "E_packed": typical["base"] * ratio / typical["packed"],
        "E_looped": typical["base"] * ratio / typical["looped"],
        "auto_vs_best": min(typical["packed"], typical["looped"]) / typical["auto"],
        "seconds": {name: spread(own) for name, own in times.items()},
    }


class Report:
    """A table of rows that is written after every row, so that a stopped run goes on later.

    Args:
        name: of the file in `benchmarks/results`.
        columns: keys of a row to show.
    """

    def __init__(self, name: str, columns: Sequence[str], options: argparse.Namespace) -> None:
        self.file = RESULTS / f"{name}.json"
        self.columns, self.options = columns, options
        self.rows: list[dict[str, Any]] = []
        if self.file.is_file():
            self.rows = json.loads(self.file.read_text(encoding="utf-8"))["rows"]
        self.console = Console(width=160)

    def wanted(self, name: str) -> bool:
        """Whether a row is asked for and not measured yet."""
        words = self.options.only
        asked = words is None or any(word in name for word in words)
        known = any(row["row"] == name for row in self.rows)
        return asked and (self.options.again or not known)

    def add(self, name: str, **values: Any) -> None:
        """Keep a row, in the place of an earlier one, and show it."""
        row = {"row": name, **values, "environment": environment()}
        self.rows = list(({own["row"]: own for own in self.rows} | {name: row}).values())
        self.file.parent.mkdir(exist_ok=True)
        draft = self.file.with_suffix(".draft")
        draft.write_text(json.dumps({"rows": self.rows}, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.file)
        shown = {key: row[key] for key in self.columns if key in row}
        self.console.print(name, shown, soft_wrap=True, highlight=False)

    def show(self) -> None:
        """Print every row as a table."""
        table = Table("row", *self.columns)
        for row in self.rows:
            table.add_row(row["row"], *(_text(row.get(key, "")) for key in self.columns))
        self.console.print(table)


def _text(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def prepare() -> None:
    """Two threads and an allocator that keeps its memory, for base models and ensembles alike."""
    torch.set_num_threads(2)
    treeify.tune_allocator()
