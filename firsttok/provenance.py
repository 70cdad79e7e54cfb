"""What a result was made with."""

import platform
from importlib import metadata

__all__ = ["versions"]

_PACKAGES = ("firsttok", "torch", "transformers", "transformer-lens", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python, firsttok and the libraries that decide numbers."""
    found = {package: metadata.version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **found}
