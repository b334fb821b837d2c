"""An ensemble as a list of plain modules: each computes what one size needs beyond the one before.

A step from `n` to `m` leaves is a function of the images and of values that earlier steps kept.
Every branch's weights belong to exactly one step.
"""

import copy
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from treeify.arguments import require_integer, require_iterable
from treeify.conversion.ensemble import HierarchicalEnsemble, require_ensemble
from treeify.deploy.dense import Template, template
from treeify.deploy.level_call import LevelCall
from treeify.deploy.resized import resized
from treeify.deploy.step import Key, Step
from treeify.deploy.step_draft import Choose, Draft, spans_between
from treeify.deploy.values import IMAGES, Layout, crossing_layouts
from treeify.engine.forms import Form
from treeify.engine.program import OUTPUT, PACKED, CrossingValue, Program, Walk
from treeify.errors import LeafError
from treeify.tree import Span


def steps(
    hne: HierarchicalEnsemble,
    sizes: Iterable[int] | None = None,
    *,
    batch: int | None = None,
    input_size: tuple[int, int] | None = None,
) -> list[Step]:
    """An ensemble as plain modules, one for each size; together they are as large as it is.

    Each has dense weights of its own with batch norms folded in, changes none of its inputs, and
    can be traced by `torch.export`. Levels are packed.

    Args:
        hne: the ensemble. Not modified.
        sizes: increasing nested sizes at which a step ends; all of them if not given.
        batch: how many images there will be; any number if not given.
        input_size: height and width of images, instead of those it was converted for.

    Returns:
        The steps, in the order in which they run; on the CPU, in float32.

    Raises:
        LeafError: a size is no nested one, or sizes do not increase.
        ExportError: the model cannot be exported.
    """
    require_ensemble(hne)
    plans = StepPlans(resized(hne, input_size), batch=batch)
    return plans.steps(plans.check_sizes(sizes))


