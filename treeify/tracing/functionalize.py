"""In-place operations of a graph replaced by others.

A value may be shared by siblings: if the first of them changed it in place, the others would go on
from what it made of it.
"""

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from treeify.tracing.aliasing import VIEWS, Aliases, InPlaceError, ReadLaterError

_COPY = "treeify_copy"
# How fx names tensors that are neither parameters nor buffers, in the model it traces.
CONSTANT = "_tensor_constant"
IN_PLACE_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(operator, f"__i{name}__"): getattr(operator, f"__{name}__")
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "pow", "mod"),
        *("and", "or", "xor", "lshift", "rshift"),
    )
}

_RESHAPED = {"view": "reshape", "view_as": "reshape_as"}
_RENAMED = {"size": "shape"}


def set_item(value: Tensor, index: Any, item: Any) -> Tensor:
    """`value[index] = item` on a copy."""
    result = value.clone()
    result[index] = item
    return result


def call_on_copy(method: str, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An in-place method without an out-of-place twin, run on a copy."""
    result: Tensor = getattr(value.clone(), method)(*args, **kwargs)
    return result


def as_strided(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.as_strided` of a tensor without gaps, which its strides are meant for."""
    return value.contiguous().as_strided(*args, **kwargs)


def stride(value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`value.stride()` of a tensor without gaps."""
    return value.contiguous().stride(*args, **kwargs)


_OF_DENSE = {"as_strided": as_strided, torch.as_strided: as_strided, "stride": stride}


def join_constants(graph: fx.Graph) -> None:
    """Let all readers of a tensor that `forward` made read one node, so that changes reach them."""
    first: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if _is_constant(node):
            reader = first.setdefault(str(node.target), node)
            if reader is not node:
                node.replace_all_uses_with(reader)
                graph.erase_node(node)
        elif node.op == "call_method" and node.target == "__setitem__":
            node.op, node.target = "call_function", operator.setitem


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target).startswith(CONSTANT)


def functionalize(graph: fx.Graph, root: nn.Module, aliases: Aliases) -> None:
    """Replace in-place operations on values; updates of buffers stay, being the model's state.

    Later readers of the changed value, or of an alias that is the same tensor, read the result
    instead. An alias that is only a part of it, or of which it is a part, must not be read later:
    no value of the graph would be what that reader expects, a part changed and the rest as it was.

    Raises:
        InPlaceError: an operation has no out-of-place twin, or such an alias is read later.
    """
    for node in graph.nodes:
        target = in_place_target(node, root)
        if target is None or stems_from_state(target):
            continue
        # `n += 1` of a size gives a name another value, and the sum inside of `x[index] += y` is
        # seen by the set item after it alone, which is replaced in its turn.
        if node.target in IN_PLACE_OPERATORS and (_is_number(target) or _is_put_back(node, target)):
            _make_out_of_place(node)
            continue
        _check_unread(view_source(target), target, node)
        # Aliases are found by running the graph, which has to change the value in place for that.
        same = [target, *aliases.read_later(target, node)]
        _make_out_of_place(node)
        for value in same:
            for reader in list(value.users):
                if reader > node:  # in the order of the graph: those before it read the old value
                    reader.replace_input_with(value, node)


def reshape_views(graph: fx.Graph) -> None:
    """Let views be copies where a value has another memory format than in the base model.

    Packed branches, channels-last images and fused operations give values with strides of which
    `view` cannot take a view; `reshape` copies then. The graph has to be functional: a change in
    place would not reach what a copy was taken of.
    """
    for node in graph.nodes:
        if node.op == "call_method" and node.target in _RESHAPED and not _needs_view(node):
            node.target = _RESHAPED[node.target]
            node.kwargs = {_RENAMED.get(key, key): value for key, value in node.kwargs.items()}
        elif node.op in ("call_method", "call_function") and node.target in _OF_DENSE:
            node.op, node.target = "call_function", _OF_DENSE[node.target]


def isolate(
    graph: fx.Graph, changing: Mapping[fx.Node, Sequence[fx.Node]], aliases: Aliases
) -> None:
    """Give calls that change their inputs, though nothing about them says so, copies of these.

    `changing` has the inputs they change, by functions that were not traced into and leaf modules.
    Neither these, nor what they are views of, nor their parts may be read again afterwards.
    """
    for node, sources in changing.items():
        for source in sources:
            _check_unread(source, source, node)
            for other in aliases.read_later(source, node):
                _check_unread(other, source, node)
        # A function's arguments may hold the tensor anywhere inside of lists and dicts, and which
        # of them it changes was seen for one input only: it gets copies of all.
        if node.op == "call_function":
            node.target = _on_copies(node.target)
            continue
        for source in sources:
            with graph.inserting_before(node):
                copied = graph.call_method("clone", (source,))
            copied.meta = {**node.meta, _COPY: True}
            node.replace_input_with(source, copied)


def is_isolating_copy(node: fx.Node) -> bool:
    """Whether a value is a copy that `isolate` made, to be changed."""
    return _COPY in node.meta


def _needs_view(node: fx.Node) -> bool:
    """Whether a view shows the same bits as another dtype, or is one of the model's state."""
    # `reshape` takes no dtype; and a copy of a buffer would not pass on what is written into it.
    source, *arguments = (*node.args, *node.kwargs.values())
    if isinstance(source, fx.Node) and stems_from_state(source):
        return True
    return any(
        value.target is getattr and value.args[1] == "dtype"
        if isinstance(value, fx.Node)
        else isinstance(value, torch.dtype)
        for value in arguments
    )


def _on_copies(function: Any) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        return function(*args, **kwargs)

    return call


def in_place_target(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The value a node changes in place, as its name or flag says, if any."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(first, fx.Node):
        return None
    if node.op == "call_module":
        in_place = getattr(root.get_submodule(str(node.target)), "inplace", False)
    elif node.op == "call_method":
        in_place = _says_in_place(str(node.target))
    else:
        in_place = node.op == "call_function" and (
            node.target in IN_PLACE_OPERATORS
            or node.target is operator.setitem
            or _in_place_flag(node) is not None
            or _says_in_place(getattr(node.target, "__name__", ""))
        )
    return first if in_place else None


def _is_number(value: fx.Node) -> bool:
    """Whether a value is a size or computed from sizes, which `n += 1` leaves as they are."""
    if value.op == "call_method":
        return value.target in ("size", "dim", "numel", "nelement", "item")
    if value.op != "call_function":
        return False
    if value.target is getattr:
        return value.args[1] in ("shape", "ndim")
    # Python's own operators on tensors pass here too; then an input of theirs is no number.
    computes = getattr(value.target, "__module__", "") in ("_operator", "math", "builtins")
    return computes and all(map(_is_number, value.all_input_nodes))


def _is_put_back(node: fx.Node, part: fx.Node) -> bool:
    """Whether the operation is that of `x[index] += y`, which sets the part of `x` afterwards."""
    last = next(reversed(node.users), None)
    return (
        part.target is operator.getitem
        and last is not None
        and last.target is operator.setitem
        and last.args == (*part.args, node)
    )


def _says_in_place(name: str) -> bool:
    """Whether a function or method is named as torch names those that change their first input."""
    return name.endswith("_") and not name.endswith("__")


def _make_out_of_place(node: fx.Node) -> None:
    """Let a node compute what it would have put into its first input, if torch can do that."""
    if node.op == "call_module":
        return  # modules run with their `inplace` flag off: see `conversion.decide`
    if node.op == "call_method":
        name = str(node.target)
        # `add_` has `add`; `fill_`, `uniform_` and their like have no twin.
        if hasattr(Tensor, name[:-1]):
            node.target = name[:-1]
        else:
            node.op, node.target, node.args = "call_function", call_on_copy, (name, *node.args)
    elif node.target is operator.setitem:
        node.target = set_item
    elif node.target in IN_PLACE_OPERATORS:
        node.target = IN_PLACE_OPERATORS[node.target]
    elif (call := _in_place_flag(node)) is not None:
        call.arguments["inplace"] = False
        node.args, node.kwargs = call.args, call.kwargs
    else:
        name = getattr(node.target, "__name__", "")
        twin = getattr(torch, name[:-1], None) or getattr(nn.functional, name[:-1], None)
        if twin is None:
            raise InPlaceError(
                node,
                where=f"{name} changes a value in place and has no out-of-place twin.",
                next_step="Use the out-of-place operation in the model.",
            )
        node.target = twin


def _in_place_flag(node: fx.Node) -> inspect.BoundArguments | None:
    """The call's bound arguments if it sets `inplace=True`."""
    try:
        signature = inspect.signature(node.target)  # type: ignore[arg-type]
        call = signature.bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # builtins have no signature, and no such flag
        return None
    return call if call.arguments.get("inplace") is True else None


def stems_from_state(node: fx.Node) -> bool:
    """Whether a value is a parameter or buffer, or a view of one."""
    while (source := view_source(node)) is not None:
        node = source
    return node.op == "get_attr" and not _is_constant(node)


def view_source(node: fx.Node) -> fx.Node | None:
    """The value a node is a view of, or gives back after changing it, if any."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    reads_data = node.target is getattr and node.args[1] == "data"
    gives_back = name in VIEWS or name == "detach" or _says_in_place(name) or reads_data
    is_view = node.op in ("call_method", "call_function") and gives_back
    if name == "getitem" and not _is_slice(node.args[1]):
        return None  # what is picked is a copy
    source = node.args[0] if is_view and node.args else None
    return source if isinstance(source, fx.Node) else None


def _is_slice(index: Any) -> bool:
    """Whether an index gives a view: numbers and slices do, tensors and lists of them do not."""
    parts = index if isinstance(index, tuple) else (index,)
    return not any(
        isinstance(part, list | Tensor) or (isinstance(part, fx.Node) and not _is_number(part))
        for part in parts
    )


def _check_unread(source: fx.Node | None, changed: fx.Node, node: fx.Node) -> None:
    """Refuse reads of `source`, or of what it is a view of, after `node` changes `changed`."""
    while source is not None:
        late = [user for user in source.users if user > node]
        if late:
            view = "" if source is changed else f", a view of {source.name}"
            raise ReadLaterError(node, changed, view, late[0])
        source = view_source(source)
