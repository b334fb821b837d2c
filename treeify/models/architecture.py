"""Names of base models: how to build one again, and how to tell that two are built alike.

A checkpoint holds a name instead of code. A model *given* as an instance gets its name back by
rebuilding it from what timm or torchvision leave on it and comparing fingerprints, so a wrong guess
is never accepted.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from itertools import chain
from typing import Any

import timm
import torch
import torchvision
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from treeify.errors import ModelError, nearest
from treeify.registry import import_function

TORCHVISION = "torchvision/"
TIMM = "timm/"
FORMS = (
    "timm's name ('resnet50'), 'torchvision/NAME', or 'package.module:function' of a function that"
    " returns a torch.nn.Module"
)

_IMAGE_SIZE = "img_size"  # what timm calls it, as an argument and in modules

# What a module carries that says nothing about what it computes: nn.Module's own bookkeeping (with
# the train/eval flag), a memory setting of timm's, and timm's notes on where a model comes from.
_NOT_STRUCTURE = frozenset(vars(nn.Module())) | {
    "grad_checkpointing",
    "pretrained_cfg",
    "default_cfg",
    "pretrained_model_args",
    "_model_args",
    "_traits",
}


@dataclass(frozen=True)
class Architecture:
    """The recipe for one base model: a name and the arguments its builder gets.

    Args:
        name: timm's name (`mobilenetv2_140`, also `timm/mobilenetv2_140`), `torchvision/resnet50`,
            or `package.module:function` for any function that returns a module.
        kwargs: the builder's keyword arguments; JSON values only, tuples become lists.

    Raises:
        ModelError: an argument is no JSON value.
    """

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            kwargs = json.loads(json.dumps(dict(self.kwargs)))
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"arguments of {self.name!r} cannot be written to a checkpoint: {error}.",
                expected="numbers, strings, booleans, None, and lists or dicts of them",
                found=f"{dict(self.kwargs)!r}",
                next_step="Wrap the model in a function of simple arguments, as 'module:function'.",
            ) from error
        object.__setattr__(self, "kwargs", kwargs)

    def build(self, pretrained: bool = False) -> nn.Module:
        """A new model, initialised from torch's global random state as it stands.

        Args:
            pretrained: load the trained weights that timm or torchvision offer under this name
                (needs the network or their cache); a builder function gets `pretrained=True`.

        Returns:
            The model, in training mode.

        Raises:
            ModelError: the name is unknown, the builder refuses the arguments, or trained weights
                cannot be had.
        """
        builder = self._builder(pretrained)
        try:
            model = builder(**self.kwargs)
        except Exception as error:
            raise self._failed(error, pretrained) from error
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"{self.name!r} builds no model.",
                expected="a torch.nn.Module",
                found=f"{type(model).__name__} {model!r:.100}",
            )
        return model

    def to_dict(self) -> dict[str, Any]:
        """The architecture as JSON values."""
        return {"name": self.name, "kwargs": dict(self.kwargs)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """The architecture that `to_dict` wrote.

        Raises:
            ModelError: `data` is not of that form.
        """
        match data:
            case {"name": str(name), "kwargs": Mapping() as kwargs} if len(data) == 2:
                return cls(name, kwargs)
        raise ModelError(
            "not a description of an architecture.",
            expected="{'name': a string, 'kwargs': a mapping}",
            found=repr(data),
        )

    def __str__(self) -> str:
        """`name(key=value, ...)`, or the bare name if there are no arguments."""
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.kwargs.items())
        return f"{self.name}({arguments})" if arguments else self.name

    def _builder(self, pretrained: bool) -> Callable[..., object]:
        if ":" in self.name:
            function = import_function(self.name, "model", ModelError, FORMS)
            return partial(function, pretrained=True) if pretrained else function
        if self.name.startswith(TORCHVISION):
            return partial(_build_torchvision, self.name.removeprefix(TORCHVISION), pretrained)
        name = self.name.removeprefix(TIMM)
        if not timm.is_model(name):
            raise _unknown(self.name)
        return partial(timm.create_model, name, pretrained=pretrained)

    def _failed(self, error: Exception, pretrained: bool) -> ModelError:
        reason = f"{type(error).__name__}: {error}"
        # urllib's, the operating system's and the model hub's connection errors are all OSErrors.
        if pretrained and isinstance(error, OSError):
            return ModelError(
                f"the pretrained weights of {self.name!r} could not be downloaded.",
                expected="network access or a filled download cache, as pretrained was asked for",
                found=reason,
                next_step="Connect and try again, or leave pretrained out for random weights.",
            )
        return ModelError(
            f"{self.name!r} could not be built"
            f"{' with pretrained weights' if pretrained else ''} from {dict(self.kwargs)}.",
            expected="arguments its builder accepts",
            found=reason,
        )


def recognise(model: nn.Module) -> Architecture | None:
    """How to build a model like `model` again, if it comes from timm or torchvision.

    The answer rebuilds exactly this structure: its fingerprint was compared. A model that was
    changed after it was built, cast to another dtype, or whose class is the user's own has no
    name; its constructor is never called.

    Args:
        model: any module; not modified, and no random state is used.

    Returns:
        The architecture, or None where there is none.
    """
    origin = type(model).__module__
    if origin.startswith("timm."):
        guesses = _timm_guesses(model)
    elif origin.startswith("torchvision.models."):
        guesses = _torchvision_guesses(model)
    else:
        return None
    wanted = fingerprint(model)
    with torch.random.fork_rng(devices=[]):
        return next((found for guess in guesses if (found := _match(guess, model, wanted))), None)


def fingerprint(model: nn.Module) -> str:
    """A digest of what a model computes, whatever its weights are.

    It covers every module's class, printed hyper-parameters and plain attributes, every parameter's
    and buffer's name, shape and dtype, and what is shared. It leaves out weights, train/eval mode,
    `requires_grad`, devices and hooks. Comparable under one version of torch, timm and torchvision.

    Args:
        model: any module; not modified.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for line in chain(_module_lines(model), _tensor_lines(model)):
        # Addresses of functions differ from run to run.
        digest.update(re.sub(r" at 0x[0-9a-fA-F]+", "", line).encode() + b"\n")
    return digest.hexdigest()


