"""What can go wrong, by kind: where, what was expected, what was found, what to do next."""

import difflib
import re
from collections.abc import Iterable, Sequence

# What a terminal obeys instead of showing it: control characters but for tabs and ends of lines,
# and marks that turn the direction of writing.
_CONTROL = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
_OBEYED = re.compile(f"[{_CONTROL}]")
# And the bytes of a file's name that are no UTF-8.
_UNPRINTABLE = re.compile(rf"[{_CONTROL}\ud800-\udfff]")


class TreeifyError(Exception):
    """Base of every error treeify raises on bad input; its text is `printable`.

    Args:
        where: what is wrong and where, one sentence.
        expected: what would have been accepted.
        found: what was given instead.
        next_step: what the user can do about it.
    """

    def __init__(
        self,
        where: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        next_step: str | None = None,
    ) -> None:
        details = {"Expected ": expected, "Found ": found, "": next_step}
        lines = [f"  {label}{text}" for label, text in details.items() if text is not None]
        super().__init__(printable("\n".join([where, *lines])))


class ModelError(TreeifyError):
    """A model is unknown, has weights without shapes, or differs from one it should be like."""


class TraceError(TreeifyError):
    """The base model cannot be traced, or does not run on its example input."""


class SplitError(TreeifyError):
    """A split is unknown, repeated, out of order, or has an impossible fanout."""


class LeafError(TreeifyError):
    """A leaf or a number of leaves lies outside the tree."""


class InputError(TreeifyError):
    """An argument or an input tensor does not fit the model."""


class CheckpointError(TreeifyError):
    """A saved directory or file is missing, damaged, does not fit, or cannot be written."""


class RecipeError(TreeifyError):
    """A recipe has an unknown key, a wrong type or a value that cannot work."""


class DataError(TreeifyError):
    """A data set is missing or does not fit the recipe."""


class ParityError(TreeifyError):
    """A converted model differs from the untouched base architecture."""


class ExportError(TreeifyError):
    """An ensemble cannot be exported, or what was exported differs from it."""


class InitWarning(UserWarning):
    """A module's own weights are passed over, and nobody said that they should be."""


def printable(text: str, *, in_file: bool = False) -> str:
    """Text as a terminal may show it: escapes in the place of what it would obey, or cannot show.

    A file can hold the bytes of a name that are no text.
    """
    pattern = _OBEYED if in_file else _UNPRINTABLE
    return pattern.sub(lambda match: ascii(match[0])[1:-1], text)


def shortened(value: object, most: int = 100) -> str:
    """The `repr` of a value for a message, however long it is."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


_SCALARS = (bool, int, float, complex, str, bytes, type(None))


def described(value: object) -> str:
    """What an argument is, for a message: a number or text itself, a tensor's shape, or a type."""
    name = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {name} of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length():,} bits"
    if isinstance(value, _SCALARS):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    if isinstance(value, list) and all(isinstance(element, _SCALARS) for element in value[:9]):
        more = [f"... ({len(value):,} in all)"] if len(value) > 8 else []
        return f"[{', '.join([*map(described, value[:8]), *more])}]"
    return f"a {name}"


def nearest(word: str, choices: Iterable[str], count: int = 3) -> str:
    """The choices that look most like `word`, quoted and comma-separated; empty if none does."""
    matches = difflib.get_close_matches(word, list(choices), n=count, cutoff=0.5)
    return ", ".join(repr(match) for match in matches)


def joined(names: Sequence[str], most: int = 8) -> str:
    """Names for a message: the first few, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def quoted(names: Sequence[str], most: int = 8) -> str:
    """The same with each name in quotes."""
    return joined([repr(name) for name in names], most)
