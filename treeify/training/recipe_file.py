"""Recipe files: YAML, extended and overridden, with every problem reported at once.

Unknown keys, wrong types and impossible values are reported with their key path, their line and
the nearest valid key.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from treeify import files
from treeify.errors import CheckpointError, RecipeError, nearest, shortened
from treeify.training.recipe import DataRecipe, Recipe
from treeify.training.sections import Named, Section, section_in
from treeify.training.yaml_values import MOST_BYTES, KeyPath, check_keys, keys, parse

# How many keys a message lists, and how many recipes one may extend, one the other.
_SHOWN = 20
_LONGEST = 20


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; nothing is built.

    Args:
        path: YAML file. `extends: other.yaml`, relative to the file, takes over what it leaves out.
        overrides: `key.path=value`, the value in YAML, e.g. `optimizer.lr=3e-2`. Naming another
            loss or data set than the file (`loss.name=independent`) leaves the file's options for
            the old one behind.

    Returns:
        The recipe with every default filled in.

    Raises:
        RecipeError: the file cannot be read, or something in it or in the overrides is wrong; all
            problems are listed.
    """
    values, origins, problems = _read(Path(path), ())
    problems += _override(values, origins, overrides)
    return _validate(Recipe, values, origins, problems, f"recipe {str(path)!r}")


def recipe_from(values: Mapping[str, Any], overrides: Sequence[str], subject: str) -> Recipe:
    """Check a recipe of values instead of a file, as `load_recipe` does; `subject` is its name."""
    merged = deepcopy(dict(values))
    origins: dict[KeyPath, str] = {}
    problems = _override(merged, origins, overrides)
    return _validate(Recipe, merged, origins, problems, subject)


def data_recipe(options: Sequence[str]) -> DataRecipe:
    """The section a recipe would have, from `name=...` and options of that data set in YAML.

    Raises:
        RecipeError: a key is unknown or a value wrong; all problems are listed.
    """
    values: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    problems = _override(values, origins, options)
    return _validate(DataRecipe, values, origins, problems, "the data set")


class _DataOfRun(Section):
    """The part of a run's recipe that its ensemble is measured by; the rest is not looked at."""

    model_config = ConfigDict(extra="ignore")

    data: DataRecipe


def data_of_run(path: Path, overrides: Sequence[str] = (), *, trust: bool) -> DataRecipe:
    """The data section of the recipe in a run's directory, which somebody else may have written.

    Args:
        path: the recipe.
        overrides: what the user sets in it, `data.key=value`.
        trust: whether a data set that the recipe names may be imported, or fetch files.

    Raises:
        CheckpointError: it names a data set that is not trusted.
        RecipeError: as for `load_recipe`.
    """
    values, origins, problems = _read(path, (), alone=not trust)
    if not trust:
        _require_safe(path, values, {text.partition("=")[0].strip() for text in overrides})
    problems += _override(values, origins, overrides)
    return _validate(_DataOfRun, values, origins, problems, f"recipe {str(path)!r}").data


def values_of_run(path: Path) -> dict[str, Any]:
    """The recipe in a run's directory as it stands there, unchecked; nothing is imported.

    Raises:
        RecipeError: it is no YAML, or extends another file.
    """
    return _read(path, (), alone=True)[0]


def _require_safe(path: Path, values: dict[str, Any], changed: Collection[str]) -> None:
    """Refuse a data set that is imported or reads more than images; let none be downloaded."""
    if not isinstance(data := values.get("data"), dict):
        return
    if "data.download" not in changed:
        data.pop("download", None)
    for key, is_unsafe in (("name", ":" in str(data.get("name"))), ("dataset", "dataset" in data)):
        value = data.get(key)
        if is_unsafe and value and f"data.{key}" not in changed:
            raise CheckpointError(
                f"{path} names a data set that would be imported: data.{key}={value!r:.200}.",
                expected="one of treeify's, of local images",
                next_step="If you trust whoever wrote it, pass --trust. Or name the data yourself:"
                " --data name=image_folder --data root=DIRECTORY",
            )


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _read(
    path: Path, below: tuple[Path, ...], *, alone: bool = False
) -> tuple[dict[str, Any], dict[KeyPath, str], list[str]]:
    """A file's values on top of those it extends, where every key stands, and what is wrong.

    What a run wrote stands alone: it extends nothing.

    Raises:
        RecipeError: it cannot be read, is no YAML, or extends itself.
    """
    try:
        text = files.read_bytes(path, MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"recipe {str(path)!r} cannot be read.",
            expected="a YAML file",
            found=f"{error}" + (f", extended by {str(below[-1])!r}" if below else ""),
        ) from error
    if len(below) == _LONGEST or any(path.samefile(file) for file in below):
        chain = " extends ".join(map(str, (*below[-3:], path)))
        raise RecipeError(
            f"recipe {str(path)!r} extends itself, or {_LONGEST} others, one the other.",
            found=("" if len(below) < 4 else "... ") + chain,
        )
    values, node = _parse(text, str(path))
    origins: dict[KeyPath, str] = {}
    problems = []
    for key, line in keys(node):
        first = origins.get(key)
        origins[key] = f"line {line} of {path.name}" if below else f"line {line}"
        if first is not None:
            problems.append(f"{_shown(key, origins)}: the key is there twice, first in {first}")
    extended = values.pop("extends", None)
    if not isinstance(extended, str) or alone:
        if extended is not None:
            expected = "left out of a run's recipe" if alone else "the path of a recipe"
            problems.append(f"extends should be {expected}; found {shortened(extended)}")
        return values, origins, problems
    base, base_origins, base_problems = _read(path.parent / extended, (*below, path))
    return _on_top(base, values), base_origins | origins, base_problems + problems


