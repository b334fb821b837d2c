"""`metrics.jsonl`, which may be cut off, edited or copied badly: what can be read of it counts.

A run does not need it to go on, so nothing that happened to it stops one.
"""

import codecs
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from treeify import files
from treeify.errors import CheckpointError
from treeify.training.events import EPOCH, Epoch

DAMAGED = "metrics.damaged.jsonl"


@dataclass(frozen=True)
class Row:
    """An epoch, and its line as it stands in the file: it may say more than this version reads."""

    line: bytes
    epoch: Epoch


def read_rows(file: Path) -> tuple[list[Row], list[bytes]]:
    """Every epoch once, in order, and the lines that are none or that a later one repeats.

    Raises:
        CheckpointError: the file may not be read.
    """
    try:
        content = file.read_bytes() if file.is_file() else b""
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    rows: dict[int, Row] = {}
    damaged: list[bytes] = []
    for line in map(bytes.strip, content.removeprefix(codecs.BOM_UTF8).split(b"\n")):
        if not line:
            continue
        try:
            epoch = EPOCH.validate_json(line, strict=True)
        except ValidationError:
            damaged.append(line)
            continue
        if epoch.epoch in rows:
            damaged.append(rows[epoch.epoch].line)
        rows[epoch.epoch] = Row(line, epoch)
    return [rows[number] for number in sorted(rows)], damaged


def mend(file: Path, epochs: int, warn: Callable[[str], None]) -> None:
    """Leave nothing in the file but the epochs that a run has finished.

    What is removed is put beside it, and `warn` hears about it; but for the epoch after those,
    which is all that a killed process leaves, and which the run writes again.

    Args:
        file: need not exist.
        epochs: finished.
        warn: hears what is wrong.

    Raises:
        CheckpointError: the file may not be read.
    """
    aside = files.unused(file.with_name(DAMAGED))
    if os.path.lexists(file) and not file.is_file():
        file.rename(aside)
        warn(f"{file} is no file: it is {aside.name} now.")
        aside = files.unused(file.with_name(DAMAGED))
    rows, damaged = read_rows(file)
    finished = [row for row in rows if row.epoch.epoch <= epochs]
    later = [row.line for row in rows[len(finished) :]]
    is_next = [row.epoch.epoch for row in rows[len(finished) :]] == [epochs + 1]
    removed = damaged + ([] if is_next else later)
    if removed:
        files.replace_bytes(aside, _joined(removed))
        warn(
            f"{len(removed)} line{'s'[: len(removed) > 1]} of {file} can be found in {aside.name}"
            f" now: {len(damaged)} damaged or repeated, {len(removed) - len(damaged)} later than"
            " the last state."
        )
    if damaged or later:
        files.replace_bytes(file, _joined([row.line for row in finished]))
    missing = set(range(1, epochs + 1)) - {row.epoch.epoch for row in finished}
    if missing:
        warn(f"{file} lacks {len(missing)} of {epochs} finished epochs; the state is whole.")


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)
