"""What kernels rely on, for the calls that come without the checks of checks.py: of torch.ops and exported programs.

Those of the C++ and CUDA kernels are in csrc/tensors.h. These are for Triton's kernels, and for the matrix products of
the projector on every backend. The values of `cu_frames` and the sizes of windows are checked where plans are made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..shapes import Window, check_axes, check_sizes

_LOW = (torch.float32, torch.float16, torch.bfloat16)
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_relevance(image_embeds: Tensor, text_embeds: Tensor, scale_tensor: Tensor | None, cu_frames: Tensor | None):
    """image_embeds [B, T, H, W, C] or [F, H, W, C], text_embeds [B, C], one number."""
    batch = _check_clips("image_embeds", image_embeds, cu_frames)
    _check("text_embeds", text_embeds, (batch, image_embeds.shape[-1]), image_embeds)
    _check_channels("text_embeds", text_embeds)
    _check("scale_tensor", scale_tensor, (), image_embeds)


def check_pool(values: Tensor, weights: Tensor | None, window: Window, temperature: float, cu_frames: Tensor | None):
    """values [B, T, H, W, D] or [F, H, W, D], weights [B, T, H, W] or [F, H, W]."""
    _check_clips("values", values, cu_frames)
    _check("weights", weights, values.shape[:-1], values)
    check_sizes(window)
    if not _SMALLEST <= temperature <= _LARGEST:
        raise ValueError(
            f"temperature must be positive and finite in float32, got {temperature}; the original model uses 0.01"
        )


def check_grid(values: Tensor, image_embeds: Tensor):
    """[B, T, H, W, D] and [B, T, H, W, C], or both packed."""
    if values.shape[:-1] != image_embeds.shape[:-1]:
        raise ValueError(
            f"image_embeds must describe the patches of values {list(values.shape)}, got {list(image_embeds.shape)}; "
            "pass both of one clip"
        )
    _check_place("image_embeds", image_embeds, values)


def check_guide(
    features: Tensor,
    text_embeds: Tensor,
    scale_tensor: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    guide_weight: Tensor,
    cu_frames: Tensor | None,
):
    """features [B, T, H, W, V] or [F, H, W, V], text_embeds [B, C], guide_weight [C, V], the norm's [V]."""
    batch = _check_clips("features", features, cu_frames)
    width = features.shape[-1]
    for name, x in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        _check(name, x, (width,), features)
    if guide_weight.dim() != 2 or guide_weight.shape[0] == 0:
        raise ValueError(
            f"guide_weight must be [C, V], got {list(guide_weight.shape)}; pass the weight of nn.Linear, [out, in]"
        )
    _check("guide_weight", guide_weight, (guide_weight.shape[0], width), features)
    _check("text_embeds", text_embeds, (batch, guide_weight.shape[0]), features)
    _check_channels("text_embeds", text_embeds)
    _check("scale_tensor", scale_tensor, (), features)


def check_hidden(
    features: Tensor,
    weights: Tensor | None,
    linear_1_weight: Tensor,
    linear_1_bias: Tensor | None,
    window: Window,
    temperature: float,
    cu_frames: Tensor | None,
):
    """features and weights as in `check_pool`, linear_1_weight [D', V], linear_1_bias [D']."""
    check_pool(features, weights, window, temperature, cu_frames)
    if linear_1_weight.dim() != 2 or linear_1_weight.shape[0] == 0:
        raise ValueError(
            f"linear_1_weight must be [D', V], got {list(linear_1_weight.shape)}; pass the weight of nn.Linear, "
            "[out, in]"
        )
    hidden = linear_1_weight.shape[0]
    _check("linear_1_weight", linear_1_weight, (hidden, features.shape[-1]), features, (features.dtype,))
    _check("linear_1_bias", linear_1_bias, (hidden,), features, (features.dtype,))


def check_patches(like: Tensor, **scores: Tensor):
    """One number for each patch of `like`, as precise as sums over its channels: relevance, cosines, their gradient."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    for name, x in scores.items():
        _check(name, x, like.shape[:-1], like, (dtype,))
        if name != "grad" and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(x.stride())}; use {name}.contiguous()")


def check_windows(grad: Tensor, lead: Sequence[int], channels: int, like: Tensor):
    """grad [B, To, Ho, Wo, channels], or packed, as what was pooled; lead: its shape without channels."""
    _check("grad", grad, (*lead, channels), like, (like.dtype,))


def check_needed(**pairs: tuple[bool, Tensor | None]):
    """A gradient is asked for only of what is given."""
    for name, (needed, x) in pairs.items():
        if needed and x is None:
            raise ValueError(f"need_{name} must be False where {name} are None, got True; pass {name}, or False")


def _check_clips(name: str, x: Tensor, cu_frames: Tensor | None) -> int:
    """The number of clips; dtype, axes and channels are those that kernels take."""
    if x.dtype not in (*_LOW, torch.float64):
        raise ValueError(
            f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}; convert it, e.g. {name}.float()"
        )
    check_axes(x.shape, cu_frames is not None)
    _check_channels(name, x)
    return x.shape[0] if cu_frames is None else cu_frames.numel() - 1


def _check_channels(name: str, x: Tensor):
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(
            f"{name} must have a contiguous channel axis (stride 1), got strides {tuple(x.stride())}; "
            f"use {name}.contiguous()"
        )


def _check(name: str, x: Tensor | None, shape: Sequence[int], like: Tensor, dtypes: Sequence[torch.dtype] = ()):
    """x of this shape, on the device of `like`, in one of `dtypes`: by default float64 exactly where `like` is."""
    if x is None:
        return
    if x.shape != torch.Size(shape):
        raise ValueError(
            f"{name} must be {list(shape)} to match the other tensors of this call, got {list(x.shape)}; "
            "pass tensors of one call"
        )
    _check_place(name, x, like)
    dtypes = dtypes or ((torch.float64,) if like.dtype == torch.float64 else _LOW)
    if x.dtype not in dtypes:
        raise ValueError(
            f"{name} must be {' or '.join(str(dtype) for dtype in dtypes)} beside the other tensors of this call, got "
            f"{x.dtype}; convert it with {name}.to"
        )


def _check_place(name: str, x: Tensor, like: Tensor):
    if x.device != like.device or x.layout != torch.strided:
        raise ValueError(
            f"{name} must be a dense tensor on {like.device}, the device of this call, got {x.layout} on {x.device}; "
            "move it there"
        )
