"""One ONNX graph in 8 bits: weights per output channel, activations by the range they were seen in.

Weights are signed and activations unsigned, which is what processors multiply fastest. Without VNNI
they add pairs of such products in 16 bits and may overflow, so weights get 7 bits there.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from logging import CRITICAL, disable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from treeify.deploy.runtime import Array

_FLAGS = Path("/proc/cpuinfo")
_VNNI = {"avx512_vnni", "avx_vnni"}
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_JOINS = ("Add", "Concat")
_SHAPED = ("Relu", "Clip", "MaxPool", "AveragePool")
_MOVES = ("Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Flatten")


def has_vnni(cpuinfo: Path = _FLAGS) -> bool:
    """Whether this processor adds products of 8 bits in 32; no where the system does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = (line.partition(":")[2] for line in lines if line.startswith("flags"))
    return not _VNNI.isdisjoint(next(flags, "").split())


def quantise_graph(
    model: onnx.ModelProto,
    feeds: Iterable[dict[str, Array]],
    answers: Sequence[str],
    *,
    reduced_range: bool,
) -> onnx.ModelProto:
    """A graph whose products with weights run in 8 bits; inputs and outputs stay as they are.

    Left in float are the last products before an answer, those whose weights are batched, and sums
    and joins of anything but convolutions.

    Args:
        model: the graph. Not modified.
        feeds: arrays of all inputs, several times, to see the ranges of activations.
        answers: outputs whose last products stay in float.
        reduced_range: whether weights get 7 bits.
    """
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    fold_transposes(folded.graph)
    name_nodes(folded.graph)
    excluded = last_products(folded.graph, answers) | unfit_products(folded.graph)
    excluded |= joins_in_float(folded.graph)
    with tempfile.TemporaryDirectory() as folder, _silent():
        # By paths: of a model in memory the packages move the weights to a file, and lose it.
        source, result = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(folded, source)
        quantize_static(
            source,
            result,
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", *_JOINS, *_SHAPED, *_MOVES],
            per_channel=True,
            reduce_range=reduced_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(excluded),
        )
        quantised = onnx.load(result)
    _remove_leftovers(quantised)
    share_equal(quantised.graph)
    return quantised


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # it has no annotations
    """Arrays of all inputs, one after the other."""

    def __init__(self, feeds: Iterable[dict[str, Array]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


@contextmanager
def _silent() -> Iterator[None]:
    """Without advice on preparing the model, which is as it should be."""
    disable(CRITICAL)
    try:
        yield
    finally:
        disable(0)


def fold_transposes(graph: onnx.GraphProto) -> None:
    """Write weights as they are multiplied: else they would be taken for activations."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type != "Transpose" or node.input[0] not in weights:
            continue
        order = next((list(each.ints) for each in node.attribute if each.name == "perm"), None)
        array = numpy_helper.to_array(weights[node.input[0]]).transpose(order)
        graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(array), node.output[0])
        )
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    for name in weights.keys() - read:
        graph.initializer.remove(weights[name])


def name_nodes(graph: onnx.GraphProto) -> None:
    """Names for nodes that have none: by those they are excluded."""
    for number, node in enumerate(graph.node):
        node.name = node.name or f"node_{number}"


def last_products(graph: onnx.GraphProto, answers: Sequence[str]) -> set[str]:
    """The nodes from the last products to the answers, by their names."""
    makers = {name: node for node in graph.node for name in node.output}
    names: set[str] = set()
    wanted = list(answers)
    while wanted:
        node = makers.get(wanted.pop())
        if node is None or node.name in names:
            continue
        names.add(node.name)
        if node.op_type not in (*_PRODUCTS, "Shape"):  # a shape is no way that numbers take
            wanted += node.input
    return names


def unfit_products(graph: onnx.GraphProto) -> set[str]:
    """The products that cannot run with a scale for each channel, by their nodes' names.

    Those are all but the ones of a matrix of weights on the right: of a batch of matrices, each has
    channels of its own. Products of two activations are attention's, whose weights spread too far.
    """
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return {
        node.name
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] not in matrices
    }


def joins_in_float(graph: onnx.GraphProto) -> set[str]:
    """The sums and joins whose inputs do not all come from convolutions, by their nodes' names.

    Between convolutions, sums in 8 bits save going to float and back. Those of a transformer add up
    from layer to layer, to values that spread too far: its answers would be off by a third.
    """
    constants = {tensor.name for tensor in graph.initializer}
    inputs = {value.name for value in graph.input}  # an earlier step's, of whatever kind
    convolved: set[str] = set()
    names: set[str] = set()
    for node in graph.node:
        if node.op_type == "Conv" or (
            node.op_type in (*_SHAPED, *_MOVES) and node.input[0] in convolved
        ):
            convolved.update(node.output)
        elif node.op_type in _JOINS:
            sources = set(node.input) - constants - inputs
            if sources and sources <= convolved:
                convolved.update(node.output)
            else:
                names.add(node.name)
    return names


def batched_weights(graph: onnx.GraphProto) -> set[str]:
    """The products of a batch of matrices of weights, by their nodes' names."""
    batches = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 2}
    products = (node for node in graph.node if node.op_type == "MatMul")
    return {node.name for node in products if not batches.isdisjoint(node.input)}


def share_equal(graph: onnx.GraphProto) -> None:
    """Store equal constants once: each quantised tensor brings zeros of its own."""
    names: dict[str, str] = {}
    first: dict[bytes, str] = {}
    for tensor in list(graph.initializer):
        content = onnx.TensorProto()
        content.CopyFrom(tensor)
        content.name = ""
        names[tensor.name] = first.setdefault(content.SerializeToString(), tensor.name)
        if names[tensor.name] != tensor.name:
            graph.initializer.remove(tensor)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _remove_leftovers(model: onnx.ModelProto) -> None:
    """Remove what only quantising needed: shapes of all values, a domain that no node is of."""
    del model.graph.value_info[:]
    domains: set[Any] = {node.domain or "" for node in model.graph.node}
    kept = [each for each in model.opset_import if (each.domain or "") in domains | {""}]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    model.producer_name, model.producer_version = "treeify", ""