def library_names() -> list[str]:
    """Every classifier that timm and torchvision build by name, timm's first."""
    return [*timm.list_models(), *(TORCHVISION + name for name in _torchvision_names())]


def check_names(names: Iterable[str]) -> None:
    """Raise ModelError, naming every wrong one and the nearest right ones, unless all are known."""
    errors = [error for name in dict.fromkeys(names) if (error := _wrong(name)) is not None]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ModelError("\n".join([f"{len(errors)} names are wrong.", *map(str, errors)]))


def _wrong(name: str) -> ModelError | None:
    try:
        Architecture(name)._builder(pretrained=False)
    except ModelError as error:
        return error
    unknown = name.startswith(TORCHVISION) and name not in library_names()
    return _unknown(name) if unknown else None


def family(name: str) -> str:
    """The module that defines a library's model: `resnet` in timm, `torchvision/resnet`."""
    if ":" in name:
        return name.partition(":")[0]
    if name.startswith(TORCHVISION):
        builder = torchvision.models.get_model_builder(name.removeprefix(TORCHVISION))
        return TORCHVISION + str(builder.__module__).rpartition(".")[2]
    return str(timm.models.model_entrypoint(name.removeprefix(TIMM)).__module__).rpartition(".")[2]


def skeleton(architecture: Architecture) -> nn.Module:
    """A model on the meta device: shapes without weights, and mostly without memory for any.

    Raises:
        ModelError: the name is unknown or its builder refuses the arguments.
    """
    try:
        with ParametersOnMeta():
            return architecture.build().to("meta")
    except ModelError:
        return architecture.build().to("meta")


