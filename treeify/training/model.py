"""The ensemble of a run: built from its recipe, checked against the data, set up for training."""

import torch
from torch import Tensor, nn

from treeify.conversion.api import hierarchicalize
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data import Data
from treeify.engine.preserve import preserve_modes
from treeify.errors import RecipeError
from treeify.models.architecture import Architecture
from treeify.training.distributed import Team, broadcast
from treeify.training.recipe import Recipe


def build(recipe: Recipe, data: Data) -> HierarchicalEnsemble:
    """Build the untrained ensemble of a recipe's model section and seed, on the CPU."""
    model = recipe.model
    architecture = Architecture(model.name, model.kwargs)
    base: nn.Module | Architecture = architecture
    if model.pretrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            base = architecture.build(pretrained=True)
    return hierarchicalize(
        base,
        splits=model.splits,
        fanout=model.fanout,
        init=model.init,
        seed=recipe.seed,
        example_input=data.example()[None],
        weights=model.weights,
    )


@torch.no_grad()
def check_classes(hne: HierarchicalEnsemble, data: Data) -> None:
    """Compare an ensemble's outputs with the data's classes.

    Raises:
        RecipeError: there is not one logit for each class.
    """
    image = data.example()
    first = next(hne.parameters())
    with preserve_modes(hne):
        output = hne.eval()(image[None].to(first.device, first.dtype), leaves=1)
    if not isinstance(output, Tensor):
        raise RecipeError(
            "the model does not return logits.",
            expected="one tensor, [N, K]",
            found=type(output).__name__,
            next_step="Train a module whose forward returns the logits alone.",
        )
    outputs = output.shape[-1]
    if outputs != len(data.classes):
        raise RecipeError(
            "the model does not fit the data.",
            expected=f"a model with the data's {len(data.classes)} classes",
            found=f"one with {outputs}",
            next_step=f"Set model.kwargs.num_classes={len(data.classes)}, or its name for it.",
        )


def choose_execution(
    hne: HierarchicalEnsemble, recipe: Recipe, data: Data, images: int, team: Team
) -> None:
    """Set how levels run and where their weights lie, measured if the recipe says so.

    An ensemble that was tuned before stays as it is. The first process measures, with as many
    images as are in one forward pass of a process, so that all of them run alike.
    """
    hne.execution = recipe.execution
    if recipe.tune and not hne.tunings:
        _set_memory_format(hne, recipe)  # what tuning compares other plans with
        image, first = data.example(), next(hne.parameters())
        x = image[None].expand(images, *image.shape).to(first.device, first.dtype)
        if team.index == 0:
            for training in (True, False):
                hne.tune(x, training=training)
        hne.tunings.update(broadcast(hne.tunings))
    _set_memory_format(hne, recipe)


def _set_memory_format(hne: HierarchicalEnsemble, recipe: Recipe) -> None:
    """Put weights in the format of the tuned plan, else of the recipe, also after resuming.

    The images need not be converted: convolutions take over their weights' format.
    """
    plans = [tuning.plan for situation, tuning in hne.tunings.items() if situation.training]
    channels_last = plans[-1].channels_last if plans else recipe.channels_last
    hne.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
