"""Scores of patches, l_i = s cos(x_i, c), and the statistics of their softmax over a clip: (max, sum of exp(l - max)).

A part of a clip gives statistics of its own; those of the clip are combined from them in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import clip_frames, clip_of, clip_start, patch_offset

EPS = tl.constexpr(1e-12)  # as torch.nn.functional.normalize


@triton.jit
def text_norm(text, C, CHUNK: tl.constexpr):
    """|c|"""
    square = tl.zeros([CHUNK], tl.float32)
    for begin in range(0, C, CHUNK):
        cols = begin + tl.arange(0, CHUNK)
        c = tl.load(text + cols, mask=cols < C, other=0.0).to(tl.float32)
        square += c * c
    return tl.sqrt(tl.sum(square, 0))


@triton.jit
def full_scale(scale, scale_tensor, HAS_SCALE: tl.constexpr):
    if HAS_SCALE:
        return scale * tl.load(scale_tensor)
    else:
        return scale


@triton.jit
def tile_patches(tile, H, W, DEEP: tl.constexpr, WARPS: tl.constexpr):
    """(patches of a frame [DEEP, WARPS] in one of its tiles, what of them is inside): a warp has a column."""
    p = tile * (DEEP * WARPS) + tl.arange(0, DEEP)[:, None] * WARPS + tl.arange(0, WARPS)[None, :]
    return p, p < H * W


@triton.jit
def tile_offsets(b, frame, p, W, SB, ST, SH, SW, FLAT: tl.constexpr):
    """Offsets of the patches p of a frame; FLAT: they lie at equal distances, which saves two divisions for each."""
    if FLAT:
        return patch_offset(b, frame, 0 * p, p, SB, ST, SH, SW)
    else:
        return patch_offset(b, frame, p // W, p % W, SB, ST, SH, SW)


@triton.jit
def load_columns(image, text, offset, valid, begin, over_norm, C, COLS: tl.constexpr, WARPS: tl.constexpr):
    """Some channels of x [DEEP, WARPS, COLS] and, for each warp, of c^ [WARPS, COLS]: zero where not valid.

    Each warp loads c^ for itself, in the layout of its x: shared by all it would take barriers between the loads of x.
    """
    cols = begin + tl.arange(0, COLS)
    c = text + cols[None, :] + 0 * tl.arange(0, WARPS)[:, None]
    c = tl.load(c, mask=(cols < C)[None, :], other=0.0).to(tl.float32) * over_norm
    mask = valid[:, :, None] & (cols < C)[None, None, :]
    return tl.load(image + offset[:, :, None] + cols[None, None, :], mask=mask, other=0.0).to(tl.float32), c


@triton.jit
def dots_and_squares(
    image, text, offset, valid, over_norm, C,
    DEEP: tl.constexpr, WARPS: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """x_i . c^ and x_i . x_i [DEEP, WARPS]; sums of single channels until the end, so that few numbers cross lanes."""
    dot = tl.zeros([DEEP, WARPS, COLS], tl.float32)
    square = tl.zeros([DEEP, WARPS, COLS], tl.float32)
    for begin in tl.range(0, C, COLS, loop_unroll_factor=UNROLL):
        x, c = load_columns(image, text, offset, valid, begin, over_norm, C, COLS, WARPS)
        dot += x * c[None, :, :]
        square += x * x
    return tl.sum(dot, 2), tl.sum(square, 2)


@triton.jit
def clip_parts(frames, H, W, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """(tiles of a clip, tiles in one of its parts, parts), of its length alone: neighbours must not change its bits."""
    tiles = frames * tl.cdiv(H * W, ROWS)
    steps = tl.cdiv(tiles, PARTS)
    return tiles, steps, tl.cdiv(tiles, steps)


@triton.jit
def clip_statistics(
    partials, clips, b, frames, parts, batch, H, W, RAGGED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr
):
    """(max, sum of exp(logit - max)) of clip b, from its parts in order."""
    pairs = partials + clip_start(clips, b, 3, parts, batch, RAGGED) * 2
    _, _, count = clip_parts(frames, H, W, ROWS, PARTS)
    n = tl.arange(0, PARTS)
    largest = tl.load(pairs + n * 2, mask=n < count, other=float("-inf"))  # [PARTS]
    total = tl.load(pairs + n * 2 + 1, mask=n < count, other=0.0)
    most = tl.max(largest, 0)
    return most, tl.sum(tl.where(largest == float("-inf"), total, total * tl.exp(largest - most)), 0)


@triton.jit
def normalise_frame(
    logits, partials, relevance, clips, frame, batch, parts, T, H, W,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """relevance = exp(logit - max) / sum."""
    b, _ = clip_of(clips, frame, 0, T, batch, BATCH, RAGGED)
    _, frames = clip_frames(clips, b, T, batch, RAGGED)
    largest, total = clip_statistics(partials, clips, b, frames, parts, batch, H, W, RAGGED, ROWS, PARTS)
    start = frame.to(tl.int64) * (H * W)
    for begin in range(0, H * W, CHUNK):
        p = begin + tl.arange(0, CHUNK)
        logit = tl.load(logits + start + p, mask=p < H * W)
        tl.store(relevance + start + p, tl.exp(logit - largest) / total, mask=p < H * W)
