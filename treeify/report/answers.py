"""One pass over the held-out images: what every nested size answers to each of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor, nn

from treeify.anytime.confidence import confidence
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data import Data, Preparation
from treeify.deploy.exported import ExportedEnsemble
from treeify.deploy.exported_scores import exported_scores
from treeify.evaluation.classes import NamedClasses
from treeify.evaluation.comparison import Gains, compare
from treeify.evaluation.metrics import Batch, Score, Scores
from treeify.losses import nested_logits
from treeify.report.results import Answers, Thumbnail
from treeify.tree import Tree

# Thumbnails of each size and of each direction, and the longer side of each in pixels.
_THUMBNAILS, _PIXELS = 4, 64


def answers_of(
    hne: HierarchicalEnsemble,
    batches: Iterable[Batch],
    data: Data,
    base: nn.Module | None = None,
) -> Answers:
    """What an ensemble answers to the images of `data` that `batches` go through.

    Args:
        hne: the ensemble.
        batches: images `[N, C, H, W]` and classes `[N]`.
        data: where they are from.
        base: the base model in evaluation mode, if its accuracy is to be measured too.

    Raises:
        DataError, InputError: as of `treeify.evaluation.metrics.measure`.
    """
    observed = _Observed(hne.tree, data)
    scores, gains, base_score = compare(hne, batches, base, observe=observed.add)
    return observed.answers(scores, gains, hne.tree.nested_sizes, base_score)


def answers_of_export(exported: ExportedEnsemble, batches: Iterable[Batch], data: Data) -> Answers:
    """The same of an export, of the sizes at which its steps end.

    Raises:
        DataError, InputError: as of `treeify.deploy.exported_scores`.
    """
    observed = _Observed(exported.tree, data)
    scores, gains = exported_scores(exported, batches, data.classes, observe=observed.add)
    return observed.answers(scores, gains, exported.sizes)


@dataclass
class _Observed:
    """What is kept of every batch: no logits, of which a data set may have gigabytes."""

    tree: Tree
    data: Data
    named: NamedClasses = field(init=False)
    confidences: list[Tensor] = field(default_factory=list)
    thumbnails: dict[tuple[int, bool], list[Thumbnail]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.named = NamedClasses(self.tree, len(self.data.classes))

    def add(self, images: Tensor, logits: Tensor, target: Tensor) -> None:
        """Observe images `[N, C, H, W]`, leaf logits `[N, L, K]` and classes `[N]`."""
        named = self.named.add(logits, target)
        self.confidences.append(confidence(nested_logits(logits.float(), self.tree)).T.cpu())
        if self.data.preparation is not None and images.ndim == 4:
            self._keep_changed(images, named.T, target.cpu(), self.data.preparation)

    def _keep_changed(
        self, images: Tensor, classes: Tensor, target: Tensor, preparation: Preparation
    ) -> None:
        """Keep the first images that a size makes right or wrong."""
        correct = classes == target
        names = self.data.classes
        for index, size in enumerate(self.tree.nested_sizes[1:], 1):
            for better in (True, False):
                kept = self.thumbnails.setdefault((size, better), [])
                changed = (correct[index] == better) & (correct[index - 1] != better)
                for image in changed.nonzero()[: _THUMBNAILS - len(kept), 0].tolist():
                    before, after = (names[classes[step, image]] for step in (index - 1, index))
                    url = _data_url(images[image], preparation)
                    kept.append(Thumbnail(url, names[target[image]], before, after, size))

    def answers(
        self, scores: Scores, gains: Gains, sizes: Sequence[int], base: Score | None = None
    ) -> Answers:
        """All of it, of some of the nested sizes."""
        results, differences = scores.result(), gains.result()
        kept = [index for index, size in enumerate(self.tree.nested_sizes) if size in sizes]
        preparation = self.data.preparation
        return Answers(
            split=self.data.split,
            preparation=None if preparation is None else str(preparation),
            classes=self.data.classes,
            target=self.named.labels,
            nested=self.named.named.T[kept],
            confidence=torch.cat(self.confidences, 1)[kept],
            scores=tuple(results[index] for index in kept),
            gains=tuple(differences[index] for index in kept),
            base=base,
            leaf_accuracy=scores.leaf_accuracy(),
            thumbnails=tuple(
                thumbnail
                for (size, _), thumbnails in self.thumbnails.items()
                for thumbnail in thumbnails
                if size in sizes and len(kept) == len(self.tree.nested_sizes)
            ),
        )


def _data_url(image: Tensor, preparation: Preparation) -> str:
    """A prepared image `[C, H, W]` as a small one that a page can hold."""
    pixels = image.detach().float().cpu()
    if preparation.mean is not None and preparation.std is not None:
        mean, std = (
            torch.tensor(part)[:, None, None] for part in (preparation.mean, preparation.std)
        )
        pixels = pixels * std + mean
    else:  # in whatever range they are
        low, high = pixels.amin(), pixels.amax()
        pixels = (pixels - low) / (high - low).clamp(min=1e-6)
    array = (255 * pixels.clamp(0, 1)).round().to(torch.uint8)
    grey = array.shape[0] not in (3, 4) or bool((array == array[:1]).all())
    picture = Image.fromarray(array[0].numpy() if grey else array[:3].permute(1, 2, 0).numpy())
    is_photo = max(picture.size) > _PIXELS
    picture.thumbnail((_PIXELS, _PIXELS))
    content = io.BytesIO()
    kind = "JPEG" if is_photo else "PNG"  # small ones are shown pixel by pixel
    picture.save(content, kind, optimize=True)
    encoded = base64.b64encode(content.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{encoded}"
