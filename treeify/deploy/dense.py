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
from treeify.deploy.rewrites import rewrite
from treeify.deploy.values import BatchDim
from treeify.errors import ExportError

_aten = torch.ops.aten
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
    rewrite(graph)
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
    if "DataDependent" in type(error).__name__:
        advice = "A model that decides by the values of images has no graph that fits all of them."
    else:
        advice = "Try one size of batches: --batch 1 (batch=1)."
    raise ExportError(
        "torch.export cannot follow the model.",
        found=f"{type(error).__name__}: {error!s:.1000}",
        next_step=advice if dynamic else None,
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
