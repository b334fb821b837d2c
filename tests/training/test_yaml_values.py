"""YAML's values, where their keys stand, and where reading them stops."""

import pytest

from treeify.training.yaml_values import check_keys, keys, parse


def test_values_and_the_lines_of_their_keys() -> None:
    value, node = parse("a: 1e-4\nb:\n  - c: &x [1, 2]\n    d: *x\n")
    assert value == {"a": 1e-4, "b": [{"c": [1, 2], "d": [1, 2]}]}
    lines = {("a",): 1, ("b",): 2, ("b", "0", "c"): 3, ("b", "0", "d"): 4}
    assert dict(keys(node)) == lines
    assert parse("") == (None, None)


@pytest.mark.parametrize("text", ["1:2", "12:30:45", "-1:2", "1:2.5", "0:2", "1:70"])
def test_a_split_is_no_number_to_the_base_60(text: str) -> None:
    assert parse(f"splits: [{text}, {text}]")[0] == {"splits": [text, text]}
    assert parse(f"'{text}'")[0] == text
    assert parse("{a: 12, b: 1.5, c: 2024-01-01}")[0]["a"] == 12


def test_a_key_twice_is_said_with_both_lines() -> None:
    check_keys(parse("a: {x: 1}\nb: {x: 1}")[1])
    with pytest.raises(ValueError, match=r"the key a\.x is there twice, in lines 1 and 2"):
        check_keys(parse("a: {x: 1,\n x: 2}")[1])


@pytest.mark.parametrize("depth", [49, 50])
def test_depth_counts_from_the_outside_in(depth: int) -> None:
    text = "[" * depth + "1" + "]" * depth
    if depth == 49:
        assert parse(text)[1] is not None
    else:
        with pytest.raises(ValueError, match="nested deeper than 50 levels"):
            parse(text)


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63) + 1, 2**63])
def test_numbers_have_64_bits(number: int) -> None:
    if number < 2**63:
        assert parse(str(number))[0] == number
    else:
        with pytest.raises(ValueError, match="more than 64 bits"):
            parse(str(number))
