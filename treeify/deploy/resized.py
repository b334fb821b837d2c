"""An ensemble for images of another size: what was traced of one size holds for that one."""

from dataclasses import replace

from torch import Tensor

from treeify.conversion.assemble import assemble
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.initialize import Source


def resized(hne: HierarchicalEnsemble, input_size: tuple[int, int] | None) -> HierarchicalEnsemble:
    """The same ensemble for images of another height and width; itself where they are the same."""
    if input_size is None or tuple(hne.example[1:]) == tuple(input_size):
        return hne
    like = hne.example_images(1)
    x = like.new_zeros((1, hne.example[0], *input_size))
    other = assemble(
        hne.leaf(0), hne.architecture, list(hne.conversion.splits.specs), example_input=x
    )
    tensors = hne.packed_tensors

    def branch(leaf: int) -> dict[str, Tensor]:
        return {key: hne.part(key, leaf, tensor) for key, tensor in tensors.items()}

    other.fill(Source(branch, by_leaf=True))
    if hne.preparation is not None:
        other.preparation = replace(hne.preparation, size=input_size)
    other.budgets = dict(hne.budgets)
    return other.eval()
