"""What a user calls: a model or its name, or trained models, in; an ensemble out."""

import logging
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from treeify.conversion.assemble import assemble, blank_image
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.initialize import INITS, Source, initial_weights
from treeify.conversion.resolve import resolve, unwrapped
from treeify.conversion.trained import load_trained
from treeify.data.preparation import Preparation
from treeify.engine.packed_tensors import named_tensors
from treeify.errors import InitWarning, InputError, ModelError, quoted
from treeify.models.architecture import Architecture
from treeify.models.fingerprint import fingerprint
from treeify.models.recognise import recognise
from treeify.tracing.hooks import changing_hooks
from treeify.tracing.model_copy import copy_model
from treeify.tracing.trace import plain_tensors

_log = logging.getLogger(__name__)


def hierarchicalize(
    model: nn.Module | str | Architecture,
    splits: int | str | Sequence[str] = 4,
    fanout: int = 2,
    init: str | None = None,
    seed: int = 0,
    example_input: Tensor | None = None,
    weights: str | Path | None = None,
    *,
    trust: bool = False,
) -> HierarchicalEnsemble:
    """Turn a classifier into a tree of networks that share their early layers.

    Args:
        model: traceable classifier, `[N, C, H, W] float -> [N, K]` logits, not modified; or a
            name: timm's (`mobilenetv2_140`), `torchvision/resnet50` or `package.module:function`.
        splits: how many splits, chosen so that the levels' MACs are even (logged at level INFO, and
            in `hne.conversion`); or names of modules from input to output, with a fanout if it
            differs (`["layer2", "layer3:16"]`); `"input"` splits before the first operation; `[]`
            is the base model itself.
        fanout: children per split that names none, at least 2.
        init: `fresh`: every branch its own initialisation by the architecture's own scheme;
            `copy`: every leaf equals the model; `perturb`: copy plus seeded noise of 0.1 times
            each tensor's root mean square, leaf 0 exact. By default `perturb` with weights, else
            `fresh`, with an `InitWarning` where that passes over a module's own weights.
        seed: of everything random; same seed, same weights.
        example_input: an input of the size the model expects, `[N, C, H, W]`; found by itself for
            timm's and torchvision's models, else `[1, 3, 224, 224]`.
        weights: a file of trained weights (`treeify.models.weights.read_weights`), or the directory
            of an ensemble or a run. An ensemble that splits alike gives every branch its own,
            whatever `init` is; of another one leaf 0 is the model.
        trust: as in `treeify.load`, for a directory of weights.

    Returns:
        An ensemble mapping `[N, C, H, W]` to leaf logits `[N, L, K]`, L the product of the fanouts.

    Raises:
        ModelError: the name is unknown.
        SplitError: a split is unknown, repeated or out of order, or a fanout below 2.
        TraceError: the model cannot be traced; names the line that stopped it.
        InputError: the model does not run on the example input, init is unknown, would throw the
            weights away, or is `fresh` for a model that loads its weights as it is built.
        CheckpointError: the weights cannot be read or do not fit.

    Source: Ruiz & Verbeek, AAAI 2021, section 3.
    """
    scheme = choose_init(init, model, weights)
    base, architecture = resolve(model, seed)
    is_built = architecture is not None
    trained = None
    if weights is not None:
        name, classes = None, None
        if architecture is not None:
            name, classes = architecture.name, architecture.kwargs.get("num_classes")
        trained = load_trained(base, weights, classes, name=name, trust=trust)
        base = trained.model
    # Only fresh weights and a reload need to build the model again: look for a builder then.
    architecture = architecture or recognise(base)
    hne = assemble(base, architecture, splits, fanout=fanout, example_input=example_input)
    if trained is not None:
        _take_over(hne, [trained.preparation])
    _log.info("splits: %s", ", ".join(hne.conversion.splits.specs) or "none")
    source = initial_weights(base, architecture, scheme, seed, is_first=is_built)
    if trained is not None:
        note = f"init: {scheme}, {INITS[scheme]}"
        source = trained.branches(hne) or replace(
            source, notes=(*trained.notes, note, *source.notes)
        )
    del base, trained  # their memory serves the branches
    hne.fill(source)
    return hne


def choose_init(
    init: str | None, model: nn.Module | str | Architecture, weights: str | Path | None
) -> str:
    """The scheme of `initial_weights` that `hierarchicalize` is asked for.

    Raises:
        InputError: fresh weights would throw the trained ones away.
    """
    if weights is not None and init == "fresh":
        raise InputError(
            f"init='fresh' would throw the weights of {str(weights)!r} away.",
            expected="copy or perturb with weights, or no weights",
        )
    if init is None and weights is None and isinstance(model, nn.Module):
        warnings.warn(
            f"every branch gets fresh weights, none of this {type(model).__name__}'s. Say what is"
            ' meant: init="fresh"; init="perturb" keeps its weights, exactly in leaf 0 and with'
            ' noise in the others; init="copy" keeps them in every leaf.',
            InitWarning,
            stacklevel=3,
        )
    return init or ("fresh" if weights is None else "perturb")


