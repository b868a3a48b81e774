"""What libraries log while they are imported, and no user can act upon.

Transformers imports torchao where it is installed. Torchao then warns of each GPU library that a CPU lacks, and PyTorch
of names that torchao uses.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("torchao", "torch.utils._pytree")


def hush() -> None:
    """Only errors of these libraries from here on, in the whole process: for programs, before they import PyTorch.

    PPLLAVA_DEBUG=1 shows all.
    """
    if os.environ.get("PPLLAVA_DEBUG") != "1":
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def hushed() -> Iterator[None]:
    """As :func:`hush`, and as it was afterwards: for the import of a module of this package by a user's program."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    hush()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


__all__ = ["hush", "hushed"]
