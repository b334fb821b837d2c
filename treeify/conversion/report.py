"""What a conversion did, for `hne.conversion`: the decisions, and what a user should know."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from treeify.conversion.decide import Decision
from treeify.conversion.splits import Splits
from treeify.engine.forms import Form
from treeify.tracing.trace import Traced


@dataclass(frozen=True)
class Conversion:
    """What a conversion did: the splits and how every node runs.

    Args:
        splits: the split points.
        nodes: every node of the evaluation graph.
        training_nodes: every node of the training graph.
        notes: what a user should know, e.g. modules that could not re-initialise themselves.
    """

    splits: Splits
    nodes: tuple[Decision, ...]
    training_nodes: tuple[Decision, ...]
    notes: tuple[str, ...] = ()

    @property
    def packed_fraction(self) -> float:
        """Fraction of the branches' MACs (level 1 and up) that runs packed, 0 to 1."""
        branched = [node for node in self.nodes if node.level > 0]
        total = sum(node.macs for node in branched)
        packed = sum(node.macs for node in branched if node.form is not Form.BRANCHES)
        return packed / total if total else 1.0

    @property
    def fallbacks(self) -> dict[str, int]:
        """Reasons why nodes run per branch, with how many nodes each concerns."""
        reasons = Counter(
            f"{node.operation}: {node.reason}" for node in self.nodes if node.form is Form.BRANCHES
        )
        return dict(reasons.most_common())

    def __str__(self) -> str:
        """One line a level, then the reasons for what runs per branch."""
        lines = [f"splits: {', '.join(self.splits.specs) or 'none'}"]
        for level, branches in enumerate(self.splits.tree.branches):
            counts = Counter(node.form.value for node in self.nodes if node.level == level)
            forms = ", ".join(f"{count} {form}" for form, count in sorted(counts.items()))
            lines.append(f"level {level} x {branches}: {forms or 'nothing'}")
        lines.append(f"{self.packed_fraction:.1%} of the branches' MACs run packed")
        lines += [f"per branch: {count} x {reason}" for reason, count in self.fallbacks.items()]
        lines += list(self.notes)
        return "\n".join(lines)


def notes(traced: Traced, shared_buffers: Sequence[str]) -> Iterator[str]:
    """What a user should know of an ensemble: one note for each difference from the base model."""
    if traced.hooked:
        paths = ", ".join(path or "the model itself" for path in traced.hooked)
        yield f"leaves out the hooks of {paths}"
    if shared_buffers:
        buffers = ", ".join(shared_buffers)
        yield (
            "updated at several levels, so that branches share the mean of their training updates:"
            f" {buffers}"
        )
    limits = traced.limits
    if limits.one_size:
        size = " x ".join(map(str, traced.example[1:]))
        yield f"takes images of {size} alone, since what the model does depends on their size"
    if limits.fixed:
        yield "does what these buffers said when it was converted: " + ", ".join(limits.fixed)
    if limits.recomputed:
        yield "keeps all activations in training: torch.utils.checkpoint is left out"
    if limits.assigned:
        more = f" and {len(limits.assigned) - 3} more" if len(limits.assigned) > 3 else ""
        yield "does not set the attributes " + ", ".join(limits.assigned[:3]) + more
    for path, reason in traced.leaf_modules.items():
        kind = type(traced.skeleton.get_submodule(path)).__name__
        yield f"{path} ({kind}) runs as one call, since its inside cannot be traced: {reason}"
