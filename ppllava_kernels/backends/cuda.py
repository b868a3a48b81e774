"""CUDA C++: one cooperative launch for the scores and the pooling; nothing of size T*H*W x D besides the gradient.

The projector: the library's matrix products on tiles, with kernels of this backend as their epilogues.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from torch import Tensor

from .. import compat
from ..extension import _C, REINSTALL, missing
from . import preconditions, products
from .plan import clip_counts, make_plan

# Space-separated: "90" for sm_90, "120+PTX" for code that any later GPU compiles when it loads it.
_architectures = getattr(_C, "cuda_architectures", "").split()
_without = getattr(_C, "cuda_missing", "")
_version = getattr(_C, "cuda_version", "")
_reasons: dict[int, str | None] = {}  # why the kernels cannot run on a GPU, by its index
_HERE = contextlib.nullcontext()


def why_not(*tensors: Tensor) -> str | None:
    for x in tensors:
        if x.dtype == torch.float64:
            return "cuda computes in float32 and got float64; use backend='reference', or float32 inputs"
        if x.device.type != "cuda":
            return f"cuda runs on CUDA tensors, got one on {x.device}; use backend=None, or move it with .cuda()"
    if missing is not None:
        return missing
    if not _architectures:
        remedy = "unset PPLLAVA_CUDA_ARCHS" if "PPLLAVA_CUDA_ARCHS" in _without else "install the CUDA toolkit"
        return f"this installation has no CUDA kernels ({_without}); {remedy}, then {REINSTALL}, or use backend=None"
    if not tensors and not torch.cuda.is_available():
        return "cuda needs a CUDA GPU and this PyTorch finds none; use backend=None"
    return _why_not_device(tensors[0].device.index if tensors else torch.cuda.current_device())


def _why_not_device(index: int) -> str | None:
    if index not in _reasons:
        _reasons[index] = _ask_device(index)
    return _reasons[index]


def _ask_device(index: int) -> str | None:
    if torch.version.hip:
        return "cuda runs on NVIDIA GPUs and this PyTorch is for AMD's; use backend='triton'"
    driver = compat.driver_version()
    if driver // 1000 < int(_version.partition(".")[0]):
        return (
            f"its kernels are compiled with CUDA {_version} and this driver is for CUDA "
            f"{driver // 1000}.{driver % 1000 // 10}; update the driver, or use backend='triton'"
        )
    gpu = torch.cuda.get_device_properties(index)
    if runs_on(_architectures, gpu.major, gpu.minor):
        return None
    number = f"{gpu.major}{gpu.minor}"
    return (
        f"its kernels are compiled for {', '.join(_architectures)} and cuda:{index} is {number}; reinstall with "
        f"PPLLAVA_CUDA_ARCHS={number}, or use backend='triton'"
    )


def runs_on(architectures: list[str], major: int, minor: int) -> bool:
    """Machine code runs on its own major version from its minor on, PTX on every later GPU, and `a` on that one GPU."""
    for name in architectures:
        number, _, ptx = name.partition("+")
        built = divmod(int(number.rstrip("a")), 10)
        if built == (major, minor):
            return True
        if not number.endswith("a") and built <= (major, minor) and (ptx or built[0] == major):
            return True
    return False


def _device(x: Tensor):
    """The context that kernels on x are launched in: its GPU is the current one."""
    if not x.is_cuda:
        raise ValueError(why_not(x))
    return _HERE if x.device.index == torch.cuda.current_device() else torch.cuda.device(x.device)


def _stream(x: Tensor) -> int:
    """The current cudaStream_t."""
    return compat.current_raw_stream(x.device.index)


def prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames):
    relevance = image_embeds.new_empty(*image_embeds.shape[:-1], dtype=torch.float32)  # [B, T, H, W]
    counts = clip_counts(image_embeds, cu_frames)
    arguments = image_embeds, text_embeds, scale_tensor, scale, counts
    with _device(image_embeds):
        _C.cuda_prompt_relevance(relevance, *arguments, _stream(image_embeds))
    return relevance


def prompt_relevance_backward(grad, relevance, image_embeds, text_embeds, scale_tensor, scale, cu_frames):
    grad_image = image_embeds.new_empty(*image_embeds.shape)  # [B, T, H, W, C]
    grad_text = text_embeds.new_empty(*text_embeds.shape)  # [B, C]
    grad_scale = relevance.new_empty(())
    arguments = image_embeds, text_embeds, scale_tensor, scale, clip_counts(image_embeds, cu_frames)
    with _device(image_embeds):
        _C.cuda_prompt_relevance_backward(
            grad_image, grad_text, grad_scale, grad.contiguous(), relevance, *arguments, _stream(image_embeds)
        )
    return grad_image, grad_text, grad_scale


def weighted_pool3d(values, weights, window, temperature, cu_frames):
    plan = make_plan(values, window, cu_frames)
    pooled = values.new_empty(*plan.pooled_shape)
    with _device(values):
        _C.cuda_weighted_pool3d(pooled, values, weights, temperature, *plan.arguments, _stream(values))
    return pooled


def weighted_pool3d_backward(grad, values, weights, window, temperature, cu_frames, need_values, need_weights):
    preconditions.check_needed(weights=(need_weights, weights))
    plan = make_plan(values, window, cu_frames)
    shares = torch.empty((plan.slots,), dtype=torch.float32, device=values.device)
    grad_scores = torch.empty_like(shares) if need_weights else None
    grad_values = values.new_empty(*values.shape) if need_values else None
    grad_weights = weights.new_empty(*weights.shape) if need_weights else None
    grads = grad_values, grad_weights, shares, grad_scores, grad.contiguous()
    with _device(values):
        _C.cuda_weighted_pool3d_backward(*grads, values, weights, temperature, *plan.arguments, _stream(values))
    return (
        values.new_empty(0) if grad_values is None else grad_values,
        values.new_empty(0) if grad_weights is None else grad_weights,
    )


def prompt_guided_pool3d(values, image_embeds, text_embeds, scale_tensor, scale, window, temperature, cu_frames):
    plan = make_plan(values, window, cu_frames)
    pooled = values.new_empty(*plan.pooled_shape)
    relevance = values.new_empty(*values.shape[:-1], dtype=torch.float32)
    embeds = image_embeds, text_embeds, scale_tensor, scale, temperature
    with _device(values):
        _C.cuda_prompt_guided_pool3d(pooled, relevance, values, *embeds, *plan.arguments, _stream(values))
    return pooled, relevance


def guide_relevance(features, *arguments):
    with _device(features):
        return products.guide_relevance(_KERNELS, features, *arguments)


def guide_relevance_backward(features, *arguments):
    with _device(features):
        return products.guide_relevance_backward(features, *arguments)


def hidden_pool3d(features, *arguments):
    with _device(features):
        return products.hidden_pool3d(_KERNELS, features, *arguments)


def hidden_pool3d_backward(features, *arguments):
    with _device(features):
        return products.hidden_pool3d_backward(_KERNELS, features, *arguments)


# What backends/products.py asks of a backend, inside of `_device`.


def score_rows(cosines, embeds, text):
    _C.cuda_score_rows(cosines, embeds, text, _stream(embeds))


def window_shares(features, weights, temperature, plan):
    shares = features.new_empty(plan.slots, dtype=torch.float32)
    _C.cuda_window_shares(shares, weights, features, temperature, *plan.arguments, _stream(features))
    return shares


def window_shares_backward(weights, shares, dots, features, temperature, plan):
    grad_weights = weights.new_empty(*weights.shape)
    arguments = shares, dots, features, temperature, *plan.arguments
    _C.cuda_window_shares_backward(grad_weights, *arguments, _stream(features))
    return grad_weights


def pool_hidden(sums, hidden, bias, shares, first, channel, features, plan):
    arguments = hidden, bias, shares, first, channel, features, *plan.arguments
    _C.cuda_pool_hidden(sums, *arguments, _stream(features))


def pool_hidden_backward(hidden, bias, shares, dots, grad, first, channel, features, plan):
    arguments = bias, shares, dots, grad, first, channel, features, *plan.arguments
    _C.cuda_pool_hidden_backward(hidden, *arguments, _stream(features))


_KERNELS = sys.modules[__name__]
