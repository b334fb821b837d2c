"""An ensemble -> files that answer without PyTorch, one for each step from size to size.

`runtime` runs them and imports nothing of treeify's; all else may use any room but the command
line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treeify.deploy.dense_steps import steps
    from treeify.deploy.executorch_program import export_executorch
    from treeify.deploy.exporter import export

__all__ = ["export", "export_executorch", "steps"]

_HOMES = {
    "export": "exporter",
    "export_executorch": "executorch_program",
    "steps": "dense_steps",
}


def __getattr__(name: str) -> Any:
    """Import a function when it is first used: the runtime beside them needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'treeify.deploy' has no attribute {name!r}")
    return getattr(import_module(f"treeify.deploy.{_HOMES[name]}"), name)
