"""How far a run is: what going on with it needs besides the weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.amp.grad_scaler import GradScaler

from treeify.errors import CheckpointError
from treeify.evaluation.metrics import Scores
from treeify.training.optimizers import in_memory_formats

# Fields with a state of their own; all others are plain values.
_PARTS = ("scores", "optimizer", "scaler")


@dataclass(kw_only=True)
class RunState:
    """Counters, scores and optimizer of a run. Its fields are the keys that are saved.

    Args:
        step: training steps since the start of the run.
        epochs: how many are finished.
        images: training images of the data set, by which another one is recognised.
        best: the checkpoint with the highest held-out accuracy, None before the first epoch's end.
        best_accuracy: of that checkpoint, in percent.
        loss: of the unfinished epoch, summed over its images so far.
        scores: of the unfinished epoch's training images, in this process.
        skipped: paths of images that could not be read.
        optimizer: with a momentum, say, for each parameter.
        scaler: of gradients in half precision, None in others.
    """

    step: int = 0
    epochs: int = 0
    images: int
    best: str | None = None
    best_accuracy: float = -1.0
    loss: float = 0.0
    scores: Scores
    skipped: set[str] = field(default_factory=set)
    optimizer: torch.optim.Optimizer | AcceleratedOptimizer
    scaler: GradScaler | None

    def state_dict(self) -> dict[str, Any]:
        """Every field by name, as plain values and tensors."""
        parts = {name: getattr(self, name) for name in _PARTS}
        states = {name: None if part is None else part.state_dict() for name, part in parts.items()}
        return {**vars(self), **states, "skipped": sorted(self.skipped)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, as it was read from a file.

        Raises:
            CheckpointError: the optimizer groups its parameters otherwise than the saved one did.
        """
        optimizer = in_memory_formats(state["optimizer"], self.optimizer)
        state = {**state, "optimizer": optimizer, "skipped": set(state["skipped"])}
        for name, value in list(vars(self).items()):
            if name not in _PARTS:
                setattr(self, name, state[name])
            elif value is not None and state[name] is not None:
                try:
                    value.load_state_dict(state[name])
                except ValueError as error:  # torch's, of groups of parameters
                    raise CheckpointError(
                        f"the run was saved with another {name}: {error}",
                        next_step="Go on with the treeify version that began it, or begin anew.",
                    ) from error
