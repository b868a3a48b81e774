"""r_i = softmax_i(s cos(P LN(x_i), c)) over one clip: the product with P, whose rows are never written.

Four launches: the statistics of the layer norm; dots with c and squares of e = P LN(x), for some channels of e each;
their sums as logits; the softmax.
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
    patch_offset,
    product_of,
)
from .prompt_relevance import normalise_patches
from .scores import EPS, clip_parts, full_scale, text_norm


@triton.jit
def packed_offset(n, frames, H, W, SB, ST, SH, SW):
    """Offset of patch n of all clips; frames: on the frame axis."""
    frame = n // (H * W)
    return patch_offset(frame // frames, frame % frames, n // W % H, n % W, SB, ST, SH, SW)


@triton.jit
def row_statistics(
    features, statistics, rows, frames, H, W, V, SB, ST, SH, SW, eps, BLOCK_R: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """(mean, 1 / standard deviation) of each patch: [2, rows]."""
    n = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    x = features + packed_offset(n, frames, H, W, SB, ST, SH, SW)
    sum = tl.zeros([BLOCK_R, COLS], tl.float32)
    for begin in range(0, V, COLS):
        v = begin + tl.arange(0, COLS)
        mask = (n < rows)[:, None] & (v < V)[None, :]
        sum += tl.load(x[:, None] + v[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(sum, 1) / V
    square = tl.zeros([BLOCK_R, COLS], tl.float32)
    for begin in range(0, V, COLS):
        v = begin + tl.arange(0, COLS)
        mask = (n < rows)[:, None] & (v < V)[None, :]
        away = tl.load(x[:, None] + v[None, :], mask=mask, other=0.0).to(tl.float32) - mean[:, None]
        square += tl.where(mask, away * away, 0.0)
    tl.store(statistics + n, mean, mask=n < rows)
    tl.store(statistics + rows + n, 1.0 / tl.sqrt(tl.sum(square, 1) / V + eps), mask=n < rows)


@triton.jit
def clips_of(clips, frame, batch, BITS: tl.constexpr):
    """The clip of each frame, by halving."""
    low, high = 0 * frame, 0 * frame + batch
    for _ in tl.static_range(BITS):
        middle = (low + high) // 2
        begins = tl.load(clips + middle).to(tl.int32) <= frame
        low, high = tl.where(begins, middle, low), tl.where(begins, high, middle)
    return low


@triton.jit
def guide_product(
    features, statistics, norm_weight, norm_bias, guide, text, partials, clips, rows, frames, batch, H, W, V, C,
    SB, ST, SH, SW, TB, RAGGED: tl.constexpr, BITS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """partials [C / BLOCK_N, 2, rows]: e_i . c and e_i . e_i over BLOCK_N channels."""
    # Neighbours read the same patches.
    block = tl.program_id(0) % tl.cdiv(C, BLOCK_N)
    n = tl.program_id(0) // tl.cdiv(C, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = block * BLOCK_N + tl.arange(0, BLOCK_N)
    x = features + packed_offset(n, frames, H, W, SB, ST, SH, SW)
    mean = tl.load(statistics + n, mask=n < rows, other=0.0)[:, None]
    deviation = tl.load(statistics + rows + n, mask=n < rows, other=0.0)[:, None]
    embeds = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, V, BLOCK_K):
        v = begin + tl.arange(0, BLOCK_K)
        mask = (n < rows)[:, None] & (v < V)[None, :]
        normed = tl.load(x[:, None] + v[None, :], mask=mask, other=0.0).to(tl.float32)
        # Zero beyond V: in 16 bits it could be infinite there, which no weight of zero makes zero.
        normed = tl.where((v < V)[None, :], (normed - mean) * deviation, 0.0)
        if HAS_WEIGHT:
            normed *= tl.load(norm_weight + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            normed += tl.load(norm_bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
        mask = (v < V)[:, None] & (c < C)[None, :]
        weight = tl.load(guide + c[None, :].to(tl.int64) * V + v[:, None], mask=mask, other=0.0)
        if WIDEN:
            weight = weight.to(tl.float32)
        normed = normed.to(weight.dtype)
        embeds = tl.dot(normed, weight, embeds, input_precision=PRECISION)
    if RAGGED:
        b = clips_of(clips, tl.minimum(n, rows - 1) // (H * W), batch, BITS)
    else:
        b = tl.minimum(n, rows - 1) // (H * W) // frames
    at = text + b[:, None].to(tl.int64) * TB + c[None, :]
    prompt = tl.load(at, mask=(c < C)[None, :], other=0.0).to(tl.float32)
    out = partials + block.to(tl.int64) * 2 * rows + n
    tl.store(out, tl.sum(embeds * prompt, 1), mask=n < rows)
    tl.store(out + rows, tl.sum(embeds * embeds, 1), mask=n < rows)


@triton.jit
def combine_scores(
    text, scale_tensor, partials, cosines, logits, statistics, clips, scale, batch, parts, blocks, rows, T, H, W, C, TB,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, HAS_SCALE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Cosines, logits, and for each part of a clip (max, sum of exp(logit - max))."""
    b, part = clip_of(clips, tl.program_id(0), 3, parts, batch, BATCH, RAGGED)
    _, frames = clip_frames(clips, b, T, batch, RAGGED)
    tiles, steps, _ = clip_parts(frames, H, W, ROWS, PARTS)
    start = clip_start(clips, b, 0, T, batch, RAGGED) * H * W
    norm = tl.maximum(text_norm(text + b.to(tl.int64) * TB, C, CHUNK), EPS)
    s = full_scale(scale, scale_tensor, HAS_SCALE)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for step in range(0, tl.minimum(steps, tiles - part * steps)):
        tile = part * steps + step
        p = tile % tl.cdiv(H * W, ROWS) * ROWS + tl.arange(0, ROWS)
        valid = p < H * W
        n = start + (tile // tl.cdiv(H * W, ROWS)).to(tl.int64) * (H * W) + p
        dot = tl.zeros([ROWS], tl.float32)
        square = tl.zeros([ROWS], tl.float32)
        for block in range(0, blocks):
            pair = partials + n + (0 * b + block).to(tl.int64) * 2 * rows
            dot += tl.load(pair, mask=valid, other=0.0)
            square += tl.load(pair + rows, mask=valid, other=0.0)
        cosine = dot / norm / tl.maximum(tl.sqrt(square), EPS)
        tl.store(cosines + n, cosine, mask=valid)
        logit = s * cosine
        tl.store(logits + n, logit, mask=valid)
        new = tl.maximum(largest, tl.where(valid, logit, float("-inf")))
        total = tl.where(largest == new, total, total * tl.exp(largest - new))
        total += tl.where(valid, tl.exp(logit - new), 0.0)
        largest = new
    most = tl.max(largest, 0)
    total = tl.where(largest == float("-inf"), total, total * tl.exp(largest - most))
    pair = statistics + tl.program_id(0).to(tl.int64) * 2
    tl.store(pair, most)
    tl.store(pair + 1, tl.sum(total, 0))


def guide_relevance(
    features, text_embeds, scale_tensor, scale, norm_weight, norm_bias, norm_eps, guide_weight, cu_frames
):
    plan, device, product = make_plan(features, cu_frames), features.device, product_of(guide_weight)
    channels, width = guide_weight.shape  # C, V
    rows, blocks = plan.frames * features.shape[-3] * features.shape[-2], ceil_div(channels, product.columns)
    if rows >= 2**31:
        raise RuntimeError(
            f"features must have fewer than 2**31 patches with backend='triton', got {rows}; split the batch"
        )
    norm_weight, norm_bias = (x if x is None else x.contiguous() for x in (norm_weight, norm_bias))
    relevance = features.new_empty(features.shape[:-1], dtype=torch.float32)
    statistics = relevance.new_empty(2, rows)
    partials = relevance.new_empty(blocks, 2, rows)
    cosines, logits, parts = (
        torch.empty_like(relevance),
        torch.empty_like(relevance),
        relevance.new_empty(plan.parts, 2),
    )
    tile = CONFIG.row_statistics
    arguments = product.arguments(guide_weight) | clip_arguments(plan, device) | plan.sizes | dict(
        features=features, statistics=statistics, norm_weight=norm_weight, norm_bias=norm_bias, eps=norm_eps,
        guide=guide_weight.contiguous(), text=text_embeds, partials=partials, rows=rows, V=width, C=channels,
        frames=plan.frames if cu_frames is not None else plan.counts[0], TB=text_embeds.stride(0),
        HAS_WEIGHT=norm_weight is not None, HAS_BIAS=norm_bias is not None, BITS=len(plan.counts).bit_length(),
        BLOCK_R=tile.rows, COLS=tile.channels(features), **grid_strides("S", features, plan),
    )  # fmt: skip
    launch(row_statistics, ceil_div(rows, tile.rows), device, arguments, tile)
    launch(guide_product, ceil_div(rows, product.rows) * blocks, device, arguments, product)
    arguments |= dict(
        scale_tensor=scale_tensor, scale=scale, HAS_SCALE=scale_tensor is not None, cosines=cosines, logits=logits,
        statistics=parts, blocks=blocks, ROWS=CONFIG.score_patches.rows, CHUNK=CONFIG.frames.rows,
    )  # fmt: skip
    launch(combine_scores, plan.parts, device, arguments, CONFIG.frames)
    arguments |= dict(partials=parts, relevance=relevance)
    launch(normalise_patches, plan.frames, device, arguments, CONFIG.frames)
    return relevance, cosines