def pack(
    models: Sequence[nn.Module | str | Path],
    splits: int | str | Sequence[str] = 4,
    example_input: Tensor | None = None,
    architecture: str | Architecture | None = None,
    *,
    trust: bool = False,
) -> HierarchicalEnsemble:
    """Pack `L` trained base models of one architecture into an ensemble.

    Leaf `i` takes its own branches from model `i`; a shared branch comes from the first below.

    Args:
        models: as many as the tree has leaves, in depth-first order, not modified; or paths of
            their weights, as in `hierarchicalize`.
        splits: as in `hierarchicalize`; splits without a fanout share the one that fits.
        example_input: as in `hierarchicalize`.
        architecture: whose weights the paths hold, if any are given: a name, as in
            `hierarchicalize`.
        trust: as in `treeify.load`, for directories of weights.

    Raises:
        ModelError: the models differ in architecture, in hooks that change what they compute, in
            a tensor that is neither a parameter nor a buffer, or in how the ensembles they are from
            prepare images; or paths came without an architecture.
        SplitError: no fanouts give as many leaves as there are models, or a split is wrong.
        TraceError: the models cannot be traced.
        CheckpointError: weights cannot be read or do not fit.
    """
    if not models:
        raise ModelError("there are no models to pack.", expected="one model per leaf")
    built, named = (None, None) if architecture is None else resolve(architecture)
    networks, notes, preparations = [], [], []
    for leaf, model in enumerate(models):
        if isinstance(model, nn.Module):
            networks.append(unwrapped(model))
            continue
        if built is None:
            raise ModelError(
                f"the weights of {str(model)!r} do not say what they are of.",
                expected="architecture='resnet50', or the name of yours",
            )
        name = None if named is None else named.name
        trained = load_trained(built, model, name=name, trust=trust)
        networks.append(trained.model)
        preparations.append(trained.preparation)
        notes += [f"leaf {leaf}: {note}" for note in trained.notes]
    first = networks[0]
    _check_alike(first if built is None else built, networks)
    hne = assemble(
        first,
        named or recognise(first),
        splits,
        leaves=len(networks),
        example_input=example_input,
    )
    _check_constants(networks, plain_tensors(hne.traced))
    _check_hooks(networks, blank_image(first, hne.example, hne.traced.batch))
    _take_over(hne, preparations)
    states = [dict(named_tensors(network)) for network in networks]
    hne.fill(Source(states.__getitem__, by_leaf=True, notes=tuple(notes)))
    return hne


def _check_alike(base: nn.Module, models: Sequence[nn.Module]) -> None:
    expected = fingerprint(base)
    named = "model 0" if base is models[0] else "the architecture"
    for index, model in enumerate(models):
        if fingerprint(model) != expected:
            raise ModelError(
                f"model {index} is not built like {named}.",
                expected=f"{type(base).__name__} with the same layers, widths and options",
                found=type(model).__name__,
            )


def _check_constants(models: Sequence[nn.Module], constants: Mapping[str, Tensor]) -> None:
    """Tensors that are neither parameters nor buffers are one for all leaves."""
    for index, model in enumerate(models):
        for name, constant in constants.items():
            tensor = operator.attrgetter(name)(model)
            if tensor.shape != constant.shape or not torch.equal(tensor.to(constant), constant):
                raise ModelError(
                    f"{name!r} of model {index} differs from that of model 0, and is neither a"
                    " parameter nor a buffer: leaves cannot have one each.",
                    next_step="Make it a buffer: self.register_buffer(name, tensor).",
                )


def _take_over(hne: HierarchicalEnsemble, preparations: Iterable[Preparation | None]) -> None:
    """Let an ensemble prepare images as those that its weights are from, all of them alike.

    Raises:
        ModelError: they prepare images differently, or have other classes.
    """
    first: Preparation | None = None
    for preparation in filter(None, preparations):
        first = first or preparation
        if replace(preparation, size=first.size, source=first.source) != first:
            raise ModelError(
                "networks of ensembles that prepare images differently, or name other classes,"
                " cannot be leaves of one.",
                expected=f"{first}, classes {quoted(first.classes or ())}",
                found=f"{preparation}, classes {quoted(preparation.classes or ())}",
                next_step="Pack networks that were trained on images prepared alike.",
            )
    if first is not None and len(hne.example) == 3:
        hne.preparation = replace(first, size=hne.example[1:])


def _check_hooks(models: Sequence[nn.Module], example: Tensor) -> None:
    """Hooks that change what is computed are one for all leaves, those of the first model."""
    changing = [
        [(hook.path, hook.name) for hook in changing_hooks(model, example, copy_model)]
        for model in models
    ]
    for index, hooks in enumerate(changing):
        if hooks != changing[0]:
            raise ModelError(
                f"model {index} has other hooks that change what it computes than model 0.",
                expected=", ".join(f"{name} of {path}" for path, name in changing[0]) or "none",
                found=", ".join(f"{name} of {path}" for path, name in hooks) or "none",
                next_step="Remove them, or register the same for all models.",
            )
