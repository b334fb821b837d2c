"""Which weights a level would have of its own: without any, its branches would all be one."""

from collections import Counter
from collections.abc import Mapping

from torch import fx, nn

from treeify.conversion.levels import Dependencies
from treeify.tracing.trace import Traced


class LevelWeights:
    """Counts the parameters that lie behind a split alone, in both modes.

    A parameter lies there if all that read it do: one that is read before the split too is shared.

    Args:
        traced: the model.
        modes: the dependencies in its graphs, by mode.
        trained_only: whether to leave out frozen parameters, of which all branches have the same
            values; a model whose parameters are all frozen counts them all the same.
    """

    def __init__(
        self, traced: Traced, modes: Mapping[bool, Dependencies], *, trained_only: bool
    ) -> None:
        self._modes = modes
        parameters = dict(traced.skeleton.named_parameters(remove_duplicate=False))
        if trained_only and any(tensor.requires_grad for tensor in parameters.values()):
            parameters = {key: tensor for key, tensor in parameters.items() if tensor.requires_grad}
        readers: dict[int, dict[bool, int]] = {}  # by the tensor, since tied ones have two keys
        for mode, dependencies in modes.items():
            for key, mask in _readers(dependencies, traced.skeleton).items():
                if key in parameters:
                    masks = readers.setdefault(id(parameters[key]), dict.fromkeys(modes, 0))
                    masks[mode] |= mask
        # A layer's weight and bias have the same readers.
        self._counts = Counter(tuple(masks.items()) for masks in readers.values())

    def behind(self, name: str) -> int:
        """How many parameters lie behind a split at a name."""
        behind = {mode: dependencies.behind(name) for mode, dependencies in self._modes.items()}
        return sum(
            count
            for masks, count in self._counts.items()
            if all(not mask & ~behind[mode] for mode, mask in masks)
        )


def _readers(dependencies: Dependencies, skeleton: nn.Module) -> dict[str, int]:
    """By the keys of parameters, masks of the first nodes computed from images that read them."""
    readers: dict[str, int] = {}
    first: dict[fx.Node, int] = {}  # such nodes after one that is not computed from images
    position = {node: index for index, node in enumerate(dependencies.nodes)}
    for node in reversed(dependencies.nodes):
        rooted = dependencies.rooted >> position[node] & 1
        first[node] = 1 << position[node] if rooted else 0
        for user in () if rooted else node.users:
            first[node] |= first[user]
        target = str(node.target)
        if node.op == "get_attr":
            readers[target] = readers.get(target, 0) | first[node]
        elif node.op == "call_module":
            module = skeleton.get_submodule(target)
            for name, _ in module.named_parameters(remove_duplicate=False):
                key = f"{target}.{name}"
                readers[key] = readers.get(key, 0) | first[node]
    return {key: mask for key, mask in readers.items() if mask}
