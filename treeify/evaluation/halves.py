"""Held-out images in two halves: confidence thresholds are chosen on one, reported on the other."""

from collections.abc import Iterable

import torch
from torch import Tensor

from treeify.anytime.confidence import Budget, budget
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.evaluation.metrics import Batch, require_labels
from treeify.losses import nested_logits


class Halves:
    """The held-out images' answers: one half to choose thresholds on, the other to report on.

    Args:
        hne: the ensemble.
        batches: images `[N, 3, H, W]` and classes `[N]`.
        seed: of the halves.
    """

    def __init__(self, hne: HierarchicalEnsemble, batches: Iterable[Batch], seed: int) -> None:
        self.seed = seed
        self.sizes = hne.tree.nested_sizes
        self.macs = [hne.count_macs(size) for size in self.sizes]
        logits, labels = nested_answers(hne, batches)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        first, second = order.tensor_split(2)
        self.choose_on = logits[:, first], labels[first]
        self.report_on = logits[:, second], labels[second]

    @property
    def images(self) -> tuple[int, int]:
        """How many images thresholds are chosen on, and how many they are reported on."""
        return len(self.choose_on[1]), len(self.report_on[1])

    def budget(self, target: int) -> Budget:
        """Thresholds chosen on one half, with what they give on the other."""
        chosen = budget(*self.choose_on, self.sizes, self.macs, target)
        return chosen.on(*self.report_on, self.macs)

    @property
    def fixed(self) -> list[float]:
        """Accuracy of every nested size for all images of the second half, 0 to 1."""
        logits, labels = self.report_on
        return (logits.argmax(-1) == labels).double().mean(1).tolist()


@torch.no_grad()
def nested_answers(hne: HierarchicalEnsemble, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Logits `[S, N, K]` of every nested size and classes `[N]`, of all images in the batches."""
    parameter = next(hne.parameters())
    logits, labels = [], []
    for images, target, *_ in batches:
        if not len(images):  # none of them can be read
            continue
        nested = nested_logits(hne(images.to(parameter.device, parameter.dtype)).float(), hne.tree)
        require_labels(target, nested.shape[-1])
        logits.append(nested.transpose(0, 1).cpu())
        labels.append(target)
    return torch.cat(logits, 1), torch.cat(labels)
