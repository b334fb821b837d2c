"""Text from files is text on the page, whatever it says."""

import pytest

from treeify.share.markdown import literal, plain, table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("shirt", "shirt"),
        ("held-out (10 %)", "held-out (10 %)"),
        ("a_b*c", r"a\_b\*c"),
        ("[x](javascript:alert)", r"\[x\](javascript:alert)"),
        ("<script>", "&#60;script&#62;"),
        ("a | b", r"a \| b"),
        ("one\n# two\r\n---", "one # two ---"),
        ("https://x www.x.y", "https&#58;//x www&#46;x.y"),
        ("@someone", "&#64;someone"),
        ("&lt;", "&#38;lt;"),
        ("\x1b[31m", r"\\x1b\[31m"),
    ],
)
def test_nothing_is_markup(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_long_text_is_cut() -> None:
    assert plain("a" * 300, 10) == "a" * 9 + "…"


def test_code_ends_where_it_should() -> None:
    assert literal("a`b\nc") == "`ab c`"


def test_tables_have_a_line_a_row() -> None:
    assert table(["a", "b"], [["1", "2"]]).splitlines() == [
        "| a | b |",
        "| ---: | ---: |",
        "| 1 | 2 |",
    ]
