"""What a conversion did, for `hne.conversion`: the decisions, and what a user should know."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType

from treeify.conversion.decide import Decision
from treeify.conversion.splits import Splits
from treeify.engine.forms import Form
from treeify.errors import joined
from treeify.rules.table import rules_of
from treeify.tracing.aliasing import is_library
from treeify.tracing.hooks import has_hooks
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
    if attached := _attached(traced):
        yield (
            "attached to a layer that does not call them, so that they take no part and get no"
            f" gradient: {', '.join(attached)}"
        )
    if shared_buffers:
        buffers = ", ".join(shared_buffers)
        yield (
            "updated at several levels, so that branches share the mean of their training updates:"
            f" {buffers}"
        )
    if traced.batch > 1:
        yield (
            f"takes batches of {traced.batch} images or multiples of it, as the example has; of"
            " others the model took none that was tried, and no image can leave a batch"
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
        yield f"does not set the attributes {joined(limits.assigned, 3)}"
    for path, reason in traced.leaf_modules.items():
        kind = type(traced.skeleton.get_submodule(path)).__name__
        stops = "" if path in traced.changed_by_hooks else "its inside cannot be traced: "
        yield f"{path} ({kind}) runs as one call, since {stops}{reason}"


def _attached(traced: Traced) -> list[str]:
    """Modules with weights that were put into a layer of a library, whose code does not know them.

    Those that the model calls itself are not among them.
    """
    nodes = (node for graph in traced.graphs.values() for node in graph.nodes)
    read = {str(node.target) for node in nodes if node.op in ("call_module", "get_attr")}
    attached = []
    for path in sorted(read & dict(traced.skeleton.named_modules()).keys()):
        layer = traced.skeleton.get_submodule(path)
        has_fixed_code = is_library(type(layer)) or rules_of(type(layer)).exist
        if not has_fixed_code or has_hooks(layer):
            continue
        names = _names_in_code(type(layer))
        for name, child in layer.named_children():
            below = f"{path}.{name}"
            called = any(f"{target}.".startswith(f"{below}.") for target in read)
            if name not in names and not called and any(True for _ in child.parameters()):
                attached.append(below)
    return attached


def _names_in_code(kind: type) -> set[str]:
    """Names of attributes that the methods of a class, or of those it stems from, read or set."""
    functions = (value for base in kind.__mro__ for value in vars(base).values())
    codes = [function.__code__ for function in functions if isinstance(function, FunctionType)]
    return {name for code in codes for name in code.co_names}
