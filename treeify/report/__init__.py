"""What runs, grids, ensembles and exports reached, as figures and as one page of HTML.

    report = treeify.report.read("runs/digits_hne")
    report.figures["trade_off"]       # matplotlib's, to be changed or saved
    report.write("report.html")       # one file, no script, nothing fetched

Directories are read into plain values, one function for each figure draws them, and the page
gathers figures, tables and what is missing. Needs the extra `treeify[report]`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treeify.report.api import Report, read
    from treeify.report.chart import Chart

__all__ = ["Chart", "Report", "read"]

_HOMES = {"Chart": "chart", "Report": "api", "read": "api"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: matplotlib is an extra, and takes its time."""
    if name not in _HOMES:
        raise AttributeError(f"module 'treeify.report' has no attribute {name!r}")
    from treeify.report.writing import require_packages

    require_packages()
    return getattr(import_module(f"treeify.report.{_HOMES[name]}"), name)
