"""Fine-tuning: which parts of an ensemble stay as they are, and a classifier that begins anew."""

import re
from collections.abc import Callable, Iterable, Iterator, Set
from fnmatch import fnmatchcase

import torch
from torch import fx, nn
from torch.nn import functional as F

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.initialize import State, built, varies
from treeify.engine.packed_tensors import get_tensor, named_tensors
from treeify.errors import RecipeError, nearest
from treeify.models.architecture import Architecture
from treeify.models.load_weights import classifier_paths
from treeify.models.saved_architecture import without_weights
from treeify.training.recipe import ModelRecipe

_LEVEL = re.compile(r"level (\d+)")


def level_of(hne: HierarchicalEnsemble, key: str) -> int:
    """The level of a parameter or buffer."""
    return hne.tree.branches.index(hne.branches_of(key))


def level_names(hne: HierarchicalEnsemble) -> list[str]:
    """Every level and where it begins, for messages."""
    splits = hne.conversion.splits.names
    return ["level 0", *(f"level {i} (from {name})" for i, name in enumerate(splits, start=1))]


@torch.no_grad()
def initialise(
    hne: HierarchicalEnsemble,
    model: ModelRecipe,
    seed: int,
    copied: Callable[[], HierarchicalEnsemble],
) -> None:
    """Give a new ensemble what fine-tuning begins with: a fresh head, frozen parts as the model's.

    Args:
        hne: the ensemble as `model.init` fills it.
        model: what is frozen, and whether the head is fresh.
        seed: of the head.
        copied: makes the same ensemble with `init: copy`.

    Raises:
        RecipeError: the head is not to be found, or frozen; or see `freeze`.
    """
    frozen = freeze(hne, model)
    if frozen and model.init != "copy":
        original = copied()
        for key in frozen:
            get_tensor(hne, key).copy_(get_tensor(original, key))
    if model.head == "fresh":
        paths = head_of(hne)
        keys = [key for key, _ in named_tensors(hne) if _is_below(key, paths)]
        if both := frozen & set(keys):
            raise RecipeError(
                f"model.freeze keeps {min(both)!r}, which model.head=fresh draws anew.",
                next_step="Leave the classifier out of model.freeze, or head: fresh out.",
            )
        if model.init != "fresh":  # which has drawn it already
            _draw(hne, keys, Architecture(model.name, model.kwargs), seed)


def freeze(hne: HierarchicalEnsemble, model: ModelRecipe) -> set[str]:
    """Exclude what a recipe freezes from training; the weights stay as they are.

    Returns:
        The keys of all parameters and buffers that are frozen.

    Raises:
        RecipeError: there is no such level or module, or nothing is left to train.
    """
    frozen = {key for pattern in model.freeze for key in _matching(hne, pattern)}
    for key in frozen:
        if isinstance(tensor := get_tensor(hne, key), nn.Parameter):
            tensor.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in hne.parameters()):
        raise RecipeError(
            "model.freeze leaves nothing to train.",
            expected="at least one parameter that is not frozen",
            found=f"freeze: {model.freeze}",
        )
    if model.freeze_norms:
        _check_norms(hne, frozen)
        parts = (key.rpartition(".") for key in frozen)
        hne.keep_evaluating(path for path, _, name in parts if name == "running_mean")
    return frozen


def frozen_at_random(model: ModelRecipe) -> str | None:
    """Says so where what a recipe freezes was never trained, as far as the recipe tells."""
    architecture = Architecture(model.name, model.kwargs)
    is_fresh = not (model.pretrained or model.weights or ":" in model.name)
    if not model.freeze or not is_fresh or without_weights(architecture) != architecture:
        return None
    return (
        f"model.freeze keeps random weights: nothing says where those of {model.name} come from."
        " Set model.pretrained=true or model.weights."
    )


