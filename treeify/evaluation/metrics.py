"""How well every nested sub-ensemble answers: running totals over batches, and their scores."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from treeify.arguments import require_callable, require_iterable, require_type, wrong_class
from treeify.conversion.ensemble import HierarchicalEnsemble, require_ensemble
from treeify.engine.preserve import preserve_modes
from treeify.errors import DataError, InputError, described
from treeify.losses import nested_logits
from treeify.tree import Tree

# Images [N, 3, H, W], classes [N], and whatever else.
Batch = tuple[Any, ...]

# Of the calibration error, by confidence from 0 to 1; as many as Guo et al., ICML 2017, take.
_BINS = 15

# Logits of batches that are counted together: with fewer, calling takes longer than computing.
_TOGETHER = 2**17


@dataclass(frozen=True)
class Score:
    """What one nested sub-ensemble reached.

    Args:
        leaves: its size `n`.
        accuracy: images whose class has the largest mean logit, in percent.
        nll: negative log-likelihood of the mean logits, nats per image.
        calibration_error: how far confidence and accuracy are apart, in percent, in the mean over
            15 equal bins of confidence weighted by their images (Guo et al., ICML 2017).
        logit_std: standard deviation of the logits over its leaves (divided by `n`, not `n - 1`),
            averaged over classes and images; 0 for one leaf.
    """

    leaves: int
    accuracy: float
    nll: float
    calibration_error: float
    logit_std: float


def _correct(logits: Tensor, target: Tensor) -> Tensor:
    return (logits.argmax(-1) == target[:, None]).float()


def _logit_std(logits: Tensor, nested: Tensor, tree: Tree) -> Tensor:
    # Not `Tensor.std`: over few leaves it takes up to ten times as long.
    deviations = [
        (logits[:, :size] - nested[:, index, None]).square().mean(1).sqrt().mean(-1)
        for index, size in enumerate(tree.nested_sizes)
    ]
    return torch.stack(deviations, dim=1)


def _nll(nested: Tensor, target: Tensor) -> Tensor:
    targets = target[:, None].expand(nested.shape[:2])
    return F.cross_entropy(nested.transpose(1, 2), targets, reduction="none")


class Scores:
    """Running totals of every nested sub-ensemble's scores over batches.

    Small batches are counted several at a time, with the same outcome to the last bit.

    Args:
        tree: the shape the leaves belong to.

    Raises:
        InputError: it is no tree.
    """

    def __init__(self, tree: Tree) -> None:
        """Start from no images: one vector of sums, of which the named totals are views."""
        require_type("tree", tree, Tree, "a tree, such as hne.tree")
        self.tree = tree
        sizes = tree.levels
        shapes = {
            "images": (),
            "correct": (sizes,),
            "nll": (sizes,),
            "std": (sizes,),
            "leaf_correct": (tree.leaves,),
            "bin_images": (sizes, _BINS),
            "bin_confidence": (sizes, _BINS),
            "bin_correct": (sizes, _BINS),
        }
        lengths = [prod(shape) for shape in shapes.values()]
        self._sums = torch.zeros(sum(lengths), dtype=torch.float64)
        self._totals = {
            name: part.view(shapes[name])
            for name, part in zip(shapes, torch.split(self._sums, lengths), strict=True)
        }
        self._uncounted: list[tuple[Tensor, Tensor]] = []

    @property
    def images(self) -> int:
        """How many were added."""
        return int(self._totals["images"]) + sum(len(target) for _, target in self._uncounted)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Observe a batch of leaf logits [N, L, K] with classes [N].

        Raises:
            InputError: they do not fit each other or the tree.
        """
        require_answers(logits, target, self.tree)
        self._uncounted.append((logits.detach().float(), target))
        if sum(logits.numel() for logits, _ in self._uncounted) >= _TOGETHER:
            self._count()

    def _count(self) -> None:
        """Bring the totals up to date."""
        if not self._uncounted:
            return
        batches = [len(target) for _, target in self._uncounted]
        logits, target = map(torch.cat, zip(*self._uncounted, strict=True))
        self._uncounted = []
        nested = nested_logits(logits, self.tree)
        confidence = nested.softmax(-1).amax(-1)
        correct = _correct(nested, target)
        ones = torch.ones_like(correct)
        bins = F.one_hot((confidence * _BINS).long().clamp(max=_BINS - 1), _BINS)
        binned = torch.stack([ones, confidence, correct], dim=1)[..., None] * bins[:, None]
        # Of each image, in the order of the totals.
        columns = (
            ones[:, :1],
            *(correct, _nll(nested, target), _logit_std(logits, nested, self.tree)),
            _correct(logits, target),
            binned.flatten(1),
        )
        rows = torch.split(torch.cat(columns, dim=1), batches)
        # Summed by batch, so that it does not matter how many are counted together. A GPU is waited
        # for once; not every device has doubles.
        for batch_sum in torch.stack([batch.sum(0) for batch in rows]).cpu().double():
            self._sums += batch_sum

    @property
    def accuracy(self) -> float:
        """Of all leaves so far, in percent, up to the last images counted; not a number before."""
        return float(100 * self._totals["correct"][-1] / self._totals["images"])

    def state_dict(self) -> dict[str, Tensor]:
        """Sums over all images, by name; views of the running totals, as a module's state is."""
        self._count()
        return self._totals

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the sums that `state_dict` gave."""
        for name, total in self.state_dict().items():
            total.copy_(state[name])

    def result(self) -> tuple[Score, ...]:
        """The scores so far, from one leaf to all `L`.

        Raises:
            DataError: no image was counted.
        """
        require_some(self.images)
        totals = self.state_dict()
        gaps = (totals["bin_confidence"] - totals["bin_correct"]).abs().sum(-1)
        sums = [100 * totals["correct"], totals["nll"], 100 * gaps, totals["std"]]
        means = (torch.stack(sums, dim=1) / self.images).tolist()
        return tuple(
            Score(leaves, *row) for leaves, row in zip(self.tree.nested_sizes, means, strict=True)
        )

    def leaf_accuracy(self) -> tuple[float, ...]:
        """Of every single leaf by itself, in percent."""
        return tuple((100 * self.state_dict()["leaf_correct"] / self.images).tolist())


def require_some(images: int) -> None:
    """Raise DataError where no image was counted."""
    if not images:
        raise DataError(
            "there are no images to measure accuracy on.",
            expected="at least one batch",
            found="none",
            next_step="Check the data's held-out part.",
        )


def require_answers(logits: Tensor, target: Tensor, tree: Tree) -> None:
    """Refuse what are no leaf logits with classes; no value is read.

    Raises:
        InputError: they do not fit each other or the tree.
    """
    for name, tensor in (("logits", logits), ("target", target)):
        require_type(name, tensor, Tensor, "a tensor")
    integers = target.dtype in (torch.int64, torch.uint8)
    fits = logits.ndim == 3 and logits.shape[1] == tree.leaves and target.shape == logits.shape[:1]
    together = target.device == logits.device
    if not (fits and integers and together and logits.is_floating_point() and logits.numel()):
        raise InputError(
            "the answers cannot be counted.",
            expected=f"logits, floats of shape [N, {tree.leaves}, K], and N integer classes, on one"
            " device",
            found=f"{described(logits)} and {described(target)}",
            next_step="Give hne(x), and classes as target.long().",
        )


def require_labels(target: Tensor, classes: int) -> None:
    """Raise DataError unless classes [N] are integers, numbered from 0 to below K."""
    require_type("the target", target, Tensor, "a tensor of classes, [N]", error=DataError)
    if target.ndim != 1 or target.dtype not in (torch.int64, torch.uint8):
        raise DataError(
            "the target holds no classes.",
            expected="integers, shape [N] of torch.int64",
            found=described(target),
            next_step="Convert them: target.long().",
        )
    # Before they go to a GPU, where a label out of range ends the process.
    if (label := wrong_class(target, classes)) is not None:
        raise DataError(
            "an image has a class that there is not.",
            expected=f"numbers from 0 to {classes - 1}, of {classes} classes",
            found=f"{label}",
            next_step="Number the classes from 0, in the order of their names.",
        )


@torch.no_grad()
def measure(
    hne: HierarchicalEnsemble,
    batches: Iterable[Batch],
    *,
    stop: Callable[[], bool] = lambda: False,
    observe: Callable[[Tensor, Tensor, Tensor], None] = lambda images, logits, target: None,
) -> Scores:
    """Count every nested sub-ensemble's scores in evaluation mode, in one pass over the images.

    Args:
        hne: the ensemble; every module's mode is put back.
        batches: images [N, 3, H, W] and classes [N].
        stop: asked before every batch but the first; when it says so, the rest is left out.
        observe: called with every batch: images, leaf logits [N, L, K] and classes [N], on the
            ensemble's device.

    Raises:
        DataError: a class is out of range, or there are others than one for each image.
        InputError: `hne` is no ensemble, the images do not fit it, or another argument is of a
            wrong type.
    """
    require_ensemble(hne)
    require_callable("stop", stop, "nothing")
    require_callable("observe", observe, "images, leaf logits and classes")
    scores = Scores(hne.tree)
    with preserve_modes(hne):
        hne.eval()
        for images, target in pairs(batches):
            if scores.images and stop():
                break
            if len(images):
                x = placed(images, hne)
                logits = hne(x)
                require_labels(target, logits.shape[-1])
                classes = target.to(x.device)
                scores.add(logits, classes)
                observe(x, logits, classes)
    return scores


def pairs(batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and the classes of batches.

    Yields:
        Images [N, C, H, W] and classes [N]; N may be 0, where no image could be read.

    Raises:
        InputError: there are no batches to go through, or one is no such pair.
        DataError: there are more or fewer classes than images.
    """
    require_iterable("batches", batches, "a list of batches, or a data loader")
    for batch in batches:
        parts = batch[:2] if isinstance(batch, tuple | list) else ()
        if len(parts) < 2 or not all(isinstance(part, Tensor) and part.ndim for part in parts):
            raise InputError(
                "there is no batch of images and classes.",
                expected="pairs of tensors: images [N, C, H, W] and classes [N]",
                found=described(batch),
                next_step="Pass a list of batches, or a torch.utils.data.DataLoader.",
            )
        images, target = parts
        if len(images) != len(target):
            raise DataError(
                "there are not as many classes as images.",
                expected=f"{len(images)}",
                found=f"{len(target)}",
                next_step="Give every image of a batch one class.",
            )
        yield images, target


def placed(images: Tensor, hne: HierarchicalEnsemble, *, non_blocking: bool = False) -> Tensor:
    """Images on the ensemble's device, in its dtype if they are floats: integers are no images.

    Raises:
        InputError: they have no values.
    """
    like = next(hne.parameters())
    if images.is_meta and not like.is_meta:
        raise InputError(
            "there are no images, only shapes.",
            expected=f"images, with values, for an ensemble on {like.device}",
            found=described(images),
            next_step="Give images that are not on the meta device.",
        )
    dtype = like.dtype if images.is_floating_point() else images.dtype
    return images.to(like.device, dtype, non_blocking=non_blocking)
