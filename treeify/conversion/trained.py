"""Weights that were trained before, from a file or from an ensemble's directory."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from treeify.conversion import checkpoint
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.initialize import Source, State
from treeify.conversion.saved_config import read_config, scored_ensemble
from treeify.data.preparation import Preparation
from treeify.engine.packed_tensors import get_parent, named_tensors
from treeify.models.fingerprint import fingerprint
from treeify.models.hub import local_path
from treeify.models.load_weights import load_into
from treeify.models.saved_architecture import is_trusted
from treeify.models.weights import Weights, read_weights
from treeify.tracing.model_copy import copy_model
from treeify.tracing.trace import plain_tensors


@dataclass(frozen=True)
class _Leaves:
    """An ensemble from a directory, and the number of classes that was asked for."""

    ensemble: HierarchicalEnsemble
    origin: Path
    num_classes: int | None

    def load(self, base: nn.Module, index: int) -> tuple[nn.Module, list[str]]:
        """A base model with the weights of a leaf, and what a user should know of them."""
        leaf, source = self.ensemble.leaf(index), f"leaf {index} of {self.origin}"
        model = copy_model(base)
        if fingerprint(leaf) != fingerprint(base):  # another head, say
            return model, load_into(model, Weights(leaf.state_dict(), source), self.num_classes)
        # With what no state dict holds.
        tensors = dict(named_tensors(leaf))
        with torch.no_grad():
            for key, tensor in named_tensors(model):
                tensor.copy_(tensors[key])
        for key, constant in plain_tensors(self.ensemble.traced).items():
            parent, name = get_parent(model, key)
            setattr(parent, name, constant.clone())
        return model, [f"weights: {source}"]


@dataclass(frozen=True)
class Trained:
    """A base model with trained weights.

    Args:
        model: the base model; that of leaf 0 where the weights are an ensemble's.
        notes: what a user should know of its weights.
        leaves: the ensemble they came from, if they are one's.
    """

    model: nn.Module
    notes: tuple[str, ...]
    leaves: _Leaves | None = None

    @property
    def preparation(self) -> Preparation | None:
        """What the ensemble that the weights are of says of images, if they are one's.

        Classes have no names if the head is for another number of them.
        """
        if self.leaves is None or (preparation := self.leaves.ensemble.preparation) is None:
            return None
        classes = preparation.classes
        if classes is not None and self.leaves.num_classes not in (None, len(classes)):
            classes = None
        return replace(preparation, classes=classes)

    def branches(self, hne: HierarchicalEnsemble) -> Source | None:
        """The weights of every branch, where they are those of an ensemble that splits alike."""
        leaves, splits = self.leaves, hne.conversion.splits.specs
        if leaves is None or leaves.ensemble.conversion.splits.specs != splits:
            return None
        note = f"weights: every branch's own, from {leaves.origin}, which splits alike"

        def state(index: int) -> State:
            return dict(named_tensors(leaves.load(self.model, index)[0]))

        return Source(state, by_leaf=True, notes=(note, *self.notes[1:]))


def load_trained(
    base: nn.Module,
    path: str | Path,
    num_classes: int | None = None,
    *,
    name: str | None = None,
    trust: bool = False,
) -> Trained:
    """Read the trained weights of a base model.

    Args:
        base: the base model. Not modified.
        path: a file, see `treeify.models.weights.read_weights`; or the directory of an ensemble or
            of a run, whose averaged ensemble is preferred, also as `hf-hub:org/name@revision`.
        num_classes: as in `treeify.models.load_weights.load_into`.
        name: of the base model, if the user gave one: a directory may have the same.
        trust: as in `treeify.load`, for a directory.

    Raises:
        CheckpointError: there are no weights, they do not fit, or the directory is not trusted.
    """
    path = local_path(path)
    if not path.is_dir():
        model = copy_model(base)
        return Trained(model, tuple(load_into(model, read_weights(path), num_classes)))
    origin = scored_ensemble(path, trust=trust)
    ensemble = _ensemble(origin, base, name, trust=trust)
    leaves = _Leaves(ensemble, origin, num_classes)
    model, notes = leaves.load(base, 0)
    return Trained(model, tuple(notes), leaves)


def _ensemble(
    path: Path, base: nn.Module, name: str | None, *, trust: bool
) -> HierarchicalEnsemble:
    """The ensemble of a directory; its function is called if the user named the same one."""
    config = read_config(path, trust=trust)
    architecture = config["architecture"]
    if architecture is None or (
        # Another head, say, has to be built.
        not (trust or is_trusted(str(architecture.get("name"))))
        and config["fingerprint"] == fingerprint(base)
    ):
        return checkpoint.load(path, base, trust=trust)
    is_same = name is not None and architecture.get("name") == name
    return checkpoint.load(path, trust=trust or is_same)
