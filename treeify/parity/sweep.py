"""Many models checked one after the other, each in a process of its own."""

import contextlib
import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from treeify.errors import InputError
from treeify.parity import results
from treeify.parity.check_levels import BASE_BYTES
from treeify.parity.results import FULL, META, Coverage, Row
from treeify.parity.zoo_check import UNFINISHED, Export, verify_model

_DONE = "done"
_OUT_OF_MEMORY = "out of memory"
_LONGEST_REASON = 600
# What libraries say where they do not raise MemoryError.
_SHORTAGE = "can(no|')t (allocate memory|start new thread)"


@dataclass(frozen=True)
class Settings:
    """What is asked of every model.

    Args:
        splits: as `hierarchicalize` takes them, as text.
        memory: bytes a check may use. It decides which models are checked in full, and a process
            gets no more where the system can refuse (Linux). One that asks for more is started
            again as if there were less: shallower, or without weights.
        time_limit: seconds a model may take; None is no limit.
        export: exports an ensemble in a model's process, and raises what it cannot; None to export
            none. A function of a module: it is named to the process.
    """

    splits: str = "2"
    memory: int = 8 * 10**9
    time_limit: float | None = None
    export: Export | None = None


def shard(names: Sequence[str], part: int, parts: int) -> list[str]:
    """Every `parts`-th name from the `part`-th on: neighbours are alike and cost alike."""
    if not 1 <= part <= parts:
        raise InputError(
            f"there is no shard {part}/{parts}.", expected="K/N with K from 1 to N, e.g. 3/8"
        )
    return list(names[part - 1 :: parts])


def todo(
    names: Sequence[str], coverage: Coverage, settings: Settings, *, retry: bool = False
) -> list[str]:
    """The names that are still to be checked under the present versions, in order.

    Those are names without a row of these splits, models that were not checked in full for want of
    memory if there is more of it now, models that are to be exported and were not, and with
    `retry` models whose check or export failed.
    """
    done = {
        row.name
        for row in coverage.present(settings.splits)
        if not (retry and _failed(row, settings))
        and not _could_be_fuller(row, settings.memory)
        and not _lacks_export(row, settings)
    }
    return [name for name in names if name not in done]


def _failed(row: Row, settings: Settings) -> bool:
    return row.failure is not None if settings.export is None else row.unfit


def _lacks_export(row: Row, settings: Settings) -> bool:
    return settings.export is not None and row.export is None and row.failure is None


def _could_be_fuller(row: Row, memory: int) -> bool:
    checked = row.failure is None and row.how != FULL
    return checked and row.memory is not None and row.memory < memory


def sweep(names: Sequence[str], output: Path, settings: Settings) -> Iterator[Row]:
    """Check models, and append a row for each to a file before going on.

    A model that crashes its process, runs out of memory or of time has a row that says so. What a
    sweep was doing when it was interrupted leaves no row.

    Yields:
        Each row, once it is in the file.
    """
    versions = results.versions()
    for name in names:
        start = time.monotonic()
        fields = _within_memory(name, settings)
        fields["seconds"] = round(time.monotonic() - start, 2)
        row = Row(name=name, versions=versions, asked=settings.splits, **fields)
        results.append(output, row)
        yield row


def _within_memory(name: str, settings: Settings) -> dict[str, Any]:
    """Fields of the model's row, of the fullest check that does not run out of memory."""
    end = math.inf if settings.time_limit is None else time.monotonic() + settings.time_limit
    for exhausted in itertools.count():
        fields = _in_own_process(name, settings, exhausted, end)
        ran_out = str(fields.get("failure")).startswith(_OUT_OF_MEMORY)
        if not ran_out or fields.get("how") in (None, META) or time.monotonic() > end:
            break
    return fields


def _in_own_process(name: str, settings: Settings, exhausted: int, end: float) -> dict[str, Any]:
    """Fields of the model's row, from a process that is stopped at `end` of `time.monotonic`.

    The first `exhausted` checks, the fullest ones, ran out of memory before and are left out.
    """
    # A server that has imported everything and does nothing else forks them off.
    context: Any = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["treeify.parity.sweep"])
    parent_end, child_end = context.Pipe()
    fields: dict[str, Any] = {}
    # What the process leaves behind if it is ended is here, and goes.
    with tempfile.TemporaryDirectory(prefix="treeify-") as scratch:
        args = (child_end, name, settings, exhausted, Path.cwd(), scratch)
        process = context.Process(target=_check, args=args, daemon=True)
        process.start()
        child_end.close()
        try:
            if _listen(parent_end, fields, end):
                process.join()
                failure = _death(process.exitcode)
            else:
                failure = f"stopped after the time limit of {settings.time_limit:g} s"
        finally:
            process.kill()
            process.join()
            parent_end.close()
    if fields.pop(_DONE, False):
        return fields
    # The export comes last: all else has passed.
    return {**fields, _stage(fields): failure}


def _stage(fields: Mapping[str, Any]) -> str:
    """The field that says what stopped a process."""
    return "export" if fields.get("export") == UNFINISHED else "failure"


def _listen(connection: Connection, fields: dict[str, Any], end: float) -> bool:
    """Collect the fields a process tells until it ends; whether it does so in time."""
    with contextlib.suppress(EOFError, ConnectionResetError):
        while connection.poll(None if end == math.inf else max(0.0, end - time.monotonic())):
            fields |= connection.recv()
        return False
    return True


def _death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its process ended by itself with code {code}"
    text = f"its process was ended by {signal.Signals(-code).name}"
    if -code == signal.SIGKILL:
        return f"{_OUT_OF_MEMORY}: {text}, as the system does then"
    return text


def _check(
    connection: Connection,
    name: str,
    settings: Settings,
    exhausted: int,
    directory: Path,
    scratch: str,
) -> None:
    """What the process does: tell the row's fields one after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and ends this one
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    warnings.simplefilter("ignore")
    # With less than the base no numbers are checked, but Python and torch still need theirs.
    _limit_memory(max(settings.memory, BASE_BYTES))
    os.chdir(directory)
    tempfile.tempdir = scratch

    told: dict[str, Any] = {}

    def tell(**fields: Any) -> None:
        told.update(fields)
        connection.send(fields)

    asked = (name, settings.splits, settings.memory, tell, exhausted)
    try:
        verify_model(*asked, export=settings.export)
    except Exception as error:
        tell(**{_stage(told): _reason(error, settings.memory)})
    tell(peak_memory=_peak_memory(), done=True)


def _end_with_parent(connection: Connection) -> None:
    """Nothing is ever sent to this process: its end of the pipe speaks when the parent is gone."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os._exit(1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch could not get the memory it asked for."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or re.search(_SHORTAGE, str(cause), re.IGNORECASE):
            return True
        cause = cause.__cause__
    return False


def _reason(error: Exception, memory: int) -> str:
    if is_out_of_memory(error):
        return f"{_OUT_OF_MEMORY}: more than the {results.gigabytes(memory)} it may use"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_LONGEST_REASON]


def _limit_memory(size: int) -> None:
    """Let allocations fail that would exceed a size, where the system can."""
    if sys.platform == "linux":
        import resource

        _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (size, hard_limit))


def _peak_memory() -> int | None:
    """Bytes of memory this process held at most; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
