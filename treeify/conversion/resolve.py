"""What a user calls a model: a module, wrapped or not, or the name of one."""

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from treeify.conversion.initialize import branch_seed
from treeify.errors import ModelError, described
from treeify.models.architecture import Architecture
from treeify.tracing.hooks import hooks_in


def resolve(
    model: nn.Module | str | Architecture, seed: int = 0
) -> tuple[nn.Module, Architecture | None]:
    """A base model and, where it was given by name, how to build it.

    Raises:
        ModelError: the name is unknown, or what is given is no model.
    """
    if isinstance(model, nn.Module):
        return unwrapped(model), None
    if not isinstance(model, str | Architecture):
        raise ModelError(
            f"{described(model)} is no model.",
            expected="an nn.Module, or a name: 'resnet50' (timm), 'torchvision/resnet50',"
            " 'package.module:function'",
            next_step="treeify list names the models that convert.",
        )
    architecture = Architecture(model) if isinstance(model, str) else model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(branch_seed(seed, 0))
        return architecture.build(), architecture


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what `torch.compile` and data parallelism put around it.

    Raises:
        ModelError: there are hooks around what is put around it.
    """
    while True:
        is_wrapper = isinstance(model, nn.DataParallel | DistributedDataParallel | OptimizedModule)
        if is_wrapper and any(hook.path == "" for hook in hooks_in(model)):
            raise ModelError(
                f"there are hooks around {type(model).__name__}, not around the model in it.",
                expected="hooks of the model's modules",
                next_step="Register them there, or remove them: handle.remove().",
            )
        if isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(model, OptimizedModule):
            model = model._orig_mod
        else:
            return model
