"""Windows of patches, windows of a patch, and weighted sums of rows: what the pooling kernels are made of."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    axis_begin,
    axis_end,
    axis_first,
    axis_last,
    clip_frames,
    clip_of,
    clip_slots,
    clip_start,
    patch_offset,
)


@triton.jit
def window_box(ot, oh, ow, frames, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, KERNEL: tl.constexpr):
    """Where the windows (ot, oh, ow) of a clip of so many frames begin and end."""
    t0, t1 = axis_begin(ot, frames, OT, KT, JT, KERNEL), axis_end(ot, frames, OT, KT, JT, KERNEL)
    h0, h1 = axis_begin(oh, H, OH, KH, JH, KERNEL), axis_end(oh, H, OH, KH, JH, KERNEL)
    w0, w1 = axis_begin(ow, W, OW, KW, JW, KERNEL), axis_end(ow, W, OW, KW, JW, KERNEL)
    return t0, h0, w0, t1, h1, w1


@triton.jit
def find_window(
    window, clips, batch, T, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, KERNEL: tl.constexpr,
):  # fmt: skip
    """(clip, its first frame, its frames, pooled frame in it), and where the window begins and ends."""
    b, ot = clip_of(clips, window // (OH * OW), 2, OT, batch, BATCH, RAGGED)
    first, frames = clip_frames(clips, b, T, batch, RAGGED)
    t0, h0, w0, t1, h1, w1 = window_box(
        ot, window // OW % OH, window % OW, frames, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, KERNEL
    )
    return b, first, frames, ot, t0, h0, w0, t1, h1, w1


@triton.jit
def load_scores(
    weights, k, b, first, t0, h0, w0, t1, h1, w1, WB, WT, WH, WW, LH, LW, largest, total, SOURCE: tl.constexpr
):
    """(frame, row, column, inside, w) of the places k [LANES] in a window; w is -inf where not inside.

    SOURCE of w: "none": equal; "weights": a tensor; "logits": those of the relevance, with its statistics.
    """
    t, h, w = t0 + k // (LH * LW), h0 + k // LW % LH, w0 + k % LW
    inside = (t < t1) & (h < h1) & (w < w1)
    score = tl.where(inside, 0.0, float("-inf"))
    if SOURCE != "none":
        offset = patch_offset(b, first + t, h, w, WB, WT, WH, WW)
        score = tl.load(weights + offset, mask=inside, other=float("-inf")).to(tl.float32)
        if SOURCE == "logits":
            score = tl.where(inside, tl.exp(score - largest) / total, float("-inf"))
    return first + t, h, w, inside, score


@triton.jit
def row_offset(inside, offset):
    """offset, or a negative one for the row of a term that is none; it is as aligned as any."""
    return tl.where(inside, offset, -64)


@triton.jit
def load_rows(rows, offset, k, d, D, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr):
    """Channels d of the rows k ... k + BLOCK_K at offset [LANES], zero for those that are none: [BLOCK_K, BLOCK_D]."""
    start = tl.multiple_of(tl.gather(offset, k + tl.arange(0, BLOCK_K), 0), ALIGN)
    mask = (start >= 0)[:, None] & (d < D)[None, :]
    return tl.load(rows + start[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def weigh_rows(sum, rows, share, offset, count, d, D, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr):
    """sum + sum_k share_k rows[offset_k + d] for the first `count` terms; share and offset [LANES]."""
    for k in range(0, tl.minimum(count, share.shape[0]), BLOCK_K):
        weight = tl.gather(share, k + tl.arange(0, BLOCK_K), 0)  # [BLOCK_K]
        sum += tl.sum(weight[:, None] * load_rows(rows, offset, k, d, D, BLOCK_K, ALIGN), 0)
    return sum


@triton.jit
def holding_windows(
    m, b, frames, t, h, w, clips, batch, H, W, OT, OH, OW, KT, KH, KW, JT, JH, JW, LT, LH, LW, MH, MW,
    RAGGED: tl.constexpr, KERNEL: tl.constexpr,
):  # fmt: skip
    """(exists, index, slot of the patch in it) of the m-th windows [LANES] that the patch (t, h, w) lies in."""
    ot = axis_first(t, frames, OT, KT, JT, KERNEL) + m // (MH * MW)
    oh = axis_first(h, H, OH, KH, JH, KERNEL) + m // MW % MH
    ow = axis_first(w, W, OW, KW, JW, KERNEL) + m % MW
    exists = (ot < axis_last(t, frames, OT, KT, JT, KERNEL)) & (oh < axis_last(h, H, OH, KH, JH, KERNEL))
    exists = exists & (ow < axis_last(w, W, OW, KW, JW, KERNEL))
    kt = t - axis_begin(ot, frames, OT, KT, JT, KERNEL)
    kh = h - axis_begin(oh, H, OH, KH, JH, KERNEL)
    kw = w - axis_begin(ow, W, OW, KW, JW, KERNEL)
    local = ((ot * OH + oh) * OW + ow).to(tl.int64)
    slot, slots = clip_slots(clips, b, batch, OT, OH, OW, LT, LH, LW, RAGGED)
    slot += local * slots + (kt * LH + kh) * LW + kw
    return exists, clip_start(clips, b, 2, OT, batch, RAGGED) * OH * OW + local, slot
