"""Lines, tables and JSON: nothing is markup, lines stay whole, numbers stand on the right."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from treeify.cli.output import Column, print_json, say, table


def shown(*parts: object, width: int = 40, terminal: bool = False) -> str:
    file = io.StringIO()
    say(Console(file=file, width=width, force_terminal=terminal, color_system=None), *parts)  # type: ignore[arg-type]
    return file.getvalue()


def test_lines_stay_whole_and_are_no_markup() -> None:
    line = "[bold]a[/bold] " + "word " * 20
    assert shown(line, "next") == f"{line}\nnext\n"


def test_numbers_have_their_format_and_stand_on_the_right() -> None:
    columns = [Column("name"), Column("MACs", ",d"), Column("%", ".1f")]
    lines = shown(table(columns, [("[b]a", 1_000, 2.0), ("b", "?", 12.34)])).splitlines()
    assert any("[b]a" in line and "1,000" in line and " 2.0 " in line for line in lines)
    assert any(" b " in line and "   ? " in line and "12.3" in line for line in lines)


def test_sections_have_a_line_between_them() -> None:
    one = shown(table([Column("a")], [("x",), ("y",)]))
    two = shown(table([Column("a")], [("x",)], [("y",)]))
    assert len(two.splitlines()) == len(one.splitlines()) + 1


def test_words_fold_on_a_terminal_only() -> None:
    word = "w" * 60
    assert word in shown(table([Column("a")], [(word,)]))
    folded = shown(table([Column("a")], [(word,)]), terminal=True)
    assert folded.count("w") == 60
    assert max(map(len, folded.splitlines())) == 40
    assert word in shown(table([Column("a", no_wrap=True)], [(word,)]), terminal=True)


@pytest.mark.parametrize("width", [1, 10, 30, 40, 60, 200])
@pytest.mark.parametrize("terminal", [True, False])
def test_numbers_are_whole_at_any_width(width: int, terminal: bool) -> None:
    columns = [Column("the layer"), *(Column(f"MACs after {n}", ",d") for n in range(3))]
    rows = [("w" * 30, 36_579_512, 1_234_567_890, 7), ("a b", "8.12 (14.44)", 1, 2)]
    text = shown(table(columns, rows), width=width, terminal=terminal)
    lines = text.splitlines()
    assert any("36,579,512" in line and "1,234,567,890" in line for line in lines)
    assert "8.12 (14.44)" in text
    assert "…" not in text
    assert text.count("w") == 30
    if not terminal:
        assert "w" * 30 in text
    elif width >= 60:
        assert max(map(len, lines)) <= width


def test_a_row_has_a_cell_for_every_column() -> None:
    with pytest.raises(ValueError, match="zip"):
        table([Column("a"), Column("b")], [("x",)])


@dataclass
class Point:
    name: str
    sizes: tuple[int, ...]


def test_json_may_hold_dataclasses_and_paths(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"point": Point("ä", (1, 2)), "out": Path("a/b")})
    text = capsys.readouterr().out
    assert json.loads(text) == {"point": {"name": "ä", "sizes": [1, 2]}, "out": "a/b"}
    assert text.isascii()


def test_nothing_is_shown_that_a_terminal_obeys() -> None:
    word = "\x1b[31m:cat:[red]\r\udcff"
    as_shown = "\\x1b[31m:cat:[red]\\r\\udcff"
    assert shown(word, width=200) == f"{as_shown}\n"
    text = shown(table([Column(word)], [(word,)], title=word, caption=word), width=200)
    assert text.count(as_shown) == 4
    assert not set("\x1b\r\udcff") & set(text)
