"""C++ on the CPU: vectorised for the instruction set that PyTorch finds on this machine, on PyTorch's threads."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..extension import _C, missing
from . import preconditions, products
from .plan import clip_counts, make_plan


def why_not(*tensors: Tensor) -> str | None:
    for x in tensors:
        if x.device.type != "cpu":
            return f"cpp runs on CPU tensors, got one on {x.device}; use backend=None, or move it with .cpu()"
    return missing


def prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames):
    relevance = image_embeds.new_empty(*image_embeds.shape[:-1], dtype=_accumulator(image_embeds))  # [B, T, H, W]
    counts = clip_counts(image_embeds, cu_frames)
    _C.prompt_relevance(relevance, image_embeds, *_text(text_embeds, relevance.dtype, scale_tensor, scale), counts)
    return relevance


def prompt_relevance_backward(grad, relevance, image_embeds, text_embeds, scale_tensor, scale, cu_frames):
    accumulator = _accumulator(image_embeds)
    grad_image = image_embeds.new_empty(*image_embeds.shape)  # [B, T, H, W, C]
    grad_text = image_embeds.new_empty(*text_embeds.shape, dtype=accumulator)  # [B, C]
    grad_scale = image_embeds.new_empty((), dtype=accumulator)
    text, scale = _text(text_embeds, accumulator, scale_tensor, scale)
    counts = clip_counts(image_embeds, cu_frames)
    grads = grad_image, grad_text, grad_scale
    _C.prompt_relevance_backward(*grads, grad.contiguous(), relevance, image_embeds, text, scale, counts)
    return grad_image, _cast(grad_text, text_embeds.dtype), grad_scale


def weighted_pool3d(values, weights, window, temperature, cu_frames):
    plan = make_plan(values, window, cu_frames)
    pooled = values.new_empty(*plan.pooled_shape)
    weights = None if weights is None else _cast(weights, _accumulator(values))
    _C.weighted_pool3d(pooled, values, weights, temperature, *plan.arguments)
    return pooled


def weighted_pool3d_backward(grad, values, weights, window, temperature, cu_frames, need_values, need_weights):
    preconditions.check_needed(weights=(need_weights, weights))
    plan = make_plan(values, window, cu_frames)
    accumulator = _accumulator(values)
    shares = torch.empty((plan.slots,), dtype=accumulator)
    grad_scores = torch.empty_like(shares) if need_weights else None
    grad_values = values.new_empty(*values.shape) if need_values else None
    grad_weights = weights.new_empty(*weights.shape, dtype=accumulator) if need_weights else None
    weights_in = None if weights is None else _cast(weights, accumulator)
    grads = grad_values, grad_weights, shares, grad_scores
    _C.weighted_pool3d_backward(*grads, grad.contiguous(), values, weights_in, temperature, *plan.arguments)
    return (
        values.new_empty(0) if grad_values is None else grad_values,
        values.new_empty(0) if grad_weights is None else _cast(grad_weights, weights.dtype),
    )


def prompt_guided_pool3d(values, image_embeds, text_embeds, scale_tensor, scale, window, temperature, cu_frames):
    relevance = prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames)
    return weighted_pool3d(values, relevance, window, temperature, cu_frames), relevance


def guide_relevance(*arguments):
    return products.guide_relevance(_KERNELS, *arguments)


def guide_relevance_backward(*arguments):
    return products.guide_relevance_backward(*arguments)


def hidden_pool3d(*arguments):
    return products.hidden_pool3d(_KERNELS, *arguments)


def hidden_pool3d_backward(*arguments):
    return products.hidden_pool3d_backward(_KERNELS, *arguments)


# What backends/products.py asks of a backend.


def score_rows(cosines, embeds, text):
    _C.score_rows(cosines, embeds, text)


def window_shares(features, weights, temperature, plan):
    shares = features.new_empty(plan.slots, dtype=_accumulator(features))
    weights = None if weights is None else _cast(weights, shares.dtype)
    _C.window_shares(shares, weights, features, temperature, *plan.arguments)
    return shares


def window_shares_backward(weights, shares, dots, features, temperature, plan):
    grad_weights = weights.new_empty(*weights.shape, dtype=shares.dtype)
    _C.window_shares_backward(grad_weights, shares, dots, features, temperature, *plan.arguments)
    return _cast(grad_weights, weights.dtype)


def pool_hidden(sums, hidden, bias, shares, first, channel, features, plan):
    _C.pool_hidden(sums, hidden, bias, shares, first, channel, features, *plan.arguments)


def pool_hidden_backward(hidden, bias, shares, dots, grad, first, channel, features, plan):
    _C.pool_hidden_backward(hidden, bias, shares, dots, grad, first, channel, features, *plan.arguments)


_KERNELS = sys.modules[__name__]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes a microsecond even where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def _text(text_embeds: Tensor, dtype: torch.dtype, scale_tensor: Tensor | None, scale: float) -> tuple[Tensor, float]:
    if not text_embeds.is_floating_point():
        raise ValueError(
            f"text_embeds must be floating point, got {text_embeds.dtype}; pass the embedding of the prompt"
        )
    text = _cast(text_embeds, dtype).contiguous()
    return text, scale if scale_tensor is None else scale * scale_tensor.item()
