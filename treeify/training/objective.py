"""What training minimises: the recipe's loss, on mixed images, and the distance to a teacher."""

from collections.abc import Callable
from functools import partial

import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor, nn

from treeify import losses
from treeify.conversion import checkpoint
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.saved_config import scored_ensemble
from treeify.data import Preparation
from treeify.errors import RecipeError, quoted
from treeify.models.architecture import Architecture
from treeify.models.hub import ensemble_named
from treeify.training.recipe import LossRecipe, MixRecipe, Recipe, TeacherRecipe


class Objective:
    """The recipe's loss plus the distillation of its teacher, at any time of the run."""

    def __init__(self, recipe: Recipe, hne: HierarchicalEnsemble, device: torch.device) -> None:
        self.tree, self.recipe = hne.tree, recipe.loss
        self.loss = _loss(recipe.loss)
        self.teacher: Callable[[Tensor], Tensor] | None = None
        self.weight = self.temperature = 0.0
        if recipe.teacher is not None:
            classes = None if hne.preparation is None else hne.preparation.classes
            dtype = next(hne.parameters()).dtype
            self.teacher = load_teacher(recipe.teacher, dtype, device, classes)
            self.weight, self.temperature = recipe.teacher.weight, recipe.teacher.temperature

    def __call__(self, logits: Tensor, target: Tensor, images: Tensor, epoch: float) -> Tensor:
        """The loss of a batch, a scalar; options move with the epochs trained, with fractions.

        Logits are [N, L, K], the target classes, [N], or their fractions, [N, K], and the images,
        for the teacher, [N, C, H, W].
        """
        ramps = {key: ramp.at(epoch) for key, ramp in self.recipe.ramps.items()}
        loss = self.loss(logits, target, self.tree, **ramps)
        if self.teacher is not None:
            teacher_logits = self.teacher(images)
            distillation = losses.from_teacher(
                logits, teacher_logits, self.tree, temperature=self.temperature
            )
            loss = loss + self.weight * distillation
        return loss


def _loss(recipe: LossRecipe) -> Callable[..., Tensor]:
    """A recipe's loss with its options; ramps are passed at each call."""
    function = losses.get(recipe.name)
    if not isinstance(function, type):
        return partial(function, **recipe.options)
    if recipe.ramps:
        return lambda *args, **ramps: function(**{**recipe.options, **ramps})(*args)
    # One instance for all steps: it may have a state of its own.
    instance: Callable[..., Tensor] = function(**recipe.options)
    return instance


def load_teacher(
    recipe: TeacherRecipe,
    dtype: torch.dtype,
    device: torch.device,
    classes: tuple[str, ...] | None = None,
) -> Callable[[Tensor], Tensor]:
    """Load a classifier as a function to its logits, `[N, C, H, W] -> [N, K]`.

    They are in the order of `classes`, where the names of both are known.
    """
    if (path := ensemble_named(recipe.name)) is not None:
        directory = scored_ensemble(path, trust=recipe.trust)
        teacher: nn.Module = checkpoint.load(directory, trust=recipe.trust)
    else:
        teacher = Architecture(recipe.name, recipe.kwargs).build(pretrained=True)
    teacher.to(device, dtype).eval().requires_grad_(False)
    order = _order(teacher, classes)

    def answer(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = teacher(images)
        logits = logits.mean(1) if isinstance(teacher, HierarchicalEnsemble) else logits
        return logits if order is None else logits[:, order]

    return answer


def _order(teacher: nn.Module, classes: tuple[str, ...] | None) -> list[int] | None:
    """Where a teacher has the data's classes; None if its own order is theirs, or unknown."""
    preparation = getattr(teacher, "preparation", None)
    if not isinstance(preparation, Preparation) or None in (classes, preparation.classes):
        return None
    names, classes = preparation.classes or (), classes or ()
    if sorted(names) != sorted(classes):
        raise RecipeError(
            "the teacher knows other classes than the data have.",
            expected=quoted(classes),
            found=quoted(names),
            next_step="Choose a teacher of these classes.",
        )
    return None if names == classes else [names.index(name) for name in classes]


def mixing(recipe: MixRecipe, classes: int) -> Mixup:
    """Timm's mixup and CutMix with a recipe's settings."""
    return Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        # Timm refuses to choose between two that are off.
        prob=recipe.prob if recipe.mixup or recipe.cutmix else 0.0,
        switch_prob=recipe.switch_prob,
        label_smoothing=recipe.label_smoothing,
        num_classes=classes,
    )


def mixed(mix: Mixup, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed images and the fractions of their classes, [N, K].

    Timm mixes images in pairs; the last of an odd number stays as it is.
    """
    even = len(images) // 2 * 2
    labels: Tensor = mixup_target(target, mix.num_classes, 1.0, mix.label_smoothing)  # type: ignore[no-untyped-call]
    labels = labels.to(images.dtype)
    if even:
        images = images.clone()  # timm mixes in place
        images[:even], labels[:even] = mix(images[:even], target[:even])
    return images, labels
