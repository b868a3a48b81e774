"""The compiled extension `_C`: loaded once, or why it is not there and what to do about it."""

from __future__ import annotations

import importlib
import re
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir . in the folder of the sources"
_HERE = Path(__file__).parent


class Missing:
    """In place of `_C`: torch.ops call it without asking `why_not` first."""

    cuda_architectures = cuda_missing = cuda_version = ""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __getattr__(self, name: str):
        raise RuntimeError(f"{name} of the compiled backends cannot run: {self.reason}")


def load(package: str = __package__, folder: Path = _HERE):
    """(the extension of `package` in `folder`, None), or (`Missing`, why)."""
    try:
        extension = importlib.import_module("._C", package)
    except ImportError as error:
        reason = _why_missing(error, folder)
        return Missing(reason), reason
    if _minor(extension.torch_version) != _minor(torch.__version__):
        warnings.warn(
            f"the C++ extension was built for PyTorch {extension.torch_version} and this is {torch.__version__}; "
            f"rebuild it for this one: {REINSTALL}",
            stacklevel=2,
        )
    return extension, None


def _why_missing(error: ImportError, folder: Path) -> str:
    file = next((path for x in EXTENSION_SUFFIXES if (path := folder / f"_C{x}").exists()), None)
    if file is not None:
        version = built_for(file)
        fits = version is None or _minor(version) == _minor(torch.__version__)
        if fits and not re.search("undefined symbol|symbol not found", str(error), re.IGNORECASE):
            return f"the C++ extension does not load ({error}); it is damaged, or of another machine: {REINSTALL}"
        built = f"PyTorch {version}" if version else "another PyTorch"
        return (
            f"the C++ extension does not load ({error}): it was built for {built} and this is "
            f"{torch.__version__}; rebuild it for this one: {REINSTALL}"
        )
    note = folder / "_C.missing"  # written by setup.py where it could not build the extension
    reason = note.read_text().strip() if note.exists() else str(error)
    return f"the C++ extension is not there ({reason}); install a C++17 compiler, then {REINSTALL}"


def built_for(file: Path) -> str | None:
    """The version of PyTorch that an extension was built for; it stands in the file, which need not load."""
    found = re.search(rb"ppllava_kernels was built for PyTorch ([^\0]{1,40})\0", file.read_bytes())
    return found[1].decode() if found else None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


_C, missing = load()
