"""Recipes: everything about a training run, in sections that are checked before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import (
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from timm.utils.misc import natural_key

from treeify.arguments import require_integer
from treeify.data import SOURCES, Data
from treeify.errors import RecipeError
from treeify.losses import LOSSES
from treeify.registry import FilePath, PathOrName, Registry
from treeify.training.optimization_recipe import EmaRecipe, OptimizerRecipe, ScheduleRecipe
from treeify.training.sections import Count, Cpus, Named, Section, options_of

if TYPE_CHECKING:
    from typing_extensions import Self


class Ramp(Section):
    """A loss's option that moves in a straight line, step by step, and then stays.

    Args:
        start: its value at the first step.
        stop: its value after `epochs`.
        epochs: how long it moves.
    """

    start: float
    stop: float
    epochs: PositiveFloat

    def at(self, epoch: float) -> float:
        """The value after so many epochs."""
        return self.start + (self.stop - self.start) * min(1.0, epoch / self.epochs)


class LossRecipe(Named):
    """A loss of `treeify.losses`, or one of your own, and its options.

    Args:
        name: `independent`, `structured`, `co_distillation`, `hierarchical_distillation` or
            `package.module:name`; its options stand beside it.
        ramps: options that change over the run, e.g. `ramps: {alpha: {start: 0.0, stop: 0.5,
            epochs: 20}}`.
    """

    registry: ClassVar[Registry] = LOSSES

    ramps: dict[str, Ramp] = Field(default={})

    @model_validator(mode="after")
    def _ramps_fit_function(self) -> Self:
        options = options_of(self.registry.find(self.name))
        for key, ramp in self.ramps.items():
            if key not in options.model_fields:
                raise PydanticCustomError(
                    "ramp", f"Input should have ramps of the loss's options only, not of {key!r}"
                )
            try:
                options.model_validate({**self.options, key: ramp.start})
                options.model_validate({**self.options, key: ramp.stop})
            except ValidationError as error:
                rule = error.errors()[0]["msg"].removeprefix("Input should ")
                raise PydanticCustomError(
                    "ramp", f"Input should {rule} at both ends of the ramp of {key}"
                ) from error
        return self


class DataRecipe(Named):
    """A data set of `treeify.data`, or one of your own, and its options.

    Args:
        name: of the data set, or `package.module:name`; its options stand beside it.
    """

    registry: ClassVar[Registry] = SOURCES

    @property
    def follows_model(self) -> bool:
        """Whether images get as many channels as the model takes."""
        return self.options.get("channels", "no such option") is None

    def load(self, channels: int | None = None) -> Data:
        """Read the data set; a `DataError` says what cannot be read.

        Args:
            channels: of its images, where the recipe leaves that open.
        """
        options = self.options
        if self.follows_model and channels is not None:
            options["channels"] = channels
        data: Data = self.registry.find(self.name)(**options)
        return data

    def classes_of_earlier_runs(self, classes: Sequence[str]) -> tuple[str, ...]:
        """How a run of an earlier version, which saved no names, numbered the data's classes."""
        # timm's readers put 2 before 10.
        by_timm = self.name == "timm" and not (self.options["dataset"] or self.options["class_map"])
        return tuple(sorted(classes, key=natural_key) if by_timm else classes)


class ModelRecipe(Section):
    """The base model and the tree made of it: the arguments of `treeify.hierarchicalize`.

    Args:
        name: timm, torchvision or `package.module:function`.
        kwargs: its builder's arguments.
        pretrained: begin with the trained weights of timm or torchvision; init is then `copy` or
            `perturb`.
        weights: begin with trained weights of your own: a file (.pth, .safetensors, ...), or the
            directory of an ensemble or a run. One that splits alike goes on as it is, branch by
            branch; of another, leaf 0 is the model. `hf-hub:org/name@revision` is such a directory.
        trust: whether a directory of weights may have functions of its own imported and called.
        splits: how many, or their names.
        fanout: children per split.
        init: `fresh`, random weights in every branch; `copy`, those of the model; `perturb`, those
            of the model plus noise, but for leaf 0. Null is `perturb` with trained weights, else
            `fresh`.
        head: `fresh` initialises the classifier anew, for every branch another, on a trunk of the
            model's weights.
        freeze: what is not trained and keeps the model's weights in every branch: levels of the
            tree (`level 0` is what all leaves share) and names of modules or parameters of the
            model, e.g. `[level 0, "layer3.*.bn1"]`.
        freeze_norms: batch norms in frozen parts use and keep their running statistics.
    """

    name: str
    kwargs: dict[str, JsonValue] = Field(default={})
    pretrained: bool = False
    weights: FilePath | None = None
    trust: bool = False
    splits: NonNegativeInt | list[str] = 4
    fanout: int = Field(default=2, ge=2)
    init: Literal["fresh", "copy", "perturb"] | None = None
    head: Literal["keep", "fresh"] = "keep"
    freeze: list[str] = Field(default=[])
    freeze_norms: bool = False

    @field_validator("splits", mode="before")
    @classmethod
    def _as_names(cls, splits: object) -> object:
        """Names as commands take them (`1,2`), and the numbers that children of Sequential have."""
        names = splits.split(",") if isinstance(splits, str) else splits
        if isinstance(names, list):
            return [str(name) if type(name) is int else name for name in names]
        return names

    @model_validator(mode="after")
    def _freezes_norms_of_something(self) -> Self:
        if self.freeze_norms and not self.freeze:
            raise PydanticCustomError("freeze", "Input should freeze something with freeze_norms")
        return self

    @model_validator(mode="after")
    def _uses_trained_weights(self) -> Self:
        if self.pretrained and self.weights is not None:
            raise PydanticCustomError(
                "weights", "Input should have pretrained weights or weights of your own, not both"
            )
        is_trained = self.pretrained or self.weights is not None
        if is_trained and self.init == "fresh":
            raise PydanticCustomError(
                "pretrained", "Input should have init: perturb (or copy) to use trained weights"
            )
        if self.init is None:
            # A run's own recipe holds what it was.
            object.__setattr__(self, "init", "perturb" if is_trained else "fresh")
        return self


