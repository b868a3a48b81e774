"""Triton, on CUDA tensors, or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1), which is for debugging."""

from __future__ import annotations

from torch import Tensor


def why_not(*tensors: Tensor) -> str | None:
    return "not yet"
