"""y_o = sum_{i in o} p_oi gelu(W x_i + b): the windows of a tile of the product are pooled where it was multiplied."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import weighted_pool3d as pooling
from .common import (
    CONFIG,
    ceil_div,
    clip_arguments,
    clip_frames,
    clip_of,
    clip_slots,
    clip_start,
    grid_strides,
    launch,
    patch_offset,
    product_of,
)
from .common import make_plan as plan_of
from .windows import find_window, holding_windows, load_scores, window_box


@triton.jit
def normal(x):
    """The cumulative distribution of the normal one: gelu(x) = x normal(x)."""
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def clip_of_group(clips, group, each, batch, total, OT, OHW, BATCH: tl.constexpr, RAGGED: tl.constexpr):
    """(clip, place in it, its pooled frames) of a group of `each` windows, which lie in one clip."""
    if RAGGED:
        b = tl.arange(0, BATCH)
        begin = tl.load(clips + 2 * batch + b, mask=b < batch, other=0).to(tl.int32)
        end = tl.load(clips + 2 * batch + b + 1, mask=b + 1 < batch, other=0).to(tl.int32)
        count = tl.where(b + 1 < batch, end, total) - begin  # pooled frames [BATCH]
        groups = tl.where(b < batch, tl.cdiv(count * OHW, each), 0)
        clip = tl.sum((tl.cumsum(groups, 0) <= group).to(tl.int32), 0)
        return clip, group - tl.sum(tl.where(b < clip, groups, 0), 0), tl.sum(tl.where(b == clip, count, 0), 0)
    else:
        groups = tl.cdiv(OT * OHW, each)
        return group // groups, group % groups, OT + 0 * group


@triton.jit
def pool_products(
    features, weights, linear, bias, pooled, clips, sharpness, batch, total, each, tiles, V, D,
    SB, ST, SH, SW, WB, WT, WH, WW, T, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, LT, LH, LW,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, KERNEL: tl.constexpr, SOURCE: tl.constexpr, HAS_BIAS: tl.constexpr,
    WINDOWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Some channels of `each` windows of a clip, whose patches fill a tile; or of one window, tile by tile.

    What is pooled is a second product, of the shares [WINDOWS, BLOCK_M] with the tile [BLOCK_M, BLOCK_N].
    """
    # Neighbours read the same patches.
    group, block = tl.program_id(0) // tl.cdiv(D, BLOCK_N), tl.program_id(0) % tl.cdiv(D, BLOCK_N)
    b, local, outputs = clip_of_group(clips, group, each, batch, total, OT, OH * OW, BATCH, RAGGED)
    first, frames = clip_frames(clips, b, T, batch, RAGGED)
    slots = LT * LH * LW
    m = tl.arange(0, WINDOWS)
    d = block * BLOCK_N + tl.arange(0, BLOCK_N)
    most = tl.full([WINDOWS], float("-inf"), tl.float32)
    # The largest score of a window that takes several tiles is found first.
    for tile in range(0, tl.where(tiles > 1, tiles, 0)):
        _row, inside, of, score = tile_scores(
            tile, weights, b, first, frames, local, outputs, each, slots, WB, WT, WH, WW, SB, ST, SH, SW, H, W,
            OT, OH, OW, KT, KH, KW, JT, JH, JW, LH, LW, KERNEL, SOURCE, BLOCK_M,
        )  # fmt: skip
        own = (of[None, :] == m[:, None]) & inside[None, :]
        most = tl.maximum(most, tl.max(tl.where(own, score[None, :], float("-inf")), 1))
    sum = tl.zeros([WINDOWS, BLOCK_N], tl.float32)
    all = tl.zeros([WINDOWS], tl.float32)
    for tile in range(0, tiles):
        row, inside, of, score = tile_scores(
            tile, weights, b, first, frames, local, outputs, each, slots, WB, WT, WH, WW, SB, ST, SH, SW, H, W,
            OT, OH, OW, KT, KH, KW, JT, JH, JW, LH, LW, KERNEL, SOURCE, BLOCK_M,
        )  # fmt: skip
        row = tl.multiple_of(tl.maximum(row, 0), ALIGN)  # also where it is not inside, which is not loaded
        hidden = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in range(0, V, BLOCK_K):
            v = begin + tl.arange(0, BLOCK_K)
            mask = inside[:, None] & (v < V)[None, :]
            x = tl.load(features + row[:, None] + v[None, :], mask=mask, other=0.0)
            mask = (v < V)[:, None] & (d < D)[None, :]
            weight = tl.load(linear + d[None, :].to(tl.int64) * V + v[:, None], mask=mask, other=0.0)
            if WIDEN:
                x, weight = x.to(tl.float32), weight.to(tl.float32)
            hidden = tl.dot(x, weight, hidden, input_precision=PRECISION)
        if HAS_BIAS:
            hidden += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        hidden *= normal(hidden)
        own = (of[None, :] == m[:, None]) & inside[None, :]  # [WINDOWS, BLOCK_M]
        new = tl.maximum(most, tl.max(tl.where(own, score[None, :], float("-inf")), 1))
        share = tl.where(own, tl.exp2((score[None, :] - new[:, None]) * sharpness), 0.0)
        if not WIDEN:
            # 16 bits: those that eager rounds the hidden state to; shares that are rounded add up as they are.
            share, hidden = share.to(features.dtype.element_ty), hidden.to(features.dtype.element_ty)
        all += tl.sum(share.to(tl.float32), 1)
        # A patch that is not finite is none of its neighbours' business: in the product zero times it would be NaN.
        strange = (hidden - hidden).to(tl.float32) != 0
        # Seldom: a loop, for `if` costs registers. Over both axes at once: for sm_100 Triton 3.7.1 compiles no maximum
        # of maxima of a product.
        for _ in range(0, tl.max(strange.to(tl.int32))):
            spoilt = tl.dot(own.to(share.dtype), strange.to(share.dtype), input_precision="tf32")  # of ones: exact
            sum = tl.where(spoilt > 0, float("nan"), sum)
            hidden = tl.where(strange, 0.0, hidden)
        sum = tl.dot(share, hidden, sum, input_precision="ieee")
    window = clip_start(clips, b, 2, OT, batch, RAGGED) * OH * OW + local * each + m
    mask = (m < each) & (local * each + m < outputs * OH * OW)
    out = pooled + window[:, None] * D + d[None, :]
    tl.store(out, (sum / all[:, None]).to(pooled.dtype.element_ty), mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def tile_scores(
    tile, weights, b, first, frames, local, outputs, each, slots, WB, WT, WH, WW, SB, ST, SH, SW, H, W,
    OT, OH, OW, KT, KH, KW, JT, JH, JW, LH, LW, KERNEL: tl.constexpr, SOURCE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(offset of its features, inside of its window, that window of the tile, score) of each row of a tile."""
    flat = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    of, k = flat // slots, flat % slots
    index = local * each + of
    valid = (of < each) & (index < outputs * OH * OW)
    t0, h0, w0, t1, h1, w1 = window_box(
        index // (OH * OW), index // OW % OH, index % OW, frames, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, KERNEL
    )
    t1 = tl.where(valid, t1, t0)
    frame, h, w, inside, score = load_scores(
        weights, k, b, first, t0, h0, w0, t1, h1, w1, WB, WT, WH, WW, LH, LW, 0.0, 1.0, SOURCE
    )
    row = patch_offset(b, frame, h, w, SB, ST, SH, SW)
    return row, inside, of, score


@triton.jit
def hidden_backward(
    hidden, bias, grad, shares, dots, clips, start, rows, step, batch, D, T, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW,
    LT, LH, LW, MT, MH, MW,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, KERNEL: tl.constexpr, HAS_BIAS: tl.constexpr, NEED_DOTS: tl.constexpr,
    BLOCK_R: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dots[o, i] += g_o . gelu(z_i), then dz_i = gelu'(z_i) sum_o p_oi g_o in place of z_i, of a tile of one clip."""
    n = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    b, _ = clip_of(clips, start // (H * W), 0, T, batch, BATCH, RAGGED)
    _, frames = clip_frames(clips, b, T, batch, RAGGED)
    patch = start + n - (clip_start(clips, b, 0, T, batch, RAGGED) * H * W).to(tl.int32)
    t, h, w = patch // (H * W), patch // W % H, patch % W
    z = hidden + n[:, None].to(tl.int64) * D
    if NEED_DOTS:
        for m in range(0, MT * MH * MW):
            exists, window, slot = holding_windows(
                m, b, frames, t, h, w, clips, batch, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, LT, LH, LW, MH, MW,
                RAGGED, KERNEL,
            )  # fmt: skip
            exists = exists & (n < rows)
            dot = tl.zeros([BLOCK_R, COLS], tl.float32)
            for begin in range(0, D, COLS):
                d = begin + tl.arange(0, COLS)
                mask = exists[:, None] & (d < D)[None, :]
                x = tl.load(z + d[None, :], mask=mask, other=0.0).to(tl.float32)
                if HAS_BIAS:
                    x += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
                g = tl.load(grad + window[:, None] * step + d[None, :], mask=mask, other=0.0).to(tl.float32)
                dot += x * normal(x) * g
            sum = tl.sum(dot, 1)
            tl.store(dots + slot, tl.load(dots + slot, mask=exists, other=0.0) + sum, mask=exists)
    for begin in range(0, D, COLS):
        d = begin + tl.arange(0, COLS)
        grad_hidden = tl.zeros([BLOCK_R, COLS], tl.float32)
        for m in range(0, MT * MH * MW):
            exists, window, slot = holding_windows(
                m, b, frames, t, h, w, clips, batch, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, LT, LH, LW, MH, MW,
                RAGGED, KERNEL,
            )  # fmt: skip
            exists = exists & (n < rows)
            mask = exists[:, None] & (d < D)[None, :]
            share = tl.load(shares + slot, mask=exists, other=0.0)
            g = tl.load(grad + window[:, None] * step + d[None, :], mask=mask, other=0.0).to(tl.float32)
            grad_hidden += share[:, None] * g
        mask = (n < rows)[:, None] & (d < D)[None, :]
        x = tl.load(z + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        slope = normal(x) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
        tl.store(z + d[None, :], (grad_hidden * slope).to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def window_means(
    shares, dots, means, clips, batch, T, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, LT, LH, LW,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, KERNEL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """means[o] = sum_i p_oi dots[o, i] in float64, as in backward_windows."""
    window = tl.program_id(0)
    b, _first, _frames, ot, t0, h0, w0, t1, h1, w1 = find_window(
        window, clips, batch, T, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, BATCH, RAGGED, KERNEL
    )
    slot, slots = clip_slots(clips, b, batch, OT, OH, OW, LT, LH, LW, RAGGED)
    slot += (ot * (OH * OW) + window % (OH * OW)) * slots
    mean = tl.zeros([LANES], tl.float64)
    total = tl.zeros([LANES], tl.float64)
    for begin in range(0, (t1 - t0) * LH * LW, LANES):
        k = begin + tl.arange(0, LANES)
        inside = (t0 + k // (LH * LW) < t1) & (h0 + k // LW % LH < h1) & (w0 + k % LW < w1)
        p = tl.load(shares + slot + k, mask=inside, other=0.0).to(tl.float64)
        mean += p * tl.load(dots + slot + k, mask=inside, other=0.0)
        total += p
    tl.store(means + window, tl.sum(mean, 0) / tl.sum(total, 0))


def hidden_pool3d(features, weights, linear_1_weight, linear_1_bias, window, temperature, cu_frames):
    plan, product, device = plan_of(features, cu_frames, window), product_of(features), features.device
    width, depth = linear_1_weight.shape  # D', V
    grid = [plan.sizes[name] for name in ("OT", "OH", "OW")]
    slots = math.prod(plan.sizes[name] for name in ("LT", "LH", "LW"))
    each = max(1, product.rows // slots)
    pooled = features.new_empty((*plan.lead, width))
    total = plan.windows // (grid[1] * grid[2])  # pooled frames
    outputs = (*plan.table[2][1:], total) if plan.table else range(grid[0], total + 1, grid[0])
    begins = plan.table[2] if plan.table else range(0, total, grid[0])
    groups = sum(ceil_div((end - begin) * grid[1] * grid[2], each) for begin, end in zip(begins, outputs))
    bias = None if linear_1_bias is None else linear_1_bias.contiguous()
    arguments = product.arguments(features) | plan.sizes | clip_arguments(plan, device) | dict(
        features=features, weights=weights, linear=linear_1_weight.contiguous(), bias=bias, pooled=pooled,
        sharpness=math.log2(math.e) / temperature, total=total, each=each, tiles=ceil_div(slots, product.rows),
        V=depth, D=width, SOURCE="none" if weights is None else "weights", HAS_BIAS=linear_1_bias is not None,
        ALIGN=pooling.alignment(features), WINDOWS=max(16, 1 << (each - 1).bit_length()),
        **grid_strides("S", features, plan), **grid_strides("W", weights, plan),
    )  # fmt: skip
    launch(pool_products, groups * ceil_div(width, product.columns), device, arguments, product)
    return pooled


# What backends/products.py asks of a backend, for its backward.


def make_plan(features, window, cu_frames):
    return plan_of(features, cu_frames, window)


def window_shares(features, weights, temperature, plan):
    shares = torch.empty((plan.slots,), dtype=torch.float32, device=features.device)
    tile = CONFIG.backward_windows
    arguments = pooling.window_arguments(None, weights, plan, tile, features.device) | dict(
        grad=None, values=None, weights=weights, shares=shares, dots=None, means=None, ALIGN=1, NEED_WEIGHTS=False,
        sharpness=math.log2(math.e) / temperature, SOURCE="none" if weights is None else "weights",
    )  # fmt: skip
    launch(pooling.backward_windows, plan.windows, features.device, arguments, tile)
    return shares


def window_shares_backward(weights, shares, dots, features, temperature, plan):
    device, grad_weights = features.device, weights.new_empty(weights.shape)
    means = shares.new_empty(plan.windows, dtype=torch.float64)
    tile = CONFIG.backward_patches
    arguments = pooling.window_arguments(None, grad_weights, plan, tile, device) | dict(
        grad=None, shares=shares, dots=dots, means=means, grad_values=None, grad_weights=grad_weights,
        temperature=temperature, NEED_VALUES=False, NEED_WEIGHTS=True, ALIGN=1, PATCHES=CONFIG.neighbours,
    )  # fmt: skip
    launch(window_means, plan.windows, device, arguments, CONFIG.frames)
    programs = plan.frames * ceil_div(plan.sizes["H"] * plan.sizes["W"], CONFIG.neighbours)
    launch(pooling.backward_patches, programs, device, arguments, tile)
    return grad_weights


def pool_hidden_backward(hidden, bias, shares, dots, grad, first, channel, features, plan):
    tile, (rows, width) = CONFIG.hidden_backward, hidden.shape
    arguments = plan.sizes | clip_arguments(plan, features.device) | dict(
        hidden=hidden, bias=bias, grad=grad[:, channel:], shares=shares, dots=dots, start=first, rows=rows,
        step=grad.shape[-1], D=width, HAS_BIAS=bias is not None, NEED_DOTS=dots is not None, BLOCK_R=tile.rows,
        COLS=tile.channels(hidden),
    )  # fmt: skip
    launch(hidden_backward, ceil_div(rows, tile.rows), features.device, arguments, tile)
