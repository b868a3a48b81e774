"""The projector by the library's matrix products: on tiles of patches, a backend's kernels as their epilogues.

`kernels` is the module of that backend:

    make_plan(features, window, cu_frames)                    what its kernels want to know of the windows
    score_rows(cosines, embeds, text)                         cosines [R] of embeds [R, C] with text [C]
    window_shares(features, weights, temperature, plan)       shares [slots]: for each window those of its patches
    window_shares_backward(weights, shares, dots, features, temperature, plan)  gradient of weights, from g_o . h_i
    pool_hidden(sums, z, bias, shares, first, channel, features, plan)          sums[o] += sum_i p_oi gelu(z_i + b)
    pool_hidden_backward(z, bias, shares, dots, grad, first, channel, features, plan)  z becomes its gradient

A tile is z [R, D'] of R patches, the `first` and those after it, for the D' channels from `channel` on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce, wraps
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import preconditions
from .plan import clip_counts

# Patches and channels of a tile: as few as the products do not slow down for, so that it stays in the cache.
TILE = {"cpu": (1152, 1024), "cuda": (4608, 2048)}
EPS = 1e-12  # as torch.nn.functional.normalize


class Tile(NamedTuple):
    clip: int
    first: int  # patch, of those of all clips
    rows: Tensor  # features [R, V]
    place: tuple  # index of the features

    @property
    def patches(self) -> slice:
        return slice(self.first, self.first + len(self.rows))


def tiles(features: Tensor, counts: tuple[int, ...]) -> Iterator[Tile]:
    """Whole frames of one clip or, where a frame has too many patches, some of its rows."""
    height, width, channels = features.shape[-3:]
    most = TILE[features.device.type][0]
    frames, rows = max(1, most // (height * width)), height
    if height * width > most:
        rows = max(1, most // width)
    for b, (count, start) in enumerate(zip(counts, (0, *accumulate(counts)))):
        for t in range(0, count, frames):
            for h in range(0, height, rows):
                lead = (
                    (b, slice(t, t + frames))
                    if features.dim() == 5
                    else (slice(start + t, start + min(t + frames, count)),)
                )
                place = (*lead, slice(h, h + rows))
                yield Tile(b, ((start + t) * height + h) * width, features[place].reshape(-1, channels), place)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _widens(x: Tensor) -> bool:
    """On CPUs PyTorch multiplies float16 far slower than float32."""
    return x.dtype == torch.float16 and x.device.type == "cpu"


def _operand(x: Tensor) -> Tensor:
    """x as the products take it."""
    return x.float() if _widens(x) else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, multiplied as the products here are; differentiable."""
    if not _widens(x):
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _add_product(sum: Tensor, a: Tensor, b: Tensor) -> None:
    """sum += a b in the dtype of sum; on CPUs, whose library has no such product of bfloat16, a b is rounded first."""
    if sum.dtype == a.dtype:
        sum.addmm_(a, b)
    elif sum.is_cuda:
        sum += torch.mm(a, b, out_dtype=sum.dtype)
    else:
        sum += a @ b


def _without_autocast(function):
    """Autocast has been asked before, of the arguments; in here every product has its dtype."""

    @wraps(function)
    def run(*arguments):
        features = next(x for x in arguments if isinstance(x, Tensor))
        with torch.autocast(features.device.type, enabled=False):
            return function(*arguments)

    return run


