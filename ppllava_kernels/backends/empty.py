"""What every backend gives for a batch without a video: no numbers, and gradients of zero for all that is shared.

The kernels themselves are never launched for nothing. The functions are those of a backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..shapes import Window, empty_shape, frame_counts
from . import preconditions


def prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames):
    preconditions.check_relevance(image_embeds, text_embeds, scale_tensor, cu_frames)
    _check_no_video(image_embeds, cu_frames)
    return _scores(image_embeds)


def prompt_relevance_backward(grad, relevance, image_embeds, text_embeds, scale_tensor, scale, cu_frames):
    prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames)
    return _zeros(image_embeds), _zeros(text_embeds), _scale(image_embeds)


def weighted_pool3d(values, weights, window, temperature, cu_frames):
    preconditions.check_pool(values, weights, window, temperature, cu_frames)
    return values.new_empty(_pooled(values, window, cu_frames))


def weighted_pool3d_backward(grad, values, weights, window, temperature, cu_frames, need_values, need_weights):
    preconditions.check_needed(weights=(need_weights, weights))
    preconditions.check_windows(grad, _pooled(values, window, cu_frames)[:-1], values.shape[-1], values)
    return _given(values, (need_values, values), (need_weights, weights))


def prompt_guided_pool3d(values, image_embeds, text_embeds, scale_tensor, scale, window, temperature, cu_frames):
    preconditions.check_grid(values, image_embeds)
    relevance = prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames)
    return weighted_pool3d(values, relevance, window, temperature, cu_frames), relevance


def guide_relevance(features, text_embeds, scale_tensor, scale, norm_weight, norm_bias, norm_eps, guide, cu_frames):
    preconditions.check_guide(features, text_embeds, scale_tensor, norm_weight, norm_bias, guide, cu_frames)
    _check_no_video(features, cu_frames)
    return _scores(features), _scores(features)


def guide_relevance_backward(
    features, grad, relevance, cosines, text_embeds, scale_tensor, scale, norm_weight, norm_bias, norm_eps,
    guide_weight, cu_frames, need_features, need_text, need_norm, need_guide,
):  # fmt: skip
    norm = norm_weight, norm_bias
    guide_relevance(features, text_embeds, scale_tensor, scale, *norm, norm_eps, guide_weight, cu_frames)
    features, text = _given(features, (need_features, features), (need_text, text_embeds))
    rest = _given(features, *((need_norm and x is not None, x) for x in norm), (need_guide, guide_weight))
    return features, text, _scale(relevance), *rest


def hidden_pool3d(features, weights, linear_1_weight, linear_1_bias, window, temperature, cu_frames):
    layer = linear_1_weight, linear_1_bias
    preconditions.check_hidden(features, weights, *layer, window, temperature, cu_frames)
    return features.new_empty((*_pooled(features, window, cu_frames)[:-1], linear_1_weight.shape[0]))


def hidden_pool3d_backward(
    features, grad, weights, linear_1_weight, linear_1_bias, window, temperature, cu_frames, need_features,
    need_weights, need_weight, need_bias,
):  # fmt: skip
    hidden_pool3d(features, weights, linear_1_weight, linear_1_bias, window, temperature, cu_frames)
    preconditions.check_needed(weights=(need_weights, weights), bias=(need_bias, linear_1_bias))
    pairs = (features, weights, linear_1_weight, linear_1_bias)
    return _given(features, *zip((need_features, need_weights, need_weight, need_bias), pairs))


def _check_no_video(x: Tensor, cu_frames: Tensor | None) -> None:
    """Of no video, and not of videos of no size: those have no windows, and a mean of nothing."""
    empty_shape(x.shape, Window((), (), (1, 1, 1)), cu_frames is not None)
    if cu_frames is not None:
        frame_counts(cu_frames, x.shape[0])


def _pooled(values: Tensor, window: Window, cu_frames: Tensor | None) -> tuple[int, ...]:
    _check_no_video(values, cu_frames)
    return empty_shape(values.shape, window, cu_frames is not None)


def _scores(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _scale(x: Tensor) -> Tensor:
    return x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))


def _zeros(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape)


def _given(like: Tensor, *pairs: tuple[bool, Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(_zeros(x) if needed else like.new_empty(0) for needed, x in pairs)
