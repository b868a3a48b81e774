"""y_o = sum_{i in o} p_oi v_i,  p_oi = softmax_{i in o}(w_i / temperature), forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    CONFIG,
    axes,
    axis_begin,
    axis_end,
    axis_first,
    axis_last,
    clip_of_output,
    clip_slots,
    find_clip,
    launch,
    make_plan,
    patch_offset,
    strides,
)
from .prompt_relevance import clip_statistics, normalise_block

# Where the scores w come from: nowhere (equal), a tensor, or the logits of the relevance and their statistics.
NONE, TENSOR, LOGITS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_scores(weights, offset, inside, largest, total, SOURCE: tl.constexpr):
    """w [BLOCK_K] of patches, -inf outside of the window."""
    if SOURCE == NONE:
        return tl.where(inside, 0.0, float("-inf"))
    else:
        w = tl.load(weights + offset, mask=inside, other=float("-inf")).to(tl.float32)
        if SOURCE == LOGITS:
            w = tl.where(inside, tl.exp(w - largest) / total, float("-inf"))
        return w


@triton.jit
def find_window(
    window, clips, batch, T, H, W, TO, HO, WO, KT, KH, KW, JT, JH, JW,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, KERNEL: tl.constexpr,
):  # fmt: skip
    """The clip of a window, the clip's first frame, and where the window begins and ends along (T, H, W)."""
    output = window // (HO * WO)
    b = clip_of_output(clips, output, TO, batch, BATCH, RAGGED)
    first, frames, first_output = find_clip(clips, b, T, RAGGED)
    ot = output - first_output if RAGGED else output - b * TO
    oh, ow = window // WO % HO, window % WO
    t0, t1 = axis_begin(ot, frames, TO, KT, JT, KERNEL), axis_end(ot, frames, TO, KT, JT, KERNEL)
    h0, h1 = axis_begin(oh, H, HO, KH, JH, KERNEL), axis_end(oh, H, HO, KH, JH, KERNEL)
    w0, w1 = axis_begin(ow, W, WO, KW, JW, KERNEL), axis_end(ow, W, WO, KW, JW, KERNEL)
    return b, first, t0, h0, w0, t1, h1, w1


@triton.jit
def window_patches(k, t0, h0, w0, t1, h1, w1, LH, LW):
    """(frame, row, column, inside) of the k-th places in a window."""
    t, h, w = t0 + k // (LH * LW), h0 + k // LW % LH, w0 + k % LW
    return t, h, w, (t < t1) & (h < h1) & (w < w1)