def _check_norms(hne: HierarchicalEnsemble, frozen: Set[str]) -> None:
    """Raise RecipeError if a frozen batch norm cannot be put in evaluation mode by itself."""
    for node in hne.traced.graphs[True].nodes:
        if node.target is not F.batch_norm or not node.kwargs.get("training"):
            continue
        mean = node.args[1]
        if isinstance(mean, fx.Node) and (key := str(mean.target)) in frozen:
            raise RecipeError(
                f"model.freeze_norms: {key!r} is updated by F.batch_norm in the model's own code,"
                " which has one mode for all of the model.",
                expected="batch norms that are modules of torch or timm, e.g. nn.BatchNorm2d",
                next_step="Use these, or leave freeze_norms out.",
            )


def _matching(hne: HierarchicalEnsemble, pattern: str) -> set[str]:
    """The keys of the parameters and buffers of a level, or of the modules of some name."""
    keys = [key for key, _ in named_tensors(hne)]
    if level := _LEVEL.fullmatch(pattern.strip()):
        matching = {key for key in keys if level_of(hne, key) == int(level[1])}
    else:
        matching = {key for key in keys if any(fnmatchcase(p, pattern) for p in _prefixes(key))}
    if not matching:
        names = dict.fromkeys(prefix for key in keys for prefix in _prefixes(key))
        close = nearest(pattern, names)
        raise RecipeError(
            f"model.freeze: {pattern!r} names nothing that has weights.",
            expected=f"{', '.join(level_names(hne))}, or a module or parameter of the model"
            + (f" (did you mean {close}?)" if close else ""),
        )
    return matching


def _prefixes(key: str) -> Iterator[str]:
    """A key and the modules around it: `a`, `a.b`, `a.b.weight`."""
    parts = key.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def _is_below(key: str, paths: Iterable[str]) -> bool:
    return any(prefix in paths for prefix in _prefixes(key))


def head_of(hne: HierarchicalEnsemble) -> list[str]:
    """Paths of the classifier's modules: those timm names, else the last called with weights.

    Raises:
        RecipeError: the last weights are the model's own, not a module's.
    """
    skeleton = hne.skeleton
    if paths := classifier_paths(skeleton):
        return paths
    for node in reversed(hne.traced.graphs[False].nodes):
        target = str(node.target)
        if node.op == "call_module" and [*skeleton.get_submodule(target).parameters()]:
            return [target]
        if node.op == "get_attr" and "." in target and target in dict(skeleton.named_parameters()):
            return [target.rpartition(".")[0]]
    raise RecipeError(
        f"model.head=fresh: {type(skeleton).__name__} has no module that is its classifier.",
        expected="a last module with parameters",
        next_step="Leave head out, or set model.init=fresh.",
    )


def _draw(
    hne: HierarchicalEnsemble, keys: Iterable[str], architecture: Architecture, seed: int
) -> None:
    """Fill tensors as `init: fresh` does: branch `i` from network `i`, built anew.

    Raises:
        RecipeError: the builder loads them, so that they are the same in every network.
    """
    by_branches: dict[int, list[str]] = {}
    for key in keys:
        by_branches.setdefault(hne.branches_of(key), []).append(key)
    architecture = without_weights(architecture)
    first: State = {}
    # Two at least, to compare: one alone does not show whether it was drawn.
    for network in range(max(2, *by_branches)):
        state = built(architecture, seed, network)
        first = first or {key: state[key] for names in by_branches.values() for key in names}
        drawn = [key for key, tensor in first.items() if varies(tensor)]
        if network == 1 and drawn and all(torch.equal(first[key], state[key]) for key in drawn):
            raise RecipeError(
                f"model.head=fresh: {str(architecture)!r} loads the weights of its classifier"
                f" ({drawn[0]!r}) as it is built.",
                expected="a builder that draws them",
                next_step="Let it build the network alone, and give the file as model.weights.",
            )
        for branches, names in by_branches.items():
            if network < branches:
                leaf = network * (hne.leaves // branches)
                for key in names:
                    hne.part(key, leaf, get_tensor(hne, key)).copy_(state[key])
