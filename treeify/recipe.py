"""Recipes: YAML files that say everything about a training run, checked before anything is built.

Unknown keys, wrong types and impossible values are reported all at once, each with its key path,
its line and the nearest valid key.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from treeify.data import SOURCES, Data
from treeify.errors import RecipeError, nearest
from treeify.losses import LOSSES
from treeify.registry import Registry

if TYPE_CHECKING:
    from typing_extensions import Self

KeyPath = tuple[str, ...]


class Section(BaseModel):
    """A part of a recipe: no key it does not know, no value converted from another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def keys(cls, _values: object) -> list[str]:
        """The keys this section may have."""
        return list(cls.model_fields)


class Named(Section):
    """A registered function's name, beside it the options of that function."""

    model_config = ConfigDict(extra="allow")
    registry: ClassVar[Registry]

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The function's options, defaults included."""
        return dict(self.model_extra or {})

    @classmethod
    def keys(cls, values: object) -> list[str]:
        """`name` and the options of the function that `values` names."""
        function = cls.registry.get(str(_get(values, ("name",))))
        options = _options(function).model_fields if function else {}
        return ["name", *options]

    @field_validator("name")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        if name not in cls.registry:
            known = nearest(name, cls.registry) or ", ".join(cls.registry)
            kind = cls.registry.kind
            raise PydanticCustomError("unknown_name", f"Input should name a {kind}, e.g. {known}")
        return name

    @model_validator(mode="after")
    def _fit_function(self) -> Self:
        options = _options(self.registry[self.name]).model_validate(self.model_extra)
        assert self.__pydantic_extra__ is not None
        self.__pydantic_extra__.update(options.model_dump())
        return self


class LossRecipe(Named):
    """A loss of `treeify.losses` and its options."""

    registry: ClassVar[Registry] = LOSSES


class DataRecipe(Named):
    """A data set of `treeify.data` and its options."""

    registry: ClassVar[Registry] = SOURCES

    def load(self) -> Data:
        """Read the data set.

        Returns:
            Its training and held-out examples; `DataError` is raised if they cannot be read.
        """
        data: Data = self.registry[self.name](**self.options)
        return data


class ModelRecipe(Section):
    """The base model and the tree made of it: the arguments of `treeify.hierarchicalize`."""

    name: str
    kwargs: dict[str, JsonValue] = {}
    splits: NonNegativeInt | list[str] = 4
    fanout: int = Field(default=2, ge=2)
    init: Literal["fresh", "copy", "perturb"] = "fresh"


class OptimizerRecipe(Section):
    """Stochastic gradient descent; the defaults are the paper's for CIFAR (appendix A)."""

    lr: PositiveFloat = 0.1
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 5e-4
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise PydanticCustomError(
                "nesterov", "Input should have a momentum above 0 to use nesterov"
            )
        return self


