"""Measures 1, 2, 4, 8 and 16 first leaves of every run of a grid, whatever their nested sizes.

`python docs/first_leaves.py runs/digits_figure5 docs/results/digits_figure5.json` for figure 5: it
compares a tree with networks that branch once, whose only nested sizes are one leaf and all. That
makes sense where leaves were trained one by one, with the independent loss.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import treeify
from treeify.evaluation.metrics import Scores, placed
from treeify.report.grids import runs_below
from treeify.training.loaders import held_out_loader
from treeify.training.recipe_file import load_recipe
from treeify.training.run_directory import RECIPE, RunDirectory
from treeify.tree import Tree

BINARY = Tree((2, 2, 2, 2))


@torch.no_grad()
def rows(grid: Path) -> Iterator[dict[str, Any]]:
    """Scores and MACs of the sizes of a binary tree, a row for each run."""
    for (variant, seed), run in runs_below(grid).items():
        hne = treeify.load(run / "last").eval()
        scores = Scores(BINARY)
        for images, target, *_ in held_out_loader(
            load_recipe(run / RECIPE).data.load().held_out, 128
        ):
            scores.add(hne(placed(images, hne)), target)
        environment = RunDirectory(run).environment()
        yield {
            "variant": variant,
            "seed": seed,
            "held_out": [asdict(score) for score in scores.result()],
            "macs": [hne.count_macs(size) for size in BINARY.nested_sizes],
            "versions": environment.versions,
            "commit": environment.commit,
        }


if __name__ == "__main__":
    found = list(rows(Path(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
