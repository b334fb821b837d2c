"""What a user calls: a model or its name, or trained models, in; an ensemble out."""

import logging
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from treeify.conversion.assemble import assemble, blank_image
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.initialize import Source, branch_seed, initial_weights
from treeify.engine.packed_tensors import named_tensors
from treeify.errors import ModelError
from treeify.models.architecture import Architecture
from treeify.models.fingerprint import fingerprint
from treeify.models.recognise import recognise
from treeify.tracing.hooks import changing_hooks, hooks_in
from treeify.tracing.model_copy import copy_model
from treeify.tracing.trace import plain_tensors

_log = logging.getLogger(__name__)


def hierarchicalize(
    model: nn.Module | str | Architecture,
    splits: int | str | Sequence[str] = 4,
    fanout: int = 2,
    init: str = "fresh",
    seed: int = 0,
    example_input: Tensor | None = None,
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
            each tensor's root mean square, leaf 0 exact.
        seed: of everything random; same seed, same weights.
        example_input: an input of the size the model expects, `[N, C, H, W]`; found by itself for
            timm's and torchvision's models, else `[1, 3, 224, 224]`.

    Returns:
        An ensemble mapping `[N, C, H, W]` to leaf logits `[N, L, K]`, L the product of the fanouts.

    Raises:
        ModelError: the name is unknown.
        SplitError: a split is unknown, repeated or out of order, or a fanout below 2.
        TraceError: the model cannot be traced; names the line that stopped it.
        InputError: the model does not run on the example input, or init is unknown.

    Source: Ruiz & Verbeek, AAAI 2021, section 3.
    """
    base, architecture = resolve(model, seed)
    is_built = architecture is not None
    # Only fresh weights and a reload need to build the model again: look for a builder then.
    architecture = architecture or recognise(base)
    source = initial_weights(base, architecture, init, seed, is_first=is_built)
    hne = assemble(base, architecture, splits, fanout=fanout, example_input=example_input)
    _log.info("splits: %s", ", ".join(hne.conversion.splits.specs) or "none")
    del base  # its memory, if it was built here, serves the branches
    hne.fill(source)
    return hne


def resolve(
    model: nn.Module | str | Architecture, seed: int = 0
) -> tuple[nn.Module, Architecture | None]:
    """A base model and, where it was given by name, how to build it.

    Raises:
        ModelError: the name is unknown, or what is given is no model.
    """
    if isinstance(model, nn.Module):
        return unwrapped(model), None
    if not isinstance(model, str | Architecture):
        raise ModelError(
            f"{model!r} is no model.",
            expected="an nn.Module, or a name: 'resnet50' (timm), 'torchvision/resnet50',"
            " 'package.module:function'",
        )
    architecture = Architecture(model) if isinstance(model, str) else model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(branch_seed(seed, 0))
        return architecture.build(), architecture


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what `torch.compile` and data parallelism put around it.

    Raises:
        ModelError: there are hooks around what is put around it.
    """
    while True:
        is_wrapper = isinstance(model, nn.DataParallel | DistributedDataParallel | OptimizedModule)
        if is_wrapper and any(hook.path == "" for hook in hooks_in(model)):
            raise ModelError(
                f"there are hooks around {type(model).__name__}, not around the model in it.",
                expected="hooks of the model's modules",
                next_step="Register them there, or remove them: handle.remove().",
            )
        if isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(model, OptimizedModule):
            model = model._orig_mod
        else:
            return model


def pack(
    models: Sequence[nn.Module],
    splits: int | str | Sequence[str] = 4,
    example_input: Tensor | None = None,
) -> HierarchicalEnsemble:
    """Pack `L` trained base models of one architecture into an ensemble.

    Leaf `i` takes its own branches from model `i`; a shared branch comes from the first below.

    Args:
        models: as many as the tree has leaves, in depth-first order. Not modified.
        splits: as in `hierarchicalize`; splits without a fanout share the one that fits.
        example_input: as in `hierarchicalize`.

    Raises:
        ModelError: the models differ in architecture, in hooks that change what they compute, or in
            a tensor that is neither a parameter nor a buffer.
        SplitError: no fanouts give as many leaves as there are models, or a split is wrong.
        TraceError: the models cannot be traced.
    """
    if not models:
        raise ModelError("there are no models to pack.", expected="one model per leaf")
    models = [unwrapped(model) for model in models]
    _check_alike(models)
    first, leaves = models[0], len(models)
    hne = assemble(first, recognise(first), splits, leaves=leaves, example_input=example_input)
    _check_constants(models, plain_tensors(hne.traced))
    _check_hooks(models, blank_image(first, hne.example, hne.traced.batch))
    hne.fill(Source(lambda network: dict(named_tensors(models[network])), by_leaf=True))
    return hne


def _check_alike(models: Sequence[nn.Module]) -> None:
    expected = fingerprint(models[0])
    for index, model in enumerate(models):
        if fingerprint(model) != expected:
            raise ModelError(
                f"model {index} is not built like model 0.",
                expected=f"{type(models[0]).__name__} with the same layers, widths and options",
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
