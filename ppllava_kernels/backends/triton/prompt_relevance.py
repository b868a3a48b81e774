"""r_i = softmax_i(l_i) over one clip, l_i = s cos(x_i, c): two launches, the second of which the pooling op fuses.

The first writes the logits and the statistics of each part of a clip, the second combines these. A tile is some patches
of one frame; programs never cross clips.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    CONFIG,
    ceil_div,
    clip_arguments,
    clip_frames,
    clip_of,
    clip_start,
    grid_strides,
    launch,
    make_plan,
)
from .scores import (
    EPS,
    clip_parts,
    dots_and_squares,
    full_scale,
    load_columns,
    normalise_frame,
    text_norm,
    tile_offsets,
    tile_patches,
)


@triton.jit
def score_patches(
    image, text, scale_tensor, logits, partials, clips, scale, batch, parts, T, H, W, C, SB, ST, SH, SW, TB,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, HAS_SCALE: tl.constexpr, FLAT: tl.constexpr, DEEP: tl.constexpr,
    WARPS: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    b, part = clip_of(clips, tl.program_id(0), 3, parts, batch, BATCH, RAGGED)
    first, frames = clip_frames(clips, b, T, batch, RAGGED)
    tiles, steps, _ = clip_parts(frames, H, W, DEEP * WARPS, PARTS)
    logits += clip_start(clips, b, 0, T, batch, RAGGED) * H * W
    text += b.to(tl.int64) * TB
    over_norm = 1.0 / tl.maximum(text_norm(text, C, CHUNK), EPS)
    s = full_scale(scale, scale_tensor, HAS_SCALE)
    largest = tl.full([DEEP, WARPS], float("-inf"), tl.float32)
    total = tl.zeros([DEEP, WARPS], tl.float32)
    for step in range(0, tl.minimum(steps, tiles - part * steps)):
        tile = part * steps + step
        t = tile // tl.cdiv(H * W, DEEP * WARPS)
        p, valid = tile_patches(tile % tl.cdiv(H * W, DEEP * WARPS), H, W, DEEP, WARPS)
        offset = tile_offsets(b, first + t, p, W, SB, ST, SH, SW, FLAT)
        dot, square = dots_and_squares(image, text, offset, valid, over_norm, C, DEEP, WARPS, COLS, UNROLL)
        logit = s * (dot / tl.maximum(tl.sqrt(square), EPS))  # [DEEP, WARPS]
        tl.store(logits + t.to(tl.int64) * (H * W) + p, logit, mask=valid)
        new = tl.maximum(largest, tl.where(valid, logit, float("-inf")))
        total = tl.where(largest == new, total, total * tl.exp(largest - new))
        total += tl.where(valid, tl.exp(logit - new), 0.0)
        largest = new
    most = tl.max(tl.max(largest, 0), 0)
    total = tl.where(largest == float("-inf"), total, total * tl.exp(largest - most))
    pair = partials + tl.program_id(0).to(tl.int64) * 2
    tl.store(pair, most)
    tl.store(pair + 1, tl.sum(tl.sum(total, 0), 0))


@triton.jit
def normalise_patches(
    logits, partials, relevance, clips, batch, parts, T, H, W,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(0)
    normalise_frame(logits, partials, relevance, clips, frame, batch, parts, T, H, W, BATCH, RAGGED, ROWS, PARTS, CHUNK)


@triton.jit
def grad_sums(grad, relevance, sums, H, W, CHUNK: tl.constexpr):
    """sums[frame] = sums of r_i dr_i and r_i over a frame; see relevance_backward for float64."""
    frame = tl.program_id(0).to(tl.int64)
    weighted = tl.zeros([CHUNK], tl.float64)
    total = tl.zeros([CHUNK], tl.float64)
    for begin in range(0, H * W, CHUNK):
        p = begin + tl.arange(0, CHUNK)
        r = tl.load(relevance + frame * (H * W) + p, mask=p < H * W, other=0.0).to(tl.float64)
        weighted += r * tl.load(grad + frame * (H * W) + p, mask=p < H * W, other=0.0)
        total += r
    tl.store(sums + frame * 2, tl.sum(weighted, 0))
    tl.store(sums + frame * 2 + 1, tl.sum(total, 0))


@triton.jit
def relevance_backward(
    grad, relevance, image, text, scale_tensor, sums, grad_image, text_sums, scale_sums, clips, scale, batch,
    T, H, W, C, SB, ST, SH, SW, GB, GT, GH, GW, TB,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, HAS_SCALE: tl.constexpr, FLAT: tl.constexpr,
    DEEP: tl.constexpr, WARPS: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dx_i, and of a tile the sums of dcos_i x^_i [C] and of dl_i cos_i."""
    # Where one r is almost 1 its dr - m is far smaller than dr, so that m and the difference are computed in float64.
    # dl_i = r_i (dr_i - m),  m = sum_j r_j dr_j;  dcos_i = s dl_i;  ds = sum_i dl_i cos_i
    # dx_i = dcos_i (c^ - cos_i x^_i) / |x_i|;  dc^ = sum_i dcos_i x^_i
    tiles = tl.cdiv(H * W, DEEP * WARPS)
    frame = tl.program_id(0) // tiles
    b, t = clip_of(clips, frame, 0, T, batch, BATCH, RAGGED)
    first, frames = clip_frames(clips, b, T, batch, RAGGED)
    weighted = tl.zeros([CHUNK], tl.float64)
    total = tl.zeros([CHUNK], tl.float64)
    for begin in range(0, frames, CHUNK):
        n = begin + tl.arange(0, CHUNK)
        pair = sums + (frame - t + n).to(tl.int64) * 2
        weighted += tl.load(pair, mask=n < frames, other=0.0)
        total += tl.load(pair + 1, mask=n < frames, other=0.0)
    mean = tl.sum(weighted, 0) / tl.sum(total, 0)
    text += b.to(tl.int64) * TB
    over_norm = 1.0 / tl.maximum(text_norm(text, C, CHUNK), EPS)
    s = full_scale(scale, scale_tensor, HAS_SCALE)

    p, valid = tile_patches(tl.program_id(0) % tiles, H, W, DEEP, WARPS)
    offset = tile_offsets(b, first + t, p, W, SB, ST, SH, SW, FLAT)
    dot, square = dots_and_squares(image, text, offset, valid, over_norm, C, DEEP, WARPS, COLS, UNROLL)
    norm = tl.sqrt(square)  # [DEEP, WARPS]
    inverse = 1.0 / tl.maximum(norm, EPS)
    cosine = dot * inverse
    at = frame.to(tl.int64) * (H * W) + p
    r = tl.load(relevance + at, mask=valid, other=0.0)
    grad_logit = r * (tl.load(grad + at, mask=valid, other=0.0).to(tl.float64) - mean)
    row = tl.program_id(0).to(tl.int64)
    tl.store(scale_sums + row, tl.sum(tl.sum(tl.where(valid, grad_logit * cosine, 0.0), 0), 0))
    factor = tl.where(valid, s * grad_logit.to(tl.float32) * inverse, 0.0)
    # A zero embedding gets no gradient.
    dx_factor = tl.where(norm <= EPS, 0.0, factor)
    out = grad_image + tile_offsets(b, first + t, p, W, GB, GT, GH, GW, FLAT)
    for begin in tl.range(0, C, COLS, loop_unroll_factor=UNROLL):
        # Mostly from the first-level cache.
        x, c = load_columns(image, text, offset, valid, begin, over_norm, C, COLS, WARPS)
        cols = begin + tl.arange(0, COLS)
        dx = dx_factor[:, :, None] * (c[None, :, :] - (cosine * inverse)[:, :, None] * x)
        mask = valid[:, :, None] & (cols < C)[None, None, :]
        tl.store(out[:, :, None] + cols[None, None, :], dx.to(grad_image.dtype.element_ty), mask=mask)
        text_sum = tl.sum(tl.sum(factor[:, :, None] * x, 0), 0)  # over patches of a warp, then over warps
        tl.store(text_sums + row * C + cols, text_sum, mask=cols < C)


