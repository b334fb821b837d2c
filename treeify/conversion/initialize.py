"""Where an ensemble's weights come from: fresh, copied or perturbed; and how they fill it.

Branch initialisation depends only on `(seed, level, branch)`: branch `i` of every level takes its
tensors from network `i`, which is drawn with a generator seeded from `(seed, i)`.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from treeify.engine.packed_tensors import Slot, get_tensor, named_tensors, narrow
from treeify.errors import InputError, joined
from treeify.models.architecture import Architecture
from treeify.seeds import seed_of
from treeify.tracing.model_copy import copy_model
from treeify.tree import Span, Tree

# Noise of `init="perturb"`, relative to the root mean square of the tensor it is added to.
PERTURBATION = 0.1

# What every branch begins with.
INITS = {
    "fresh": "every branch random weights of its own",
    "copy": "every branch the model's weights",
    "perturb": "the model's weights, in all leaves but the first with noise of"
    f" {PERTURBATION} times their root mean square",
}

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Source:
    """Where an ensemble's weights come from: as many networks as it has leaves.

    Args:
        state: the tensors of network `i`, under the base model's keys.
        by_leaf: network `i` is leaf `i`, so a shared branch comes from the first leaf below it;
            else network `i` gives branch `i` of every level that has one.
        drawn: every network was drawn with a seed of its own, so none should equal another.
        notes: what a user should know of them, a sentence each.
    """

    state: Callable[[int], State]
    by_leaf: bool = False
    drawn: bool = False
    notes: tuple[str, ...] = ()


def initial_weights(
    model: nn.Module,
    architecture: Architecture | None,
    scheme: str,
    seed: int,
    *,
    is_first: bool = False,
) -> Source:
    """The branches' first weights.

    Args:
        model: the base model. Not modified.
        architecture: builds the base model again, if that is known.
        scheme: `fresh`: every branch by the architecture's own scheme (by building it again, or
            by its modules' `reset_parameters`); `copy`: every branch equals the model; `perturb`: a
            copy plus noise of `PERTURBATION` times each tensor's root mean square, leaf 0 exact.
            What is frozen (see `frozen_tensors`) keeps the model's values in all of them.
        seed: makes it reproducible.
        is_first: the model was built with the seed of network 0, and so is that network.

    Raises:
        InputError: the scheme is unknown.
    """
    if scheme == "copy":
        source = copies(model)
    elif scheme == "perturb":
        source = Source(lambda network: perturbed(model, seed, network))
    elif scheme != "fresh":
        raise InputError(f"init={scheme!r} is unknown.", expected=f"one of {', '.join(INITS)}")
    elif architecture is None:
        notes = _notes_on_reset(model)
        source = Source(lambda network: reset(model, seed, network), drawn=True, notes=notes)
    else:
        source = _builds(model, architecture, seed, is_first=is_first)
    frozen = frozen_tensors(model)
    if not frozen:
        return source
    return replace(
        source,
        state=lambda network: {**source.state(network), **frozen},
        notes=(*source.notes, _note_on_frozen(model, frozen)),
    )


def _builds(model: nn.Module, architecture: Architecture, seed: int, *, is_first: bool) -> Source:
    """Networks built again, each with a seed of its own; the model itself may be the first."""
    ready = [dict(named_tensors(model))] if is_first else []

    def state(network: int) -> State:
        # Given away, so that its memory serves the next networks.
        if network == 0 and ready:
            return ready.pop()
        return built(architecture, seed, network)

    return Source(state, drawn=True)


def copies(model: nn.Module) -> Source:
    """The model's own tensors for every network."""
    state = dict(named_tensors(model))
    return Source(lambda network: state)


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training leaves as it is, by state-dict keys.

    Parameters that require no gradients, and the buffers (running statistics) that belong to such
    alone: the innermost module around a buffer that has parameters has no others.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = {key: tensor for key, tensor in parameters.items() if not tensor.requires_grad}
    if not frozen:
        return {}
    # By the path of every module with parameters in it, whether all of them are frozen.
    all_frozen: dict[str, bool] = {}
    for key in parameters:
        for path in _modules_around(key):
            all_frozen[path] = all_frozen.get(path, True) and key in frozen
    buffers = {
        key: buffer
        for key, buffer in model.named_buffers(remove_duplicate=False)
        if next(all_frozen[path] for path in _modules_around(key) if path in all_frozen)
    }
    return frozen | buffers


def _modules_around(key: str) -> Iterator[str]:
    """The paths of the modules around a tensor, from the innermost to the model itself."""
    while key:
        key = key.rpartition(".")[0]
        yield key


def _note_on_frozen(model: nn.Module, frozen: Mapping[str, Tensor]) -> str:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    count = len(frozen.keys() & parameters.keys())
    buffers = len(frozen) - count
    statistics = f", and {buffers} buffers that go with them" if buffers else ""
    return (
        f"keeps the model's values of {count} of its {len(parameters)} parameters in every branch,"
        f" since they are frozen (requires_grad is False){statistics}"
    )


def _notes_on_reset(model: nn.Module) -> tuple[str, ...]:
    """Whose scheme draws the weights of a model that cannot be built again."""
    scheme = (
        "initialised again by each layer's reset_parameters, which undoes what the constructor of"
        f" {type(model).__name__} sets beyond it; to draw weights as the constructor does, give a"
        " function that builds the model: 'package.module:function'"
    )
    stuck = [
        path or "the model itself" for path, module in model.named_modules() if _is_stuck(module)
    ]
    if not stuck:
        return (scheme,)
    return (
        f"perturbed by {PERTURBATION} times their root mean square, since they cannot initialise"
        f" themselves again: {', '.join(stuck)}",
        scheme,
    )