class StepPlans:
    """Makes steps; what was exported for one of them serves the others.

    The arguments are those of `steps`.
    """

    def __init__(self, hne: HierarchicalEnsemble, *, batch: int | None = None) -> None:
        require_ensemble(hne)
        self.dynamic = batch is None
        self.hne = _plain(hne)
        self.tree = self.hne.tree
        self.program: Program = self.hne.evaluation_program
        self.image_shape = tuple(self.hne.example)
        self.images = IMAGES if batch is None else require_batch(batch)
        small, large = (self._record(count) for count in (self.images, self.images + 1))
        self.output = small.pop(OUTPUT)
        large.pop(OUTPUT, None)
        self.layouts = crossing_layouts(self.program.crossings, small, large, self.images)
        self.packed = self.hne.packed_tensors
        self._templates: dict[Key, Template] = {}

    def check_sizes(self, sizes: Iterable[int] | None) -> tuple[int, ...]:
        """Sizes where steps can end, increasing; LeafError for others."""
        nested = self.tree.nested_sizes
        if sizes is None:
            return nested
        require_iterable("sizes", sizes, "increasing nested sizes", error=LeafError)
        chosen = tuple(sizes)
        for size in chosen:
            self.tree.check_size(size)
            if size not in nested:
                raise LeafError(
                    f"no step ends at {size} leaves.",
                    expected=f"nested sizes, of {', '.join(map(str, nested))}",
                    next_step="Any size in between is answered by the next smaller one.",
                )
        if not chosen or any(one >= other for one, other in pairwise(chosen)):
            raise LeafError(
                "sizes do not increase.", expected="e.g. 1,2,4", found=", ".join(map(str, chosen))
            )
        return chosen

    @torch.no_grad()
    def _record(self, images: int) -> dict[str, Any]:
        """The values of the first leaf's branches for so many images."""
        x = torch.rand(images, *self.image_shape, generator=torch.Generator().manual_seed(0))
        walk = Walk(self.program, (PACKED,) * self.tree.levels)
        values: dict[str, CrossingValue] = self.program.start(x)
        for level in range(self.tree.levels):
            values |= walk.call(level, Span(0, 1), values)
        return {name: value.value for name, value in values.items()}

    def template(self, key: Key) -> Template:
        """The graph of a level's call, exported when first asked for."""
        if key not in self._templates:
            self._templates[key] = template(self.level_call(key), dynamic=self.dynamic)
        return self._templates[key]

    def level_call(self, key: Key) -> LevelCall:
        """A level's call for a span."""
        level, span = key
        return LevelCall(self.program.segments[level], span, self.tree, self.layouts, self.packed)

    def dense(self, level: int, span: Span) -> fx.GraphModule:
        """A level's call with weights of its own."""
        return self.template(key_of(level, span)).instantiate(self.packed_from(level, span))

    def packed_from(self, level: int, span: Span) -> dict[str, Tensor]:
        """The packed tensors, rolled so that a single branch's own are the first."""
        if span.size > 1 or not span.start:
            return self.packed
        rolled = {}
        for key, tensor in self.packed.items():
            below = self.hne.level_of(key)
            if below <= level:
                branches = self.tree.branches[below]
                index = span.start // (self.tree.branches[level] // branches)
                tensor = tensor.roll(-index * (tensor.shape[0] // branches), 0)
            rolled[key] = tensor
        return rolled

    def steps(
        self, sizes: Sequence[int], choose: Choose = lambda level, span: PACKED
    ) -> list[Step]:
        """Steps that end at increasing nested sizes, each level run as chosen."""
        drafts = [Draft(self, start, size, choose) for start, size in pairwise((0, *sizes))]
        for draft in drafts:
            draft.write()
        for index, draft in enumerate(drafts):
            for name, branch in draft.needs:
                maker = _maker(drafts[:index], self.layouts[name], branch)
                if maker is not None:
                    maker.keep(name, branch)
        return [draft.step() for draft in drafts]

    def spans(self, sizes: Sequence[int]) -> list[tuple[int, int, Span]]:
        """Per step, from 1, every level it computes and the branches there."""
        found = []
        for number, (start, size) in enumerate(pairwise((0, *sizes)), 1):
            spans = spans_between(self.tree, start, size)
            found += [(number, level, span) for level, span in enumerate(spans) if span.size]
        return found

    def level_step(self, level: int, span: Span, execution: str) -> Step:
        """A step of one level alone, to measure it: what it reads comes from outside."""
        draft = Draft(self, 0, self.tree.leaves, lambda level, span: execution)
        draft.spans = [Span(0, 0)] * self.tree.levels
        draft.spans[level] = span
        segment = self.program.segments[level]
        for name in segment.inputs:
            layout = self.layouts[name]
            branches = self.tree.branches[layout.crossing.level]
            draft.receive(name, span.parents(self.tree.branches[level] // branches))
        draft.write()
        for name in segment.outputs:
            if name != OUTPUT:
                draft.keep_all(name, span)
        return draft.step()


def require_batch(batch: int) -> int:
    """A number of images; InputError if it is none."""
    require_integer("batch", batch, 1, 2**16)
    return batch


def key_of(level: int, span: Span) -> Key:
    """Which template a call has."""
    return (level, Span(0, 1) if span.size == 1 else span)


def _plain(hne: HierarchicalEnsemble) -> HierarchicalEnsemble:
    """The ensemble in evaluation mode, in float32 on the CPU: itself, or a copy."""
    floating = [tensor for tensor in hne.state_dict().values() if tensor.is_floating_point()]
    on_cpu = all(tensor.device.type == "cpu" for tensor in hne.state_dict().values())
    if on_cpu and all(tensor.dtype == torch.float32 for tensor in floating) and not hne.training:
        return hne
    return copy.deepcopy(hne).cpu().float().eval()


def _maker(drafts: Sequence[Draft], layout: Layout, branch: int) -> Draft | None:
    """The step that computes a value last before it is needed; None for the images."""
    for draft in reversed(drafts):
        span = draft.spans[layout.crossing.level]
        shared = layout.form is Form.SHARED and span.size > 0
        if layout.crossing is not draft.images and (shared or span.start <= branch < span.stop):
            return draft
    return None
