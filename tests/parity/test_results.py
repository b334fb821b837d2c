"""Rows survive in their file, and say what was checked."""

import os
from pathlib import Path

import pytest
from rows import row

import treeify
from treeify.parity import results
from treeify.parity.results import Row


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_only_shapes_were_checked_of_says_why() -> None:
    needs = {"how": "meta", "estimate": 40 * 10**9, "least": 9 * 10**9}
    start = "checking numbers takes about 40 GB, with as few blocks as it runs with 9 GB; "
    assert row("a", memory=8 * 10**9, **needs).shortage == f"{start}there were 8 GB"
    assert row("a", memory=10**10, **needs).shortage == f"{start}it ran out of 10 GB"


def test_a_file_cut_off_anywhere_loses_no_other_line() -> None:
    file = Path("rows.jsonl")
    results.append(file, row("a", packed_fraction=0.5))
    whole = file.read_bytes()
    results.append(file, row("b"))
    both = file.read_bytes()
    for length in range(len(whole), len(both) + 1):
        file.write_bytes(both[:length])
        results.append(file, row("c"))
        found = results.read(file)
        names = [own.name for own in found.rows]
        if length in (len(whole), len(both), len(both) - 1):
            complete = length >= len(both) - 1
            assert names == (["a", "b", "c"] if complete else ["a", "c"])
            assert found.damaged == 0
        else:
            assert names == ["a", "c"]
            assert found.damaged == 1


def test_a_row_is_brought_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    file, bring = tmp_path / "rows.jsonl", os.fsync

    def fsync(descriptor: int) -> None:
        bring(descriptor)
        seen.append(file.read_text())

    monkeypatch.setattr(os, "fsync", fsync)
    results.append(file, Row(name="a", versions={}, asked="2"))
    assert seen == [file.read_text()]
    assert seen[0].endswith("\n")


@pytest.mark.parametrize("text", ['{"name": 3}', "[]", '{"name": "a", "versions": {}, "x": 1}'])
def test_a_file_of_something_else_is_refused(text: str) -> None:
    Path("other.jsonl").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(treeify.errors.DataError, match=r"other.jsonl:1 is no row"):
        results.read(Path("other.jsonl"))


def test_compressed_rows_read_the_same() -> None:
    rows = (row("a", packed_fraction=1 / 3, deviations={"prefix": 0.1}), row("b", failure="é"))
    file = Path("rows.jsonl.xz")
    file.write_bytes(results.compressed(reversed(rows)))
    assert results.read(file).rows == rows


def test_the_rows_that_ship_have_the_macs_of_every_model() -> None:
    rows = results.shipped().newest().values()
    assert [row.name for row in rows if row.converted and not row.macs] == []


def test_the_key_in_files_is_that_of_the_first_rows() -> None:
    results.append(Path("rows.jsonl"), row("a", packed_fraction=0.5))
    assert '"packed_share":0.5' in Path("rows.jsonl").read_text(encoding="utf-8")
    (known,) = results.read(Path("rows.jsonl")).rows
    assert known.packed_fraction == 0.5