def example_shape(model: nn.Module, architecture: Architecture | None = None) -> tuple[int, ...]:
    """The image a model is usually fed.

    The channels are those of the first layer if it is a convolution; the size is, in this order,
    what the model says it was built for (`img_size` or `image_size`), what its builder was asked
    for, what timm notes as its input size, 299 for torchvision's `inception_v3`, and 224. A model
    that takes another size needs an example input of the caller's.

    Args:
        model: the base model.
        architecture: its architecture, where known.

    Returns:
        The shape `(C, H, W)`.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    noted = cfg.get("input_size") if isinstance(cfg, Mapping) else None
    asked = None if architecture is None else _sides(architecture.kwargs.get(_IMAGE_SIZE))
    if built_for := _image_size(model) or asked:
        size = built_for
    elif noted:
        size = tuple(noted[1:])
    elif architecture is not None and architecture.name == "torchvision/inception_v3":
        size = (299, 299)
    else:
        size = (224, 224)
    return (_input_channels(model, default=noted[0] if noted else 3), *size)


def resized(architecture: Architecture, model: nn.Module, size: int) -> Architecture:
    """The architecture for square images of another size.

    Args:
        architecture: how to build `model`.
        model: the base model.
        size: height and width of the images.

    Returns:
        The same architecture, unless the model is built for one size: then with that argument set.
    """
    channels, *usual = example_shape(model, architecture)
    if usual == [size, size]:
        return architecture
    if _image_size(model) is None and (
        not _is_noted_as_fixed(model) or _takes(architecture, (channels, size, size))
    ):
        return architecture
    key = "image_size" if architecture.name.startswith(TORCHVISION) else _IMAGE_SIZE
    return Architecture(architecture.name, {**architecture.kwargs, key: size})


def _is_noted_as_fixed(model: nn.Module) -> bool:
    """Whether timm notes that a model takes one size, and its builder is told which.

    Some take others all the same.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, Mapping) or not cfg.get("fixed_input_size"):
        return False
    # A class may pass on what it is given.
    return any(_IMAGE_SIZE in inspect.signature(kind).parameters for kind in type(model).__mro__)


def _takes(architecture: Architecture, shape: tuple[int, ...]) -> bool:
    """Whether a model runs on an image of a shape."""
    try:
        with torch.no_grad():
            skeleton(architecture).eval()(torch.zeros(1, *shape, device="meta"))
    except Exception:  # whatever a library raises for a size it does not take
        return False
    return True


def _build_torchvision(name: str, pretrained: bool, **kwargs: object) -> object:
    if name not in _torchvision_names():
        raise _unknown(f"{TORCHVISION}{name}")
    if name in ("googlenet", "inception_v3") and not pretrained:
        # Their own scheme, spelled out: left open, it comes with a warning.
        kwargs.setdefault("init_weights", True)
    return torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, **kwargs)


def _torchvision_names() -> list[str]:
    """Torchvision's classifiers; its detectors and quantised models live in other modules."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _unknown(name: str) -> ModelError:
    bare = name.removeprefix(TORCHVISION).removeprefix(TIMM)
    known = library_names()
    same = [other for other in known if other.removeprefix(TORCHVISION) == bare]
    close = repr(same[0]) if same else nearest(name, known) or nearest(bare, known)
    return ModelError(
        f"there is no model {name!r}.", expected=FORMS, next_step=_did_you_mean(close)
    )


def _did_you_mean(names: str) -> str | None:
    return f"Did you mean {names}?" if names else None


# What initialisers do to weights.
_FILLING = frozenset(
    {
        *(Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.clamp_, Tensor.fill_),
        *(Tensor.zero_, Tensor.copy_, Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_),
    }
)


class ParametersOnMeta(TorchFunctionMode):
    """Builds layers without memory for their weights.

    `torch.device("meta")` would do the same to the tensors some constructors compute widths and
    rates with, and then fail to read them.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        if func in _FILLING and args and getattr(args[0], "is_meta", False):
            return args[0]  # there is nothing to fill, and to try takes milliseconds
        return func(*args, **kwargs)


def _match(guess: Architecture, model: nn.Module, wanted: str) -> Architecture | None:
    """`guess`, given whatever else `model` notes about itself, if that rebuilds `model`."""
    candidate = _rebuild(guess)
    if candidate is None or type(candidate) is not type(model):
        return None
    if fingerprint(candidate) == wanted:
        return guess
    accepted = inspect.signature(type(model).__init__).parameters
    noted = {
        key: value
        for key, value in vars(model).items()
        if key in accepted
        and isinstance(value, bool | int | float | str)
        and vars(candidate).get(key) != value
    }
    if not noted.keys() - guess.kwargs.keys():
        return None
    second = Architecture(guess.name, {**guess.kwargs, **noted})
    candidate = _rebuild(second)
    return second if candidate is not None and fingerprint(candidate) == wanted else None


def _rebuild(architecture: Architecture) -> nn.Module | None:
    """The model of a guess; None if its builder refuses it, as wrong guesses may."""
    try:
        with ParametersOnMeta():
            return architecture.build()
    except ModelError:
        pass
    try:
        return architecture.build()
    except ModelError:
        return None


