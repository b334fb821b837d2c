"""Checksums, by which a file tells that it is no longer what was written.

What is written as JSON lists the files beside it with their checksums, and ends with a checksum of
its own text. Earlier versions wrote neither; their files are taken as they are.

They are CRC-32, as in zip and PNG: a flipped bit never goes unseen, other damage once in four
billion times. SHA-256 takes three times as long, up to a fifth of what loading takes.
"""

import json
import mmap
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treeify import files
from treeify.errors import CheckpointError

# Keys of sealed JSON: the checksums of other files by name, and that of the text without this one.
FILES, SEAL = "files", "checksum"
_ADVICE = (
    "Copy it again from where it was saved. treeify.load(path, verify=False) reads an ensemble all"
    " the same, say one whose configuration you changed; save it again then."
)


def _crc(content: bytes | mmap.mmap) -> str:
    return f"{zlib.crc32(content):08x}"


def checksum(file: Path) -> str:
    """The CRC-32 of a file's content, in hexadecimal digits."""
    if not file.stat().st_size:  # which cannot be mapped
        return _crc(b"")
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return _crc(content)


def checksums(paths: Iterable[Path], directory: Path) -> dict[str, str]:
    """The checksums of files by their names, relative to a directory."""
    return {file.relative_to(directory).as_posix(): checksum(file) for file in sorted(paths)}


def check_file(file: Path, expected: str) -> None:
    """Raise CheckpointError unless a file is there and has this checksum."""
    # What is no ordinary file, a pipe say, may have no end.
    found = checksum(file) if file.is_file() else "no such file"
    if found != expected:
        raise CheckpointError(
            f"{file} is missing, truncated or damaged.",
            expected=f"checksum {expected}, as it was written",
            found=found,
            next_step=_ADVICE,
        )


@contextmanager
def checking(file: Path, expected: str) -> Iterator[None]:
    """Check a file in a thread while it is used; what was made of a damaged one must not be kept.

    Raises:
        CheckpointError: at the end, the file is missing or has another checksum, whatever other
            error there was: that explains it.
    """
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(check_file, file, expected)
        try:
            yield
        except Exception:
            check.result()
            raise
        check.result()


def seal(values: Mapping[str, Any]) -> str:
    """JSON that ends with a checksum of itself."""
    bare = {key: value for key, value in values.items() if key != SEAL} | {SEAL: ""}
    text = json.dumps(bare, indent=2) + "\n"
    return _with_seal(text, _crc(text.encode()))


def _with_seal(text: str, value: str) -> str:
    """The text with another checksum at its end."""
    head, key, _ = text.rpartition(f'"{SEAL}": ')
    return f'{head}{key}"{value}"\n}}\n'


def read_sealed(file: Path, most: int, *, verify: bool = True) -> Any:
    """The values in a file of JSON, which `seal` or an earlier version wrote.

    Args:
        file: the file.
        most: how many bytes it may have.
        verify: whether the text must have the checksum that it ends with.

    Raises:
        CheckpointError: it is not what was written.
        FileNotFoundError: there is no such file.
    """
    try:
        text = files.read_bytes(file, most).decode().replace("\r\n", "\n")
        values = json.loads(text)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is damaged or cannot be read: {error}", next_step=_ADVICE
        ) from error
    # Both keys or neither: a bit that flips in one of their names makes no earlier version of it.
    is_sealed = isinstance(values, dict) and bool({FILES, SEAL} & values.keys())
    if verify and is_sealed:
        bare = _with_seal(text, "")
        expected = _crc(bare.encode())
        if text != _with_seal(text, expected) or FILES not in values:
            raise CheckpointError(
                f"{file} is damaged: its text is not what was written.",
                expected=f"one that ends with its {SEAL}",
                found=f"{values.get(SEAL)!r} where the text has {expected!r}",
                next_step=_ADVICE,
            )
    return values