class ScheduleRecipe(Section):
    """Cosine from the learning rate to 0, after a linear warm-up, one step at a time."""

    epochs: PositiveInt
    warmup_epochs: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _warms_up_before_the_end(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise PydanticCustomError("warmup", "Input should have fewer warmup_epochs than epochs")
        return self


class Recipe(Section):
    """Everything about a training run.

    Args:
        name: of the run; its directory is `runs/NAME` unless `out` says otherwise.
        model: base model and splits.
        data: data set and its options.
        loss: loss and its options.
        optimizer: stochastic gradient descent.
        schedule: epochs and learning rate over time.
        batch_size: images per training step.
        seed: of the weights, the order of the images and their augmentation.
        workers: processes that prepare images; 0 prepares them in the training process.
        device: `auto` takes CUDA, then MPS, then the CPU.
        channels_last: keep images as [N, H, W, C] in memory, which most convolutions run faster on.
        threads: CPU threads for PyTorch; null leaves PyTorch's choice.
        out: run directory, new or empty; null takes `runs/NAME`, `runs/NAME-2`, ...
    """

    name: str = Field(pattern=r"^\w[\w.-]*$")
    model: ModelRecipe
    data: DataRecipe
    loss: LossRecipe
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe
    batch_size: PositiveInt = 128
    seed: NonNegativeInt = 0
    workers: NonNegativeInt = 0
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    channels_last: bool = False
    threads: PositiveInt | None = None
    out: str | None = None


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; nothing is built.

    Args:
        path: YAML file.
        overrides: `key.path=value`, the value in YAML, e.g. `optimizer.lr=3e-2`. Naming another
            loss or data set than the file (`loss.name=independent`) leaves the file's options for
            the old one behind.

    Returns:
        The recipe with every default filled in.

    Raises:
        RecipeError: the file cannot be read, or something in it or in the overrides is wrong; all
            problems are listed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"recipe {str(path)!r} cannot be read.",
            expected="a YAML file",
            found=str(error),
        ) from error
    values, origins, repeated = _parse(text, str(path))
    problems = [
        f"{_shown(key, origins)}: the key is there twice, first in line {line}"
        for key, line in repeated
    ]
    problems += _override(values, origins, overrides)
    return _validate(Recipe, values, origins, problems, f"recipe {str(path)!r}")


