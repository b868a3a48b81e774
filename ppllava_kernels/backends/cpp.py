"""C++ on the CPU: vectorised for the instruction set that PyTorch finds on this machine, on PyTorch's threads."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..shapes import Window, frame_counts, largest_window, output_shape, ragged_outputs

try:
    from .. import _C

    _missing = None
except ImportError as error:
    # Written by setup.py where it could not build the extension.
    _note = Path(__file__).parent.parent / "_C.missing"
    _reason = _note.read_text().strip() if _note.exists() else str(error)
    _missing = (
        f"the C++ extension is not there ({_reason}); install a C++17 compiler, then "
        "pip install --force-reinstall --no-deps --no-build-isolation ppllava-kernels"
    )


def why_not(*tensors: Tensor) -> str | None:
    for x in tensors:
        if x.device.type != "cpu":
            return f"cpp runs on CPU tensors, got one on {x.device}; use backend=None, or move it with .cpu()"
    return _missing


def prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames):
    relevance = torch.empty(image_embeds.shape[:-1], dtype=_accumulator(image_embeds))  # [B, T, H, W]
    counts = _counts(image_embeds, cu_frames)
    _C.prompt_relevance(relevance, image_embeds, *_text(text_embeds, relevance, scale_tensor, scale), counts)
    return relevance


def prompt_relevance_backward(grad, relevance, image_embeds, text_embeds, scale_tensor, scale, cu_frames):
    grad_image = torch.empty(image_embeds.shape, dtype=image_embeds.dtype)  # [B, T, H, W, C]
    grad_text = torch.empty(text_embeds.shape, dtype=relevance.dtype)  # [B, C]
    grad_scale = torch.empty((), dtype=relevance.dtype)
    text, scale = _text(text_embeds, relevance, scale_tensor, scale)
    counts = _counts(image_embeds, cu_frames)
    grads = grad_image, grad_text, grad_scale
    _C.prompt_relevance_backward(*grads, grad.contiguous(), relevance, image_embeds, text, scale, counts)
    return grad_image, grad_text.to(text_embeds.dtype), grad_scale


def weighted_pool3d(values, weights, window, temperature, cu_frames):
    plan = _plan(values, window, cu_frames)
    pooled = torch.empty(_pooled_shape(values, window, cu_frames, plan), dtype=values.dtype)
    weights = None if weights is None else weights.to(_accumulator(values))
    _C.weighted_pool3d(pooled, values, weights, temperature, *plan)
    return pooled


def weighted_pool3d_backward(grad, values, weights, window, temperature, cu_frames, need_values, need_weights):
    plan = _plan(values, window, cu_frames)
    accumulator = _accumulator(values)
    (_, rows, columns), (high, wide) = plan.window[2:]
    frames = sum(n * span for n, span in zip(plan.outputs, plan.spans))
    shares = torch.empty((frames * rows * columns * high * wide,), dtype=accumulator)  # [windows x patches]
    grad_scores = torch.empty_like(shares) if need_weights else None
    grad_values = torch.empty(values.shape, dtype=values.dtype) if need_values else None
    grad_weights = torch.empty(weights.shape, dtype=accumulator) if need_weights else None
    weights_in = None if weights is None else weights.to(accumulator)
    _C.weighted_pool3d_backward(
        grad_values, grad_weights, shares, grad_scores, grad.contiguous(), values, weights_in, temperature, *plan
    )
    return (
        values.new_empty(0) if grad_values is None else grad_values,
        values.new_empty(0) if grad_weights is None else grad_weights.to(weights.dtype),
    )


def prompt_guided_pool3d(values, image_embeds, text_embeds, scale_tensor, scale, window, temperature, cu_frames):
    relevance = prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames)
    return weighted_pool3d(values, relevance, window, temperature, cu_frames), relevance


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _text(text_embeds: Tensor, relevance: Tensor, scale_tensor: Tensor | None, scale: float) -> tuple[Tensor, float]:
    return text_embeds.to(relevance.dtype).contiguous(), scale if scale_tensor is None else scale * scale_tensor.item()


def _counts(x: Tensor, cu_frames: Tensor | None) -> list[int]:
    """Frames of each clip."""
    return [x.shape[1]] * x.shape[0] if cu_frames is None else frame_counts(cu_frames, x.shape[0])


class _Plan(NamedTuple):
    """What the kernels want to know of the windows, in the order in which they take it."""

    window: list  # kernel and stride, zeros for adaptive; windows along (T, H, W); patches in the largest along (H, W)
    counts: list[int]  # frames of each clip
    outputs: list[int]  # pooled frames of each clip
    spans: list[int]  # frames in the largest window of each clip


def _plan(values: Tensor, window: Window, cu_frames: Tensor | None) -> _Plan:
    counts, (height, width) = _counts(values, cu_frames), values.shape[-3:-1]
    none, size = (0, 0, 0), (max(counts), height, width)
    spans = [largest_window(n, height, width, window)[0] for n in counts]
    largest = largest_window(*size, window)[1:]
    sizes = [window.kernel_size or none, window.stride or none, output_shape(size, *window), largest]
    return _Plan(sizes, counts, ragged_outputs(counts, height, width, window), spans)


def _pooled_shape(values: Tensor, window: Window, cu_frames: Tensor | None, plan: _Plan) -> list[int]:
    frames, rows, columns = plan.window[2]
    dense = cu_frames is None or window.output_size
    return [*((len(plan.outputs), frames) if dense else (sum(plan.outputs),)), rows, columns, values.shape[-1]]
