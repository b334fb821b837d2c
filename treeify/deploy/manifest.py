"""What `ensemble.json` says: the tree, how images are prepared, and each step's file."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from treeify.anytime.confidence import BUDGET
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data.preparation import PREPARATION
from treeify.deploy.dense_steps import StepPlans
from treeify.deploy.formats import FORMAT, OPSET, PACKAGES, VERSION
from treeify.deploy.step import Step, output_names
from treeify.deploy.values import BatchDim


def row_of(
    hne: HierarchicalEnsemble, step: Step, file: Path, forms: Mapping[str, str]
) -> dict[str, Any]:
    """What the manifest says of a step that was written.

    Args:
        hne: the ensemble.
        step: the step.
        file: that it was written to.
        forms: how its levels run, by their names.
    """
    content = file.read_bytes()
    leaf_outputs = step.outputs[: len(step.outputs) - len(step.kept)]
    before = (
        (hne.count_macs(step.start), hne.count_parameters(step.start)) if step.start else (0, 0)
    )
    return {
        "file": file.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "parameters": hne.count_parameters(step.leaves) - before[1],
        "start": step.start,
        "leaves": step.leaves,
        "macs": hne.count_macs(step.leaves) - before[0],
        "inputs": [{"name": name} for name in step.inputs],
        "outputs": [
            *({"name": name, "kind": "leaves"} for name in leaf_outputs),
            *(
                {
                    "name": kept.name,
                    "kind": "kept",
                    "dtype": str(kept.example.dtype).removeprefix("torch."),
                    "shape": shape_of(kept.example, kept.batch_dim),
                    "batch_dim": None if kept.batch_dim is None else kept.batch_dim[0],
                }
                for kept in step.kept
            ),
        ],
        "forms": dict(forms),
        "parity": None,
    }


def manifest_of(
    plans: StepPlans, sizes: Sequence[int], name: str, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """What `ensemble.json` says of an export.

    Args:
        plans: its steps.
        sizes: where they end.
        name: of the model.
        rows: of the steps, see `row_of`.
    """
    hne = plans.hne
    preparation = None
    if hne.preparation is not None:
        preparation = PREPARATION.dump_python(hne.preparation, mode="json")
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "versions": {
            "treeify": version("treeify"),
            **{package: version(package) for package in ("torch", *PACKAGES)},
            "opset": OPSET,
        },
        "classes": None if preparation is None else preparation["classes"],
        "preparation": preparation,
        "tree": {
            "fanouts": list(hne.tree.fanouts),
            "leaves": hne.leaves,
            "nested_sizes": list(hne.tree.nested_sizes),
            "splits": list(hne.conversion.splits.specs),
        },
        "sizes": list(sizes),
        "images": {
            "shape": ["batch" if plans.dynamic else plans.images, *plans.image_shape],
            "dtype": "float32",
        },
        "macs": {str(size): hne.count_macs(size) for size in sizes},
        "output": structure_of(plans.output),
        "droppable": all(crossing.rows for crossing in plans.program.crossings.values()),
        "budgets": [
            BUDGET.dump_python(budget, mode="json", by_alias=True)
            for budget in hne.budgets.values()
            if budget.sizes == sizes
        ],
        "quantised": None,
        "steps": rows,
    }


def shape_of(example: Tensor, batch_dim: BatchDim) -> list[int | str]:
    """A tensor's shape with its batch by name."""
    shape: list[int | str] = list(example.shape)
    if batch_dim is not None:
        dim, times = batch_dim
        shape[dim] = "batch" if times == 1 else f"batch*{times}"
    return shape


def structure_of(output: Any) -> dict[str, Any]:
    """The structure of the model's output, as JSON values."""
    count = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(output))
    names = iter(output_names(count))

    def structure(value: Any) -> dict[str, Any]:
        if isinstance(value, Tensor):
            return {"tensor": next(names)}
        if isinstance(value, dict):
            return {"dict": {str(key): structure(each) for key, each in value.items()}}
        if isinstance(value, tuple | list):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [structure(each) for each in value]}
        return {"constant": value}

    return structure(output)
