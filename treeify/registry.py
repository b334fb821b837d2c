"""Functions found by name: what lets a recipe name a loss or a data set, and a user add one."""

import importlib
import operator
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, PositiveInt

from treeify.errors import RecipeError, TreeifyError, nearest

F = TypeVar("F", bound=Callable[..., Any])


# What stands before a repository of the Hugging Face hub, or before a directory, in a path's place,
# as in timm's names of models; `treeify.models.hub` opens them.
HUB, LOCAL = "hf-hub:", "local-dir:"


def _absolute(path: str) -> str:
    if path.startswith(HUB):
        return path
    path = path.removeprefix(LOCAL)
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 - of a pattern as well


def _absolute_if_there(name: str) -> str:
    if name.startswith(LOCAL):  # stays, since it tells a directory from a name
        return LOCAL + _absolute(name)
    path = _absolute(name)
    return path if os.path.exists(path) else name  # noqa: PTH110


# Kinds of options that recipes check. Paths become absolute: a run's recipe is read elsewhere too.
Fraction = Annotated[float, Field(ge=0, le=1)]
Crop = Annotated[float, Field(gt=0, le=1)]
FilePath = Annotated[str, AfterValidator(_absolute)]
PathOrName = Annotated[str, AfterValidator(_absolute_if_there)]
ImageSize = PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
Channels = Literal[1, 3, 4]
Numbers = Annotated[list[float], Field(min_length=1)]


# Whether the directory where a function was found stays on the path: its code may import more from
# there. The command line has it so; nothing else that is imported is looked for beside the user.
keep_directory = False


class Registry(dict[str, Callable[..., Any]]):
    """Functions by name. Registering a name twice is an error that names both functions.

    A registered function's keyword-only parameters are its options: a recipe may set them, and
    checks them against their annotations.

    Args:
        kind: what the functions are, for messages, e.g. "loss".
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[F], F]:
        """Decorate a function to be found under `name`."""

        def add(function: F) -> F:
            if name in self:
                raise RecipeError(
                    f"two functions want to be the {self.kind} {name!r}.",
                    expected="each name to be registered once",
                    found=f"{_where(self[name])} and {_where(function)}",
                    next_step="Register the second under another name.",
                )
            self[name] = function
            return function

        return add

    def find(self, name: str) -> Callable[..., Any]:
        """The function registered under `name`, or that `package.module:function` names.

        Raises:
            RecipeError: there is none; the message offers the nearest names.
        """
        if ":" in name:
            expected = "package.module:function, or a class whose instances are called"
            return import_function(name, self.kind, RecipeError, expected)
        if name not in self:
            close = nearest(name, self)
            others = f"{close} (did you mean it?), or another of" if close else "one of"
            raise RecipeError(
                f"no {self.kind} is called {name!r}.",
                expected=f"{others} {', '.join(sorted(self))}",
            )
        return self[name]


def import_function(
    name: str, kind: str, error_class: type[TreeifyError], expected: str
) -> Callable[..., Any]:
    """The function or class that a user names.

    Args:
        name: `package.module:function`; the module may lie in the current directory, where Python
            looks first unless it was told not to (`python -P`).
        kind: what the function is, for messages, e.g. "loss".
        error_class: what is raised.
        expected: what would have been accepted, for messages.

    Raises:
        TreeifyError: of `error_class`: the module cannot be imported, or has no such function.
    """
    module_name, _, attribute = name.partition(":")
    try:
        with _beside_the_user() as directory:
            module = importlib.import_module(module_name)
        is_there = Path(getattr(module, "__file__", None) or "").is_relative_to(directory)
        if keep_directory and is_there and directory not in sys.path:
            sys.path.append(directory)
    except Exception as error:  # whatever the user's code raises
        raise error_class(
            f"module {module_name!r} of {kind} {name!r} cannot be imported.",
            expected=expected,
            found=f"{type(error).__name__}: {error}",
            next_step="Run from the directory that holds it, or install its package.",
        ) from error
    try:
        function = operator.attrgetter(attribute)(module)
    except AttributeError:
        function = None
    if callable(function):
        return function  # type: ignore[no-any-return]  # its caller checks what it returns
    functions = [key for key, value in vars(module).items() if callable(value)]
    close = nearest(attribute, functions)
    raise error_class(
        f"{kind} {name!r} cannot be imported: module {module_name!r} has no function"
        f" {attribute!r}.",
        expected=expected,
        found=None if function is None else f"{type(function).__name__} {function!r:.100}",
        next_step=f"Did you mean {close}?" if close else None,
    )


@contextmanager
def _beside_the_user() -> Iterator[str]:
    """Look for modules in the current directory first, as `python -m` does; yields it."""
    directory = str(Path.cwd())
    if getattr(sys.flags, "safe_path", False):  # since Python 3.11
        yield directory
        return
    sys.path.insert(0, directory)
    try:
        yield directory
    finally:
        sys.path.remove(directory)


def _where(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
