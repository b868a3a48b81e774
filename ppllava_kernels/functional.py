"""The ops. `[..]` are shapes; channels come last, because that is what a ViT emits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library
from .backends import PROJECTOR, products, reference
from .checks import (
    check_backend,
    check_channels_last,
    check_embeds,
    check_grid,
    check_norm_eps,
    check_projector,
    check_temperature,
    check_tensors,
    check_text,
    check_window,
    split_logit_scale,
)
from .shapes import make_window

Size = int | Sequence[int]


def prompt_relevance(
    image_embeds: Tensor,  # [B, T, H, W, C] or [F, H, W, C]
    text_embeds: Tensor,  # [B, C]
    *,
    logit_scale: float | Tensor = 100.0,
    cu_frames: Tensor | None = None,  # [B+1]
    backend: str | None = None,
) -> Tensor:
    r"""How relevant each patch of a video is to its prompt.

    .. math:: r_i = \mathrm{softmax}_i(s \cos(e_i, c))

    with `e_i` the patches of one video, `c` its prompt and `s` the scale; the softmax runs over all T*H*W patches of
    the video and never crosses videos. (PPLLaVA, arXiv 2411.02327, section 3.2.)

    Args:
        image_embeds: [B, T, H, W, C] patch embeddings in the space of the text, not normalised. Any strides with a
            contiguous channel axis; a batch stride of 0 (`expand`) costs nothing.
        text_embeds: [B, C] one prompt embedding per video, not normalised.
        logit_scale: s, a float or a one-element tensor, which then gets a gradient. CLIP: `exp(logit_scale)`, 100.
        cu_frames: int32 [B+1] for a ragged batch: video b is frames cu_frames[b]:cu_frames[b+1] of image_embeds
            [F, H, W, C]. On the CPU or on the device of image_embeds; the CPU saves a synchronisation.
        backend: "cuda", "cpp", "triton" or "reference"; None takes the best that can run, a name never falls back.

    Returns:
        relevance: [B, T, H, W] or [F, H, W], float32 (float64 for float64 inputs), sums to 1 over each video.
        An embedding that is zero has cosine 0 and gets no gradient. NaN in one video stays in that video. A batch of
        no video, B = 0 or F = 0 with cu_frames = [0], gives an empty tensor, as do all ops; gradients flow.

    Raises:
        ValueError, TypeError: for input outside of the above; the message says what to do.
    """
    check_tensors(cu_frames, image_embeds=image_embeds, text_embeds=text_embeds)
    check_embeds(image_embeds, text_embeds, cu_frames)
    scale, scale_tensor = split_logit_scale(logit_scale, image_embeds)
    backend = check_backend(backend, image_embeds)
    if backend == "reference":
        scale = scale if scale_tensor is None else scale_tensor
        return reference.prompt_relevance(image_embeds, text_embeds, scale, cu_frames)
    return library.ops.prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames, backend)


def weighted_pool3d(
    values: Tensor,  # [B, T, H, W, D] or [F, H, W, D]
    weights: Tensor | None,  # [B, T, H, W] or [F, H, W]
    *,
    kernel_size: Size | None = None,
    stride: Size | None = None,
    output_size: Size | None = None,
    temperature: float = 0.01,
    cu_frames: Tensor | None = None,  # [B+1]
    backend: str | None = None,
) -> Tensor:
    r"""Pool each window of a video with the softmax of its weights.

    .. math:: y_o = \sum_{i \in o} \mathrm{softmax}_{i \in o}(w_i / \tau) \, v_i

    The windows `o` are those of :class:`torch.nn.AvgPool3d` (`kernel_size`, `stride`, no padding; leftover frames, rows
    and columns are dropped) or, with `output_size`, those of :class:`torch.nn.AdaptiveAvgPool3d`, which fit a clip of
    any length into a fixed number of tokens. With equal weights, or None, the result is that of these modules.

    Args:
        values: [B, T, H, W, D]. Any strides with a contiguous channel axis.
        weights: [B, T, H, W] scores, any strides, or None for the plain mean. They keep their own dtype; a score of
            -inf leaves its patch out; a window whose scores are all -inf is NaN. Low precision scores lose up to 0.2
            in the exponent at the default temperature: pass float32.
        kernel_size: window size over (T, H, W), one int or three.
        stride: distance between windows; None: kernel_size, so that windows neither overlap nor leave gaps.
        output_size: number of windows along (T, H, W) instead of kernel_size.
        temperature: tau > 0, a float. The original model uses 0.01.
        cu_frames: int32 [B+1] for a ragged batch, as in :func:`prompt_relevance`: values [F, H, W, D], weights
            [F, H, W]. No window crosses videos.
        backend: as in :func:`prompt_relevance`.

    Returns:
        pooled: [B, To, Ho, Wo, D] in the dtype of values, accumulated in float32; with cu_frames and kernel_size
        [Fo, Ho, Wo, D], the pooled frames of all videos packed; with cu_frames and output_size [B, To, Ho, Wo, D].

    Raises:
        ValueError, TypeError: for input outside of the above; the message says what to do.
    """
    window = make_window(kernel_size, stride, output_size)
    check_tensors(cu_frames, values=values, **({} if weights is None else {"weights": weights}))
    check_channels_last("values", values, cu_frames, "D")
    if weights is not None:
        check_grid("weights", weights.shape, values, cu_frames)
    check_window(values, window, cu_frames)
    temperature = check_temperature(temperature)
    backend = check_backend(backend, values)
    if backend == "reference":
        return reference.weighted_pool3d(values, weights, window, temperature, cu_frames)
    return library.ops.weighted_pool3d(values, weights, *window, temperature, cu_frames, backend)


def prompt_guided_pool3d(
    values: Tensor,  # [B, T, H, W, D] or [F, H, W, D]
    image_embeds: Tensor,  # [B, T, H, W, C] or [F, H, W, C]
    text_embeds: Tensor,  # [B, C]
    *,
    kernel_size: Size | None = None,
    stride: Size | None = None,
    output_size: Size | None = None,
    logit_scale: float | Tensor = 100.0,
    temperature: float = 0.01,
    return_relevance: bool = False,
    cu_frames: Tensor | None = None,  # [B+1]
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Pool the tokens of a video with the relevance of each patch to the prompt.

    :func:`prompt_relevance` and :func:`weighted_pool3d` in one pass; nothing of size T*H*W x D is written besides the
    gradient of values.

    Args:
        values: [B, T, H, W, D] the tokens to pool, for example the projected patches.
        image_embeds: [B, T, H, W, C] the same patches in the space of the prompt.
        text_embeds: [B, C] one prompt embedding per video.
        return_relevance: return relevance, too.
        kernel_size, stride, output_size, temperature: as in :func:`weighted_pool3d`.
        logit_scale, cu_frames, backend: as in :func:`prompt_relevance`.

    Returns:
        pooled as in :func:`weighted_pool3d`, or (pooled, relevance) with relevance as in :func:`prompt_relevance`;
        both carry gradients.

    Raises:
        ValueError, TypeError: for input outside of the above; the message says what to do.
    """
    window = make_window(kernel_size, stride, output_size)
    check_tensors(cu_frames, values=values, image_embeds=image_embeds, text_embeds=text_embeds)
    check_channels_last("values", values, cu_frames, "D")
    check_embeds(image_embeds, text_embeds, cu_frames)
    check_grid("image_embeds", image_embeds.shape[:-1], values, cu_frames, channel=", C")
    check_window(values, window, cu_frames)
    temperature = check_temperature(temperature)
    scale, scale_tensor = split_logit_scale(logit_scale, image_embeds)
    backend = check_backend(backend, values)
    if backend == "reference":
        scale = scale if scale_tensor is None else scale_tensor
        pooled, relevance = reference.prompt_guided_pool3d(
            values, image_embeds, text_embeds, scale, window, temperature, cu_frames
        )
    else:
        pooled, relevance = library.ops.prompt_guided_pool3d(
            values, image_embeds, text_embeds, scale_tensor, scale, *window, temperature, cu_frames, backend
        )
    return (pooled, relevance) if return_relevance else pooled


