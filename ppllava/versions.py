"""One warning where a library is newer than what this package was tested with."""

from __future__ import annotations

import re
import warnings
from importlib import metadata

PACKAGES = ("transformers", "torchao", "av")


def warn_of_untested() -> None:
    """Compare what is installed with the ranges of pyproject.toml, as the metadata of the installation has them."""
    try:
        requirements = metadata.requires("ppllava-kernels") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return
    found = []
    for name in PACKAGES:
        tested = next((x for x in requirements if re.match(rf"{name}\b[^;]*<\s*\d", x)), None)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if tested is not None and _numbers(version) >= _numbers(re.search(r"<\s*([\d.]+)", tested)[1]):
            found.append(f"{name} {version} ({tested.partition(';')[0].strip()})")
    if found:
        warnings.warn(
            f"ppllava was not tested with {', '.join(found)}; where something fails, install a version in the range",
            UserWarning,
            stacklevel=3,
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Of "5.25.0.dev0" (5, 25, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


__all__ = ["warn_of_untested"]