def data_recipe(options: Sequence[str]) -> DataRecipe:
    """A data set and its options from `key=value` words.

    Args:
        options: `name=...` and options of that data set, the values in YAML.

    Returns:
        The section a recipe would have.

    Raises:
        RecipeError: a key is unknown or a value wrong; all problems are listed.
    """
    values: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    problems = _override(values, origins, options)
    return _validate(DataRecipe, values, origins, problems, "the data set")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML without surprises in numbers: `1e-4` is one, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _parse(
    text: str, path: str
) -> tuple[dict[str, Any], dict[KeyPath, str], list[tuple[KeyPath, int]]]:
    """A YAML mapping, the line of every key in it, and repeated keys with their first line."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"recipe {path!r} is not valid YAML.", found=str(error).replace("\n", "\n  ")
        ) from error
    if node is None or not isinstance(values, dict):
        raise RecipeError(
            f"recipe {path!r} holds no keys.",
            expected="a YAML mapping, e.g. 'name: digits'",
            found=f"{values!r}",
        )
    lines: dict[KeyPath, int] = {}
    repeated = []
    for key, line in _keys(node):
        if key in lines:
            repeated.append((key, lines[key]))
        lines[key] = line
    return values, {key: f"line {line}" for key, line in lines.items()}, repeated


def _keys(root: yaml.Node) -> Iterator[tuple[KeyPath, int]]:
    """Path and line of every key below a node; aliases are followed once."""
    waiting: list[tuple[yaml.Node, KeyPath]] = [(root, ())]
    seen: set[int] = set()
    while waiting:
        node, path = waiting.pop(0)
        if not isinstance(node, yaml.MappingNode) or id(node) in seen:
            continue
        seen.add(id(node))
        for key, value in node.value:
            inner = (*path, str(key.value))
            yield inner, key.start_mark.line + 1
            waiting.append((value, inner))


def _override(
    values: dict[str, Any], origins: dict[KeyPath, str], overrides: Sequence[str]
) -> list[str]:
    """Write overrides into the values; return what is wrong with them."""
    problems = []
    parsed: list[tuple[KeyPath, Any]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            problems.append(f"{override!r} is not of the form key.path=value")
            continue
        try:
            parsed.append((path, yaml.load(text, _Loader)))
        except yaml.YAMLError as error:
            problems.append(f"the value of {override!r} is not valid YAML: {error}")
            continue
        for depth in range(1, len(path)):
            origins.setdefault(path[:depth], "command line")
        origins[path] = "command line"
    for path, value in parsed:
        if path[1:] == ("name",) and _get(values, path) != value:
            _forget_options(values, path[0])
    for path, value in parsed:
        problems += _set(values, path, value)
    return problems


def _forget_options(values: dict[str, Any], section: str) -> None:
    field = Recipe.model_fields.get(section)
    if field and isinstance(field.annotation, type) and issubclass(field.annotation, Named):
        values[section] = {}


def _set(values: dict[str, Any], path: KeyPath, value: object) -> list[str]:
    for depth, part in enumerate(path[:-1], start=1):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            return [f"{'.'.join(path)} cannot be set: {'.'.join(path[:depth])} is {values!r}"]
    values[path[-1]] = value
    return []


def _get(values: object, path: KeyPath) -> object:
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values


S = TypeVar("S", bound=Section)


def _validate(
    section: type[S],
    values: dict[str, Any],
    origins: Mapping[KeyPath, str],
    problems: list[str],
    what: str,
) -> S:
    try:
        checked = section.model_validate(values)
    except ValidationError as error:
        problems = problems + _problems(section, values, origins, error.errors())
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RecipeError("\n  ".join([f"{what} has {count}.", *problems]))
    return checked


def _problems(
    section: type[Section],
    values: dict[str, Any],
    origins: Mapping[KeyPath, str],
    errors: Sequence[ErrorDetails],
) -> list[str]:
    """One line per key that is wrong; the alternatives of a union share a line."""
    by_key: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        by_key.setdefault(_key_path(error, values), []).append(error)
    lines = []
    for key, found in by_key.items():
        kind = found[0]["type"]
        if kind == "extra_forbidden":
            text = f"unknown key{_suggestion(section, key, values)}"
        elif kind == "missing":
            text = "required key is missing"
        else:
            # pydantic's messages begin "Input should be ...", "String should match ...".
            wanted = dict.fromkeys(re.sub(r"^\w+ should ", "", error["msg"]) for error in found)
            text = f"should {' or '.join(wanted)}; found {found[0]['input']!r}"
        lines.append(f"{_shown(key, origins)}: {text}")
    return lines


def _key_path(error: ErrorDetails, values: object) -> KeyPath:
    """The error's location without the names pydantic adds for the members of a union."""
    path: list[str] = []
    for part in error["loc"]:
        try:
            values = values[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            if error["type"] != "missing":
                break
        path.append(str(part))
    return tuple(path)


def _suggestion(section: type[Section], key: KeyPath, values: object) -> str:
    siblings = _valid_keys(section, key[:-1], values)
    if close := nearest(key[-1], siblings, count=1):
        return f", did you mean {close}?"
    elsewhere = [".".join(path) for path in _all_keys(section, values) if path[-1] == key[-1]]
    if elsewhere:
        return f", did you mean {elsewhere[0]!r}?"
    return f"; valid here: {', '.join(siblings)}"


def _valid_keys(section: type[Section], path: KeyPath, values: object) -> list[str]:
    for part in path:
        inner = section.model_fields[part].annotation
        assert isinstance(inner, type) and issubclass(inner, Section)
        section, values = inner, _get(values, (part,))
    return section.keys(values)


def _all_keys(section: type[Section], values: object, path: KeyPath = ()) -> Iterator[KeyPath]:
    for key in section.keys(values):
        yield (*path, key)
        field = section.model_fields.get(key)
        if field and isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _all_keys(field.annotation, _get(values, (key,)), (*path, key))


def _shown(key: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """A key path with the line it, or the nearest key above it, stands in."""
    above = [key[:depth] for depth in range(len(key), 0, -1)]
    origin = next((origins[path] for path in above if path in origins), None)
    shown = ".".join(key) or "the recipe"
    return f"{shown} ({origin})" if origin else shown


@functools.cache
def _options(function: Callable[..., Any]) -> type[BaseModel]:
    """A model of a function's keyword-only parameters."""
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {
        parameter.name: (
            hints.get(parameter.name, Any),
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    return create_model(function.__name__, __config__=Section.model_config, **fields)
