"""Checks of what users pass: a type or a range, in one message each that names the argument.

They compare and never convert: what a check lets through is used as it came. None of them but
`wrong_class` reads a tensor, so that none waits for an accelerator.
"""

import math
import os
from collections.abc import Collection
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from treeify.errors import InputError, TreeifyError, described, nearest

# Of a random generator's seed.
LARGEST_SEED = 2**63 - 1

_LARGEST_INTEGER = 2**63 - 1


def require_integer(
    name: str,
    value: object,
    at_least: int,
    at_most: int | None = None,
    *,
    error: type[TreeifyError] = InputError,
    next_step: str | None = None,
) -> None:
    """Refuse what is no integer of a range; truth values are none."""
    is_integer = isinstance(value, int | Integral) and not isinstance(value, bool)
    if is_integer and at_least <= value and (at_most is None or value <= at_most):  # type: ignore[operator]
        return
    most = "" if at_most is None else f" and at most {at_most:,}"
    raise error(
        f"{name} is no integer in range.",
        expected=f"an integer of at least {at_least:,}{most}",
        found=described(value),
        next_step=next_step or f"Pass another {name}.",
    )


def is_number(value: object) -> bool:
    """Whether it is a real number that torch computes with; truth values and NaN are none."""
    if isinstance(value, float):
        return value == value  # NaN is not
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= _LARGEST_INTEGER
    return isinstance(value, Real) and value == value


def require_number(
    name: str,
    value: object,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    *,
    above: float = -math.inf,
    finite: bool = True,
    expected: str,
    next_step: str | None = None,
) -> None:
    """Refuse what is no number of a range; truth values and NaN are none.

    Raises:
        InputError: it is not. `expected` is the range in words.
    """
    in_range = is_number(value) and at_least <= value <= at_most and above < value  # type: ignore[operator]
    if in_range and (not finite or value < math.inf):  # type: ignore[operator]
        return
    raise InputError(
        f"{name} is no number in range.",
        expected=expected,
        found=described(value),
        next_step=next_step or f"Pass another {name}.",
    )


def require_type(
    name: str,
    value: object,
    types: type[Any] | tuple[type[Any], ...],
    expected: str,
    *,
    error: type[TreeifyError] = InputError,
    next_step: str | None = None,
) -> None:
    """Refuse what is of another type; `expected` is the right one in words."""
    if not isinstance(value, types):
        raise error(
            f"{name} is of a wrong type.",
            expected=expected,
            found=described(value),
            next_step=next_step or f"Pass {expected}.",
        )


def require_flag(name: str, value: object) -> None:
    """Raise InputError unless it is True or False."""
    require_type(name, value, bool, "True or False")


def require_iterable(
    name: str, value: Any, expected: str, *, error: type[TreeifyError] = InputError
) -> None:
    """Refuse what cannot be gone through, and text, of which that is never meant."""
    try:
        iter(value)
    except TypeError:  # of a tensor without dims as well
        is_iterable = False
    else:
        is_iterable = not isinstance(value, str | bytes)
    if not is_iterable:
        raise error(
            f"{name} cannot be gone through.",
            expected=expected,
            found=described(value),
            next_step=f"Pass {expected}.",
        )


def require_callable(name: str, value: object, called_with: str) -> None:
    """Raise InputError unless it can be called."""
    if not callable(value):
        raise InputError(
            f"{name} cannot be called.",
            expected=f"a function of {called_with}",
            found=described(value),
            next_step=f"Pass a function, or leave {name} out.",
        )


def require_member(name: str, value: object, choices: Collection[str], listed: str) -> None:
    """Raise InputError unless it is one of some names; `listed` says where to find them all."""
    if isinstance(value, str) and value in choices:
        return
    close = nearest(value, choices) if isinstance(value, str) else ""
    raise InputError(
        f"there is no such {name}.",
        expected=f"one of {listed}" + (f" (did you mean {close}?)" if close else ""),
        found=described(value),
        next_step=f"List them: {listed}.",
    )


def as_path(name: str, value: object, error: type[TreeifyError]) -> Path:
    """What a user gives for a path, as one; what no file system may have is refused."""
    require_type(name, value, str | os.PathLike, "a path", error=error)  # type: ignore[arg-type]
    text = os.fspath(value)  # type: ignore[call-overload]
    if not isinstance(text, str) or not text or "\0" in text:
        raise error(
            f"{name} is no path.",
            expected="characters other than a null byte",
            found=described(value),
            next_step="Pass the path of a file or a directory.",
        )
    try:
        os.lstat(text)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # the caller says what is to be there
    except OSError as problem:  # a name that is too long, links that go in circles
        raise error(
            f"{name} is no path that can be.",
            expected="the path of a file or a directory",
            found=f"{described(value)}: {problem.strerror}",
            next_step="Pass a shorter path, or repair its links.",
        ) from problem
    return Path(text)


def is_recorded() -> bool:
    """Whether torch is compiling, tracing or transforming: tensors may have no values then."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    is_dual = torch.autograd.forward_ad._current_level >= 0
    return is_dual or torch._C._functorch.peek_interpreter_stack() is not None


def is_readable(tensor: Tensor) -> bool:
    """Whether its values can be read at once: on the CPU, with nothing recording what is done."""
    if is_recorded() or tensor.device.type != "cpu":
        return False
    return type(tensor) is Tensor and _get_current_dispatch_mode() is None


def wrong_class(target: Tensor, classes: int) -> int | None:
    """Of integer classes one that there is not, the smallest or the largest; None if all are."""
    if not target.numel():
        return None
    smallest, largest = (int(label) for label in target.aminmax())
    if smallest < 0:
        return smallest
    return largest if largest >= classes else None