def _on_top(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values over those they extend; another loss or data set brings its own options."""
    merged = dict(base)
    for key, value in values.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            same = value.get("name", below.get("name")) == below.get("name")
            value = _on_top(below, value) if same or not _is_named(key) else value
        merged[key] = value
    return merged


def _is_named(key: str) -> bool:
    """Whether a key of the recipe has a section with a function's name and options."""
    field = Recipe.model_fields.get(key)
    section = None if field is None else section_in(field.annotation)
    return section is not None and issubclass(section, Named)


def _parse(text: str, path: str) -> tuple[dict[str, Any], yaml.Node]:
    """A YAML mapping and its node."""
    try:
        values, node = parse(text)
    except ValueError as error:
        raise RecipeError(
            f"recipe {path!r} is not valid YAML.", found=str(error).replace("\n", "\n  ")
        ) from error
    if node is None or not isinstance(values, dict):
        raise RecipeError(
            f"recipe {path!r} holds no keys.",
            expected="a YAML mapping, e.g. 'name: digits'",
            found=shortened(values),
        )
    return values, node


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
            problems.append(f"{shortened(override)} is not of the form key.path=value")
            continue
        try:
            value, node = parse(text)
            check_keys(node)
        except ValueError as error:
            problems.append(f"the value of {shortened(override)} is not valid YAML: {error}")
            continue
        parsed.append((path, value))
        for depth in range(1, len(path)):
            origins.setdefault(path[:depth], "command line")
        origins[path] = "command line"
    for path, value in parsed:
        # Before any is set: those for the new function may come before its name.
        if path[1:] == ("name",) and _is_named(path[0]) and _get(values, path) != value:
            values[path[0]] = {}
    for path, value in parsed:
        problems += _set(values, path, value)
    return problems


def _set(values: dict[str, Any], path: KeyPath, value: object) -> list[str]:
    """Write one value into nested mappings; return what is wrong with it."""
    for depth, part in enumerate(path[:-1], start=1):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            above = ".".join(path[:depth])
            return [f"{'.'.join(path)} cannot be set: {above} is {shortened(values)}"]
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
    subject: str,
) -> S:
    """Build a section, or report its problems together with those already noticed."""
    try:
        checked = section.model_validate(values)
    except ValidationError as error:
        problems = problems + _problems(section, values, origins, error.errors())
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RecipeError("\n  ".join([f"{subject} has {count}.", *problems]))
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
    for key, alternatives in islice(by_key.items(), _SHOWN):
        first = alternatives[0]
        kind = first["type"]
        if kind == "extra_forbidden":
            text = f"unknown key{_suggestion(section, key, values)}"
        elif kind == "missing":
            text = "required key is missing"
        else:
            # pydantic's messages begin "Input should be ...", "String should match ...".
            rules = [re.sub(r"^\w+ should ", "", error["msg"]) for error in alternatives]
            text = f"should {' or '.join(dict.fromkeys(rules))}; found {shortened(first['input'])}"
        lines.append(f"{_shown(key, origins)}: {text}")
    if (more := len(by_key) - _SHOWN) > 0:
        lines.append(f"and {more:,} more keys")
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
    """The keys that may have been meant: beside an unknown one, or of its name elsewhere."""
    paths = list(_key_paths(section, values))
    siblings = [path[-1] for path in paths if path[:-1] == key[:-1]]
    if close := nearest(key[-1], siblings, count=1):
        return f", did you mean {close}?"
    if elsewhere := [path for path in paths if path[-1] == key[-1]]:
        shortest = min(elsewhere, key=len)
        return f", did you mean {'.'.join(shortest)!r}?"
    return f"; valid here: {', '.join(siblings)}"


def _key_paths(annotation: Any, values: object, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key that may stand below a field of this type, with the values it has."""
    if (section := section_in(annotation)) is not None:
        for key in section.keys(values):
            yield (*path, key)
            if field := section.model_fields.get(key):
                yield from _key_paths(field.annotation, _get(values, (key,)), (*path, key))
    elif get_origin(annotation) is dict and isinstance(values, dict):
        for key, inner in values.items():
            yield from _key_paths(get_args(annotation)[1], inner, (*path, key))


def _shown(key: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """A key path with the line it, or the nearest key above it, stands in."""
    above = [key[:depth] for depth in range(len(key), 0, -1)]
    origin = next((origins[path] for path in above if path in origins), None)
    shown = ".".join(key) or "the recipe"
    return f"{shown} ({origin})" if origin else shown
