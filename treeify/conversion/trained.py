"""Weights that were trained before, from a file or from an ensemble's directory."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from treeify.conversion import checkpoint
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.conversion.initialize import Source, State
from treeify.engine.packed_tensors import named_tensors
from treeify.models.fingerprint import fingerprint
from treeify.models.load_weights import load_into
from treeify.models.weights import Weights, read_weights
from treeify.tracing.model_copy import copy_model


@dataclass(frozen=True)
class Trained:
    """A base model with trained weights.

    Args:
        model: the base model; that of leaf 0 where the weights are an ensemble's.
        notes: what a user should know of its weights.
        origin: what the weights came from, a directory or a file.
        ensemble: the ensemble they came from, if they are one's.
        num_classes: as in `load_trained`.
    """

    model: nn.Module
    notes: tuple[str, ...]
    origin: Path
    ensemble: HierarchicalEnsemble | None = None
    num_classes: int | None = None

    def fits(self, hne: HierarchicalEnsemble) -> bool:
        """Whether the weights are those of an ensemble that splits alike."""
        splits = hne.conversion.splits.specs
        return self.ensemble is not None and self.ensemble.conversion.splits.specs == splits

    def branches(self) -> Source:
        """The weights of every branch, for an ensemble that `fits`."""
        assert self.ensemble is not None
        ensemble = self.ensemble

        def state(leaf: int) -> State:
            return dict(named_tensors(_leaf(self.model, ensemble, leaf, self.num_classes)[0]))

        first, *notes = self.notes
        first = f"weights: every branch's own, from {self.origin}, which splits alike"
        return Source(state, by_leaf=True, notes=(first, *notes))


def load_trained(base: nn.Module, path: str | Path, num_classes: int | None = None) -> Trained:
    """Read the trained weights of a base model.

    Args:
        base: the base model. Not modified.
        path: a file, see `treeify.models.weights.read_weights`; or the directory of an ensemble or
            of a run, whose averaged ensemble is preferred.
        num_classes: as in `treeify.models.load_weights.load_into`.

    Raises:
        CheckpointError: there are no weights, or they do not fit.
    """
    path = Path(path)
    if not path.is_dir():
        model = copy_model(base)
        notes = load_into(model, read_weights(path), num_classes)
        return Trained(model, tuple(notes), path)
    origin = checkpoint.scored_ensemble(path)
    is_named = checkpoint.read_config(origin)["architecture"] is not None
    ensemble = checkpoint.load(origin, None if is_named else base)
    model, notes = _leaf(base, ensemble, 0, num_classes)
    notes = [f"weights: of leaf 0 of {origin}", *notes]
    return Trained(model, tuple(notes), origin, ensemble, num_classes)


def _leaf(
    base: nn.Module, ensemble: HierarchicalEnsemble, index: int, num_classes: int | None
) -> tuple[nn.Module, list[str]]:
    """A base model with the weights of a leaf, and what a user should know of them."""
    leaf = ensemble.leaf(index)
    if fingerprint(leaf) != fingerprint(base):  # another head, say
        model = copy_model(base)
        weights = Weights(leaf.state_dict(), f"leaf {index} of the ensemble")
        return model, load_into(model, weights, num_classes)[1:]
    # With what no state dict holds. What is trained, where, in which mode is the base's matter.
    parameters = dict(base.named_parameters())
    leaf.to(next((parameter.device for parameter in parameters.values()), None))
    for name, parameter in leaf.named_parameters():
        parameter.requires_grad_(parameters[name].requires_grad)
    modules = dict(base.named_modules())
    for name, module in leaf.named_modules():
        module.training = modules[name].training
    return leaf, []