@triton.jit
def pool_windows(
    values, weights, partials, pooled, relevance, clips, temperature, batch, parts, steps, blocks,
    VB, VT, VH, VW, WB, WT, WH, WW, D, T, H, W, TO, HO, WO, KT, KH, KW, JT, JH, JW, LT, LH, LW, MT, MH, MW,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, KERNEL: tl.constexpr, SOURCE: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < blocks:
        # The first programs write the relevance itself, blocks = B * parts, so that it costs no launch of its own.
        if SOURCE == LOGITS and tl.program_id(1) == 0:
            normalise_block(
                weights, partials, relevance, clips, pid % parts, pid // parts, parts, steps, T, H, W,
                RAGGED, ROWS, PARTS,
            )  # fmt: skip
    else:
        window = pid - blocks
        b, first, t0, h0, w0, t1, h1, w1 = find_window(
            window, clips, batch, T, H, W, TO, HO, WO, KT, KH, KW, JT, JH, JW, BATCH, RAGGED, KERNEL
        )

        clip_largest, clip_total = 0.0, 1.0
        if SOURCE == LOGITS:
            clip_largest, clip_total = clip_statistics(partials, b, parts, PARTS)
        largest = tl.full([], float("-inf"), tl.float32)
        for k in range(0, (t1 - t0) * LH * LW, BLOCK_K):
            t, h, w, inside = window_patches(k + tl.arange(0, BLOCK_K), t0, h0, w0, t1, h1, w1, LH, LW)
            offset = patch_offset(b, first + t, h, w, WB, WT, WH, WW)
            score = load_scores(weights, offset, inside, clip_largest, clip_total, SOURCE)
            largest = tl.maximum(largest, tl.max(score, 0))
        total = tl.full([], 0.0, tl.float32)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        sum = tl.zeros([BLOCK_D], tl.float32)
        for k in range(0, (t1 - t0) * LH * LW, BLOCK_K):
            t, h, w, inside = window_patches(k + tl.arange(0, BLOCK_K), t0, h0, w0, t1, h1, w1, LH, LW)
            offset = patch_offset(b, first + t, h, w, WB, WT, WH, WW)
            score = load_scores(weights, offset, inside, clip_largest, clip_total, SOURCE)
            share = tl.where(inside, tl.exp((score - largest) / temperature), 0.0)  # [BLOCK_K]
            offset = patch_offset(b, first + t, h, w, VB, VT, VH, VW)
            mask = inside[:, None] & (d < D)[None, :]
            v = tl.load(values + offset[:, None] + d[None, :], mask=mask, other=0.0)  # [BLOCK_K, BLOCK_D]
            total += tl.sum(share, 0)
            sum += tl.sum(share[:, None] * v.to(tl.float32), 0)
        out = pooled + window.to(tl.int64) * D + d
        tl.store(out, (sum / total).to(pooled.dtype.element_ty), mask=d < D)


@triton.jit
def backward_windows(
    grad, values, weights, shares, dots, means, clips, slots, temperature, batch,
    VB, VT, VH, VW, WB, WT, WH, WW, D, T, H, W, TO, HO, WO, KT, KH, KW, JT, JH, JW, LT, LH, LW, MT, MH, MW,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, KERNEL: tl.constexpr, SOURCE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """shares[o, i] = p_oi, dots[o, i] = g_o . v_i and means[o] = sum_i p_oi dots[o, i].

    Where one p is almost 1 its dot - mean is far smaller than its dot: the mean is kept in float64, or its rounding,
    divided by the temperature, would be the error of the gradient.
    """
    window = tl.program_id(0)
    b, first, t0, h0, w0, t1, h1, w1 = find_window(
        window, clips, batch, T, H, W, TO, HO, WO, KT, KH, KW, JT, JH, JW, BATCH, RAGGED, KERNEL
    )

    slot, volume = clip_slots(clips, slots, b, TO, HO, WO, LT, LH, LW, RAGGED)
    output = tl.load(clips + 4 * b + 2) if RAGGED else b * TO
    slot += (window - output * HO * WO).to(tl.int64) * volume
    volume = (t1 - t0) * LH * LW
    largest = tl.full([], float("-inf"), tl.float32)
    for k in range(0, volume, BLOCK_K):
        t, h, w, inside = window_patches(k + tl.arange(0, BLOCK_K), t0, h0, w0, t1, h1, w1, LH, LW)
        offset = patch_offset(b, first + t, h, w, WB, WT, WH, WW)
        score = load_scores(weights, offset, inside, 0.0, 1.0, SOURCE)
        largest = tl.maximum(largest, tl.max(score, 0))
    total = tl.full([], 0.0, tl.float32)
    for k in range(0, volume, BLOCK_K):
        t, h, w, inside = window_patches(k + tl.arange(0, BLOCK_K), t0, h0, w0, t1, h1, w1, LH, LW)
        offset = patch_offset(b, first + t, h, w, WB, WT, WH, WW)
        score = load_scores(weights, offset, inside, 0.0, 1.0, SOURCE)
        total += tl.sum(tl.where(inside, tl.exp((score - largest) / temperature), 0.0), 0)
    mean = tl.full([], 0.0, tl.float64)
    share_sum = tl.full([], 0.0, tl.float64)
    for k in range(0, volume, BLOCK_K):
        places = k + tl.arange(0, BLOCK_K)
        t, h, w, inside = window_patches(places, t0, h0, w0, t1, h1, w1, LH, LW)
        offset = patch_offset(b, first + t, h, w, WB, WT, WH, WW)
        score = load_scores(weights, offset, inside, 0.0, 1.0, SOURCE)
        share = tl.where(inside, tl.exp((score - largest) / temperature) / total, 0.0)  # [BLOCK_K]
        tl.store(shares + slot + places, share, mask=inside)
        if NEED_WEIGHTS:
            offset = patch_offset(b, first + t, h, w, VB, VT, VH, VW)
            dot = tl.zeros([BLOCK_K], tl.float32)
            for block in range(0, D, BLOCK_D):
                d = block + tl.arange(0, BLOCK_D)
                g = tl.load(grad + window.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
                mask = inside[:, None] & (d < D)[None, :]
                v = tl.load(values + offset[:, None] + d[None, :], mask=mask, other=0.0)  # [BLOCK_K, BLOCK_D]
                dot += tl.sum(v.to(tl.float32) * g[None, :], 1)
            mean += tl.sum(tl.where(inside, share.to(tl.float64) * dot, 0.0), 0)
            share_sum += tl.sum(share.to(tl.float64), 0)
            tl.store(dots + slot + places, dot, mask=inside)
    if NEED_WEIGHTS:
        tl.store(means + window, mean / share_sum)


@triton.jit
def backward_patches(
    grad, shares, dots, means, grad_values, grad_weights, clips, slots, temperature, batch,
    VB, VT, VH, VW, WB, WT, WH, WW, D, T, H, W, TO, HO, WO, KT, KH, KW, JT, JH, JW, LT, LH, LW, MT, MH, MW,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, KERNEL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, NEED_VALUES: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """dv_i = sum_o p_oi g_o and dw_i = sum_o p_oi (dots_oi - means_o) / temperature: each patch collects its own
    windows, at most MT * MH * MW, in order: no atomics, the same bits every time."""
    b = tl.program_id(2)
    first, frames, first_output = find_clip(clips, b, T, RAGGED)
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = p < frames * H * W
    t, h, w = p // (H * W), p // W % H, p % W
    ot0, ot1 = axis_first(t, frames, TO, KT, JT, KERNEL), axis_last(t, frames, TO, KT, JT, KERNEL)
    if KERNEL:
        ot1 = tl.minimum(ot1, (frames - KT) // JT + 1)
    oh0, oh1 = axis_first(h, H, HO, KH, JH, KERNEL), axis_last(h, H, HO, KH, JH, KERNEL)
    ow0, ow1 = axis_first(w, W, WO, KW, JW, KERNEL), axis_last(w, W, WO, KW, JW, KERNEL)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad_value = tl.zeros([ROWS, BLOCK_D], tl.float32)
    grad_weight = tl.zeros([ROWS], tl.float32)
    base = first_output if RAGGED else b * TO
    first_slot, volume = clip_slots(clips, slots, b, TO, HO, WO, LT, LH, LW, RAGGED)
    for m in range(0, MT * MH * MW):
        ot, oh, ow = ot0 + m // (MH * MW), oh0 + m // MW % MH, ow0 + m % MW
        inside = valid & (ot < ot1) & (oh < oh1) & (ow < ow1)
        local = (ot * HO + oh) * WO + ow
        window = base * HO * WO + local
        kt = t - axis_begin(ot, frames, TO, KT, JT, KERNEL)
        kh = h - axis_begin(oh, H, HO, KH, JH, KERNEL)
        kw = w - axis_begin(ow, W, WO, KW, JW, KERNEL)
        slot = first_slot + local.to(tl.int64) * volume + (kt * LH + kh) * LW + kw
        share = tl.load(shares + slot, mask=inside, other=0.0)  # [ROWS]
        if NEED_WEIGHTS:
            dot = tl.load(dots + slot, mask=inside, other=0.0)
            mean = tl.load(means + window, mask=inside, other=0.0)
            grad_weight += share * (dot.to(tl.float64) - mean).to(tl.float32) / temperature
        if NEED_VALUES:
            mask = inside[:, None] & (d < D)[None, :]
            g = tl.load(grad + window.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
            grad_value += tl.where(inside[:, None], share[:, None] * g.to(tl.float32), 0.0)
    if NEED_VALUES:
        rows = grad_values + patch_offset(b, first + t, h, w, VB, VT, VH, VW)[:, None] + d[None, :]
        tl.store(rows, grad_value.to(grad_values.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])
    # Not one condition: NEED_WEIGHTS is known when this is compiled, and leaves no code.
    if NEED_WEIGHTS:  # noqa: SIM102
        if tl.program_id(1) == 0:
            out = grad_weights + patch_offset(b, first + t, h, w, WB, WT, WH, WW)
            tl.store(out, grad_weight.to(grad_weights.dtype.element_ty), mask=valid)


def pool(values, weights, plan, temperature, pooled_shape, logits=None):
    """pooled, given weights or, as `logits`, what the first launch of prompt_relevance gave; then relevance, too."""
    pooled = values.new_empty(pooled_shape)
    channels = values.shape[-1]
    scores, partials, tiles = (weights, None, dict(parts=1, steps=1, ROWS=1)) if logits is None else logits
    relevance = None if logits is None else torch.empty_like(scores)
    blocks = 0 if logits is None else plan.batch * tiles["parts"]
    source = (NONE if weights is None else TENSOR) if logits is None else LOGITS
    arguments = dict(
        values=values, weights=scores, partials=partials, pooled=pooled, relevance=relevance, temperature=temperature,
        blocks=blocks, SOURCE=source.value, PARTS=triton.next_power_of_2(tiles["parts"]),
        **_shared(values, scores, plan), **tiles,
    )  # fmt: skip
    grid = (blocks + plan.windows, triton.cdiv(channels, arguments["BLOCK_D"]))
    launch(pool_windows, grid, values.device, arguments)
    return pooled, relevance


def weighted_pool3d(values, weights, window, temperature, cu_frames):
    plan = make_plan(values, cu_frames, window)
    return pool(values, weights, plan, temperature, pooled_shape(values, plan, window))[0]


def pooled_shape(values, plan, window):
    lead = (plan.outputs,) if plan.clips is not None and window.kernel_size else (plan.batch, plan.window[0])
    return *lead, *plan.window[1:3], values.shape[-1]


def weighted_pool3d_backward(grad, values, weights, window, temperature, cu_frames, need_values, need_weights):
    plan = make_plan(values, cu_frames, window)
    grad, empty = grad.contiguous(), values.new_empty(0)
    shares = torch.empty((plan.scratch,), dtype=torch.float32, device=values.device)
    dots = torch.empty_like(shares) if need_weights else None
    means = shares.new_empty(plan.windows, dtype=torch.float64) if need_weights else None
    grad_values = values.new_empty(values.shape) if need_values else None
    grad_weights = weights.new_empty(weights.shape) if need_weights else None
    arguments = _shared(values, weights, plan)
    block_k = arguments.pop("BLOCK_K")
    common = dict(
        grad=grad, shares=shares, dots=dots, means=means, slots=plan.slots, temperature=temperature,
        NEED_WEIGHTS=need_weights,
    )  # fmt: skip
    source = (NONE if weights is None else TENSOR).value
    first = dict(values=values, weights=weights, SOURCE=source, BLOCK_K=block_k)
    launch(backward_windows, (plan.windows,), values.device, common | arguments | first)

    arguments |= _strides("V", strides(grad_values, plan)) | _strides("W", strides(grad_weights, plan))
    second = dict(
        grad_values=grad_values,
        grad_weights=grad_weights,
        ROWS=CONFIG.patches,
        NEED_VALUES=need_values,
    )
    patches = plan.frames * plan.height * plan.width
    blocks = triton.cdiv(values.shape[-1], arguments["BLOCK_D"]) if need_values else 1
    grid = (triton.cdiv(patches, CONFIG.patches), blocks, plan.batch)
    launch(backward_patches, grid, values.device, common | arguments | second)
    return empty if grad_values is None else grad_values, empty if grad_weights is None else grad_weights


def _strides(letter, numbers):
    return dict(zip((letter + axis for axis in "BTHW"), numbers))


def _shared(values, weights, plan):
    channels = values.shape[-1]
    block = min(CONFIG.bytes // values.element_size(), triton.next_power_of_2(channels))
    return dict(
        D=channels, BLOCK_K=32 if plan.volume > 16 else 16, BLOCK_D=block,
        **_strides("V", strides(values, plan)), **_strides("W", strides(weights, plan)), **axes(plan), **plan.ragged,
    )  # fmt: skip
