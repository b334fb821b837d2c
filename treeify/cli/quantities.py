"""Quantities with units, as they are written on the command line: `20ms`, `60M`.

What is not written so raises an InputError that names the option.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from math import isfinite
from typing import NamedTuple

from treeify.errors import InputError

# Of no more digits than Python prints; nothing is so many.
_DIGITS = r"\d{1,30}"
_NUMBER = rf"(?:{_DIGITS}(?:\.{_DIGITS})?|\.{_DIGITS})(?:e[+-]?\d{{1,2}})?"
_GROUPED = r"[1-9]\d{0,2}(?:[_,]\d{3}){1,9}"  # 60,000,000, as tables show counts
_SECONDS = {"": Decimal(1), "s": Decimal(1), "ms": Decimal("1e-3"), "us": Decimal("1e-6")}
_MILLISECONDS = {"": Decimal(1), "ms": Decimal(1), "s": Decimal(1000), "us": Decimal("1e-3")}
_MEGABYTES = {"": Decimal(1), "MB": Decimal(1), "kB": Decimal("1e-3"), "GB": Decimal(1000)}
_COUNTS = {"": Decimal(1), "k": Decimal(10**3), "K": Decimal(10**3)}
_COUNTS |= {"M": Decimal(10**6), "G": Decimal(10**9), "T": Decimal(10**12)}


class Bounds(NamedTuple):
    """The least and the most of a number."""

    least: int
    most: int


class Part(NamedTuple):
    """One of several parts, numbered from 1 on."""

    number: int
    parts: int

    def __str__(self) -> str:
        """As it is written on the command line."""
        return f"{self.number}/{self.parts}"


class Size(NamedTuple):
    """Of images, in pixels."""

    height: int
    width: int


def seconds(text: str, option: str) -> float:
    """A duration in seconds, from a number with `s`, `ms`, `us` or no unit (seconds) after it."""
    expected = "a time above 0 in s, ms or us: 20ms, 0.02s; 0.02 means seconds"
    return _positive(text, option, _SECONDS, "duration", expected)


def milliseconds(text: str, option: str) -> float:
    """A duration in milliseconds, from a number with `ms`, `s`, `us` or no unit after it."""
    expected = "a time above 0: 5 or 5ms, 0.005s"
    return _positive(text, option, _MILLISECONDS, "duration", expected)


def megabytes(text: str, option: str) -> float:
    """Megabytes of 10^6 bytes, from a number with `MB`, `kB`, `GB` or no unit after it."""
    expected = "megabytes above 0: 120 or 120MB, 1.5GB"
    return _positive(text, option, _MEGABYTES, "size of a file", expected)


def _positive(
    text: str, option: str, units: Mapping[str, Decimal], what: str, expected: str
) -> float:
    """A number above 0 with a unit after it, in that unit which has none."""
    value = _quantity(text, units)
    if not value:
        raise InputError(
            f"{option} {text!r} is no {what}.",
            expected=expected,
            next_step=_unit_meant(text, units),
        )
    return float(value)


def bounds(text: str, option: str) -> Bounds:
    """The least and the most of a whole number above 0, such as `4..32`, or `8` for both."""
    match = re.fullmatch(r"([1-9]\d{0,8})(?:\.\.([1-9]\d{0,8}))?", text.strip())
    if match is None or (match[2] and int(match[1]) > int(match[2])):
        raise InputError(
            f"{option} {text!r} is no range of whole numbers above 0.",
            expected=f"one number, or the least and the most: {option} 8, {option} 4..32",
        )
    return Bounds(int(match[1]), int(match[2] or match[1]))


def count(text: str, option: str) -> int:
    """A whole number above 0; `k`, `M`, `G` or `T` (thousands, millions, ...) may follow it."""
    # Without a unit, digits may be grouped by commas or underscores.
    grouped = re.fullmatch(_GROUPED, text.strip())
    value = _quantity(re.sub("[_,]", "", text) if grouped else text, _COUNTS)
    if not value or value != value.to_integral_value():
        raise InputError(
            f"{option} {text!r} is no whole number above 0.",
            expected="a number with k, M, G, T or no unit: 60M, 1.2G, 60000000",
            next_step=_unit_meant(text, _COUNTS),
        )
    return int(value)


def numbers(text: str, option: str, *, positive: bool = False) -> tuple[float, ...]:
    """Comma-separated numbers, such as `0.485,0.456,0.406`."""
    try:
        values = tuple(map(float, text.split(",")))
    except ValueError:
        values = ()
    if not values or not all(isfinite(value) and (value > 0 or not positive) for value in values):
        raise InputError(
            f"{option} {text!r} is no list of numbers{' above 0' if positive else ''}.",
            expected=f"one number, or one for each channel: {option} 0.5,0.5,0.5",
        )
    return values


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Comma-separated numbers above 0, such as `1,4,16`."""
    if not re.fullmatch(r"[1-9]\d{0,8}(,\s*[1-9]\d{0,8})*", text.strip()):
        raise InputError(
            f"{option} {text!r} is no list of whole numbers above 0.",
            expected=f"numbers with commas between them: {option} 1,4,16",
        )
    return tuple(map(int, text.split(",")))


def size(text: str, option: str) -> Size:
    """Height and width in pixels, such as `96x160`, or `96` for both."""
    match = re.fullmatch(r"([1-9]\d{0,9})(?:x([1-9]\d{0,9}))?", text.strip())
    if match is None:
        raise InputError(
            f"{option} {text!r} is no size of an image.",
            expected=f"pixels, one number or HEIGHTxWIDTH: {option} 96, {option} 96x160",
        )
    return Size(int(match[1]), int(match[2] or match[1]))


def part(text: str, option: str) -> Part:
    """Which of how many parts, such as `3/8`."""
    match = re.fullmatch(rf"({_DIGITS})/({_DIGITS})", text)
    if match is None:
        raise InputError(
            f"{option} {text!r} is no {option.strip('-')}.",
            expected="K/N with K from 1 to N: 3/8",
        )
    return Part(int(match[1]), int(match[2]))


def _quantity(text: str, units: Mapping[str, Decimal]) -> Decimal | None:
    match = re.fullmatch(rf"({_NUMBER})\s*([A-Za-z]*)", text.strip())
    if match is None or match[2] not in units:
        return None
    # Decimal: 1.2G is 1,200,000,000 and no rounding of it.
    return Decimal(match[1]) * units[match[2]]


def _unit_meant(text: str, units: Mapping[str, Decimal]) -> str | None:
    """A hint where only the case of the unit is wrong."""
    match = re.fullmatch(rf"({_NUMBER})\s*([A-Za-z]+)", text.strip())
    if match is None or match[2] in units:
        return None
    same = [unit for unit in units if unit.lower() == match[2].lower()]
    return f"Did you mean {match[1]}{same[0]}?" if same else None