def prompt_guided_project(
    features: Tensor,  # [B, T, H, W, V] or [F, H, W, V]
    text_embeds: Tensor,  # [B, C]
    *,
    norm_weight: Tensor | None,  # [V]
    norm_bias: Tensor | None,  # [V]
    norm_eps: float,
    guide_weight: Tensor,  # [C, V]
    linear_1_weight: Tensor,  # [D', V]
    linear_1_bias: Tensor | None,  # [D']
    linear_2_weight: Tensor,  # [D, D']
    linear_2_bias: Tensor | None,  # [D]
    kernel_size: Size | None = None,
    stride: Size | None = None,
    output_size: Size | None = None,
    logit_scale: float | Tensor = 100.0,
    temperature: float = 0.01,
    return_relevance: bool = False,
    cu_frames: Tensor | None = None,  # [B+1]
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""From the features of a vision tower to the tokens of a language model: guide, projector and pooling.

    .. math::
        r_i = \mathrm{softmax}_i(s \cos(P \, \mathrm{LN}(x_i), c)), \quad
        y_o = \sum_{i \in o} \mathrm{softmax}_{i \in o}(r_i / \tau) \, (W_2 \, \mathrm{gelu}(W_1 x_i + b_1) + b_2)

    The shares of a window sum to one and W_2 is linear, so that pooling comes before it: exact up to rounding, and on
    T*H*W rows there are two products instead of three. Nothing of size T*H*W x D' is written, forward or backward: the
    first layer is pooled tile by tile as it is computed. (PPLLaVA, arXiv 2411.02327, section 3.2.)

    Args:
        features: [B, T, H, W, V] of the vision tower, without class token. Any strides with a contiguous channel axis.
        text_embeds: [B, C] one prompt embedding per video, not normalised, of any floating dtype, but float64 exactly
            where features are.
        norm_weight, norm_bias, norm_eps: of the guide's layer norm over V; a weight or bias may be None.
        guide_weight: [C, V] from normalised features into the space of the text: CLIP's visual projection.
        linear_1_weight, linear_1_bias: [D', V] and [D'] or None, of the projector's first layer; gelu is the exact one.
        linear_2_weight, linear_2_bias: [D, D'] and [D] or None, of its second layer.
        kernel_size, stride, output_size, temperature: as in :func:`weighted_pool3d`.
        logit_scale, cu_frames: as in :func:`prompt_relevance`.
        return_relevance: return relevance, too.
        backend: as in :func:`prompt_relevance`; None takes "triton" before "cuda" here.

    All weights have the dtype of features, in which the matrix products are; the norm's may be float32. Under
    `torch.autocast` the products are in its dtype, and the norm before the guide is not. Scores, softmax and sums over
    patches are float32 (float64 for float64); in bfloat16 on a CPU the gradients of the weights are float32 sums of
    one bfloat16 product for each thousand patches, as those of small batches.

    Returns:
        pooled: [B, To, Ho, Wo, D] in the dtype of features, with cu_frames as in :func:`weighted_pool3d`; or
        (pooled, relevance) with relevance as in :func:`prompt_relevance`. Both carry gradients to all tensors.

    Raises:
        ValueError, TypeError: for input outside of the above; the message says what to do.
    """
    guide = dict(norm_weight=norm_weight, norm_bias=norm_bias, guide_weight=guide_weight)
    layers = dict(linear_1_weight=linear_1_weight, linear_1_bias=linear_1_bias)
    layers |= dict(linear_2_weight=linear_2_weight, linear_2_bias=linear_2_bias)
    window = make_window(kernel_size, stride, output_size)
    check_tensors(cu_frames, features=features, text_embeds=text_embeds, **_given(guide), **_given(layers))
    guide_dtype, cast, layers = _autocast(features, layers)
    if guide_dtype is not None:
        guide["guide_weight"] = guide_weight.to(guide_dtype)
    check_channels_last("features", features, cu_frames, "V")
    check_projector(cast, features.dtype, **guide, **layers)
    check_text(text_embeds, features, guide_weight, cu_frames)
    check_window(features, window, cu_frames)
    temperature, norm_eps = check_temperature(temperature), check_norm_eps(norm_eps)
    scale, scale_tensor = split_logit_scale(logit_scale, features, "features")
    backend = check_backend(backend, features, PROJECTOR)
    norm = guide["norm_weight"], guide["norm_bias"], norm_eps, guide["guide_weight"]
    if backend == "reference":
        scale = scale if scale_tensor is None else scale_tensor
        pooled, relevance = reference.prompt_guided_project(
            features, text_embeds, scale, *norm, *layers.values(), window, temperature, cu_frames
        )
    else:
        prompt = text_embeds, scale_tensor, scale
        relevance, _ = library.ops.guide_relevance(features, *prompt, *norm, cu_frames, backend)
        pooled = _project(cast, relevance, layers, window, temperature, cu_frames, backend)
    return (pooled, relevance) if return_relevance else pooled


def weighted_project(
    features: Tensor,  # [B, T, H, W, V] or [F, H, W, V]
    weights: Tensor | None,  # [B, T, H, W] or [F, H, W]
    *,
    linear_1_weight: Tensor,  # [D', V]
    linear_1_bias: Tensor | None,  # [D']
    linear_2_weight: Tensor,  # [D, D']
    linear_2_bias: Tensor | None,  # [D]
    kernel_size: Size | None = None,
    stride: Size | None = None,
    output_size: Size | None = None,
    temperature: float = 0.01,
    cu_frames: Tensor | None = None,  # [B+1]
    backend: str | None = None,
) -> Tensor:
    """:func:`prompt_guided_project` for scores of another guide, or without any: projector and pooling.

    Args:
        features, linear_1_weight, linear_1_bias, linear_2_weight, linear_2_bias: as in :func:`prompt_guided_project`.
        weights, kernel_size, stride, output_size, temperature, cu_frames: as in :func:`weighted_pool3d`.
        backend: as in :func:`prompt_guided_project`.

    Returns:
        pooled, as in :func:`prompt_guided_project`.

    Raises:
        ValueError, TypeError: for input outside of the above; the message says what to do.
    """
    layers = dict(linear_1_weight=linear_1_weight, linear_1_bias=linear_1_bias)
    layers |= dict(linear_2_weight=linear_2_weight, linear_2_bias=linear_2_bias)
    window = make_window(kernel_size, stride, output_size)
    check_tensors(cu_frames, features=features, **_given({"weights": weights}), **_given(layers))
    _, features, layers = _autocast(features, layers)
    check_channels_last("features", features, cu_frames, "V")
    check_projector(features, features.dtype, **layers)
    if weights is not None:
        check_grid("weights", weights.shape, features, cu_frames, match="features")
    check_window(features, window, cu_frames)
    temperature = check_temperature(temperature)
    backend = check_backend(backend, features, PROJECTOR)
    if backend == "reference":
        return reference.weighted_project(features, weights, *layers.values(), window, temperature, cu_frames)
    return _project(features, weights, layers, window, temperature, cu_frames, backend)


def _project(features, weights, layers, window, temperature, cu_frames, backend) -> Tensor:
    weight_1, bias_1, weight_2, bias_2 = layers.values()
    # [B, To, Ho, Wo, D']
    hidden = library.ops.hidden_pool3d(features, weights, weight_1, bias_1, *window, temperature, cu_frames, backend)
    return products.linear(hidden, weight_2, bias_2)


def _given(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Those that are, and those that must be."""
    optional = ("weights", "norm_weight", "norm_bias", "linear_1_bias", "linear_2_bias")
    return {name: x for name, x in tensors.items() if x is not None or name not in optional}


def _autocast(features: Tensor, layers: dict[str, Tensor | None]) -> tuple:
    """(the dtype that autocast gives to matrix products or None, features and layers in it)."""
    device = features.device.type
    able = torch.amp.is_autocast_available(device)  # not so on meta tensors
    if not able or not torch.is_autocast_enabled(device) or features.dtype == torch.float64:
        return None, features, layers
    dtype = torch.get_autocast_dtype(device)
    return dtype, features.to(dtype), {name: x if x is None else x.to(dtype) for name, x in layers.items()}
