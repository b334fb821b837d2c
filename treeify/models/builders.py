"""Names of base models, and the functions of timm, torchvision and the user that build them."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import timm
import torchvision

from treeify import files
from treeify.errors import ModelError, described, nearest
from treeify.registry import import_function

TORCHVISION = "torchvision/"
TIMM = "timm/"
_EXPECTED = (
    "timm's name ('resnet50'), 'torchvision/NAME', or 'package.module:function' of a function that"
    " returns a torch.nn.Module"
)
# Names that saved files hold, of functions that lie elsewhere now.
_MOVED = {"treeify.shallower:build": "treeify.models.shallow:build"}


def find_builder(name: str, pretrained: bool = False) -> Callable[..., object]:
    """The function that builds a model from keyword arguments; `Architecture` tells its names.

    Raises:
        ModelError: the name is unknown; the message offers the nearest names.
    """
    name = _MOVED.get(name, name)
    if ":" in name:
        function = import_function(name, "model", ModelError, _EXPECTED)
        return partial(function, pretrained=True) if pretrained else function
    if name.startswith(TORCHVISION):
        bare = name.removeprefix(TORCHVISION)
        if bare in torchvision_names():
            return partial(_build_torchvision, bare, pretrained)
    elif timm.is_model(bare := name.removeprefix(TIMM)):
        return partial(timm.create_model, bare, pretrained=pretrained)
    code = Path(name.removesuffix(".py"))
    if files.is_file(Path(f"{code}.py")):
        raise ModelError(
            f"{name!r} names a file of code, and no model in it.",
            expected=_EXPECTED,
            next_step=f"Name the function or class as well: {'.'.join(code.parts)}:FUNCTION",
        )
    if files.is_file(Path(name)):
        raise ModelError(
            f"{name!r} is a file, and no model's name.",
            expected=_EXPECTED,
            next_step=f"Name the network; its weights are an option: NAME --weights {name}",
        )
    names = library_names()
    same = [repr(other) for other in names if other.removeprefix(TORCHVISION) == bare]
    close = same[0] if same else nearest(name, names) or nearest(bare, names)
    raise ModelError(
        f"there is no model {described(name)}.",
        expected=_EXPECTED,
        next_step=f"Did you mean {close}?" if close else "List all names: treeify list.",
    )


def _build_torchvision(name: str, pretrained: bool, **kwargs: object) -> object:
    if name in ("googlenet", "inception_v3") and not pretrained:
        # Their own scheme, spelled out: left open, it comes with a warning.
        kwargs.setdefault("init_weights", True)
    return torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, **kwargs)


def library_names() -> list[str]:
    """Every classifier that timm and torchvision build by name, timm's first."""
    return [*timm.list_models(), *(TORCHVISION + name for name in torchvision_names())]


def torchvision_names() -> list[str]:
    """Torchvision's classifiers; its detectors and quantised models live in other modules."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def check_names(names: Iterable[str]) -> None:
    """Raise ModelError, naming every wrong one and the nearest right ones, unless all are known."""
    errors = []
    for name in dict.fromkeys(names):
        try:
            find_builder(name)
        except ModelError as error:  # noqa: PERF203 - importing a builder takes far longer
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ModelError("\n".join([f"{len(errors)} names are wrong.", *map(str, errors)]))


def family(name: str) -> str:
    """The module that defines a library's model: `resnet` in timm, `torchvision/resnet`."""
    if ":" in name:
        return name.partition(":")[0]
    if name.startswith(TORCHVISION):
        builder = torchvision.models.get_model_builder(name.removeprefix(TORCHVISION))
        return TORCHVISION + str(builder.__module__).rpartition(".")[2]
    return str(timm.models.model_entrypoint(name.removeprefix(TIMM)).__module__).rpartition(".")[2]
