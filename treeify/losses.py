"""The paper's four training losses, and a registry to add your own.

Notation as in the paper: `F_n` are the logits of leaf `n`, `y^b` the mean logits of the first `n_b`
leaves (`n_b` the tree's nested sizes 1, 2, 4, ... `L`), `y^E` the mean logits of all leaves. Every
loss maps leaf logits [N, L, K] and classes [N] to a scalar. It averages over the batch but *sums*
over leaves or sizes, as the paper does, so each loss has its own best learning rate.

In a training loop of your own (examples/plain_loop.py), `F.cross_entropy(hne(x), y)` would take the
leaves for classes; a loss of this module knows the tree:

    loss = treeify.losses.hierarchical_distillation(hne(x), y, hne.tree)

Adding a loss (its keyword-only parameters become options a recipe can set):

    @treeify.losses.register("mean_only")
    def mean_only(logits, target, tree, *, smoothing: float = 0.0):
        return F.cross_entropy(logits.mean(1), target, label_smoothing=smoothing)

Source: Ruiz & Verbeek, AAAI 2021, section 3.
"""

from collections.abc import Callable

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from treeify.arguments import (
    is_readable,
    require_flag,
    require_number,
    require_type,
    wrong_class,
)
from treeify.errors import InputError, described
from treeify.registry import Fraction, Registry
from treeify.tree import Tree

Loss = Callable[..., Tensor]

LOSSES = Registry("loss")
register = LOSSES.register
get = LOSSES.find


def names() -> tuple[str, ...]:
    """The names of all registered losses, sorted."""
    return tuple(sorted(LOSSES))


@register("independent")
def independent(logits: Tensor, target: Tensor, tree: Tree) -> Tensor:
    """Every leaf learns the labels by itself: `L_I = sum_n CE(F_n, y)`.

    Args:
        logits: of every leaf, [N, L, K].
        target: classes, [N] int64 below K, or fractions of each, [N, K] floats (mixup).
        tree: the shape the leaves belong to.

    Returns:
        The loss, a scalar: summed over leaves, averaged over the batch.

    Raises:
        InputError: shapes, types or devices do not fit each other or the tree, or (on the CPU,
            where it can be seen without waiting) a class or fraction is none.

    Source: Ruiz & Verbeek, AAAI 2021, eq. 3.
    """
    _check(logits, target, tree)
    return _cross_entropy(logits, target)


@register("structured")
def structured(logits: Tensor, target: Tensor, tree: Tree) -> Tensor:
    """Every nested sub-ensemble learns the labels: `L_S = sum_{b=0..B} CE(y^b, y)`.

    Args:
        logits: of every leaf, [N, L, K].
        target: classes, [N] int64 below K, or fractions of each, [N, K] floats (mixup).
        tree: the shape the leaves belong to.

    Returns:
        The loss, a scalar: summed over nested sizes, averaged over the batch.

    Raises:
        InputError: shapes, types or devices do not fit each other or the tree, or (on the CPU,
            where it can be seen without waiting) a class or fraction is none.

    Source: Ruiz & Verbeek, AAAI 2021, eq. 4.
    """
    _check(logits, target, tree)
    return _cross_entropy(nested_logits(logits, tree), target)


@register("co_distillation")
def co_distillation(
    logits: Tensor,
    target: Tensor,
    tree: Tree,
    *,
    alpha: Fraction = 0.5,
    temperature: PositiveFloat = 2.0,
    scale_by_t2: bool = False,
) -> Tensor:
    """Every leaf learns the labels and the whole ensemble: `(1-a) L_I + a sum_n CE_T(F_n, y^E)`.

    Args:
        logits: of every leaf, [N, L, K].
        target: classes, [N] int64 below K, or fractions of each, [N, K] floats (mixup).
        tree: the shape the leaves belong to.
        alpha: weight `a` of the distillation, from 0 to 1.
        temperature: `T`, above 0, dividing the logits of teacher and students.
        scale_by_t2: multiply the distillation by `T^2`; see `hierarchical_distillation`.

    Returns:
        The loss, a scalar: summed over leaves, averaged over the batch. No gradient flows through
        the teacher `y^E`.

    Raises:
        InputError: as of `independent`, or an option is out of range.

    Source: Ruiz & Verbeek, AAAI 2021, eq. 5.
    """
    _check(logits, target, tree)
    _check_options(alpha, temperature, scale_by_t2)
    distilled = _distill(logits, logits, alpha, temperature, scale_by_t2)
    return (1 - alpha) * _cross_entropy(logits, target) + alpha * distilled


