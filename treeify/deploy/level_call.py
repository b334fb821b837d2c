"""One call of a level's segment as a module of its own: tensors in, tensors out."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from treeify.deploy.values import BatchDim, Layout
from treeify.engine.forms import Form
from treeify.engine.program import OUTPUT, Segment
from treeify.tree import Span, Tree


class LevelCall(nn.Module):
    """Runs a segment for a span of branches; its weights are buffers of this module.

    Args:
        segment: of evaluation mode.
        span: the branches.
        tree: the tree they are of.
        layouts: of the crossings that the segment reads and writes.
        tensors: the packed tensors of the ensemble, by their keys.
    """

    def __init__(
        self,
        segment: Segment,
        span: Span,
        tree: Tree,
        layouts: Mapping[str, Layout],
        tensors: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.span = span
        self.again = partial(LevelCall, segment, span, tree, layouts, tensors)
        # In a tuple: the segment's modules are the ensemble's, of all branches.
        self._segment = (segment,)
        read = [layouts[name] for name in segment.inputs]
        self.inputs = [(layout, self._branches(tree, layout)) for layout in read]
        self.outputs = [None if name == OUTPUT else layouts[name] for name in segment.outputs]
        keys = {id(tensor): key for key, tensor in tensors.items()}
        self._places = list(_places(segment.module, keys))
        distinct = dict.fromkeys(key for *_, key in self._places)
        self._names = {key: f"packed_{number}" for number, key in enumerate(distinct)}
        self.keys = {name: key for key, name in self._names.items()}
        for name, key in self.keys.items():
            self.register_buffer(name, tensors[key].detach())

    def _branches(self, tree: Tree, layout: Layout) -> int:
        """Of how many branches the segment reads a value."""
        if layout.form is Form.SHARED:
            return 1
        ratio = tree.branches[self._segment[0].level] // tree.branches[layout.crossing.level]
        return self.span.parents(ratio).size

    def examples(self) -> list[Tensor]:
        """Tensors to call it with."""
        return [tensor for layout, count in self.inputs for tensor in layout.examples(count)]

    def batch_dims(self) -> list[BatchDim]:
        """Per input, the dim that grows with the batch and by how many times the images."""
        return [dim for layout, count in self.inputs for dim in layout.batch_dims(count)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the segment's inputs -> those of its outputs, in their order."""
        images, remaining = self._images(tensors), list(tensors)
        values = []
        for layout, count in self.inputs:
            width = len(layout.example) * (count if layout.form is Form.BRANCHES else 1)
            values.append(layout.value(remaining[:width], count, images))
            del remaining[:width]
        results = self._run(values)
        flat = []
        for made, value in zip(self.outputs, results, strict=True):
            leaves = tree_flatten(value)[0] if made is None else made.tensors(value)
            flat += [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return tuple(flat)

    def _images(self, tensors: Sequence[Tensor]) -> Any:
        """How many images there are."""
        for tensor, dim in zip(tensors, self.batch_dims(), strict=True):
            if dim is not None:
                return tensor.shape[dim[0]] // dim[1]
        return None

    def _run(self, values: Sequence[Any]) -> Any:
        """Call the segment with this module's buffers in the place of the ensemble's tensors."""
        before = [table[name] for table, name, _ in self._places]
        for table, name, key in self._places:
            table[name] = getattr(self, self._names[key])
        try:
            return self._segment[0].module(self.span, *values)
        finally:
            for (table, name, _), tensor in zip(self._places, before, strict=True):
                table[name] = tensor


def _places(module: nn.Module, keys: Mapping[int, str]) -> Any:
    """Where a segment's modules hold tensors of the ensemble: table, name and the tensor's key."""
    seen: set[int] = set()
    tables = []
    for inner in _modules(module):
        for table in (inner._parameters, inner._buffers):
            if id(table) not in seen:
                seen.add(id(table))
                tables.append(table)
    for table in tables:
        for name, tensor in table.items():
            if tensor is not None and id(tensor) in keys:
                yield table, name, keys[id(tensor)]


def _modules(module: nn.Module) -> Any:
    """A segment's modules, those that operations hold in tuples included."""
    for inner in module.modules():
        yield inner
        for value in vars(inner).values():
            if isinstance(value, tuple):
                for part in value:
                    if isinstance(part, nn.Module):
                        yield from part.modules()
