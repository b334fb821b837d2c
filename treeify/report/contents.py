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
    leaves = result.sizes[-1].leaves
    values = [("leaves", f"{leaves}")]
    if result.scores:
        first, last = result.scores[0], result.scores[-1]
        values.append(
            (
                "accuracy, 1 leaf" if first.leaves == 1 else "first accuracy",
                f"{first.accuracy:.2f} %",
            )
        )
        values.append((f"accuracy, {last.leaves} leaves", f"{last.accuracy:.2f} %"))
    if result.base is not None and result.base.macs:
        ratio = result.sizes[-1].macs / result.base.macs
        values.append((f"MACs, {leaves} leaves to 1", f"{ratio:.2f} x"))
    if result.times is not None:
        first_time, last_time = (
            1e3 * result.times.seconds[size] for size in (result.sizes[0].leaves, leaves)
        )
        values.append((f"ms, 1 to {leaves} leaves", f"{first_time:.3g} to {last_time:.3g}"))
    values.append(("parameters", style.count(result.sizes[-1].parameters)))
    return values
