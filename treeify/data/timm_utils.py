"""timm's utilities, imported without wandb.

They import it for one function, which nothing here calls; and wandb makes temporary directories as
it is imported, which a process that is killed leaves behind. Whoever asks for wandb still gets it.
"""

import sys

if "wandb" not in sys.modules:
    sys.modules["wandb"] = None  # type: ignore[assignment]  # importing it fails
    try:
        import timm.utils  # noqa: F401
    finally:
        del sys.modules["wandb"]
