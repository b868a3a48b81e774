"""The backend: Triton on CUDA tensors, or on CPU tensors in its interpreter (TRITON_INTERPRET=1), for debugging.

Triton itself is imported at the first call, so that importing this package never needs it.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from .. import products

_installed = importlib.util.find_spec("triton") is not None
# Triton reads it when a kernel is defined, so that a later change counts for nothing.
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def why_not(*tensors: Tensor) -> str | None:
    if not _installed:
        return "the package triton is not installed; pip install 'triton>=3.6' (Linux), or use backend=None"
    if any(x.dtype == torch.float64 for x in tensors):
        return "triton computes in float32 and got float64; use backend='reference', or float32 inputs"
    if _interpreted:
        return None
    if not tensors and not torch.cuda.is_available():
        return "triton needs a CUDA GPU and this PyTorch finds none; use backend=None"
    for x in tensors:
        if x.device.type != "cuda":
            return f"triton runs on CUDA tensors, got one on {x.device}; use backend=None, or move it with .cuda()"
    return None


def prompt_relevance(*arguments):
    from . import prompt_relevance as kernels

    return kernels.prompt_relevance(*arguments)


def prompt_relevance_backward(*arguments):
    from . import prompt_relevance as kernels

    return kernels.prompt_relevance_backward(*arguments)


def weighted_pool3d(*arguments):
    from . import weighted_pool3d as kernels

    return kernels.weighted_pool3d(*arguments)


def weighted_pool3d_backward(*arguments):
    from . import weighted_pool3d as kernels

    return kernels.weighted_pool3d_backward(*arguments)


def prompt_guided_pool3d(*arguments):
    from . import prompt_guided_pool3d as kernels

    return kernels.prompt_guided_pool3d(*arguments)


def guide_relevance(*arguments):
    from . import guide_relevance as kernels

    return kernels.guide_relevance(*arguments)


def guide_relevance_backward(*arguments):
    return products.guide_relevance_backward(*arguments)


def hidden_pool3d(*arguments):
    from . import hidden_pool3d as kernels

    return kernels.hidden_pool3d(*arguments)


def hidden_pool3d_backward(*arguments):
    from . import hidden_pool3d as kernels

    return products.hidden_pool3d_backward(kernels, *arguments)
