"""Functions found by name: what lets a recipe name a loss or a data set, and a user add one."""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from treeify.errors import RecipeError, nearest

F = TypeVar("F", bound=Callable[..., Any])

# Kinds of options that recipes check.
Share = Annotated[float, Field(ge=0, le=1)]


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
        return lambda function: self._add(name, function)

    def find(self, name: str) -> Callable[..., Any]:
        """The function registered under `name`, or `package.module:function` of one's own.

        Raises:
            RecipeError: there is none; the message offers the nearest names.
        """
        if ":" in name:
            return _import(name, self.kind)
        if name not in self:
            close = nearest(name, self)
            known = ", ".join(sorted(self))
            raise RecipeError(
                f"no {self.kind} is called {name!r}.",
                expected=f"{close} (did you mean it?), or another of {known}"
                if close
                else f"one of {known}",
            )
        return self[name]

    def _add(self, name: str, function: F) -> F:
        if name in self:
            raise RecipeError(
                f"two functions want to be the {self.kind} {name!r}.",
                expected="each name to be registered once",
                found=f"{_where(self[name])} and {_where(function)}",
                next_step="Register the second under another name.",
            )
        self[name] = function
        return function


def _import(name: str, kind: str) -> Callable[..., Any]:
    """A function from `package.module:function`, the directory the user is in included."""
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = operator.attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"{kind} {name!r} cannot be imported: {error}",
            expected="package.module:function, or a class whose instances are called",
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise RecipeError(f"{kind} {name!r} is a {type(found).__name__}, not a function.")
    return found  # type: ignore[no-any-return]


def _where(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
