"""Functions found by name: what lets a recipe name a loss or a data set, and a user add one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from treeify.errors import RecipeError, nearest

F = TypeVar("F", bound=Callable[..., Any])


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
        """The function registered under `name`.

        Raises:
            RecipeError: there is none; the message offers the nearest names.
        """
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


def _where(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
