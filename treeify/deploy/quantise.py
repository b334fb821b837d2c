"""An export in float32 -> the same one in 8 bits, calibrated step by step through its chain."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import Tensor

from treeify.arguments import require_iterable
from treeify.deploy.formats import MANIFEST
from treeify.deploy.quantisation_report import (
    Comparison,
    QuantisationReport,
    batch_of,
    batches,
    compare_quantised,
)
from treeify.deploy.quantised_graph import has_vnni, quantise_graph
from treeify.deploy.runtime import Anytime, Array, OnnxRuntimeGraph, Threads
from treeify.errors import InputError, described

_EXPECTED = "prepared images, [N, C, H, W] float32, together or in batches"


def quantise(
    source: Path,
    target: Path,
    images: Array,
    data: Comparison,
    *,
    reduced_range: bool | None = None,
) -> tuple[dict[str, Any], QuantisationReport]:
    """Write an export's steps in 8 bits.

    Values that steps give to later ones stay float32: a chain may mix files of both kinds.

    Args:
        source: an export in float32.
        target: a directory, where the steps and `ensemble.json` are written.
        images: what activations' ranges are taken from, `[N, C, H, W]`.
        data: what both are compared with.
        reduced_range: whether weights get 7 bits; by default where there is no VNNI.

    Returns:
        What the new `ensemble.json` says, and how both compare.
    """
    vnni = has_vnni()
    reduced = not vnni if reduced_range is None else reduced_range
    scheme = "QDQ U8S8 per channel" + (", reduced range" if reduced else "")
    before = Anytime(source, threads=1, preload="none")
    manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
    for number, row in enumerate(manifest["steps"]):
        model = quantise_graph(
            onnx.load(source / row["file"]),
            calibration_feeds(before, number, images),
            [output["name"] for output in row["outputs"] if output["kind"] == "leaves"],
            reduced_range=reduced,
        )
        content = model.SerializeToString()
        (target / row["file"]).write_bytes(content)
        row |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest["quantised"] = {
        "scheme": scheme,
        "reduced_range": reduced,
        "calibrated_on": {"images": len(images)},
    }
    _write(target, manifest)
    after = Anytime(target, threads=1, preload="none")
    report = compare_quantised(before, after, data, scheme=scheme, vnni=vnni)
    for row, compared in zip(manifest["steps"], report.rows, strict=True):
        if row["parity"] is not None:
            row["parity"] = {
                "largest_difference": compared.largest_difference,
                "batches": [batch_of(before)],
            }
    _write(target, manifest)
    return manifest, report


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def calibration_feeds(model: Anytime, number: int, images: Array) -> Iterator[dict[str, Array]]:
    """The inputs of a step, from what the steps before it keep of images.

    Computed anew for each step: what is kept of all images may not fit into memory.

    Yields:
        Arrays by the names of the step's inputs, of one batch.
    """
    rows = model.manifest["steps"]
    graphs = [OnnxRuntimeGraph(str(model.path / row["file"]), Threads(1)) for row in rows[:number]]
    names = [value["name"] for value in rows[number]["inputs"]]
    for _, batch in batches(images, batch_of(model)):
        values = {"images": batch}
        for graph in graphs:
            feeds = {name: values[name] for name in graph.inputs}
            values |= zip(graph.outputs, graph.run(feeds, graph.outputs), strict=True)
        yield {name: values[name] for name in names}


def calibration_images(name: str, data: Any, shape: tuple[int, ...]) -> Array:
    """Images for calibrating as one array.

    Args:
        name: of the argument, for messages.
        data: images, or several batches of them.
        shape: of one of them, `(C, H, W)`.

    Raises:
        InputError: there are none, or they are of another shape, not floats, or not finite.
    """
    if not isinstance(data, Tensor | np.ndarray):
        require_iterable(name, data, _EXPECTED)
        data = [_array(name, part, shape) for part in data]
        images = np.concatenate(data) if data else np.zeros((0, *shape), np.float32)
    else:
        images = _array(name, data, shape)
    if not len(images):
        raise InputError(f"{name} has no images.", expected=_EXPECTED)
    if not np.isfinite(images).all():
        raise InputError(f"{name} holds NaN or infinity.", expected=_EXPECTED)
    return np.ascontiguousarray(images, dtype=np.float32)


def _array(name: str, part: Any, shape: tuple[int, ...]) -> Array:
    array = part.detach().cpu().numpy() if isinstance(part, Tensor) else part
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name} holds something else.", expected=_EXPECTED, found=described(part))
    if array.shape[1:] != shape or array.dtype.kind != "f":
        raise InputError(
            f"{name} does not fit the model.",
            expected=f"floats of shape [N, {', '.join(map(str, shape))}]",
            found=f"{array.dtype} of shape {list(array.shape)}",
            next_step="Prepare images as the model's were, of the size it is exported for.",
        )
    return array


def comparison(images: Array, labels: Any, held_out: Any, shape: tuple[int, ...]) -> Comparison:
    """What to compare with: images that were held out if there are any, else those calibrated on.

    Raises:
        InputError: images do not fit, or there are not as many labels.
    """
    if held_out is None:
        return Comparison(images, _labels("int8_labels", labels, images))
    if not isinstance(held_out, tuple | list) or len(held_out) != 2:
        raise InputError(
            "int8_held_out is no pair.", expected="(images, labels)", found=described(held_out)
        )
    others = calibration_images("int8_held_out", held_out[0], shape)
    return Comparison(others, _labels("int8_held_out", held_out[1], others), held_out=True)


def _labels(name: str, labels: Any, images: Array) -> Array | None:
    if labels is None:
        return None
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if array.shape != (len(images),) or array.dtype.kind not in "iu":
        raise InputError(
            f"the labels of {name} do not fit the images.",
            expected=f"{len(images)} integers, one for each image",
            found=f"{array.dtype} of shape {list(array.shape)}",
        )
    return array
