"""Exported ensembles made by hand: four leaves in three steps, a matrix product for each branch.

Leaf 0 and leaf 1 share all but their heads, leaves 2 and 3 have a branch of their own. `Tiny` also
computes the leaf logits with numpy alone.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

SHAPE = (3, 4, 4)
SIZES = (1, 2, 4)
CLASSES = 5
MACS = {1: 100, 2: 130, 4: 250}
PREPARATION = {
    "size": [4, 4],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.25, 0.2, 0.3],
    "channels": 3,
    "crop_mode": "center",
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "classes": None,
    "source": "a test",
}
BUDGET = {
    "target_macs": 150,
    "sizes": [1, 2, 4],
    "thresholds": [0.4, 0.6],
    "macs": 151.5,
    "accuracy": 0.9,
    "shares": [0.5, 0.25, 0.25],
    "images": 64,
}
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tiny:
    """An export and its weights."""

    path: Path
    weights: dict[str, Array]

    def leaf_logits(self, images: Array) -> Array:
        """Logits of every leaf, `[N, 4, 5]`."""
        w = self.weights
        shared = np.tanh(images.reshape(len(images), -1) @ w["shared"])
        first = np.tanh(shared @ w["first"])
        second = np.tanh(shared @ w["second"])
        heads = [first @ w["head0"], first @ w["head1"], second @ w["head2"], second @ w["head3"]]
        return np.stack(heads, axis=1)

    def logits(self, images: Array, leaves: int = 4) -> Array:
        """The mean of the first leaves, `[N, 5]`."""
        mean: Array = self.leaf_logits(images)[:, :leaves].mean(1)
        return mean

    def manifest(self) -> dict[str, Any]:
        """What ensemble.json holds."""
        values: dict[str, Any] = json.loads((self.path / "ensemble.json").read_text())
        return values

    def rewrite(self, **changes: Any) -> None:
        """Change values of ensemble.json."""
        text = json.dumps(self.manifest() | changes, indent=2)
        (self.path / "ensemble.json").write_text(text)

    def images(self, count: int, seed: int = 0) -> Array:
        """Some images."""
        generator = np.random.default_rng(seed)
        return generator.standard_normal((count, *SHAPE)).astype(np.float32)


def write(
    path: Path,
    *,
    batch: str | int = "batch",
    droppable: bool = True,
    by_window: bool = False,
    output: str = "logits",
    **values: Any,
) -> Tiny:
    """Write an export.

    Args:
        path: the directory.
        batch: of its images.
        droppable: whether images may leave the batch.
        by_window: whether the value that step 2 reads has two rows per image.
        output: `logits`, or `classes`: integers, the likeliest class of each leaf; `pair`: both.
        values: of ensemble.json, in the place of others.
    """
    path.mkdir(parents=True)
    generator = np.random.default_rng(7)
    widths = {"shared": (48, 8), "first": (8, 6), "second": (8, 6)}
    widths |= {f"head{leaf}": (6, CLASSES) for leaf in range(4)}
    weights = {
        name: generator.standard_normal(width).astype(np.float32) / np.float32(width[0] ** 0.5)
        for name, width in widths.items()
    }
    first = ["batch*2", 3] if by_window else [batch, 6]
    specs = [
        (
            ["images"],
            {"kept_shared": [batch, 8], "kept_first": first},
            [
                ("Flatten", ["images"], "flat"),
                ("MatMul", ["flat", "shared"], "flat_shared"),
                ("Tanh", ["flat_shared"], "kept_shared"),
                ("MatMul", ["kept_shared", "first"], "first_"),
                ("Tanh", ["first_"], "features"),
                ("Reshape", ["features", "windows" if by_window else "whole"], "kept_first"),
                ("MatMul", ["features", "head0"], "scores0"),
            ],
            [0],
        ),
        (
            ["kept_first"],
            {},
            [
                ("Reshape", ["kept_first", "whole"], "features"),
                ("MatMul", ["features", "head1"], "scores1"),
            ],
            [1],
        ),
        (
            ["kept_shared"],
            {},
            [
                ("MatMul", ["kept_shared", "second"], "second_"),
                ("Tanh", ["second_"], "features"),
                ("MatMul", ["features", "head2"], "scores2"),
                ("MatMul", ["features", "head3"], "scores3"),
            ],
            [2, 3],
        ),
    ]
    steps, start = [], 0
    shapes: dict[str, list[Any]] = {"images": [batch, *SHAPE]}
    for index, (inputs, kept, nodes, leaves) in enumerate(specs):
        shapes |= kept
        names = {"logits": ["logits"], "classes": ["classes"], "pair": ["classes", "logits"]}[
            output
        ]
        file = f"step-{index + 1:02d}.onnx"
        _save(path / file, inputs, kept, nodes, leaves, shapes, weights, names)
        content = (path / file).read_bytes()
        steps.append(
            {
                "file": file,
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
                "parameters": 1,
                "start": start,
                "leaves": start + len(leaves),
                "macs": MACS[start + len(leaves)] - MACS.get(start, 0),
                "inputs": [{"name": name} for name in inputs],
                "outputs": [
                    *({"name": name, "kind": "leaves"} for name in names),
                    *(
                        {"name": name, "kind": "kept", "dtype": "float32", "shape": shape}
                        | {"batch_dim": 0}
                        for name, shape in kept.items()
                    ),
                ],
                "forms": {},
                "parity": None,
            }
        )
        start += len(leaves)
    structure: dict[str, Any] = {"tensor": output}
    if output == "pair":
        parts = [{"tensor": "logits"}, {"dict": {"classes": {"tensor": "classes"}}}]
        structure = {"tuple": [*parts, {"constant": None}]}
    manifest = {
        "format": "treeify-export",
        "version": 1,
        "name": "tiny",
        "versions": {},
        "classes": list("abcde"),
        "preparation": PREPARATION,
        "tree": {"fanouts": [2, 2], "leaves": 4, "nested_sizes": list(SIZES), "splits": []},
        "sizes": list(SIZES),
        "images": {"shape": [batch, *SHAPE], "dtype": "float32"},
        "macs": {str(size): macs for size, macs in MACS.items()},
        "output": structure,
        "droppable": droppable,
        "budgets": [BUDGET],
        "quantised": None,
        "steps": steps,
    }
    (path / "ensemble.json").write_text(json.dumps(manifest | values, indent=2))
    return Tiny(path, weights)


def _save(
    file: Path,
    inputs: list[str],
    kept: dict[str, list[Any]],
    nodes: list[tuple[str, list[str], str]],
    leaves: list[int],
    shapes: dict[str, list[Any]],
    weights: dict[str, Array],
    names: list[str],
) -> None:
    """One step, with only the weights that it reads."""
    constants = weights | {
        "whole": np.array([-1, 6]),
        "windows": np.array([-1, 3]),
        "leaf": np.array([1]),
    }
    made = [helper.make_node(kind, reads, [name]) for kind, reads, name in nodes]
    made += [
        helper.make_node("Unsqueeze", [f"scores{leaf}", "leaf"], [f"leaf{leaf}"]) for leaf in leaves
    ]
    made.append(helper.make_node("Concat", [f"leaf{leaf}" for leaf in leaves], ["logits"], axis=1))
    made.append(helper.make_node("ArgMax", ["logits"], ["classes"], axis=2, keepdims=0))
    read = {name for node in made for name in node.input}
    batch = shapes["images"][0]
    types = {"logits": (TensorProto.FLOAT, [batch, len(leaves), CLASSES])}
    types["classes"] = (TensorProto.INT64, [batch, len(leaves)])
    types |= {name: (TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(
        made,
        file.stem,
        [helper.make_tensor_value_info(name, *types[name]) for name in inputs],
        [helper.make_tensor_value_info(name, *types[name]) for name in (*names, *kept)],
        [numpy_helper.from_array(constants[name], name) for name in sorted(read & set(constants))],
    )
    opset = helper.make_opsetid("", 18)
    save(helper.make_model(graph, opset_imports=[opset], ir_version=10), str(file))
