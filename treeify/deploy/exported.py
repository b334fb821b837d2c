"""An export beside ensembles: images and answers are tensors, its own runtime computes them."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from treeify.anytime.confidence import Budget
from treeify.anytime.session import Answer, Prediction
from treeify.conversion.config_values import MOST_VALUES
from treeify.conversion.saved_config import CONFIG
from treeify.data.preparation import PREPARATION, Preparation
from treeify.deploy import runtime
from treeify.deploy.formats import MANIFEST
from treeify.engine import timing
from treeify.errors import CheckpointError, InputError, LeafError, TreeifyError
from treeify.tree import Tree

_BUDGETS = TypeAdapter(tuple[Budget, ...])
# What the runtime raises, which knows nothing of treeify, and what that is here.
_ERRORS: dict[type[runtime.AnytimeError], type[TreeifyError]] = {
    runtime.ExportError: CheckpointError,
    runtime.LeafError: LeafError,
}

Observer = Callable[[Answer, Tensor], None]


def looks_exported(path: Path) -> bool:
    """Whether a directory was written by `treeify export`, whole or not."""
    return (path / MANIFEST).is_file() and not (path / CONFIG).exists()


class ExportedEnsemble:
    """An exported directory, answered by the runtime that is shipped with it.

    It takes and gives tensors and has the words of a `HierarchicalEnsemble` where they mean the
    same. An export of a fixed number of images gets fewer by repeating the last one.

    Args:
        path: what `treeify export` wrote.
        threads: that compute one call; by default as many as `OMP_NUM_THREADS` says, or cores.

    Raises:
        CheckpointError: it is damaged, or of another version.
        InputError: its runtime is not installed.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        if threads is None and "OMP_NUM_THREADS" in os.environ:
            threads = torch.get_num_threads()
        if find_spec("onnxruntime") is None:
            raise InputError(
                f"{path} is an export, and what runs it is not installed.",
                expected="onnxruntime",
                next_step="pip install 'treeify[onnx]'",
            )
        with _translated():
            self.model = runtime.Anytime(path, threads=threads)
        self.path = path
        try:
            self._read(self.model.manifest)
        except (ValueError, KeyError, TypeError, TreeifyError) as error:
            raise CheckpointError(
                f"{path / MANIFEST} is damaged: {str(error).splitlines()[0]}",
                next_step="Export the ensemble again: treeify export.",
            ) from error

    def _read(self, manifest: dict[str, Any]) -> None:
        """Take what the runtime does not need from a manifest, which anybody may have written.

        Raises:
            ValueError: it is out of bounds; others are raised where it is not there.
        """
        steps, preparation = manifest["steps"], manifest.get("preparation")
        if prod((self.images or 1, *self.shape)) > MOST_VALUES:
            raise ValueError(f"its images have {prod(self.shape):,} values")
        if self.model.leaves > sum(step["bytes"] for step in steps):
            raise ValueError(f"its files have no room for {self.model.leaves:,} leaves")
        self.tree = Tree(tuple(manifest["tree"]["fanouts"])).first(self.model.leaves)[1]
        if not set(self.sizes) <= set(self.tree.nested_sizes):
            raise ValueError(f"its sizes {self.sizes} are none of its tree")
        budgets = _BUDGETS.validate_python(manifest["budgets"])
        self.budgets = {budget.target_macs: budget for budget in budgets}
        self._preparation = preparation and PREPARATION.validate_python(preparation)
        self._parameters = [int(step["parameters"]) for step in steps]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Where steps end, numbers of leaves."""
        return tuple(self.model.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image, `(C, H, W)`."""
        return tuple(int(size) for size in self.model.shape[1:])

    @property
    def images(self) -> int | None:
        """How many are answered together; None for any number."""
        first = self.model.shape[0]
        return first if isinstance(first, int) else None

    @property
    def machine(self) -> str:
        """What answers take their time on: the processor, the engine, its threads."""
        engine, threads = self.model.engine, self.model.threads
        count = f"{threads} threads" if threads else "all cores"
        return f"{timing.processor()}, {count}, {engine} {version(engine)}"

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Their names, in the order of the logits; None if they are not known."""
        return None if self.model.classes is None else tuple(self.model.classes)

    @property
    def preparation(self) -> Preparation:
        """What images go through, in the size that the export takes.

        Raises:
            InputError: it takes no images.
        """
        if len(self.shape) != 3:
            raise InputError(
                f"the ensemble takes inputs of shape {self.shape}, not files of images.",
                expected="(C, H, W) with 1, 3 or 4 channels",
                next_step="Call its runtime: treeify.deploy.runtime.Anytime(path).predict(x).",
            )
        channels, height, width = self.shape
        known = self._preparation or Preparation(
            (height, width), channels=channels, source="the export does not say it"
        )
        return replace(known, size=(height, width), channels=channels, classes=self.classes)

    def count_macs(self, leaves: int | None = None) -> int:
        """MACs per image of the steps to a size; of all if not given."""
        return int(self.model.macs[self.model.leaves if leaves is None else leaves])

    def count_parameters(self, leaves: int) -> int:
        """Parameters in the files of the steps to a size."""
        return sum(self._parameters[: self.sizes.index(leaves) + 1])

    def example_images(self, count: int) -> Tensor:
        """Images of random pixels, `[count, C, H, W]`; as many as it takes if that is fixed."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(self.images or count, *self.shape, generator=generator)

    def predict(
        self,
        x: Tensor,
        leaves: int | None = None,
        *,
        deadline: float | None = None,
        confidence: float | Budget | None = None,
        observe: Observer | None = None,
    ) -> Any:
        """Mean logits, as of `HierarchicalEnsemble.predict`.

        Args:
            x: images, `[N, C, H, W]`.
            leaves: how many leaves to average, where a step ends.
            deadline: seconds from the call.
            confidence: what suffices to stop, or the budget that thresholds were chosen for.
            observe: called with every answer, and the positions of its images.

        Returns:
            `[N, K]`, or a `Prediction`.

        Raises:
            InputError, LeafError: as there.
            CheckpointError: a file is damaged.
        """
        limits: dict[str, Any] = {"leaves": leaves, "deadline": deadline, "confidence": confidence}
        if isinstance(confidence, Budget):
            limits |= {"confidence": None, "budget": confidence.target_macs}
        observer = None if observe is None else partial(_observe, observe)
        with _translated():
            found = self.model.predict(self._array(x), **limits, observe=observer)
        if not isinstance(found, runtime.Prediction):
            return _tensor(found, len(x))
        logits, used = _tensor(found.logits, len(x)), _tensor(found.leaves, len(x))
        return Prediction(logits, used, found.seconds, found.met)

    def leaf_logits(self, x: Tensor) -> Tensor:
        """Logits of every leaf, `[N, C, H, W] -> [N, L, K]`; N may be anything.

        Raises:
            InputError: the images do not fit, or the answer is no tensor of logits.
            CheckpointError: a file is damaged.
        """
        parts = []
        for part in torch.split(x, self.images or len(x)):
            with _translated():
                session = self.model.session(self._array(part))
                session.advance(to=self.model.leaves)
            logits = session.leaf_logits
            if not isinstance(logits, np.ndarray) or logits.ndim != 3:
                raise InputError(
                    "the ensemble returns no single tensor of logits.", expected="[N, K]"
                )
            parts.append(_tensor(logits, len(part)))
        return torch.cat(parts)

    def calibrate(
        self, x: Tensor, *, repeats: int = 50, budget: float = 30.0
    ) -> tuple[runtime.Latencies, str]:
        """Measure how long the steps take, and keep it beside the export.

        Returns:
            The latencies, and where they are kept, or why not.
        """
        images = self._array(x)
        with warnings.catch_warnings(record=True) as caught, _translated():
            warnings.simplefilter("always")
            latencies = self.model.calibrate(images, repeats=repeats, budget=budget)
        kept = f"kept in {self.path}"
        if caught:
            kept = f"not kept: {str(caught[-1].message).splitlines()[0].rstrip('.')}"
        return latencies, kept

    def measure_if_unknown(self, x: Tensor) -> str | None:
        """Measure what deadlines need unless that is known; a sentence about it where it was done.

        Raises:
            InputError: the images do not fit.
        """
        try:
            self.predict(x, deadline=1e6)  # warms up where it is known
        except InputError:
            latencies, kept = self.calibrate(x)
        else:
            return None
        return (
            f"Latencies of {latencies.situation} were not known: measured in"
            f" {latencies.repeats} rounds, {kept}."
        )

    def _array(self, x: Tensor) -> "np.ndarray[Any, Any]":
        """A batch as the runtime takes it."""
        if self.images is not None and 0 < len(x) < self.images:
            x = torch.cat([x, x[-1:].expand(self.images - len(x), *x.shape[1:])])
        if x.is_floating_point():
            x = x.to(getattr(torch, self.model.manifest["images"]["dtype"]))
        array: np.ndarray[Any, Any] = x.numpy()
        return array


def _tensor(value: Any, images: int | None = None) -> Any:
    """An array, or its first rows, as a tensor; what is none stays as it is."""
    return torch.from_numpy(value[:images]) if isinstance(value, np.ndarray) else value


def _observe(observe: Observer, answer: runtime.Answer, images: "np.ndarray[Any, Any]") -> None:
    step = Answer(answer.leaves, _tensor(answer.logits), answer.elapsed, answer.macs)
    observe(step, torch.from_numpy(images))


@contextmanager
def _translated() -> Iterator[None]:
    """Raise what the runtime says as the errors of treeify."""
    try:
        yield
    except runtime.AnytimeError as error:
        kind = next(
            (here for there, here in _ERRORS.items() if isinstance(error, there)), InputError
        )
        raise kind(str(error)) from error