class Norm(NamedTuple):
    """A layer norm, in float32 where its weight or bias is."""

    dtype: torch.dtype
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(normed, mean, 1 / standard deviation) of rows [R, V]."""
        return torch.native_layer_norm(rows.to(self.dtype), rows.shape[-1:], self.weight, self.bias, self.eps)

    def backward(self, grad: Tensor, rows: Tensor, mean: Tensor, deviation: Tensor, mask: list[bool]) -> list[Tensor]:
        rows, grad = rows.to(self.dtype), grad.to(self.dtype)
        return torch.ops.aten.native_layer_norm_backward(
            grad, rows, rows.shape[-1:], mean, deviation, self.weight, self.bias, mask
        )


def make_norm(features: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Norm:
    dtype = reduce(torch.promote_types, (x.dtype for x in (features, weight, bias) if x is not None))
    return Norm(dtype, *(x if x is None else x.to(dtype) for x in (weight, bias)), eps)


def _by_clip(x: Tensor, counts: tuple[int, ...]) -> list[Tensor]:
    """x [B, T, H, W] or [F, H, W], contiguous, as rows [clips, patches]: clips of one length are rows together."""
    if len(set(counts)) == 1:
        return [x.view(len(counts), -1)]
    patches = x.shape[-2] * x.shape[-1]
    return [clip[None] for clip in x.view(-1).split([count * patches for count in counts])]


@_without_autocast
def guide_relevance(
    kernels, features, text_embeds, scale_tensor, scale, norm_weight, norm_bias, norm_eps, guide_weight, cu_frames
):
    preconditions.check_guide(features, text_embeds, scale_tensor, norm_weight, norm_bias, guide_weight, cu_frames)
    counts, dtype = clip_counts(features, cu_frames), _accumulator(features)
    text = text_embeds.to(dtype).contiguous()
    cosines = features.new_empty(features.shape[:-1], dtype=dtype)
    flat, guide = cosines.view(-1), _operand(guide_weight).t()
    norm = make_norm(features, norm_weight, norm_bias, norm_eps)
    for tile in tiles(features, counts):
        normed, _, _ = norm(tile.rows)  # [R, V]
        kernels.score_rows(flat[tile.patches], normed.to(guide.dtype) @ guide, text[tile.clip])
    return softmax(cosines, scale if scale_tensor is None else scale * scale_tensor, counts), cosines


def softmax(cosines: Tensor, scale: float | Tensor, counts: tuple[int, ...]) -> Tensor:
    """relevance of cosines [B, T, H, W] or [F, H, W]."""
    rows = [x.softmax(1).view(-1) for x in _by_clip(cosines * scale, counts)]
    return torch.cat(rows).view_as(cosines)


def grad_logits(grad: Tensor, relevance: Tensor, counts: tuple[int, ...]) -> Tensor:
    """dl_i = r_i (g_i - sum_j r_j g_j), float64 [T*H*W of all clips].

    Where one r is almost 1 its difference is far smaller than its g: in float32 rounding would be the gradient's error.
    """
    grads = []
    for g, r in zip(_by_clip(grad.contiguous(), counts), _by_clip(relevance, counts)):
        g, r = g.double(), r.double()
        grads.append(r * (g - (r * g).sum(1, keepdim=True) / r.sum(1, keepdim=True)))
    return torch.cat([x.view(-1) for x in grads])


@_without_autocast
def guide_relevance_backward(
    features, grad, relevance, cosines, text_embeds, scale_tensor, scale, norm_weight, norm_bias, norm_eps,
    guide_weight, cu_frames, need_features, need_text, need_norm, need_guide,
):  # fmt: skip
    """Gradients of features, text_embeds, scale_tensor, norm_weight, norm_bias and guide_weight."""
    preconditions.check_guide(features, text_embeds, scale_tensor, norm_weight, norm_bias, guide_weight, cu_frames)
    preconditions.check_patches(features, grad=grad, relevance=relevance, cosines=cosines)
    # e = P LN(x), e^ = e / |e|, cos = e^ . c^, l = s cos;  dcos = s dl
    # de = dcos (c^ - cos e^) / |e|;  dc^ = sum_i dcos_i e^_i;  dc = (dc^ - (dc^ . c^) c^) / |c|
    counts, dtype = clip_counts(features, cu_frames), _accumulator(features)
    text = text_embeds.to(dtype).contiguous()  # [B, C]
    length = text.norm(dim=-1, keepdim=True)  # [B, 1]
    unit = text / length.clamp_min(EPS)
    grad_logit = grad_logits(grad, relevance, counts)
    factor = ((scale if scale_tensor is None else scale * scale_tensor) * grad_logit).to(dtype)
    cosines = cosines.view(-1)
    guide = _operand(guide_weight)  # [C, V]
    norm = make_norm(features, norm_weight, norm_bias, norm_eps)
    sums = {
        "unit": torch.zeros_like(text),
        "guide": features.new_zeros(guide.shape, dtype=dtype) if need_guide else None,
        "norm": features.new_zeros(2, features.shape[-1], dtype=dtype) if need_norm else None,
    }
    grad_features = features.new_empty(features.shape) if need_features else None
    # That of scale_tensor comes from the cosines.
    for tile in tiles(features, counts) if need_features or need_text or need_norm or need_guide else ():
        normed, mean, deviation = norm(tile.rows)
        normed = normed.to(guide.dtype)  # [R, V]
        embeds = normed @ guide.t()  # [R, C]
        norms = torch.linalg.vector_norm(embeds, dim=-1, dtype=dtype)  # [R]
        along = factor[tile.patches] / norms.clamp_min(EPS)  # [R]
        wide = embeds.to(dtype)
        sums["unit"][tile.clip] += along @ wide
        if not (need_features or need_norm or need_guide):
            continue
        along = torch.where(norms <= EPS, 0, along)  # a zero embedding gets no gradient
        wide = wide * (-along * cosines[tile.patches] / norms.clamp_min(EPS))[:, None]
        grad_embeds = wide.addr_(along, unit[tile.clip]).to(guide.dtype)  # [R, C]
        if need_guide:
            _add_product(sums["guide"], grad_embeds.t(), normed)
        if need_features or need_norm:
            # Without norm_weight there is nothing to ask a gradient of.
            mask = [need_features, need_norm and norm_weight is not None, need_norm and norm_bias is not None]
            grads = norm.backward(grad_embeds @ guide, tile.rows, mean, deviation, mask)
            if need_features:
                grad_features[tile.place].view_as(tile.rows).copy_(grads[0])
            for sum, one, asked in zip(sums["norm"] if need_norm else (), grads[1:], mask[1:]):
                if asked:
                    sum += one
    grad_text = None
    if need_text:
        grad_unit = sums["unit"]
        grad_text = (grad_unit - (grad_unit * unit).sum(-1, keepdim=True) * unit) / length
        grad_text = torch.where(length > EPS, grad_text, 0).to(text_embeds.dtype)
    grad_norm = (
        sums["norm"][n].to(x.dtype, copy=True) if need_norm and x is not None else None
        for n, x in enumerate((norm_weight, norm_bias))
    )
    grad_guide = sums["guide"].to(guide_weight.dtype) if need_guide else None
    grad_scale = (grad_logit * cosines).sum().to(dtype)
    return _given(features, grad_features, grad_text, grad_scale, *grad_norm, grad_guide)


def _given(like: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    """Registered ops return tensors: an empty one for each that nobody asked for."""
    return tuple(like.new_empty(0) if x is None else x for x in grads)


def _tile_buffer(features: Tensor, channels: int) -> tuple[int, Tensor]:
    """(channels at a time, memory of a tile)."""
    height, width = features.shape[-3:-1]
    rows, most = TILE[features.device.type]
    frames = features.numel() // (features.shape[-1] * height * width)
    rows = min(max(rows, width), frames * height * width)
    dtype = torch.float32 if _widens(features) else features.dtype
    return min(channels, most), features.new_empty(rows * min(channels, most), dtype=dtype)


@_without_autocast
def hidden_pool3d(kernels, features, weights, linear_1_weight, linear_1_bias, window, temperature, cu_frames):
    layer = linear_1_weight, linear_1_bias
    preconditions.check_hidden(features, weights, *layer, window, temperature, cu_frames)
    cu_frames = None if cu_frames is None else cu_frames.cpu()  # where each of the next two would wait for it
    plan, width = kernels.make_plan(features, window, cu_frames), linear_1_weight.shape[0]
    shares = kernels.window_shares(features, weights, temperature, plan)
    sums = features.new_zeros(*plan.lead, width, dtype=_accumulator(features))  # [windows, D]
    step, buffer = _tile_buffer(features, width)
    for tile in tiles(features, clip_counts(features, cu_frames)):
        rows = _operand(tile.rows)
        for channel in range(0, width, step):
            weight = _operand(linear_1_weight[channel : channel + step])
            z = torch.mm(rows, weight.t(), out=buffer[: len(rows) * len(weight)].view(len(rows), -1))
            bias = None if linear_1_bias is None else linear_1_bias[channel : channel + step].to(z.dtype).contiguous()
            kernels.pool_hidden(sums, z, bias, shares, tile.first, channel, features, plan)
    return sums.to(features.dtype)


@_without_autocast
def hidden_pool3d_backward(
    kernels, features, grad, weights, linear_1_weight, linear_1_bias, window, temperature, cu_frames, need_features,
    need_weights, need_weight, need_bias,
):  # fmt: skip
    """Gradients of features, weights, linear_1_weight and linear_1_bias; z is computed again, tile by tile."""
    layer = linear_1_weight, linear_1_bias
    preconditions.check_hidden(features, weights, *layer, window, temperature, cu_frames)
    preconditions.check_needed(weights=(need_weights, weights), bias=(need_bias, linear_1_bias))
    cu_frames = None if cu_frames is None else cu_frames.cpu()  # where each of the next two would wait for it
    plan, width = kernels.make_plan(features, window, cu_frames), linear_1_weight.shape[0]
    preconditions.check_windows(grad, plan.lead, width, features)
    dtype = _accumulator(features)
    shares = kernels.window_shares(features, weights, temperature, plan)
    dots = torch.zeros_like(shares) if need_weights else None
    step, buffer = _tile_buffer(features, width)
    grad = grad.to(buffer.dtype).contiguous().view(-1, width)  # [windows, D]
    grad_weight = features.new_zeros(linear_1_weight.shape, dtype=dtype) if need_weight else None
    grad_bias = features.new_zeros(width, dtype=dtype) if need_bias else None
    grad_features = features.new_empty(features.shape) if need_features else None
    for tile in tiles(features, clip_counts(features, cu_frames)):
        rows = _operand(tile.rows)
        grad_rows = torch.zeros_like(rows, dtype=dtype) if need_features else None
        for channel in range(0, width, step):
            part = slice(channel, channel + step)
            weight = _operand(linear_1_weight[part])
            z = torch.mm(rows, weight.t(), out=buffer[: len(rows) * len(weight)].view(len(rows), -1))
            bias = None if linear_1_bias is None else linear_1_bias[part].to(z.dtype).contiguous()
            kernels.pool_hidden_backward(z, bias, shares, dots, grad, tile.first, channel, features, plan)
            if need_weight:
                _add_product(grad_weight[part], z.t(), rows)
            if need_bias:
                grad_bias[part] += z.sum(0, dtype=dtype)
            if need_features:
                _add_product(grad_rows, z, weight)
        if need_features:
            grad_features[tile.place].view_as(rows).copy_(grad_rows)
    grads = None
    if need_weights:
        grads = kernels.window_shares_backward(weights, shares, dots, features, temperature, plan)
    grad_weight = None if grad_weight is None else grad_weight.to(linear_1_weight.dtype)
    grad_bias = None if grad_bias is None else grad_bias.to(linear_1_bias.dtype)
    return _given(features, grad_features, grads, grad_weight, grad_bias)
