"""What a forward pass may do that no fx graph shows: a module that does it has to be one call."""

import copy
import inspect
import random
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction

from treeify.errors import TraceError
from treeify.tracing.functionalize import CONSTANT

_NUMBERS = (bool, int, float, str)
# What every module has, and what `module.compile()` adds, which no copy takes along.
_TABLES = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
_WITHOUT_GRADIENT = {"shape", "ndim", "dtype", "device", "size", "dim", "numel", "detach"}


def gradient_and_autocast() -> tuple[bool, tuple[Any, ...]]:
    """What `torch.no_grad` and `torch.autocast` set, and how many of the latter are entered.

    `torch.autocast(..., enabled=False)` sets nothing that is not set already while tracing.
    """
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    enabled = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds]
    torch.autocast_increment_nesting()
    depth = torch.autocast_decrement_nesting()
    return torch.is_grad_enabled(), (depth, enabled)


def has_saved_tensor_hooks() -> bool:
    """Whether activations are not kept as they are, as `torch.utils.checkpoint` does not."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def has_gradient(node: fx.Node, root: nn.Module) -> bool:
    """Whether a value may depend on a parameter in a way that gradients follow."""
    parameters = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    seen, pending = {node}, [node]
    while pending:
        value = pending.pop()
        target = str(value.target)
        if value.op == "get_attr" and target in parameters:
            return True
        if value.op == "call_module" and any(name.startswith(f"{target}.") for name in parameters):
            return True
        reads = value.args[1] if value.target is getattr else target
        if reads not in _WITHOUT_GRADIENT:
            pending += [source for source in value.all_input_nodes if source not in seen]
            seen.update(value.all_input_nodes)
    return False


class StateError(TraceError):
    """A module has a state that branches cannot have one each of."""


class Snapshot:
    """A module's attributes and the random generators' states, before its forward pass."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._numbers, self._random_states = _numbers(module), _random_states()
        self._attributes = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in attributes(module).items()
        }

    def compare(self, read: Container[int]) -> list[str]:
        """Attributes that got values in the pass, whose other side effects are refused.

        `read` has the ids of the tensors that were read in it.

        Raises:
            TraceError: it changed a number or draws random ones, or keeps a state (StateError).
        """
        changed = changed_number(self._numbers, _numbers(self.module))
        if changed is not None:
            self._refuse(changed)
        if _random_states() != self._random_states:
            raise TraceError("it draws random numbers, of which a graph would keep one draw")
        assigned = []
        for key, value in attributes(self.module).items():
            if not any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(value)):
                continue
            # What was put where a tensor was that the pass has read is read by the next one, as a
            # running mean is. What was put where none was, or one that is but left from an earlier
            # pass (a cache, an output to look at), is made anew by every pass.
            if _displaces_tensors(self._attributes.get(key), value, read):
                self._refuse(key)
            assigned.append(key)
        return assigned

    def _refuse(self, key: str) -> NoReturn:
        kind = type(self.module).__name__
        raise StateError(f"{kind} changes its attribute {key!r}, which no graph shows")


def attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes that are no parameters, buffers, modules or hooks."""
    return {key: value for key, value in vars(module).items() if key not in _TABLES}


def _displaces_tensors(before: Any, now: Any, read: Container[int]) -> bool:
    """Whether what an attribute holds now took a read tensor's place, or was added to a list."""
    if isinstance(before, dict) and isinstance(now, dict):  # a cache gets new keys
        before = [value for key, value in before.items() if now.get(key) is not value]
    return now is before or any(id(leaf) in read for leaf in tree_leaves(before))


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in attributes(module).items() if type(value) in _NUMBERS}


def numbers_within(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module, and of those in it, that hold numbers or text, by their path."""
    return {
        f"{path}.{key}" if path else key: value
        for path, inner in module.named_modules()
        for key, value in _numbers(inner).items()
    }


def changed_number(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first attribute that holds another number or text than before; None if none does."""
    return next((key for key, value in before.items() if now.get(key, value) != value), None)


def version(value: Any) -> int | None:
    """How often a tensor was changed in place; None for what does not tell."""
    tells = isinstance(value, Tensor) and not value.is_inference()
    return int(value._version) if tells else None


def _random_states() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    kind, keys, position, *_ = state
    numpy_state = (kind, bytes(keys), position)
    return random.getstate(), numpy_state, torch.get_rng_state().numpy().tobytes()


class ReadTensors(TorchFunctionMode):
    """While entered, notes by their ids the tensors that torch's functions are called with."""

    def __init__(self, read: dict[int, Tensor]) -> None:
        super().__init__()
        self.read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, its tensors noted; they are kept, so that no others have their ids."""
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if type(leaf) is Tensor:
                self.read[id(leaf)] = leaf
        return func(*args, **kwargs)


@contextmanager
def refuse_autograd_functions() -> Iterator[list[type]]:
    """Within, an `autograd.Function` of the user's stops tracing.

    The operations in its forward would be recorded one by one, and autograd would differentiate
    them, where the user has written another backward.

    Yields:
        Of torch's own what runs as if it was not there: that of `torch.utils.checkpoint`.
    """
    apply = inspect.getattr_static(torch.autograd.Function, "apply")
    left_out: list[type] = []

    def stop(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            left_out.append(cls)
            run, _, *inputs = args
            return run(*inputs)
        if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            raise TraceError(f"{cls.__name__} has a backward of its own, which no graph shows")
        return apply.__get__(None, cls)(*args, **kwargs)

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(stop)):
        yield left_out


@contextmanager
def undo_side_effects(model: nn.Module) -> Iterator[None]:
    """Undo what passes leave behind in a model, such as caches, and changes of its mode.

    Constants that the tracer put into it stay, since its graphs read them.
    """
    tables = ("_parameters", "_buffers", "_modules")
    before = [
        (module, {**vars(module), **{table: dict(vars(module)[table]) for table in tables}})
        for module in model.modules()
    ]
    # A cache that is filled is the same object before and after: its contents are put back.
    caches = [
        (cache, copy.copy(cache))
        for module in model.modules()
        for cache in attributes(module).values()
        if isinstance(cache, dict | list)
    ]
    try:
        yield
    finally:
        constants = {key: value for key, value in vars(model).items() if key.startswith(CONSTANT)}
        for module, state in before:
            graph = vars(module).get("_graph")
            vars(module).clear()
            vars(module).update(state)
            if isinstance(module, fx.GraphModule) and module.graph is not graph:
                module.recompile()  # its class has the forward of the mode's graph
        for cache, contents in caches:
            cache.clear()
            if isinstance(cache, dict):
                cache.update(contents)
            else:
                cache.extend(contents)
        vars(model).update(constants)
