"""Packages that only some of the runtime needs."""

from importlib import import_module
from types import ModuleType


class MissingPackage(ImportError):
    """An optional package is absent: what needs it, and the command that installs it."""


def optional(name: str, purpose: str) -> ModuleType:
    """The imported package, or MissingPackage."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise MissingPackage(f"{purpose} needs the package {error.name}: pip install 'penstock[serve]'") from error
