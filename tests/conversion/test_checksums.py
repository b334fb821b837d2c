"""What tells that a file is whole; `faults/test_flipped_bits.py` flips the bits of all files."""

import json
import os
import zlib
from contextlib import nullcontext
from pathlib import Path

import pytest

from treeify.conversion import checksums
from treeify.errors import CheckpointError


def test_checksums_are_those_of_other_tools(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    contents = {"empty": b"", "inner/some": os.urandom(3_000_000)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in contents]
    expected = {name: f"{zlib.crc32(content):08x}" for name, content in contents.items()}
    assert checksums.checksums(paths, tmp_path) == expected
    checksums.check_file(paths[1], expected["inner/some"])
    with pytest.raises(CheckpointError, match=f"checksum {expected['empty']}"):
        checksums.check_file(paths[1], expected["empty"])


@pytest.mark.parametrize("error", [None, ValueError])
def test_a_file_is_checked_while_it_is_used(tmp_path: Path, error: type[Exception] | None) -> None:
    def use(expected: str) -> None:
        with checksums.checking(tmp_path / "file", expected):
            if error is not None:
                raise error("from a file that may be damaged")

    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(error) if error else nullcontext():
        use(f"{zlib.crc32(b'content'):08x}")
    with pytest.raises(CheckpointError, match="damaged") as raised:
        use("00000000")
    assert isinstance(raised.value.__context__, error or type(None))


def test_what_is_no_ordinary_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing", "."):
        with pytest.raises(CheckpointError, match="no such file"):
            checksums.check_file(tmp_path / name, "00000000")


def test_sealed_values_come_back_and_may_be_sealed_again(tmp_path: Path) -> None:
    file = tmp_path / "values.json"
    values = {"files": {}, "text": '"checksum": ', "checksum": "of before", "last": float("inf")}
    file.write_text(checksums.seal(values))
    read = checksums.read_sealed(file, 2**20)
    assert list(read) == ["files", "text", "last", "checksum"]
    assert read["text"] == values["text"]
    file.write_text(checksums.seal(read))
    assert checksums.read_sealed(file, 2**20) == read
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))  # as some tools copy text
    assert checksums.read_sealed(file, 2**20) == read


@pytest.mark.parametrize("key", ["files", "checksum"])
def test_a_sealed_file_without_one_of_its_keys_is_damaged(tmp_path: Path, key: str) -> None:
    file = tmp_path / "values.json"
    file.write_text(checksums.seal({"files": {}, "value": 1}))
    values = checksums.read_sealed(file, 2**20)
    del values[key]
    file.write_text(json.dumps(values, indent=2) + "\n")
    with pytest.raises(CheckpointError, match="not what was written"):
        checksums.read_sealed(file, 2**20)
    assert checksums.read_sealed(file, 2**20, verify=False) == values


@pytest.mark.parametrize("values", [{"value": 1}, [1], None])
def test_what_earlier_versions_wrote_is_taken_as_it_is(tmp_path: Path, values: object) -> None:
    file = tmp_path / "values.json"
    file.write_text(json.dumps(values))
    assert checksums.read_sealed(file, 2**20) == values
    file.write_text(json.dumps(values)[:-1] + "\x00")
    with pytest.raises(CheckpointError, match="is damaged"):
        checksums.read_sealed(file, 2**20)


@pytest.mark.parametrize("content", [b"[" * 10**6, b"\xff", b"{", b""])
def test_what_is_no_json_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        checksums.read_sealed(tmp_path / "a.json", 10**7)


def test_no_more_is_read_than_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    assert checksums.read_sealed(tmp_path / "a.json", 6) == [1, 2]
    with pytest.raises(CheckpointError, match="larger than 5 bytes"):
        checksums.read_sealed(tmp_path / "a.json", 5)
