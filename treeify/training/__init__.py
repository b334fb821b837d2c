"""A recipe comes in; out goes a run directory with the trained ensemble, whatever interrupts it.

Call `train`; what a run writes is read through `RunDirectory` alone.
"""

from treeify.data import timm_utils  # noqa: F401 - before any other module imports timm's
