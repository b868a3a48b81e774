"""The definition of every op: plain, differentiable PyTorch on any device, in any floating dtype."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shapes import Window, empty_shape, frame_counts, largest_window, output_shape, ragged_outputs

EPS = 1e-12  # as torch.nn.functional.normalize


def why_not(*tensors: Tensor) -> str | None:
    return None


def prompt_relevance(image_embeds: Tensor, text_embeds: Tensor, logit_scale: float | Tensor, cu_frames: Tensor | None):
    if cu_frames is not None:
        counts = frame_counts(cu_frames, image_embeds.shape[0])
        if not counts:
            return prompt_relevance(image_embeds[:, None], text_embeds, logit_scale, None)[:, 0]
        clips = image_embeds.split(counts)  # B x [T, H, W, C]
        pairs = zip(clips, text_embeds)
        return torch.cat([prompt_relevance(x[None], c[None], logit_scale, None)[0] for x, c in pairs])  # [F, H, W]
    dtype = torch.promote_types(torch.promote_types(image_embeds.dtype, text_embeds.dtype), torch.float32)
    image, text = _unit(image_embeds.to(dtype)), _unit(text_embeds.to(dtype))  # [B, T, H, W, C], [B, C]
    logits = logit_scale * (image * text[:, None, None, None]).sum(-1)  # [B, T, H, W]
    return logits.flatten(1).softmax(1).view_as(logits)


def weighted_pool3d(
    values: Tensor, weights: Tensor | None, window: Window, temperature: float, cu_frames: Tensor | None
):
    if weights is None:
        weights = values.new_zeros(values.shape[:-1], dtype=torch.promote_types(values.dtype, torch.float32))
    if cu_frames is not None:
        counts = frame_counts(cu_frames, values.shape[0])
        if not counts:  # the sum of nothing, so that gradients flow
            total = values.sum() + weights.sum().to(values.dtype)
            return total.expand(empty_shape(values.shape, window, ragged=True))
        ragged_outputs(counts, *values.shape[1:3], window)
        clips = zip(values.split(counts), weights.split(counts))
        pooled = [weighted_pool3d(v[None], w[None], window, temperature, None)[0] for v, w in clips]
        return torch.stack(pooled) if window.output_size else torch.cat(pooled)
    dtype = torch.promote_types(torch.promote_types(values.dtype, weights.dtype), torch.float32)
    (it, mt), (ih, mh), (iw, mw) = _windows(values.shape[1:4], window, values.device)
    it, ih, iw = it[:, None, None, :, None, None], ih[:, None, None, :, None], iw[:, None, None, :]
    inside = mt[:, None, None, :, None, None] & mh[:, None, None, :, None] & mw[:, None, None, :]
    scores = weights[:, it, ih, iw].to(dtype) / temperature  # [B, To, Ho, Wo, kt, kh, kw]
    share = scores.masked_fill(~inside, -torch.inf).flatten(4).softmax(-1)  # [B, To, Ho, Wo, K]
    rows = values[:, it, ih, iw].flatten(4, 6).to(dtype)  # [B, To, Ho, Wo, K, D]
    return (share.unsqueeze(-1) * rows).sum(-2).to(values.dtype)


def prompt_guided_pool3d(values, image_embeds, text_embeds, logit_scale, window, temperature, cu_frames):
    relevance = prompt_relevance(image_embeds, text_embeds, logit_scale, cu_frames)
    return weighted_pool3d(values, relevance, window, temperature, cu_frames), relevance


def prompt_guided_project(
    features, text_embeds, logit_scale, norm_weight, norm_bias, norm_eps, guide_weight, linear_1_weight, linear_1_bias,
    linear_2_weight, linear_2_bias, window, temperature, cu_frames,
):  # fmt: skip
    dtypes = [x.dtype for x in (features, norm_weight, norm_bias) if x is not None]
    dtype = reduce(torch.promote_types, dtypes)  # a norm in float32 is one of float32
    norm = (x if x is None else x.to(dtype) for x in (norm_weight, norm_bias))
    normed = F.layer_norm(features.to(dtype), features.shape[-1:], *norm, norm_eps)  # [B, T, H, W, V]
    normed = normed.to(guide_weight.dtype)
    relevance = prompt_relevance(F.linear(normed, guide_weight), text_embeds, logit_scale, cu_frames)
    layers = linear_1_weight, linear_1_bias, linear_2_weight, linear_2_bias
    return weighted_project(features, relevance, *layers, window, temperature, cu_frames), relevance


def weighted_project(
    features, weights, linear_1_weight, linear_1_bias, linear_2_weight, linear_2_bias, window, temperature, cu_frames
):
    """In the original's order; the matrix products round to the dtype of features, as those of every library do."""
    hidden = F.gelu(F.linear(features, linear_1_weight, linear_1_bias))  # [B, T, H, W, D]
    values = F.linear(hidden, linear_2_weight, linear_2_bias)
    return weighted_pool3d(values, weights, window, temperature, cu_frames)


def _unit(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # A zero embedding has cosine 0 and no gradient; normalize's own gradient there would be 1e12 times too large.
    return torch.where(norm > EPS, x, x.detach()) / norm.clamp_min(EPS)


def _windows(size, window: Window, device):
    """For each axis the patches of its windows: indices [O, K], clamped to the window, and what is inside it [O, K]."""
    axes = []
    spans, outputs = largest_window(*size, window), output_shape(size, *window)
    for axis, (n, k, o) in enumerate(zip(size, spans, outputs)):
        index = torch.arange(o, device=device)
        start = index * n // o if window.output_size else index * window.stride[axis]
        end = ((index + 1) * n + o - 1) // o if window.output_size else start + k
        patches = start[:, None] + torch.arange(k, device=device)
        axes.append((torch.minimum(patches, end[:, None] - 1), patches < end[:, None]))
    return axes
