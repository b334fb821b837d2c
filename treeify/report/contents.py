"""Everything a report says, in order: what was read becomes sections."""

from __future__ import annotations

from treeify.report import style
from treeify.report.sections.accuracy import leaves_section, spread_section, trade_off_section
from treeify.report.sections.answering import confusion_section, reliability_section
from treeify.report.sections.running import latency_section, training_section
from treeify.report.sections.section import Contents, Gather, Section
from treeify.report.sections.structure import (
    conversion_section,
    provenance_section,
    tree_section,
)

_SECTIONS: tuple[Gather, ...] = (
    trade_off_section,
    tree_section,
    leaves_section,
    spread_section,
    reliability_section,
    confusion_section,
    training_section,
    latency_section,
    conversion_section,
    provenance_section,
)


def sections(contents: Contents) -> list[Section]:
    """All ten sections; one that has nothing to show says why."""
    return [gather(contents) for gather in _SECTIONS]


def summary(contents: Contents) -> list[tuple[str, str]]:
    """What matters most of one result, values by their names; nothing of several."""
    if contents.are_several or not contents.results:
        return []
    (result,) = contents.results
    first, last = result.sizes[0].leaves, result.sizes[-1].leaves
    values = [("leaves", f"{last}")]
    values += [
        (
            f"accuracy, {score.leaves} {'leaf' if score.leaves == 1 else 'leaves'}",
            f"{score.accuracy:.2f} %",
        )
        for score in dict.fromkeys((*result.scores[:1], *result.scores[-1:]))
    ]
    if result.base is not None and result.base.macs and last > 1:
        ratio = result.sizes[-1].macs / result.base.macs
        values.append((f"MACs, {last} leaves to 1", f"{ratio:.2f} x"))
    if result.times is not None:
        ends = dict.fromkeys((first, last))
        times = (f"{1e3 * result.times.seconds[size]:.3g}" for size in ends)
        values.append((f"ms, {' to '.join(map(str, ends))} leaves", " to ".join(times)))
    values.append(("parameters", style.count(result.sizes[-1].parameters)))
    return values
