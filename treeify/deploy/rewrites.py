"""Changes of a level's graph: batch norms folded, and what no translation to ONNX gets right."""

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
_CONVOLUTIONS = (
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    *(_aten.conv2d.padding, _aten.conv1d.padding, _aten.conv3d.padding),
)
_NORMS = (_aten.batch_norm.default, _aten._native_batch_norm_legit_no_training.default)


def rewrite(graph: fx.Graph) -> None:
    """Change a graph in place; what it computes stays."""
    _fold_norms(graph)
    _write_repeats(graph)
    _write_attention(graph)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    graph.lint()


def _fold_norms(graph: fx.Graph) -> None:
    """Write a batch norm that alone reads a convolution as a change of the latter's weights."""
    for node in list(graph.nodes):
        if node.target not in _NORMS:
            continue
        x, scale, shift, mean, variance = node.args[:5]
        conv: Any = x
        eps = node.args[7] if node.target is _NORMS[0] else node.args[6]
        if conv.target not in _CONVOLUTIONS or len(conv.users) > 1 or mean is None:
            continue
        weight, bias = conv.args[1], conv.args[2] if len(conv.args) > 2 else None
        dims = len(weight.meta["val"].shape)
        # Here, where the norm's weights are there; the convolution may stand before them.
        with graph.inserting_before(node):
            call = graph.call_function
            factor = call(_aten.rsqrt.default, (call(_aten.add.Tensor, (variance, eps)),))
            if scale is not None:
                factor = call(_aten.mul.Tensor, (factor, scale))
            column = call(_aten.view.default, (factor, [-1] + [1] * (dims - 1)))
            scaled = call(_aten.mul.Tensor, (weight, column))
            offset = call(_aten.neg.default, (mean,))
            if bias is not None:
                offset = call(_aten.add.Tensor, (offset, bias))
            offset = call(_aten.mul.Tensor, (offset, factor))
            if shift is not None:
                offset = call(_aten.add.Tensor, (offset, shift))
            folded = call(conv.target, (conv.args[0], scaled, offset, *conv.args[3:]))
        for reader in list(node.users) if node.target is _NORMS[1] else [node]:
            reader.replace_all_uses_with(folded)
            if reader is not node:
                graph.erase_node(reader)
        graph.erase_node(node)
        graph.erase_node(conv)


def _write_repeats(graph: fx.Graph) -> None:
    """Write repeated rows as expanding a dim: the translation of the former to ONNX is wrong."""
    for node in list(graph.nodes):
        if node.target is not _aten.repeat_interleave.self_int or len(node.args) < 3:
            continue
        x, times, dim = node.args[:3]
        shape = list(x.meta["val"].shape)
        dim %= len(shape)
        both_known = isinstance(times, int) and isinstance(shape[dim], int)
        merged = [size if isinstance(size, int) else -1 for size in shape]
        merged[dim] = times * shape[dim] if both_known else -1
        if merged.count(-1) > 1:
            continue
        with graph.inserting_before(node):
            apart = graph.call_function(_aten.unsqueeze.default, (x, dim + 1))
            sizes = [-1] * (dim + 1) + [times] + [-1] * (len(shape) - dim - 1)
            wide = graph.call_function(_aten.expand.default, (apart, sizes))
            node.replace_all_uses_with(graph.call_function(_aten.reshape.default, (wide, merged)))


def _write_attention(graph: fx.Graph) -> None:
    """Write attention among tensors of other than four dims as one of four: ONNX has no other."""
    for node in list(graph.nodes):
        if node.target is not _aten.scaled_dot_product_attention.default:
            continue
        arguments, named = list(node.args), dict(node.kwargs)
        if len(arguments) > 3:
            named["attn_mask"] = arguments.pop(3)
        mask = named.get("attn_mask")
        # A mask of rows and columns alone is for all images.
        whole = [*arguments, *([mask] if mask is not None and _ndim(mask) > 2 else [])]
        shapes = [list(argument.meta["val"].shape) for argument in whole]
        lead = shapes[0][:-2]
        unknown = sum(not isinstance(size, int) for size in lead)
        if len(node.args) > 4 or len(lead) == 2 or unknown > 1:
            continue
        if any(shape[:-2] != lead for shape in shapes):
            continue
        # `[.., L, E]`: dims before the heads are as many images more.
        heads = lead[-1:] if len(lead) > 2 else [1]
        with graph.inserting_before(node):
            call = graph.call_function
            flat = [
                call(_aten.reshape.default, (argument, [-1, *heads, *shape[-2:]]))
                for argument, shape in zip(whole, shapes, strict=True)
            ]
            if len(flat) > 3:
                named["attn_mask"] = flat.pop()
            result = call(node.target, tuple(flat), named)
            known = [size if isinstance(size, int) else -1 for size in lead]
            back = [*known, shapes[0][-2], shapes[2][-1]]
            back_again = call(_aten.reshape.default, (result, back))
        node.replace_all_uses_with(back_again)
        graph.erase_node(node)


def _ndim(node: fx.Node) -> int:
    return len(node.meta["val"].shape)