@triton.jit
def sum_rows(numbers, count, ROWS: tl.constexpr):
    """The sum of float64 numbers [count], in a fixed order."""
    sum = tl.zeros([ROWS], tl.float64)
    for begin in range(0, count, ROWS):
        n = begin + tl.arange(0, ROWS)
        sum += tl.load(numbers + n, mask=n < count, other=0.0)
    return tl.sum(sum, 0)


@triton.jit
def finish_backward(
    text, scale_tensor, text_sums, scale_sums, grad_text, grad_scale, clips, scale, batch, T, C, TB, tiles, rows,
    RAGGED: tl.constexpr, HAS_SCALE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dc = (dc^ - (dc^ . c^) c^) / |c|,  dc^ . c^ = sum_i dcos_i cos_i = s ds, for some channels of a clip; and ds.

    rows: all tiles, in the order of the clips; tiles: those of a frame.
    """
    blocks = tl.cdiv(C, COLS)
    b = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    _, frames = clip_frames(clips, b, T, batch, RAGGED)
    row, count = clip_start(clips, b, 0, T, batch, RAGGED) * tiles, frames * tiles
    sum = tl.zeros([ROWS, COLS], tl.float32)
    for begin in range(0, count, ROWS):
        n = begin + tl.arange(0, ROWS)
        mask = (n < count)[:, None] & (cols < C)[None, :]
        sum += tl.load(text_sums + (row + n)[:, None] * C + cols[None, :], mask=mask, other=0.0)
    text += b.to(tl.int64) * TB
    norm = text_norm(text, C, CHUNK)
    unit = tl.load(text + cols, mask=cols < C, other=0.0).to(tl.float32) / tl.maximum(norm, EPS)
    along = full_scale(scale, scale_tensor, HAS_SCALE) * sum_rows(scale_sums + row, count, CHUNK).to(tl.float32)
    dc = tl.where(norm > EPS, (tl.sum(sum, 0) - along * unit) / norm, 0.0)
    tl.store(grad_text + b.to(tl.int64) * C + cols, dc.to(grad_text.dtype.element_ty), mask=cols < C)
    if tl.program_id(0) == 0:
        tl.store(grad_scale, sum_rows(scale_sums, rows, CHUNK).to(tl.float32))


def tile_arguments(image_embeds, text_embeds, scale_tensor, scale, plan, tile):
    """Arguments of the kernels that read tiles of image_embeds."""
    channels, cols, numbers = image_embeds.shape[-1], tile.channels(image_embeds), grid_strides("S", image_embeds, plan)
    return dict(
        image=image_embeds, text=text_embeds, scale_tensor=scale_tensor, scale=scale, C=channels, COLS=cols,
        DEEP=tile.rows // tile.warps, WARPS=tile.warps, UNROLL=min(4, ceil_div(channels, cols)),
        HAS_SCALE=scale_tensor is not None, CHUNK=CONFIG.frames.rows,
        TB=text_embeds.stride(0), FLAT=numbers["SH"] == plan.sizes["W"] * numbers["SW"], **numbers,
        **clip_arguments(plan, image_embeds.device), **plan.sizes,
    )  # fmt: skip


def score(image_embeds, text_embeds, scale_tensor, scale, plan):
    """logits [B, T, H, W] and partials [parts, 2]; the first launch."""
    tile, device = CONFIG.score_patches, image_embeds.device
    logits = image_embeds.new_empty(image_embeds.shape[:-1], dtype=torch.float32)
    partials = logits.new_empty(plan.parts, 2)
    arguments = tile_arguments(image_embeds, text_embeds, scale_tensor, scale, plan, tile)
    launch(score_patches, plan.parts, device, arguments | dict(logits=logits, partials=partials), tile)
    return logits, partials


def prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames):
    plan, device = make_plan(image_embeds, cu_frames), image_embeds.device
    logits, partials = score(image_embeds, text_embeds, scale_tensor, scale, plan)
    relevance = torch.empty_like(logits)
    arguments = dict(logits=logits, partials=partials, relevance=relevance, ROWS=CONFIG.score_patches.rows)
    arguments |= dict(CHUNK=CONFIG.frames.rows)
    launch(normalise_patches, plan.frames, device, arguments | clip_arguments(plan, device) | plan.sizes, CONFIG.frames)
    return relevance


def prompt_relevance_backward(grad, relevance, image_embeds, text_embeds, scale_tensor, scale, cu_frames):
    plan, tile, device = make_plan(image_embeds, cu_frames), CONFIG.relevance_backward, image_embeds.device
    channels = image_embeds.shape[-1]
    tiles = ceil_div(plan.sizes["H"] * plan.sizes["W"], tile.rows)  # of a frame
    rows = plan.frames * tiles
    sums = relevance.new_empty(plan.frames, 2, dtype=torch.float64)
    text_sums = relevance.new_empty(rows, channels)
    scale_sums = relevance.new_empty(rows, dtype=torch.float64)
    grad_image = image_embeds.new_empty(image_embeds.shape)
    grad_text = text_embeds.new_empty(text_embeds.shape)
    grad_scale = relevance.new_empty(())
    arguments = tile_arguments(image_embeds, text_embeds, scale_tensor, scale, plan, tile) | dict(
        grad=grad.contiguous(), relevance=relevance, sums=sums, text_sums=text_sums, scale_sums=scale_sums,
        grad_image=grad_image, grad_text=grad_text, grad_scale=grad_scale, tiles=tiles, rows=rows,
        **grid_strides("G", grad_image, plan),
    )  # fmt: skip
    launch(grad_sums, plan.frames, device, arguments, CONFIG.frames)
    launch(relevance_backward, rows, device, arguments, tile)
    tile = CONFIG.finish_backward
    arguments |= dict(ROWS=tile.rows, COLS=tile.channels(text_sums))
    programs = text_embeds.shape[0] * ceil_div(channels, arguments["COLS"])
    launch(finish_backward, programs, device, arguments, tile)
    return grad_image, grad_text, grad_scale
