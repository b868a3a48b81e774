"""The backend: Triton on CUDA tensors, or on CPU tensors in its interpreter (TRITON_INTERPRET=1), for debugging.

Triton itself is imported at the first call, so that importing this package never needs it.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from .. import preconditions, products

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


def prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames):
    _check_can(image_embeds)
    preconditions.check_relevance(image_embeds, text_embeds, scale_tensor, cu_frames)
    from . import prompt_relevance as kernels

    return kernels.prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames)


def prompt_relevance_backward(grad, relevance, image_embeds, text_embeds, scale_tensor, scale, cu_frames):
    _check_can(image_embeds)
    preconditions.check_relevance(image_embeds, text_embeds, scale_tensor, cu_frames)
    preconditions.check_patches(image_embeds, grad=grad, relevance=relevance)
    from . import prompt_relevance as kernels

    embeds = image_embeds, text_embeds
    return kernels.prompt_relevance_backward(grad, relevance, *embeds, scale_tensor, scale, cu_frames)


def weighted_pool3d(*arguments):
    _check_can(arguments[0])
    preconditions.check_pool(*arguments)
    from . import weighted_pool3d as kernels

    return kernels.weighted_pool3d(*arguments)


def weighted_pool3d_backward(grad, values, weights, window, temperature, cu_frames, need_values, need_weights):
    _check_can(values)
    preconditions.check_pool(values, weights, window, temperature, cu_frames)
    preconditions.check_needed(weights=(need_weights, weights))
    from . import weighted_pool3d as kernels

    plan = kernels.make_plan(values, cu_frames, window)
    preconditions.check_windows(grad, plan.lead, values.shape[-1], values)
    return kernels.weighted_pool3d_backward(grad, values, weights, plan, temperature, need_values, need_weights)


def prompt_guided_pool3d(values, image_embeds, text_embeds, scale_tensor, scale, window, temperature, cu_frames):
    _check_can(values)
    preconditions.check_relevance(image_embeds, text_embeds, scale_tensor, cu_frames)
    preconditions.check_pool(values, None, window, temperature, cu_frames)
    preconditions.check_grid(values, image_embeds)
    from . import prompt_guided_pool3d as kernels

    embeds = image_embeds, text_embeds, scale_tensor, scale
    return kernels.prompt_guided_pool3d(values, *embeds, window, temperature, cu_frames)


def guide_relevance(
    features, text_embeds, scale_tensor, scale, norm_weight, norm_bias, norm_eps, guide_weight, cu_frames
):
    _check_can(features)
    norm = norm_weight, norm_bias
    preconditions.check_guide(features, text_embeds, scale_tensor, *norm, guide_weight, cu_frames)
    from . import guide_relevance as kernels

    prompt = text_embeds, scale_tensor, scale
    return kernels.guide_relevance(features, *prompt, *norm, norm_eps, guide_weight, cu_frames)


def guide_relevance_backward(*arguments):
    return products.guide_relevance_backward(*arguments)


def hidden_pool3d(*arguments):
    _check_can(arguments[0])
    preconditions.check_hidden(*arguments)
    from . import hidden_pool3d as kernels

    return kernels.hidden_pool3d(*arguments)


def hidden_pool3d_backward(*arguments):
    _check_can(arguments[0])
    from . import hidden_pool3d as kernels

    return products.hidden_pool3d_backward(kernels, *arguments)


def _check_can(x: Tensor) -> None:
    """torch.ops are called without asking `why_not` first."""
    if (reason := why_not(x)) is not None:
        raise ValueError(f"backend='triton' cannot run: {reason}")
