"""Convolutions of several branches with kernels of one pixel, written as batched products.

A grouped 1x1 convolution is a product for each group, and `[N, G*C, H, W]` holds the groups'
matrices as they are: none is copied. Whether that is faster depends on the runtime's kernels.
"""

from typing import Any

import numpy as np
import onnx_ir as ir


def write_products(graph: ir.Graph) -> int:
    """Replace what can be; how many were."""
    found = [node for node in graph if _is_product(node)]
    for node in found:
        _replace(graph, node)
    return len(found)


def _is_product(node: ir.Node) -> bool:
    if node.op_type != "Conv" or node.inputs[1] is None or not node.inputs[1].is_initializer():
        return False
    weight, sizes = _sizes(node.inputs[1]), _sizes(node.inputs[0])
    group = _attribute(node, "group", 1)
    strides, pads = _attribute(node, "strides", [1, 1]), _attribute(node, "pads", [0] * 4)
    plain = weight[2:] == [1, 1] and set(strides) == {1} and set(pads) == {0}
    # A depthwise one is no product worth the name.
    return group > 1 and plain and None not in sizes[1:] and weight[1] != 1


def _sizes(value: ir.Value | None) -> list[Any]:
    """A value's shape, with None where a size is not known."""
    shape = None if value is None else value.shape
    return [] if shape is None else [size if isinstance(size, int) else None for size in shape]


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    x, weight, *bias = node.inputs
    assert x is not None and weight is not None
    group = _attribute(node, "group", 1)
    (outputs, channels), (height, width) = _sizes(weight)[:2], _sizes(x)[2:]
    pixels = height * width
    rows = _node("Reshape", [x, _numbers(graph, node, "rows", [-1, group, channels, pixels])])
    matrices = _reshaped(graph, weight, [group, outputs // group, channels])
    product = _node("MatMul", [matrices, rows.outputs[0]])
    nodes = [rows, product]
    if bias and bias[0] is not None:
        column = _reshaped(graph, bias[0], [group, outputs // group, 1])
        nodes.append(_node("Add", [product.outputs[0], column]))
    back = _numbers(graph, node, "back", [-1, outputs, height, width])
    nodes.append(_node("Reshape", [nodes[-1].outputs[0], back]))
    result, old = nodes[-1].outputs[0], node.outputs[0]
    for number, new in enumerate(nodes):
        new.name = f"{node.name}~{number}"
        new.outputs[0].name = f"{old.name}~{number}"
    result.shape, result.type = old.shape, old.type
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _node(operation: str, inputs: list[ir.Value]) -> ir.Node:
    return ir.node(operation, inputs)


def _numbers(graph: ir.Graph, node: ir.Node, what: str, numbers: list[int]) -> ir.Value:
    name = f"{node.name}~{what}"
    value = ir.Value(
        name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(ir.DataType.INT64)
    )
    value.const_value = ir.tensor(np.array(numbers, dtype=np.int64), name=name)
    graph.register_initializer(value)
    return value


def _reshaped(graph: ir.Graph, weight: ir.Value, shape: list[int]) -> ir.Value:
    """A weight in another shape, read under its own name: the runtime folds the reshaping away."""
    assert weight.name is not None
    name = f"{weight.name}~{len(shape)}"
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(name=name, shape=ir.Shape(shape), type=weight.type)
    assert weight.const_value is not None
    value.const_value = ir.tensor(weight.const_value.numpy().reshape(shape), name=name)
    graph.register_initializer(value)
    return value
