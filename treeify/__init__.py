"""treeify turns any image classifier into an anytime model: a tree of networks that share layers.

    >>> import torch, torchvision, treeify
    >>> model = torchvision.models.resnet18(num_classes=10)
    >>> hne = treeify.hierarchicalize(model, splits=["layer3", "layer4"], init="fresh")
    >>> print(hne.tree)
    4 leaves, branches per level 1 2 4
    ...
    >>> x = torch.rand(2, 3, 64, 64)
    >>> hne(x).shape                      # logits of every leaf
    torch.Size([2, 4, 10])
    >>> hne.predict(x, leaves=2).shape    # mean of the first two, half the branches computed
    torch.Size([2, 10])
    >>> treeify.verify(hne, x).worst <= 1  # against the untouched architecture
    True

Train it with any of `treeify.losses` (every leaf and every nested sub-ensemble at once), keep it
with `treeify.save`, or let the command line do all of it: `treeify --help`.

Source: Ruiz & Verbeek, Anytime Inference with Distilled Hierarchical Neural Ensembles, AAAI 2021.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treeify import losses
    from treeify.conversion.api import hierarchicalize, pack
    from treeify.conversion.checkpoint import load
    from treeify.conversion.ensemble import HierarchicalEnsemble
    from treeify.conversion.saving import save
    from treeify.engine.allocator import tune_allocator
    from treeify.errors import TreeifyError
    from treeify.parity.verify import verify
    from treeify.planning.plan import plan
    from treeify.share.push import push
    from treeify.tree import Tree

__version__ = version("treeify")

__all__ = [
    "HierarchicalEnsemble",
    "Tree",
    "TreeifyError",
    "__version__",
    "hierarchicalize",
    "load",
    "losses",
    "pack",
    "plan",
    "push",
    "save",
    "tune_allocator",
    "verify",
]

_HOMES = {
    "HierarchicalEnsemble": "conversion.ensemble",
    "Tree": "tree",
    "TreeifyError": "errors",
    "hierarchicalize": "conversion.api",
    "load": "conversion.checkpoint",
    "pack": "conversion.api",
    "plan": "planning.plan",
    "push": "share.push",
    "save": "conversion.saving",
    "tune_allocator": "engine.allocator",
    "verify": "parity.verify",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `treeify --help` need not wait for torch."""
    if name in ("data", "errors", "losses", "models", "report"):
        return import_module(f"treeify.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'treeify' has no attribute {name!r}")
    attribute = globals()[name] = getattr(import_module(f"treeify.{_HOMES[name]}"), name)
    return attribute


def __dir__() -> list[str]:
    return sorted(__all__)