def _timm_guesses(model: nn.Module) -> Iterator[Architecture]:
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, Mapping) or not timm.is_model(cfg.get("architecture") or ""):
        return
    name, tag = cfg["architecture"], cfg.get("tag")
    usual = get_pretrained_cfg(name)
    if tag and (usual is None or usual.tag != tag):
        name = f"{name}.{tag}"
    if arguments := getattr(model, "_model_args", None):  # timm 1.0.31 keeps what it was given
        with contextlib.suppress(ModelError):
            yield Architecture(name, arguments)
    kwargs: dict[str, Any] = {}
    if (classes := getattr(model, "num_classes", None)) not in (None, cfg.get("num_classes")):
        kwargs["num_classes"] = classes
    usual_channels, *usual_size = cfg.get("input_size") or (3, 224, 224)
    if (channels := _input_channels(model, default=usual_channels)) != usual_channels:
        kwargs["in_chans"] = channels
    if (size := _image_size(model)) not in (None, tuple(usual_size)):
        kwargs["img_size"] = size
    yield Architecture(name, kwargs)
    for module in model.modules():
        if isinstance(pooling := getattr(module, "pool_type", None), str):
            yield Architecture(name, {**kwargs, "global_pool": pooling})


def _torchvision_guesses(model: nn.Module) -> Iterator[Architecture]:
    family = type(model).__module__
    size = sum(parameter.numel() for parameter in model.parameters())
    kwargs = {}
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if layers and (classes := len(layers[-1].weight)) != 1000:
        kwargs["num_classes"] = classes
        size += (1000 - classes) * (layers[-1].weight[0].numel() + 1)
    names = [
        name
        for name in _torchvision_names()
        if torchvision.models.get_model_builder(name).__module__ == family
    ]
    # Siblings differ far more in size than their options make them: the nearest three will do.
    for name in sorted(names, key=lambda name: abs(_documented_size(name) - size))[:3]:
        yield Architecture(TORCHVISION + name, kwargs)


def _documented_size(name: str) -> int:
    """How many parameters torchvision says its trained model has."""
    weights = next(iter(torchvision.models.get_model_weights(name)))
    parameters: int = weights.meta["num_params"]
    return parameters


def _image_size(model: nn.Module) -> tuple[int, int] | None:
    for module in model.modules():
        for key in (_IMAGE_SIZE, "image_size"):
            if sides := _sides(getattr(module, key, None)):
                return sides
    return None


def _sides(size: object) -> tuple[int, int] | None:
    match size:
        case int(side) | (int(side),):
            return side, side
        case (int(height), int(width)):
            return height, width
    return None


def _input_channels(model: nn.Module, default: int) -> int:
    layers = (layer for layer in model.modules() if next(layer.children(), None) is None)
    first = next(layers, None)
    return first.in_channels if isinstance(first, nn.Conv2d) else default


def _module_lines(model: nn.Module) -> Iterator[str]:
    first_name: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if first_name.setdefault(module, name) != name:
            yield f"{name} is {first_name[module]}"
            continue
        yield f"{name} {_class_name(type(module))}({module.extra_repr()})"
        for key, value in sorted(vars(module).items()):
            if key not in _NOT_STRUCTURE:
                yield f"{name}.{key} = {_describe(value)}"


def _tensor_lines(model: nn.Module) -> Iterator[str]:
    kept = model.state_dict(keep_vars=True).keys()
    tensors = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    first_name: dict[int, str] = {}
    for name, tensor in tensors:
        shared = first_name.setdefault(id(tensor), name)
        yield f"{name} {_describe(tensor)} kept={name in kept} is {shared}"


def _describe(value: object, depth: int = 4) -> str:
    """A plain attribute as text; of anything that is not plain, its kind."""
    if value is None or isinstance(value, bool | int | float | str | Enum | torch.dtype):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    if isinstance(value, partial):
        value = (value.func, value.args, value.keywords)
    if depth and isinstance(value, list | tuple):
        return f"({', '.join(_describe(item, depth - 1) for item in value)})"
    if depth and isinstance(value, Mapping):
        items = (f"{key!r}: {_describe(item, depth - 1)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    named = value if hasattr(value, "__qualname__") else type(value)
    return _class_name(named)


def _class_name(value: object) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
