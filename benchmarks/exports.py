"""Does a model of every class export? The smallest of each, as `tests/model_classes.py` lists them.

python benchmarks/exports.py                  # those without a row of the present versions
python benchmarks/exports.py --only ResNet    # those of one class again

Each is converted with two splits (one where it has no second), exported for any number of images,
and its files are compared with the ensemble. A row is appended once that is done, so that an
interrupted run goes on where it stopped. `python benchmarks/coverage.py` writes the page.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from coverage import EXPORTS, export_rows

import treeify
from treeify import files
from treeify.deploy.check import check_export
from treeify.errors import SplitError, TreeifyError
from treeify.parity.fresh_weights import settle

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import model_classes

_PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime")
_LONGEST_REASON = 600


def versions() -> dict[str, str]:
    """Of what exports."""
    return {package: version(package) for package in _PACKAGES}


def ensemble(case: model_classes.Case) -> treeify.HierarchicalEnsemble:
    """The case with two splits if it can be split twice, weights as training gives them."""
    torch.manual_seed(0)
    base = case.architecture.build()
    settle(base)
    x = torch.zeros(1, 3, case.size, case.size)
    try:
        hne = treeify.hierarchicalize(base, 2, init="perturb", example_input=x)
    except SplitError:
        hne = treeify.hierarchicalize(base, 1, init="perturb", example_input=x)
    return hne.eval()


def outcome(case: model_classes.Case) -> dict[str, Any]:
    """What is found of a case; `export` is "" where it is proven."""
    hne = ensemble(case)
    found: dict[str, Any] = {"leaves": hne.leaves}
    try:
        manifest = check_export(hne)
    except TreeifyError as error:
        found["export"] = one_line(error)
        try:
            check_export(hne, batch=1)
        except Exception as other:
            found["one_image"] = one_line(other)
        else:
            found["one_image"] = ""
        return found
    steps = manifest["steps"]
    difference = max(step["parity"]["largest_difference"] for step in steps)
    megabytes = sum(step["bytes"] for step in steps) / 1e6
    return found | {"export": "", "difference": difference, "megabytes": round(megabytes, 2)}


def one_line(error: Exception) -> str:
    """An error as text without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST_REASON]


def main() -> None:
    """Append the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="CLASS", help="these again")
    parser.add_argument("--output", type=Path, default=EXPORTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    present = versions()
    known = export_rows(options.output)
    for case in model_classes.CASES:
        row: Mapping[str, Any] = known.get(case.name, {})
        if options.only is None:
            wanted = row.get("versions") != present
        else:
            wanted = case.network in options.only or case.name in options.only
        if not wanted:
            continue
        start = perf_counter()
        try:
            found = outcome(case)
        except Exception as error:
            found = {"export": one_line(error)}
        seconds = round(perf_counter() - start, 1)
        row = {"network": case.network, "name": case.name, **found, "seconds": seconds}
        print(row["network"], row["name"], row["export"] or "proven", seconds, flush=True)
        files.append_line(options.output, json.dumps({**row, "versions": present}))


if __name__ == "__main__":
    main()
