"""What an export's manifest says: its tree, its steps, their parity and their latencies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from treeify.deploy import runtime
from treeify.deploy.exported import ExportedEnsemble
from treeify.deploy.formats import MANIFEST
from treeify.errors import CheckpointError
from treeify.evaluation.cost import Cost
from treeify.report.results import ExportedStep, LatencyTable, Level, Result, Transition

# As the runtime says what latencies are of: shape, type, then machine, engine and threads.
_SITUATION = re.compile(r"(?P<images>(?P<batch>[1-9]\d*)(x\d+)+ \w+), (?P<machine>.+)")


def result_of(exported: ExportedEnsemble, name: str) -> Result:
    """What is known of an export without running it.

    Raises:
        CheckpointError: it is damaged.
    """
    manifest = exported.model.manifest
    try:
        return Result(
            name,
            exported.path,
            "export",
            sizes=tuple(
                Cost(size, exported.count_macs(size), exported.count_parameters(size))
                for size in exported.sizes
            ),
            levels=_levels(exported, manifest),
            steps=tuple(map(_step, manifest["steps"])),
            latencies=_latencies(exported),
            budgets=tuple(exported.budgets.values()),
            origin=_origin(exported.path, manifest),
            missing={
                "training": "An export keeps nothing of the training: give its run, too.",
                "conversion": "How each operation runs stands in what it was exported from.",
            },
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{exported.path / MANIFEST} is damaged: {error!r}",
            next_step="Export the ensemble again: treeify export.",
        ) from error


def _levels(exported: ExportedEnsemble, manifest: dict[str, Any]) -> tuple[Level, ...]:
    """Of the tree as far as it was exported; what a level costs is not told apart."""
    tree = exported.tree
    splits = [spec.rpartition(":")[0] for spec in manifest["tree"]["splits"]]
    names = [None, *splits[len(splits) - len(tree.fanouts) :]]
    return tuple(
        Level(number, split, branches)
        for number, (split, branches) in enumerate(zip(names, tree.branches, strict=True))
    )


def _step(row: dict[str, Any]) -> ExportedStep:
    parity = row["parity"]
    return ExportedStep(
        str(row["file"]),
        int(row["start"]),
        int(row["leaves"]),
        int(row["macs"]),
        int(row["parameters"]),
        int(row["bytes"]),
        None if parity is None else float(parity["largest_difference"]),
    )


def _latencies(exported: ExportedEnsemble) -> tuple[LatencyTable, ...]:
    try:
        measured = exported.model.latencies
    except runtime.ExportError as error:
        raise CheckpointError(str(error)) from error
    return tuple(_latency_table(latencies, exported.path) for latencies in measured.values())


def _latency_table(latencies: runtime.Latencies, path: Path) -> LatencyTable:
    situation = _SITUATION.fullmatch(latencies.situation)
    if situation is None:
        raise CheckpointError(
            f"{path} holds latencies of no shape of images.",
            expected="such as 1x3x32x32 float32, and the machine",
            found=f"{latencies.situation!r:.200}",
            next_step=f"Measure them again: treeify calibrate {path}.",
        )
    return LatencyTable(
        situation["images"],
        int(situation["batch"]),
        situation["machine"],
        "as exported",
        tuple(
            Transition(*key, seconds, latencies.slow[key], latencies.margins[key])
            for key, seconds in latencies.typical.items()
        ),
        latencies.repeats,
    )


def _origin(path: Path, manifest: dict[str, Any]) -> dict[str, str]:
    facts = {
        "export": str(path),
        "base model": str(manifest["name"]),
        "splits": ", ".join(map(str, manifest["tree"]["splits"])) or "none",
        "image": " x ".join(map(str, manifest["images"]["shape"])),
        "versions": ", ".join(f"{name} {number}" for name, number in manifest["versions"].items()),
    }
    if manifest.get("quantised"):
        facts["numbers"] = "quantised to 8 bits"
    return facts
