"""Messages: their parts, and nothing in them that a terminal would obey."""

import pytest

from treeify.errors import DataError, TreeifyError, printable, shortened


def test_a_message_has_its_parts_in_lines() -> None:
    error = TreeifyError("it is wrong.", expected="a", found="b", next_step="Do c.")
    assert str(error) == "it is wrong.\n  Expected a\n  Found b\n  Do c."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\rb\x07\x00\x7f\x9b", "a\\rb\\x07\\x00\\x7f\\x9b"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("\udcff", "\\udcff"),
        ("a\tb\nc [bold] é \U0001f600 \\x1b", "a\tb\nc [bold] é \U0001f600 \\x1b"),
    ],
)
def test_what_a_terminal_obeys_is_escaped_once(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
    assert str(DataError(text, found=text)) == f"{shown}\n  Found {shown}"


def test_a_file_can_hold_bytes_that_are_no_text() -> None:
    assert printable("\x1b\udcff", in_file=True) == "\\x1b\udcff"


def test_a_long_value_is_shortened() -> None:
    assert shortened("ab") == "'ab'"
    assert shortened("a" * 10_000, 5) == "'aaaa... (10,002 characters)"
