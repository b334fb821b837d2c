"""What an ensemble says of itself: the levels of its tree, what was measured, what wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treeify.anytime.deadline import Latencies
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.engine.forms import Form
from treeify.engine.packed_tensors import named_tensors
from treeify.report.results import LatencyTable, Level, Transition


def levels_of(hne: HierarchicalEnsemble) -> tuple[Level, ...]:
    """What each level costs and how it runs for one image."""
    conversion, tree = hne.conversion, hne.tree
    parameters, sizes = [0] * tree.levels, [0] * tree.levels
    for name, parameter in hne.named_parameters():
        parameters[hne.level_of(name)] += parameter.numel()
    known = hne.packed_tensors
    for name, tensor in named_tensors(hne):
        if name in known:
            sizes[hne.level_of(name)] += tensor.numel() * tensor.element_size()
    execution = hne.plan(hne.example_images(1)).execution
    levels = []
    for number, branches in enumerate(tree.branches):
        nodes = [node for node in conversion.nodes if node.level == number]
        macs = sum(node.macs for node in nodes)
        packed = sum(node.macs for node in nodes if node.form is not Form.BRANCHES)
        levels.append(
            Level(
                number,
                conversion.splits.names[number - 1] if number else None,
                branches,
                macs,
                parameters[number],
                sizes[number],
                execution[number] if number else "shared",
                packed / macs if macs and number else None,
            )
        )
    return tuple(levels)


def latencies_of(hne: HierarchicalEnsemble) -> tuple[LatencyTable, ...]:
    """What `treeify calibrate` measured, for every situation."""
    return tuple(map(_latency_table, hne.latencies.values()))


def _latency_table(latencies: Latencies) -> LatencyTable:
    transitions = (
        Transition(row.start, row.stop, row.typical, row.slow, row.margin)
        for row in latencies.transitions
    )
    return LatencyTable(
        str(latencies.situation),
        latencies.situation.shape[0],
        latencies.situation.machine,
        str(latencies.plan),
        tuple(transitions),
        latencies.repeats,
    )


def origin_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Where a saved ensemble comes from, as its configuration says."""
    architecture = config.get("architecture")
    facts = {"base model": "a module of the user's own"}
    if architecture is not None:
        options = ", ".join(f"{key}={value}" for key, value in architecture["kwargs"].items())
        facts["base model"] = architecture["name"] + (f" ({options})" if options else "")
    facts["splits"] = ", ".join(config["splits"]) or "none"
    facts["image"] = " x ".join(map(str, config["example"]))
    facts["saved by"] = ", ".join(
        f"{package} {number}"
        for package, number in {"treeify": config["treeify"], **config["versions"]}.items()
    )
    facts["identity"] = str(config["identity"])
    return facts