@register("hierarchical_distillation")
def hierarchical_distillation(
    logits: Tensor,
    target: Tensor,
    tree: Tree,
    *,
    alpha: Fraction = 0.5,
    temperature: PositiveFloat = 2.0,
    scale_by_t2: bool = False,
) -> Tensor:
    """Smaller sub-ensembles learn from the whole: `(1-a) L_I + a sum_{b<B} CE_T(y^b, y^E)`.

    Args:
        logits: of every leaf, [N, L, K].
        target: classes, [N] int64 below K, or fractions of each, [N, K] floats (mixup).
        tree: the shape the leaves belong to.
        alpha: weight `a` of the distillation, from 0 to 1.
        temperature: `T`, above 0, dividing the logits of teacher and students. The paper states it
            for the teacher's soft labels only and is silent on the students; both get it here, as
            in Hinton et al. 2015.
        scale_by_t2: multiply the distillation by `T^2`, which keeps its gradients as large as those
            of the labels whatever `T` is (Hinton et al. 2015). The paper does not mention the
            factor, so it is off.

    Returns:
        The loss, a scalar: summed over leaves and nested sizes, averaged over the batch. No
        gradient flows through the teacher `y^E`.

    Raises:
        InputError: as of `independent`, or an option is out of range.

    Source: Ruiz & Verbeek, AAAI 2021, eq. 6.
    """
    _check(logits, target, tree)
    _check_options(alpha, temperature, scale_by_t2)
    students = nested_logits(logits, tree)[:, :-1]
    distilled = _distill(students, logits, alpha, temperature, scale_by_t2)
    return (1 - alpha) * _cross_entropy(logits, target) + alpha * distilled


def from_teacher(
    logits: Tensor, teacher: Tensor, tree: Tree, *, temperature: float = 2.0
) -> Tensor:
    """Every nested sub-ensemble learns from another classifier: `sum_{b=0..B} CE_T(y^b, y^T)`.

    Args:
        logits: of every leaf, [N, L, K].
        teacher: logits `y^T` of the other classifier, [N, K]; no gradient flows through them.
        tree: the shape the leaves belong to.
        temperature: `T`, above 0, dividing the logits of teacher and students.

    Returns:
        The loss, a scalar: summed over nested sizes, averaged over the batch.

    Raises:
        InputError: the teacher has other classes, or the temperature is out of range.

    Source: the distillation of eq. 6 with the teacher of Hinton et al. 2015.
    """
    _check_logits(logits, tree)
    _check_options(0.0, temperature, False)
    require_type("the teacher", teacher, Tensor, "a tensor of logits, [N, K]")
    is_fit = teacher.is_floating_point() and teacher.device == logits.device
    if not is_fit or teacher.shape != (len(logits), logits.shape[2]):
        raise InputError(
            "the teacher does not fit the ensemble.",
            expected=f"floats of shape [{len(logits)}, {logits.shape[2]}] on {logits.device}",
            found=f"{teacher.dtype} of shape {list(teacher.shape)} on {teacher.device}",
            next_step="Take a teacher of the same classes.",
        )
    soft_labels = (teacher.detach() / temperature).softmax(-1)
    return _cross_entropy(nested_logits(logits, tree) / temperature, soft_labels)


def nested_logits(logits: Tensor, tree: Tree) -> Tensor:
    """Mean logits `y^b` of the B + 1 nested sub-ensembles: [N, L, K] -> [N, B + 1, K].

    Raises:
        InputError: they are not the logits of this tree's leaves, or of no image.
    """
    _check_logits(logits, tree)
    sizes = torch.tensor(tree.nested_sizes, device=logits.device)
    return logits.cumsum(1)[:, sizes - 1] / sizes[:, None]


