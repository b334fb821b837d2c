"""Versions of installed packages, as saved ensembles, runs and coverage rows hold them."""

from importlib.metadata import version

# A base model, and with it a fingerprint, is the same under the same versions of these.
MODEL_LIBRARIES = ("torch", "torchvision", "timm")


def versions_of(*packages: str) -> dict[str, str]:
    """The version of each package, by name; all must be installed."""
    return {package: version(package) for package in packages}
