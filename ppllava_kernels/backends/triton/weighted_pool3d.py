"""y_o = sum_{i in o} p_oi v_i,  p_oi = softmax_{i in o}(w_i / temperature), forward and backward."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .common import (
    CONFIG,
    ceil_div,
    clip_arguments,
    clip_frames,
    clip_of,
    clip_slots,
    grid_strides,
    launch,
    make_plan,
    patch_offset,
)
from .scores import clip_statistics, normalise_frame
from .windows import (
    find_window,
    holding_windows,
    load_rows,
    load_scores,
    row_offset,
    weigh_rows,
)


@triton.jit
def pool_windows(
    values, weights, partials, pooled, relevance, clips, sharpness, batch, parts, blocks,
    VB, VT, VH, VW, WB, WT, WH, WW, D, T, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, LH, LW,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, KERNEL: tl.constexpr, SOURCE: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < blocks:
        # The first programs write the relevance itself, a frame each, so that it costs no launch of its own.
        if SOURCE == "logits":
            normalise_frame(
                weights, partials, relevance, clips, pid, batch, parts, T, H, W, BATCH, RAGGED, ROWS, PARTS, CHUNK
            )  # fmt: skip
    else:
        # Neighbours read neighbouring channels of the same patches.
        window, slice = (pid - blocks) // tl.cdiv(D, BLOCK_D), (pid - blocks) % tl.cdiv(D, BLOCK_D)
        b, first, frames, _ot, t0, h0, w0, t1, h1, w1 = find_window(
            window, clips, batch, T, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, BATCH, RAGGED, KERNEL
        )
        most_of_clip, total_of_clip = 0.0, 1.0
        if SOURCE == "logits":
            most_of_clip, total_of_clip = clip_statistics(
                partials, clips, b, frames, parts, batch, H, W, RAGGED, ROWS, PARTS
            )  # fmt: skip
        count = (t1 - t0) * LH * LW
        largest = tl.full([LANES], float("-inf"), tl.float32)
        for begin in range(0, count, LANES):
            _t, _h, _w, _inside, score = load_scores(
                weights, begin + tl.arange(0, LANES), b, first, t0, h0, w0, t1, h1, w1, WB, WT, WH, WW, LH, LW,
                most_of_clip, total_of_clip, SOURCE,
            )  # fmt: skip
            largest = tl.maximum(largest, score)
        most = tl.max(largest, 0)
        d = slice * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros([LANES], tl.float32)
        sum = tl.zeros([BLOCK_D], tl.float32)
        for begin in range(0, count, LANES):
            t, h, w, inside, score = load_scores(
                weights, begin + tl.arange(0, LANES), b, first, t0, h0, w0, t1, h1, w1, WB, WT, WH, WW, LH, LW,
                most_of_clip, total_of_clip, SOURCE,
            )  # fmt: skip
            share = tl.where(inside, tl.exp2((score - most) * sharpness), 0.0)
            offset = row_offset(inside, patch_offset(b, t, h, w, VB, VT, VH, VW))
            total += share
            sum = weigh_rows(sum, values, share, offset, count - begin, d, D, BLOCK_K, ALIGN)
        out = pooled + window.to(tl.int64) * D + d
        tl.store(out, (sum / tl.sum(total, 0)).to(pooled.dtype.element_ty), mask=d < D)


@triton.jit
def backward_windows(
    grad, values, weights, shares, dots, means, clips, sharpness, batch,
    VB, VT, VH, VW, WB, WT, WH, WW, D, T, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, LT, LH, LW,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, KERNEL: tl.constexpr, SOURCE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, LANES: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """shares[o, i] = p_oi, dots[o, i] = g_o . v_i and means[o] = sum_i p_oi dots[o, i].

    Where one p is almost 1 its dot - mean is far smaller than its dot: the mean is kept in float64, or its rounding,
    divided by the temperature, would be the error of the gradient.
    """
    window = tl.program_id(0)
    b, first, _frames, ot, t0, h0, w0, t1, h1, w1 = find_window(
        window, clips, batch, T, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, BATCH, RAGGED, KERNEL
    )
    slot, slots = clip_slots(clips, b, batch, OT, OH, OW, LT, LH, LW, RAGGED)
    slot += (ot * (OH * OW) + window % (OH * OW)) * slots
    count = (t1 - t0) * LH * LW
    largest = tl.full([LANES], float("-inf"), tl.float32)
    for begin in range(0, count, LANES):
        _t, _h, _w, _inside, score = load_scores(
            weights, begin + tl.arange(0, LANES), b, first, t0, h0, w0, t1, h1, w1, WB, WT, WH, WW, LH, LW,
            0.0, 1.0, SOURCE,
        )  # fmt: skip
        largest = tl.maximum(largest, score)
    most = tl.max(largest, 0)
    total = tl.zeros([LANES], tl.float32)
    for begin in range(0, count, LANES):
        _t, _h, _w, inside, score = load_scores(
            weights, begin + tl.arange(0, LANES), b, first, t0, h0, w0, t1, h1, w1, WB, WT, WH, WW, LH, LW,
            0.0, 1.0, SOURCE,
        )  # fmt: skip
        total += tl.where(inside, tl.exp2((score - most) * sharpness), 0.0)
    all = tl.sum(total, 0)
    mean = tl.zeros([BLOCK_K], tl.float64)
    share_sum = tl.zeros([BLOCK_K], tl.float64)
    for begin in range(0, count, LANES):
        places = begin + tl.arange(0, LANES)
        t, h, w, inside, score = load_scores(
            weights, places, b, first, t0, h0, w0, t1, h1, w1, WB, WT, WH, WW, LH, LW, 0.0, 1.0, SOURCE
        )  # fmt: skip
        share = tl.where(inside, tl.exp2((score - most) * sharpness) / all, 0.0)  # [LANES]
        tl.store(shares + slot + places, share, mask=inside)
        if NEED_WEIGHTS:
            offset = row_offset(inside, patch_offset(b, t, h, w, VB, VT, VH, VW))
            for k in range(0, tl.minimum(count - begin, LANES), BLOCK_K):
                dot = tl.zeros([BLOCK_K], tl.float32)
                for block in range(0, D, BLOCK_D):
                    d = block + tl.arange(0, BLOCK_D)
                    g = tl.load(grad + window.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
                    dot += tl.sum(load_rows(values, offset, k, d, D, BLOCK_K, ALIGN) * g[None, :], 1)
                rows = k + tl.arange(0, BLOCK_K)
                p = tl.gather(share, rows, 0).to(tl.float64)
                mean += p * dot
                share_sum += p
                tl.store(dots + slot + begin + rows, dot, mask=tl.gather(offset, rows, 0) >= 0)
    if NEED_WEIGHTS:
        tl.store(means + window, tl.sum(mean, 0) / tl.sum(share_sum, 0))


@triton.jit
def backward_patches(
    grad, shares, dots, means, grad_values, grad_weights, clips, temperature, batch,
    VB, VT, VH, VW, WB, WT, WH, WW, D, T, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, LT, LH, LW, MT, MH, MW,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, KERNEL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, LANES: tl.constexpr, PATCHES: tl.constexpr, NEED_VALUES: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """dv_i = sum_o p_oi g_o and dw_i = sum_o p_oi (dots_oi - means_o) / temperature: each patch collects its own
    windows, at most MT * MH * MW, in order: no atomics, the same bits every time."""
    frame = tl.program_id(0) // tl.cdiv(H * W, PATCHES)
    b, t = clip_of(clips, frame, 0, T, batch, BATCH, RAGGED)
    first, frames = clip_frames(clips, b, T, batch, RAGGED)
    begin, count = tl.program_id(0) % tl.cdiv(H * W, PATCHES) * PATCHES, MT * MH * MW
    # Neighbours share windows, whose rows the first-level cache still has.
    for n in range(PATCHES):
        h, w = (begin + n) // W, (begin + n) % W
        valid = begin + n < H * W
        windows, channels = tl.where(valid, count, 0), tl.where(valid, D, 0)
        if NEED_WEIGHTS:
            grad_weight = tl.zeros([LANES], tl.float32)
            for some in range(0, count, LANES):
                m = some + tl.arange(0, LANES)
                exists, window, slot = holding_windows(
                    m, b, frames, t, h, w, clips, batch, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, LT, LH, LW, MH, MW,
                    RAGGED, KERNEL,
                )  # fmt: skip
                exists = exists & (m < windows)
                share = tl.load(shares + slot, mask=exists, other=0.0)
                away = tl.load(dots + slot, mask=exists, other=0.0).to(tl.float64)
                away -= tl.load(means + window, mask=exists, other=0.0)
                grad_weight += share * away.to(tl.float32)
            dw = tl.sum(grad_weight, 0) / temperature
            at = grad_weights + patch_offset(b, first + t, h, w, WB, WT, WH, WW)
            tl.store(at, dw.to(grad_weights.dtype.element_ty), mask=valid)
        if NEED_VALUES:
            for block in range(0, D, BLOCK_D):
                d = block + tl.arange(0, BLOCK_D)
                grad_value = tl.zeros([BLOCK_D], tl.float32)
                for some in range(0, count, LANES):
                    m = some + tl.arange(0, LANES)
                    exists, window, slot = holding_windows(
                        m, b, frames, t, h, w, clips, batch, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, LT, LH, LW,
                        MH, MW, RAGGED, KERNEL,
                    )  # fmt: skip
                    exists = exists & (m < windows)
                    share = tl.load(shares + slot, mask=exists, other=0.0)
                    offset = row_offset(exists, window * D)
                    grad_value = weigh_rows(grad_value, grad, share, offset, count - some, d, D, BLOCK_K, ALIGN)
                out = grad_values + patch_offset(b, first + t, h, w, VB, VT, VH, VW) + d
                tl.store(out, grad_value.to(grad_values.dtype.element_ty), mask=d < channels)


def window_arguments(values, weights, plan, tile, device):
    """What every kernel here takes, for rows like `values` and scores like `weights`; either may be None."""
    none = values is None
    return dict(
        D=0 if none else values.shape[-1], BLOCK_D=1 if none else tile.channels(values), BLOCK_K=tile.rows,
        LANES=CONFIG.lanes, CHUNK=CONFIG.frames.rows,
        **grid_strides("V", values, plan), **grid_strides("W", weights, plan), **plan.sizes,
        **clip_arguments(plan, device),
    )  # fmt: skip


def alignment(x):
    """Elements in 16 bytes if every row of x [..., D] begins at a multiple of them, else 1."""
    size = x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(n * size % 16 == 0 for n in x.stride()[:-1])
    return 16 // size if aligned else 1


def pool(values, weights, plan, temperature, logits=None, partials=None):
    """(pooled, None) given weights or, given what the first launch of prompt_relevance gave, (pooled, relevance)."""
    tile, channels = CONFIG.pool_windows, values.shape[-1]
    pooled = values.new_empty((*plan.lead, channels))
    relevance = None if logits is None else torch.empty_like(logits)
    blocks = 0 if logits is None else plan.frames
    scores, source = (weights, "none" if weights is None else "weights") if logits is None else (logits, "logits")
    arguments = window_arguments(values, scores, plan, tile, values.device) | dict(
        values=values, weights=scores, partials=partials, pooled=pooled, relevance=relevance, blocks=blocks,
        sharpness=math.log2(math.e) / temperature, SOURCE=source, ALIGN=alignment(values),
        ROWS=CONFIG.score_patches.rows,
    )  # fmt: skip
    programs = blocks + plan.windows * ceil_div(channels, arguments["BLOCK_D"])
    launch(pool_windows, programs, values.device, arguments, tile)
    return pooled, relevance


def weighted_pool3d(values, weights, window, temperature, cu_frames):
    return pool(values, weights, make_plan(values, cu_frames, window), temperature)[0]


def weighted_pool3d_backward(grad, values, weights, plan, temperature, need_values, need_weights):
    device, grad = values.device, grad.contiguous()
    shares = torch.empty((plan.slots,), dtype=torch.float32, device=device)
    dots = torch.empty_like(shares) if need_weights else None
    means = shares.new_empty(plan.windows, dtype=torch.float64) if need_weights else None
    grad_values = values.new_empty(values.shape) if need_values else None
    grad_weights = weights.new_empty(weights.shape) if need_weights else None
    common = dict(grad=grad, shares=shares, dots=dots, means=means, NEED_WEIGHTS=need_weights)
    tile = CONFIG.backward_windows
    arguments = window_arguments(values, weights, plan, tile, device) | common | dict(
        values=values, weights=weights, sharpness=math.log2(math.e) / temperature, ALIGN=alignment(values),
        SOURCE="none" if weights is None else "weights",
    )  # fmt: skip
    launch(backward_windows, plan.windows, device, arguments, tile)

    tile = CONFIG.backward_patches if plan.most == 1 else CONFIG.backward_overlap
    arguments = window_arguments(grad_values, grad_weights, plan, tile, device) | common | dict(
        grad_values=grad_values, grad_weights=grad_weights, temperature=temperature, NEED_VALUES=need_values,
        ALIGN=alignment(grad), PATCHES=CONFIG.neighbours,
    )  # fmt: skip
    programs = plan.frames * ceil_div(plan.sizes["H"] * plan.sizes["W"], CONFIG.neighbours)
    launch(backward_patches, programs, device, arguments, tile)
    empty = values.new_empty(0)
    return empty if grad_values is None else grad_values, empty if grad_weights is None else grad_weights