class MixRecipe(Section):
    """Mixed images and labels, timm's `Mixup`.

    Args:
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        prob: fraction of batches that are mixed.
        switch_prob: fraction of those that CutMix mixes where both are on.
        label_smoothing: part of a label that is spread evenly over all classes.
    """

    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    prob: float = Field(default=1.0, ge=0, le=1)
    switch_prob: float = Field(default=0.5, ge=0, le=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class TeacherRecipe(Section):
    """Another classifier whose answers every nested sub-ensemble learns, besides the loss.

    Args:
        name: timm or torchvision name with its trained weights, or the directory of an ensemble or
            run of treeify's, also as `hf-hub:org/name@revision`.
        kwargs: its builder's arguments.
        trust: whether a directory may have functions of its own imported and called.
        weight: of this term in the sum.
        temperature: `T`, dividing the logits of teacher and students.
    """

    name: PathOrName
    kwargs: dict[str, JsonValue] = Field(default={})
    trust: bool = False
    weight: PositiveFloat = 1.0
    temperature: PositiveFloat = 2.0


class CheckpointsRecipe(Section):
    """When the run's state is saved: after every epoch, and in between.

    Args:
        minutes: since the last time.
        keep: how many of the newest stay, besides the best.
    """

    minutes: PositiveFloat = 10.0
    keep: Count = 2


class Recipe(Section):
    """Everything about a training run.

    Args:
        name: of the run; its directory is `runs/NAME` unless `out` says otherwise.
        model: base model and splits.
        data: data set and its options.
        loss: loss and its options.
        optimizer: timm's optimizers.
        schedule: epochs and learning rate over time.
        batch_size: images per training step, of all processes together.
        gradient_accumulation: parts in which a process computes its images of a step, one after
            the other, to save memory; batch norms see one part at a time.
        mix: mixup and CutMix.
        ema: moving average of the weights.
        teacher: another classifier to learn from.
        precision: `fp32`, `fp64`, or mixed with `bf16` or `fp16`.
        sync_batch_norm: several processes share the statistics of batch norms.
        execution: how levels run: `auto`, `packed` or `looped`, or a list with `packed` or
            `looped` for each level.
        tune: measure first which execution is fastest, and use it where execution is `auto`; two
            runs may then differ in rounding.
        compile: run the ensemble through `torch.compile`.
        checkpoints: when the state is saved.
        skip_corrupt: how many images may be unreadable: they are skipped and reported; one more is
            an error.
        trackers: where Accelerate also reports to: `tensorboard`, `wandb`, ...
        seed: of the weights, the order of the images and their augmentation.
        workers: processes that prepare images; 0 prepares them in the training process.
        device: `auto` is CUDA, then MPS, then the CPU.
        channels_last: memory format [N, H, W, C], in which most convolutions are faster.
        threads: CPU threads for PyTorch; null leaves PyTorch's choice.
        out: run directory, new or empty; null is `runs/NAME`, `runs/NAME-2`, ...
    """

    name: str = Field(pattern=r"^\w[\w.-]*$")
    model: ModelRecipe
    data: DataRecipe
    loss: LossRecipe
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe
    batch_size: Count = 128
    gradient_accumulation: Count = 1
    mix: MixRecipe | None = None
    ema: EmaRecipe | None = None
    teacher: TeacherRecipe | None = None
    precision: Literal["fp32", "fp64", "bf16", "fp16"] = "fp32"
    sync_batch_norm: bool = True
    execution: Literal["auto", "packed", "looped"] | list[Literal["packed", "looped"]] = "auto"
    tune: bool = False
    compile: bool = False
    checkpoints: CheckpointsRecipe = CheckpointsRecipe()
    skip_corrupt: NonNegativeInt = 0
    trackers: list[str] = Field(default=[])
    seed: NonNegativeInt = 0
    workers: Cpus = 0
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    channels_last: bool = False
    threads: Annotated[Cpus, Field(gt=0)] | None = None
    out: str | None = None


def longer(recipe: Recipe, epochs: int) -> Recipe:
    """A recipe of more epochs; the schedule of those it had stays what it was.

    Raises:
        RecipeError: that is no number of epochs.
    """
    require_integer("more_epochs", epochs, 0, error=RecipeError)
    if not epochs:
        return recipe
    schedule = recipe.schedule
    changes = {
        "epochs": schedule.epochs + epochs,
        "extended": [*schedule.extended, schedule.epochs],
    }
    try:
        schedule = ScheduleRecipe.model_validate({**schedule.model_dump(), **changes})
    except ValidationError as error:
        raise RecipeError(
            f"a run of {schedule.epochs} epochs cannot have {epochs} more.",
            expected="a positive number, and at most 1,000,000,000 epochs in all",
        ) from error
    return recipe.model_copy(update={"schedule": schedule})
