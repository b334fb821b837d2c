"""Sections on what an ensemble is: its tree, how it was converted, and where it comes from."""

from __future__ import annotations

from treeify.report.chart import Table
from treeify.report.figures.packing import packed_levels, parity
from treeify.report.figures.tree import export_steps, level_costs, tree
from treeify.report.results import Result
from treeify.report.sections.section import Contents, Draft, Facts, Section, only_of_runs


def tree_section(contents: Contents) -> Section:
    """Levels, branches, what they cost and how they run."""
    draft = Draft("tree", "The tree")
    for result in contents.results:
        charts = [tree(result.levels)]
        if any(level.macs for level in result.levels):
            charts.append(level_costs(result.levels))
        if result.steps:
            charts.append(export_steps(result.steps))
        draft.charts += [contents.mark(chart, result) for chart in charts]
        draft.facts.append(_sizes(contents, result))
    draft.missing += only_of_runs(contents, "The tree")
    return draft.section()


def _sizes(contents: Contents, result: Result) -> Facts:
    """What every nested size costs, beside as many independent networks."""
    base = result.base
    rows = [
        (
            cost.leaves,
            cost.macs,
            cost.macs / base.macs if base and base.macs else None,
            cost.leaves * base.macs if base else None,
            cost.parameters,
        )
        for cost in result.sizes
    ]
    columns = [
        ("leaves", "d"),
        ("MACs", ",d"),
        ("times the base model's", ".2f"),
        ("of as many networks", ",d"),
        ("parameters", ",d"),
    ]
    return Facts(contents.say("What the nested sizes cost", result), table=Table.of(columns, rows))


def conversion_section(contents: Contents) -> Section:
    """What runs packed, what does not and why, and how exact it all is."""
    draft = Draft("conversion", "Conversion and parity")
    for result in contents.results:
        conversion = result.conversion
        if conversion is None:
            draft.missing.append(contents.say(result.missing.get("conversion", ""), result))
        else:
            if any(level.packed is not None for level in result.levels):
                draft.charts.append(contents.mark(packed_levels(result.levels), result))
            values = [
                ("packed", f"{conversion.packed_fraction:.1%} of the branches' MACs"),
                *(("note", note) for note in conversion.notes),
            ]
            if not conversion.fallbacks:
                values.insert(1, ("per branch", "nothing: every operation has a rule"))
            title = contents.say("How it was converted", result)
            draft.facts.append(Facts(title, tuple(values)))
            if conversion.fallbacks:
                rows = [(reason, number) for reason, number in conversion.fallbacks.items()]
                table = Table.of(["operation and reason", ("nodes", ",d")], rows)
                title = contents.say("What runs branch by branch", result)
                draft.facts.append(Facts(title, table=table))
        differences = [each.difference for each in result.steps if each.difference is not None]
        if differences:
            text = f"{max(differences):.2g} of the largest logit, from PyTorch's, when written"
            title = contents.say("How exact its files are", result)
            draft.facts.append(Facts(title, (("largest difference", text),)))
        if result.parity is not None:
            draft.charts.append(contents.mark(parity(result.parity), result))
        elif "parity" in result.missing:
            draft.missing.append(contents.say(result.missing["parity"], result))
    draft.missing += only_of_runs(contents, "The conversion")
    return draft.section()


def provenance_section(contents: Contents) -> Section:
    """Commands, recipes, seeds, versions, machines and data."""
    draft = Draft("provenance", "Provenance")
    for each in contents.owners:
        title = contents.say("Where it comes from", each)
        draft.facts.append(Facts(title, tuple(each.origin.items())))
        if isinstance(each, Result):
            draft.facts += _of_result(contents, each)
            draft.missing += [
                contents.say(each.missing[key], each)
                for key in ("environment", "rates")
                if key in each.missing
            ]
    return draft.section()


def _of_result(contents: Contents, result: Result) -> list[Facts]:
    facts = []
    if (answers := result.answers) is not None:
        values = [
            ("data", result.data_set or "not named"),
            ("held out", answers.split),
            ("images", f"{len(answers.target):,} of {len(answers.classes):,} classes"),
        ]
        if answers.preparation is not None:
            values.append(("prepared as", answers.preparation))
        if answers.skipped:
            values.append(("not read, and left out", ", ".join(answers.skipped)))
        facts.append(Facts(contents.say("What was measured here", result), tuple(values)))
    if result.recipe is not None:
        facts.append(Facts(contents.say("The recipe", result), text=result.recipe))
    return facts
