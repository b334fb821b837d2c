"""A level's call as a plain graph: `torch.export`, batch norms folded, weights computed beforehand.

What a graph computes of its weights alone (slices of packed tensors, folded scales, bias tables)
is a graph of its own. Run on other branches' weights, it gives the same graph for those branches.
"""

import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from inspect import Parameter, signature
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from treeify.deploy.level_call import LevelCall
from treeify.deploy.values import BatchDim
from treeify.errors import ExportError

_aten = torch.ops.aten
_CONVOLUTIONS = (
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    *(_aten.conv2d.padding, _aten.conv1d.padding, _aten.conv3d.padding),
)
_NORMS = (_aten.batch_norm.default, _aten._native_batch_norm_legit_no_training.default)
# A table that is computed of fewer numbers may have so many; else weights would be stored twice.
_SMALL = 2**18
_ASSERTIONS = (
    _aten._assert_scalar.default,
    _aten._assert_async.msg,
    _aten._assert_tensor_metadata.default,
    _aten.sym_constrain_range_for_size.default,
    _aten.sym_constrain_range.default,
)


@dataclass(frozen=True)
class Template:
    """The graph of a level's call, for any branches in the place of those it was made for.

    Args:
        weights: from the packed tensors, by their order in `sources`, to what `main` reads.
        sources: per argument of `weights` a key of the ensemble, or a constant.
        main: the call; reads its weights as attributes `names`.
        names: of its weights, in the order in which `weights` gives them.
        dynamic: whether it takes batches of any size.
    """

    weights: fx.GraphModule
    sources: tuple[str | Tensor, ...]
    main: fx.Graph
    names: tuple[str, ...]
    dynamic: bool

    @torch.no_grad()
    def instantiate(self, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
        """The call with weights of its own.

        Args:
            tensors: packed ones, in which its branches come first.
        """
        sources = [
            tensors[source] if isinstance(source, str) else source for source in self.sources
        ]
        root = nn.Module()
        for name, tensor in zip(self.names, self.weights(*sources), strict=True):
            own = tensor.detach().clone(memory_format=torch.contiguous_format)
            root.register_buffer(name, own)
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.main, {}))
        return fx.GraphModule(root, graph, "DenseLevel")


def template(call: LevelCall, *, dynamic: bool) -> Template:
    """Export a call.

    Args:
        call: the call.
        dynamic: whether it must take batches of any size.

    Raises:
        ExportError: `torch.export` cannot follow the model, or only for one size of batches.
    """
    # A call for each attempt: what was tried in vain leaves traces.
    program = exported(call.again, call.examples(), call.batch_dims(), dynamic=dynamic)
    graph, sources = _functional(program, call)
    _fold_norms(graph)
    _write_repeats(graph)
    _write_attention(graph)
    return _separate(graph, sources, dynamic)