def _cross_entropy(students: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of S students [N, S, K] with classes [N], or one distribution [N, K] for all.

    Summed over students, averaged over the batch.
    """
    shared = target.unsqueeze(-1).expand(*target.shape, students.shape[1])
    return F.cross_entropy(students.transpose(1, 2), shared, reduction="sum") / len(students)


def _distill(
    students: Tensor, leaves: Tensor, alpha: float, temperature: float, scale_by_t2: bool
) -> Tensor:
    """`sum_s CE_T(student_s, y^E)` for students [N, S, K] and the leaves [N, L, K] behind `y^E`."""
    soft_labels = (leaves.detach().mean(1) / temperature).softmax(-1)
    loss = _cross_entropy(students / temperature, soft_labels)
    return loss * temperature**2 if scale_by_t2 else loss


def _check_options(alpha: float, temperature: float, scale_by_t2: bool) -> None:
    """Raise InputError unless the options of a distillation are in range."""
    require_number("alpha", alpha, 0, 1, expected="a number from 0 to 1, the weight of two losses")
    require_number(
        "temperature", temperature, above=0, expected="a finite number above 0, dividing logits"
    )
    require_flag("scale_by_t2", scale_by_t2)


def _check(logits: Tensor, target: Tensor, tree: Tree) -> None:
    """Raise InputError unless leaf logits fit the tree, and the target fits the logits."""
    _check_logits(logits, tree)
    images, classes = len(logits), logits.shape[2]
    kinds = (
        f"{images} integer classes, shape [{images}] of torch.int64,"
        f" or fractions of each class as floats, shape {[images, classes]}"
    )
    require_type("the target", target, Tensor, kinds)
    is_mixed = target.is_floating_point()
    shape = (images, classes) if is_mixed else (images,)
    # uint8 is the one other dtype of classes that torch's cross-entropy takes.
    if target.shape != shape or not (is_mixed or target.dtype in (torch.int64, torch.uint8)):
        raise InputError(
            "the target does not fit the logits.",
            expected=kinds,
            found=f"{target.dtype} of shape {list(target.shape)}",
            next_step="Convert classes by target.long(); fractions come from mixing or smoothing.",
        )
    if target.device != logits.device:
        raise InputError(
            "the target is on another device than the logits.",
            expected=f"{logits.device}",
            found=f"{target.device}",
            next_step="Move it: target.to(logits.device).",
        )
    if is_readable(target):
        _check_values(target, classes)


def _check_logits(logits: Tensor, tree: Tree) -> None:
    """Raise InputError unless these are every leaf's logits, of one image at least."""
    require_type("the tree", tree, Tree, "hne.tree, the shape the leaves belong to")
    expected = f"floats of shape [N, {tree.leaves}, K], the logits of every leaf"
    if not isinstance(logits, Tensor):
        raise InputError(
            "the logits are not one tensor.",
            expected=expected,
            found=described(logits),
            next_step="Switch auxiliary classifiers off, e.g. with the model's aux_logits=False.",
        )
    if logits.ndim != 3 or logits.shape[1] != tree.leaves or not logits.is_floating_point():
        raise InputError(
            "the logits do not fit the tree.",
            expected=expected,
            found=f"{logits.dtype} of shape {list(logits.shape)}",
            next_step="Give the loss hne(x), not hne.predict(x) or hne(x, leaves=n).",
        )
    if not (logits.shape[0] and logits.shape[2]):
        raise InputError(
            "there is nothing to average.",
            expected="at least one image and one class",
            found=f"logits of shape {list(logits.shape)}, [N, L, K]",
            next_step="Leave empty batches out.",
        )


def _check_values(target: Tensor, classes: int) -> None:
    """Raise InputError unless classes are below K, and fractions of classes sum to 1."""
    if not target.is_floating_point():
        if (label := wrong_class(target, classes)) is not None:
            raise InputError(
                "the target has a class that there is not.",
                expected=f"classes from 0 to {classes - 1}",
                found=f"{label}",
                next_step="Number the classes from 0; leave images without a label out.",
            )
        return
    fractions = target.detach().double()
    # Half precision rounds every fraction.
    error = max(1e-3, 4 * torch.finfo(target.dtype).eps)
    off = (fractions.sum(1) - 1).abs().max()
    # Not a number compares as neither.
    if not (fractions.min() >= 0 and off <= error):
        raise InputError(
            "the target has rows that are no fractions of classes.",
            expected="numbers of at least 0 that sum to 1 in each row",
            found=f"a smallest of {fractions.min():.4g}, and a sum that is off by {off:.4g}",
            next_step="Mix and smooth labels so that each image's fractions sum to 1, as"
            " timm.data.Mixup does.",
        )
