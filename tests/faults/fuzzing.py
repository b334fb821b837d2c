"""How inputs are drawn, and what every one has to come to: a result, or one readable message."""

import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from treeify.errors import TreeifyError, printable

# Of the long tests: how many inputs, and a seed; say TREEIFY_FUZZ_SEED=N to draw the same again.
# The short ones draw the same always.
MANY = int(os.environ.get("TREEIFY_FUZZ_INPUTS", 10_000))
SEED = int(os.environ.get("TREEIFY_FUZZ_SEED", random.SystemRandom().randrange(2**32)))


def fuzzed(examples: int, **strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """Run a test on so many inputs; on `MANY` if it is marked slow."""

    def decorate(test: Callable[..., None]) -> Any:
        is_long = examples == MANY
        quiet = settings(
            max_examples=examples,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
        drawn: Any = seed(SEED if is_long else 0)(quiet(given(**strategies)(test)))
        return pytest.mark.slow(pytest.mark.usefixtures("show_seed")(drawn)) if is_long else drawn

    return decorate


@contextmanager
def limited() -> Iterator[None]:
    """Fail in the middle of what has no end: after ten seconds of work, or thirty of waiting.

    The processor's seconds are what is judged, those of all threads: a machine that does something
    else meanwhile stretches the others, which only end what waits for ever.
    """

    def stop(number: int, _: object) -> None:
        raise AssertionError(f"hangs: {signal.Signals(number).name}")

    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, 10.0),
        signal.SIGALRM: (signal.ITIMER_REAL, 30.0),
    }
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def outcome(call: Callable[[], Any], error_class: type[TreeifyError] = TreeifyError) -> Any:
    """What a call returns; None where it refuses its input in a message that can be read."""
    with limited(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except error_class as error:
            assert_readable(str(error))
            return None


def assert_readable(text: str) -> None:
    """Nothing a terminal obeys, and no more than a screen or two."""
    assert printable(text) == text
    assert text.strip()
    assert len(text) < 20_000


# What reading numbers, names and text may stumble over.
HOSTILE_WORDS = [
    *("", " ", "\x00", "\x1b[31mred", "\x07", "\r", "[bold]x[/bold]", "[/]", ":cat:", "\u202egnp"),
    *("__proto__", "__class__", "__init__", "constructor", "../..", "/dev/zero", "a" * 5000),
    *("nan", "inf", "-inf", "1e999", "-1", "0", "9" * 5000, "0x" + "f" * 5000, "1" + "0" * 18),
    *("{}", "[", "]", "{", "}", "%s", "{0}", "\udcff", "null", "true", "é\u0301", "\U0001f600"),
]
words = st.sampled_from(HOSTILE_WORDS)
numbers = st.sampled_from(
    [0, -1, 1, 2, 3, 7, 10**6, 10**9, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-300, 1e308]
)
odd_floats = st.sampled_from([float("nan"), float("inf"), -float("inf")])
scalars = st.one_of(st.none(), st.booleans(), numbers, odd_floats, words, st.text(max_size=20))
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(words | st.text(), inner, max_size=4)
    ),
    max_leaves=8,
)

_EDITS = ("flip", "cut", "insert", "repeat", "zero", "fill", "end")
edits = st.lists(
    st.tuples(
        st.sampled_from(_EDITS),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=6,
)


def edited(content: bytes, changes: list[tuple[str, float, int, int]]) -> bytes:
    """Bytes after each change: its kind, where in 0 to 1, a byte, and how many."""
    for kind, where, byte, count in changes:
        at = int(where * len(content))
        head, span, tail = content[:at], content[at : at + count], content[at + count :]
        content = {
            "flip": head + bytes(value ^ (byte or 1) for value in span[:1]) + content[at + 1 :],
            "cut": head + tail,
            "insert": head + bytes([byte]) * count + content[at:],
            "repeat": head + span * 3 + tail,
            "zero": head + bytes(len(span)) + tail,
            "fill": head + b"\xff" * len(span) + tail,
            "end": head,
        }[kind]
    return content


def replaced(value: Any, path: tuple[float, ...], other: Any) -> Any:
    """A nested value with a part of it, wherever the numbers in 0 to 1 lead, replaced."""
    if not path or not value or not isinstance(value, dict | list):
        return other
    index = int(path[0] * len(value))
    if isinstance(value, list):
        return [*value[:index], replaced(value[index], path[1:], other), *value[index + 1 :]]
    key = list(value)[index]
    return {**value, key: replaced(value[key], path[1:], other)}


paths = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4).map(tuple)