@torch.no_grad()
def exported(
    make: Callable[[], nn.Module],
    examples: list[Tensor],
    batch_dims: list[BatchDim],
    *,
    dynamic: bool,
) -> ExportedProgram:
    """Export a new module whose inputs grow with the batch in the dims given.

    Raises:
        ExportError: it cannot be, or only for the examples' batch.
    """
    error: Exception | None = None
    for shapes in _dynamic_shapes(make(), batch_dims) if dynamic else (None,):
        try:
            # Copies: tensors that share memory would be taken for one another's views.
            with _quiet():
                program = torch.export.export(
                    make(),
                    tuple(tensor.clone() for tensor in examples),
                    dynamic_shapes=shapes,
                    strict=False,
                )
        except Exception as raised:
            error = raised
            continue
        if not dynamic or _is_dynamic(program, batch_dims):
            return program
        error = None
    if error is None:
        raise ExportError(
            "the model computes with the number of images as with a constant.",
            expected="a model that takes batches of any size",
            next_step="Export it for one size: --batch 1 (batch=1).",
        )
    raise ExportError(
        "torch.export cannot follow the model.",
        found=f"{type(error).__name__}: {error!s:.1000}",
        next_step="Try one size of batches: --batch 1 (batch=1)." if dynamic else None,
    ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the graphs that are logged and printed where one is not followed."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _dynamic_shapes(module: nn.Module, batch_dims: list[BatchDim]) -> Any:
    """What to tell `torch.export` of shapes, more freely each time."""
    batch = Dim("batch", min=1, max=2**16)
    exact = tuple(
        None if dim is None else {dim[0]: batch if dim[1] == 1 else dim[1] * batch}
        for dim in batch_dims
    )
    free = tuple(None if dim is None else {dim[0]: Dim.AUTO} for dim in batch_dims)
    # A function that takes any number of arguments has one that is a tuple.
    kinds = [each.kind for each in signature(module.forward).parameters.values()]
    return [(shapes,) if Parameter.VAR_POSITIONAL in kinds else shapes for shapes in (exact, free)]


def _is_dynamic(program: ExportedProgram, batch_dims: list[BatchDim]) -> bool:
    """Whether no batch has become a constant."""
    names = program.graph_signature.user_inputs
    values = {
        node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"
    }
    return all(
        dim is None or isinstance(values[name].shape[dim[0]], torch.SymInt)
        for name, dim in zip(names, batch_dims, strict=True)
    )


def _functional(program: ExportedProgram, call: LevelCall) -> tuple[fx.Graph, dict[fx.Node, Any]]:
    """The program's graph without writes and assertions, and what its weights' inputs are."""
    if not all(_is_plain(node) for node in program.graph.nodes):
        program = program.run_decompositions({})
    graph, signature = program.graph, program.graph_signature
    sources: dict[fx.Node, Any] = {}
    by_name = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for spec in signature.input_specs:
        node = by_name[spec.arg.name]
        if spec.kind == InputKind.BUFFER:
            target = str(spec.target)
            sources[node] = call.keys[target] if target in call.keys else program.state_dict[target]
        elif spec.kind == InputKind.PARAMETER:
            sources[node] = program.state_dict[str(spec.target)].detach()
        elif spec.kind != InputKind.USER_INPUT:
            sources[node] = program.constants[str(spec.target)]
    (output,) = (node for node in graph.nodes if node.op == "output")
    wanted = [
        result
        for result, spec in zip(output.args[0], signature.output_specs, strict=True)
        if spec.kind == OutputKind.USER_OUTPUT
    ]
    output.args = (tuple(wanted),)
    for node in reversed(list(graph.nodes)):
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return graph, sources


def _is_plain(node: fx.Node) -> bool:
    """Whether an operation changes none of its arguments, and runs no graph of its own."""
    schema = getattr(node.target, "_schema", None)
    is_nested = node.op == "get_attr" or isinstance(node.target, torch._ops.HigherOrderOperator)
    return not is_nested and not (schema is not None and schema.is_mutable)


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
    graph.lint()


def _write_repeats(graph: fx.Graph) -> None:
    """Write repeated rows as expanding a dim: the translation of the former to ONNX is wrong."""
    for node in list(graph.nodes):
        if node.target is not _aten.repeat_interleave.self_int or len(node.args) < 3:
            continue
        x, times, dim = node.args[:3]
        shape = list(x.meta["val"].shape)
        dim %= len(shape)
        with graph.inserting_before(node):
            apart = graph.call_function(_aten.unsqueeze.default, (x, dim + 1))
            sizes = [-1] * (dim + 1) + [times] + [-1] * (len(shape) - dim - 1)
            wide = graph.call_function(_aten.expand.default, (apart, sizes))
            merged = graph.call_function(
                _aten.reshape.default, (wide, [*shape[:dim], -1, *shape[dim + 1 :]])
            )
        if all(isinstance(size, int) for size in (*shape[:dim], *shape[dim + 1 :])):
            node.replace_all_uses_with(merged)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


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
    graph.lint()


def _ndim(node: fx.Node) -> int:
    return len(node.meta["val"].shape)


def _separate(graph: fx.Graph, sources: Mapping[fx.Node, Any], dynamic: bool) -> Template:
    """Cut a graph into what depends on weights alone, and the rest."""
    constant = _constant_nodes(graph, sources)
    read = [
        node
        for node in graph.nodes
        if node in constant and any(user not in constant for user in node.users)
    ]
    weights, main = fx.Graph(), fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in sources:
        copied[node] = weights.placeholder(node.name)
    for node in graph.nodes:
        if node in constant and node not in sources:
            copied[node] = weights.node_copy(node, copied.__getitem__)
    weights.output(tuple(copied[node] for node in read))
    weights.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    names = {node: f"weight_{number}" for number, node in enumerate(read)}
    kept: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in constant:
            if node in names:
                kept[node] = main.get_attr(names[node])
        elif node.op == "output":
            main.output(fx.node.map_arg(node.args[0], kept.__getitem__))
        else:
            kept[node] = main.node_copy(node, kept.__getitem__)
    main.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return Template(
        fx.GraphModule(nn.Module(), weights),
        tuple(sources.values()),
        main,
        tuple(names.values()),
        dynamic,
    )


def _constant_nodes(graph: fx.Graph, sources: Mapping[fx.Node, Any]) -> set[fx.Node]:
    """The nodes that depend on weights alone, but for those that would store much more."""
    constant = set(sources)
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op != "call_function" or not inputs or not constant.issuperset(inputs):
            continue
        if node.target is not operator.getitem and _grows(node, inputs):
            continue
        constant.add(node)
    return constant


def _grows(node: fx.Node, inputs: list[fx.Node]) -> bool:
    value = node.meta.get("val")
    if value is None:  # written here, of weights as large
        return False
    values = value if isinstance(value, tuple | list) else [value]
    size = sum(each.numel() for each in values if isinstance(each, Tensor))
    before = [each.meta.get("val") for each in inputs]
    return size > max(_SMALL, sum(each.numel() for each in before if isinstance(each, Tensor)))
