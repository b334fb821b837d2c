"""Whether an ensemble can be exported: it is, and what was written is compared and thrown away."""

import tempfile
from pathlib import Path
from typing import Any

from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.deploy.exporter import export


def check_export(hne: HierarchicalEnsemble, *, batch: int | str = "dynamic") -> dict[str, Any]:
    """Export an ensemble into a temporary directory, with a step for every nested size.

    Nothing is measured: all levels are grouped. The files' answers are compared with those of
    `hne.session` at two batch sizes, step by step.

    Args:
        hne: the ensemble. Not modified.
        batch: how many images there will be; "dynamic" for any number.

    Returns:
        What its `ensemble.json` says.

    Raises:
        ExportError: it cannot be exported, or answers differently.
    """
    with tempfile.TemporaryDirectory(prefix="treeify-") as folder:
        return export(hne, Path(folder) / "export", batch=batch, tune=False).manifest
