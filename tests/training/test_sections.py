"""Sections of recipes: their fields' types, and models of functions' options."""

from typing import Any

import pytest

from treeify.registry import Fraction
from treeify.training.sections import Section, options_of, section_in


class Inner(Section):
    size: int = 1


def scaled(x: Any, *, factor: Fraction, shift: float = 0.5) -> Any:
    return x


class Scaled:
    def __init__(self, *, factor: int = 2) -> None:
        self.factor = factor


@pytest.mark.parametrize(
    ("annotation", "section"),
    [(Inner, Inner), (Inner | None, Inner), (int, None), (dict[str, Inner], None), (None, None)],
)
def test_the_section_of_a_field(annotation: Any, section: type[Section] | None) -> None:
    assert section_in(annotation) is section


def test_options_are_the_keyword_only_parameters() -> None:
    assert list(options_of(scaled).model_fields) == ["factor", "shift"]
    assert options_of(scaled)(factor=0.25).model_dump() == {"factor": 0.25, "shift": 0.5}
    assert options_of(Scaled)().model_dump() == {"factor": 2}
    for values in ({}, {"factor": 2.0}, {"factor": 0.5, "shift": "1"}, {"factor": 0.5, "x": 1}):
        with pytest.raises(ValueError, match="validation error"):
            options_of(scaled).model_validate(values)


def test_unknown_keys_and_other_types_are_refused() -> None:
    for values in ({"sise": 2}, {"size": 2.0}, {"size": "2"}):
        with pytest.raises(ValueError, match="validation error"):
            Inner.model_validate(values)
