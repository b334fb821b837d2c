"""An ensemble -> one ExecuTorch program with a method for each step, for its own runtime on phones.

Weights of the steps are in one file then; a method's are read when it is loaded.
"""

import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from treeify import files
from treeify.arguments import as_path, require_flag
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.deploy.dense import exported
from treeify.deploy.dense_steps import StepPlans
from treeify.deploy.resized import resized
from treeify.errors import ExportError

# The method that returns what the others are, as JSON.
DESCRIPTION = "description"


@dataclass(frozen=True)
class Method:
    """A step in a program.

    Args:
        name: of the method.
        leaves: how many there are after it.
        inputs: names of its arguments: `images`, or what an earlier method gave.
        outputs: names of its results; the first are those of the new leaves.
    """

    name: str
    leaves: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class ExecutorchProgram:
    """A written program.

    Args:
        path: the file.
        bytes: its size.
        methods: in the order in which they run.
    """

    path: Path
    bytes: int
    methods: tuple[Method, ...]

    def __str__(self) -> str:
        """One line for each method."""
        lines = [f"{self.path}: {self.bytes / 1e6:.2f} MB"]
        for method in self.methods:
            names = f"{', '.join(method.inputs)} -> {', '.join(method.outputs)}"
            lines.append(f"{method.name}: {method.leaves} leaves, {names}")
        return "\n".join(lines)


def export_executorch(
    hne: HierarchicalEnsemble,
    out: str | Path,
    *,
    sizes: Iterable[int] | None = None,
    batch: int = 1,
    input_size: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> ExecutorchProgram:
    """Write an ensemble as one `.pte` file, lowered to XNNPACK.

    Its method `description` returns what the others read and give, as JSON.

    Args:
        hne: the ensemble. Not modified.
        out: the file.
        sizes: increasing nested sizes at which a method ends; all of them if not given.
        batch: how many images there will be: memory is planned for as many beforehand.
        input_size: height and width of images, instead of those it was converted for.
        overwrite: replace a file that is there.

    Returns:
        What was written; prints as one line per method.

    Raises:
        ExportError: the model cannot be exported or lowered, the file is there or cannot be
            written, or executorch is missing. Nothing is left behind.
        LeafError: a size is no nested one.
        InputError: the batch is no number of images.
    """
    require_flag("overwrite", overwrite)
    if find_spec("executorch") is None:
        raise ExportError(
            "a program for ExecuTorch needs executorch, which is not installed.",
            next_step="pip install 'treeify[executorch]'",
        )
    path = as_path("out", out, ExportError)
    if path.exists() and not overwrite:
        raise ExportError(
            f"{path} is there already.",
            next_step="Choose another one, or pass overwrite=True.",
        )
    plans = StepPlans(resized(hne, input_size), batch=batch)
    steps = plans.steps(plans.check_sizes(sizes))
    names = [f"step_{number:02d}" for number in range(1, len(steps) + 1)]
    methods = tuple(
        Method(name, step.leaves, step.inputs, step.outputs)
        for name, step in zip(names, steps, strict=True)
    )
    programs = {
        name: exported(
            lambda step=step: step,  # type: ignore[misc]
            list(step.examples),
            list(step.batch_dims),
            dynamic=False,
        )
        for name, step in zip(names, steps, strict=True)
    }
    content = _lower(programs, json.dumps([asdict(method) for method in methods]))
    try:
        files.replace_bytes(path, content)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}") from error
    return ExecutorchProgram(path, len(content), methods)


def _lower(programs: dict[str, Any], description: str) -> bytes:
    """Methods as a program, whatever XNNPACK can run run by it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages, about themselves
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            lowered = to_edge_transform_and_lower(
                programs,
                partitioner={name: [XnnpackPartitioner()] for name in programs},
                constant_methods={DESCRIPTION: description},
            )
            return bytes(lowered.to_executorch().buffer)
        except Exception as error:
            raise ExportError(
                "ExecuTorch cannot lower the model.",
                found=f"{type(error).__name__}: {error!s:.1000}",
            ) from error
