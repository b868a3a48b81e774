"""The backend `cuda` on CPU tensors, in a process whose kernels build.py compiled for this CPU."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from .build import load


def install(folder: Path) -> None:
    """Before ppllava_kernels is imported. The backend then takes CPU tensors, and float64 no more than on a GPU."""
    load(folder)
    from ppllava_kernels.backends import cuda

    why_not = cuda.why_not
    cuda.why_not = lambda *tensors: why_not(*tensors) if any(x.dtype == torch.float64 for x in tensors) else None
    cuda._device = lambda x: contextlib.nullcontext()
    cuda._stream = lambda x: 0