@torch.no_grad()
def fill(root: nn.Module, slots: Collection[Slot], tree: Tree, source: Source) -> None:
    """Fill an ensemble's packed tensors from `L` networks; two states are in memory at a time."""
    # Like no_grad, inference mode holds for one thread only: the copying thread enters it again.
    inference = torch.is_inference_mode_enabled()

    # Network by network, not tensor by tensor: only so are two networks in memory, and not all.
    def copy_branches(network: int, state: State) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for slot in slots:
                branches = tree.branches[slot.level]
                siblings = tree.leaves_below(slot.level) if source.by_leaf else 1
                branch, position = divmod(network, siblings)
                if position == 0 and branch < branches:
                    part = narrow(get_tensor(root, slot.key), branches, Span(branch, branch + 1))
                    part.copy_(state[slot.key])

    # Building a network occupies one core, copying it another.
    with ThreadPoolExecutor(1) as copier:
        copying = None
        for network in range(tree.leaves):
            state = source.state(network)
            if copying is not None:
                copying.result()
            copying = copier.submit(copy_branches, network, state)
            del state  # or it would stay in memory while the next but one is built
        if copying is not None:
            copying.result()


@torch.no_grad()
def require_drawn(root: nn.Module, slots: Collection[Slot], tree: Tree) -> list[str]:
    """Compare the branches of an ensemble that were drawn with seeds of their own.

    Returns:
        Notes on levels whose branches begin alike in part, or by their scheme, which has no random
        numbers.

    Raises:
        InputError: all that is trained in two branches of a level is the same.
    """
    notes = []
    for level, branches in enumerate(tree.branches[1:], start=1):
        tensors = {slot.key: get_tensor(root, slot.key) for slot in slots if slot.level == level}
        chunks = {
            key: tensor.chunk(branches)
            for key, tensor in tensors.items()
            if tensor.requires_grad and not tensor.is_meta
        }
        drawn = [key for key, (first, *_) in chunks.items() if varies(first)]
        twins = [index for index in range(1, branches) if _are_alike(chunks.values(), index)]
        alike = [key for key in drawn if torch.equal(*chunks[key][:2])]
        if chunks and twins and drawn:
            raise InputError(
                f"branches 0 and {twins[0]} of level {level} are one network: fresh weights came"
                " out the same, though each branch was built with a seed of its own.",
                expected="a model whose constructor draws its weights, and loads none",
                next_step='Begin with the weights it loads: init="copy" or init="perturb".',
            )
        if chunks and twins:
            notes.append(f"level {level}: branches begin alike, no random numbers initialise them")
        elif alike:
            notes.append(
                f"level {level}: {len(alike)} of {len(drawn)} parameters came out the same in its"
                f" branches, as if loaded when the model is built: {joined(alike, 3)}"
            )
    return notes


def _are_alike(chunks: Iterable[Sequence[Tensor]], branch: int) -> bool:
    return all(torch.equal(branches[0], branches[branch]) for branches in chunks)


def varies(tensor: Tensor) -> bool:
    """Whether it has several values: those of ones and zeros, as of norms, were not drawn."""
    return bool((tensor != tensor.flatten()[:1]).any())


def branch_seed(seed: int, network: int) -> int:
    """A seed for one network, far from every other's."""
    return seed_of("treeify", seed, network) >> 1


def built(architecture: Architecture, seed: int, network: int) -> State:
    """The tensors of a newly built base model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(branch_seed(seed, network))
        return dict(named_tensors(architecture.build()))


def reset(model: nn.Module, seed: int, network: int) -> State:
    """The tensors of a copy whose modules re-initialised themselves, the others perturbed."""
    fresh = copy_model(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(branch_seed(seed, network))
        for module in reversed(list(fresh.modules())):  # a parent's scheme overrides its layers'
            if _is_stuck(module):
                for parameter in module.parameters(recurse=False):
                    _perturb(parameter)
            elif (initialise := _reset_method(module)) is not None:
                initialise()
    return dict(named_tensors(fresh))


def perturbed(model: nn.Module, seed: int, network: int) -> State:
    """The model's tensors with noise on its parameters; network 0 is exact."""
    if network == 0:
        return dict(named_tensors(model))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(branch_seed(seed, network))
        noisy = {
            id(parameter): _perturb(parameter.detach().clone()) for parameter in model.parameters()
        }
    return {key: noisy.get(id(tensor), tensor) for key, tensor in named_tensors(model)}


def _is_stuck(module: nn.Module) -> bool:
    """Whether a module has parameters of its own and no way to initialise them again."""
    has_parameters = any(True for _ in module.parameters(recurse=False))
    return has_parameters and _reset_method(module) is None


def _reset_method(module: nn.Module) -> Callable[[], None] | None:
    for name in ("reset_parameters", "_reset_parameters"):  # MultiheadAttention has the latter
        method = getattr(module, name, None)
        if callable(method):
            with suppress(TypeError):  # it cannot be called without arguments
                inspect.signature(method).bind()
                return method  # type: ignore[no-any-return]
    return None


def _perturb(tensor: Tensor) -> Tensor:
    """Add noise in place."""
    if tensor.is_complex():
        _perturb(torch.view_as_real(tensor))
    elif tensor.is_floating_point():
        size = tensor.square().mean().sqrt() * PERTURBATION
        noise = torch.randn(tensor.shape, dtype=torch.float32)
        tensor.add_(noise.to(tensor.device, tensor.dtype) * size)
    return tensor
