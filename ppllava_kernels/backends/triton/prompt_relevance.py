"""r_i = softmax_i(l_i) over one clip, l_i = s cos(x_i, c): two launches, the second of which the pooling op fuses.

The first writes the logits and, for each program, (max, sum of exp) of its patches; the second combines these in a
fixed order. Programs never cross clips.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import CONFIG, clip_start, find_clip, launch, make_plan, patch_offset, strides

EPS = tl.constexpr(1e-12)  # as torch.nn.functional.normalize


@triton.jit
def unit_text(text, b, C, COLS: tl.constexpr):
    """c / max(|c|, eps) [COLS]."""
    cols = tl.arange(0, COLS)
    c = tl.load(text + b.to(tl.int64) * C + cols, mask=cols < C, other=0.0)
    return c / tl.maximum(tl.sqrt(tl.sum(c * c, 0)), EPS)


@triton.jit
def load_patches(image, p, valid, b, first, H, W, SB, ST, SH, SW, C, COLS: tl.constexpr):
    """Rows of x [ROWS, COLS] for the patches p of clip b, zero where not valid."""
    cols = tl.arange(0, COLS)
    offset = patch_offset(b, first + p // (H * W), p // W % H, p % W, SB, ST, SH, SW)
    mask = valid[:, None] & (cols < C)[None, :]
    return tl.load(image + offset[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def full_scale(scale, scale_tensor, HAS_SCALE: tl.constexpr):
    if HAS_SCALE:
        return scale * tl.load(scale_tensor)
    else:
        return scale


@triton.jit
def score_patches(
    image, text, scale_tensor, logits, partials, clips, scale, batch, parts, steps, T, H, W, C, SB, ST, SH, SW,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, HAS_SCALE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    part, b = tl.program_id(0), tl.program_id(1)
    first, frames, _ = find_clip(clips, b, T, RAGGED)
    logits += clip_start(b, first, T, H, W, RAGGED)
    c = unit_text(text, b, C, COLS)
    s = full_scale(scale, scale_tensor, HAS_SCALE)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for step in range(steps):
        p = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        valid = p < frames * H * W
        x = load_patches(image, p, valid, b, first, H, W, SB, ST, SH, SW, C, COLS)
        logit = s * (tl.sum(x * c[None, :], 1) / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), EPS))  # [ROWS]
        tl.store(logits + p, logit, mask=valid)
        new = tl.maximum(largest, tl.max(tl.where(valid, logit, float("-inf")), 0))
        total = tl.where(largest == new, total, total * tl.exp(largest - new))
        total += tl.sum(tl.where(valid, tl.exp(logit - new), 0.0), 0)
        largest = new
    tl.store(partials + (b * parts + part) * 2, largest)
    tl.store(partials + (b * parts + part) * 2 + 1, total)


@triton.jit
def clip_statistics(partials, b, parts, PARTS: tl.constexpr):
    """(max, sum of exp(logit - max)) of clip b, from its programs in order."""
    n = tl.arange(0, PARTS)
    pair = partials + (b * parts + n) * 2
    largest = tl.load(pair, mask=n < parts, other=float("-inf"))  # [PARTS]
    total = tl.load(pair + 1, mask=n < parts, other=0.0)
    most = tl.max(largest, 0)
    return most, tl.sum(tl.where(largest == float("-inf"), total, total * tl.exp(largest - most)), 0)


@triton.jit
def normalise_block(
    logits, partials, relevance, clips, part, b, parts, steps, T, H, W,
    RAGGED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    first, frames, _ = find_clip(clips, b, T, RAGGED)
    start = clip_start(b, first, T, H, W, RAGGED)
    largest, total = clip_statistics(partials, b, parts, PARTS)
    for step in range(steps):
        p = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        valid = p < frames * H * W
        logit = tl.load(logits + start + p, mask=valid)
        tl.store(relevance + start + p, tl.exp(logit - largest) / total, mask=valid)


@triton.jit
def normalise_patches(
    logits, partials, relevance, clips, batch, parts, steps, T, H, W,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    part, b = tl.program_id(0), tl.program_id(1)
    normalise_block(logits, partials, relevance, clips, part, b, parts, steps, T, H, W, RAGGED, ROWS, PARTS)


@triton.jit
def grad_sums(
    grad, relevance, partials, clips, batch, parts, steps, T, H, W,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """partials[b, part] = sums of r_i dr_i and r_i over the program's patches; see relevance_backward for float64."""
    part, b = tl.program_id(0), tl.program_id(1)
    first, frames, _ = find_clip(clips, b, T, RAGGED)
    start = clip_start(b, first, T, H, W, RAGGED)
    sum = tl.full([], 0.0, tl.float64)
    total = tl.full([], 0.0, tl.float64)
    for step in range(steps):
        p = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        valid = p < frames * H * W
        r = tl.load(relevance + start + p, mask=valid, other=0.0).to(tl.float64)
        sum += tl.sum(r * tl.load(grad + start + p, mask=valid, other=0.0), 0)
        total += tl.sum(r, 0)
    tl.store(partials + (b * parts + part) * 2, sum)
    tl.store(partials + (b * parts + part) * 2 + 1, total)


@triton.jit
def relevance_backward(
    grad, relevance, image, text, scale_tensor, partials, grad_image, text_sums, scale_sums, clips, scale, batch, parts,
    steps, T, H, W, C, SB, ST, SH, SW, GB, GT, GH, GW,
    BATCH: tl.constexpr, RAGGED: tl.constexpr, HAS_SCALE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    # Where one r is almost 1 its dr - m is far smaller than dr, so that m and the difference are computed in float64.
    # dl_i = r_i (dr_i - m),  m = sum_j r_j dr_j;  dcos_i = s dl_i;  ds = sum_i dl_i cos_i
    # dx_i = dcos_i (c^ - cos_i x^_i) / |x_i|;  dc^ = sum_i dcos_i x^_i
    part, b = tl.program_id(0), tl.program_id(1)
    first, frames, _ = find_clip(clips, b, T, RAGGED)
    start = clip_start(b, first, T, H, W, RAGGED)
    n, cols = tl.arange(0, PARTS), tl.arange(0, COLS)
    pair = partials + (b * parts + n) * 2
    total = tl.sum(tl.load(pair + 1, mask=n < parts, other=0.0), 0)
    mean = tl.sum(tl.load(pair, mask=n < parts, other=0.0), 0) / total
    c = unit_text(text, b, C, COLS)
    s = full_scale(scale, scale_tensor, HAS_SCALE)
    text_sum = tl.zeros([COLS], tl.float32)
    scale_sum = tl.full([], 0.0, tl.float64)
    for step in range(steps):
        p = (part * steps + step) * ROWS + tl.arange(0, ROWS)
        valid = p < frames * H * W
        x = load_patches(image, p, valid, b, first, H, W, SB, ST, SH, SW, C, COLS)
        norm = tl.sqrt(tl.sum(x * x, 1))  # [ROWS]
        inverse = 1.0 / tl.maximum(norm, EPS)
        cosine = tl.sum(x * c[None, :], 1) * inverse
        r = tl.load(relevance + start + p, mask=valid, other=0.0)
        grad_logit = r * (tl.load(grad + start + p, mask=valid, other=0.0).to(tl.float64) - mean)
        scale_sum += tl.sum(tl.where(valid, grad_logit * cosine, 0.0), 0)
        factor = s * grad_logit.to(tl.float32) * inverse
        text_sum += tl.sum(tl.where(valid[:, None], factor[:, None] * x, 0.0), 0)
        # A zero embedding gets no gradient.
        factor = tl.where(norm <= EPS, 0.0, factor)
        dx = factor[:, None] * (c[None, :] - (cosine * inverse)[:, None] * x)
        offset = patch_offset(b, first + p // (H * W), p // W % H, p % W, GB, GT, GH, GW)
        mask = valid[:, None] & (cols < C)[None, :]
        tl.store(grad_image + offset[:, None] + cols[None, :], dx.to(grad_image.dtype.element_ty), mask=mask)
    row = (b * parts + part).to(tl.int64)
    tl.store(text_sums + row * C + cols, text_sum, mask=cols < C)
    tl.store(scale_sums + row, scale_sum)


def tiling(plan, channels: int) -> dict:
    """Patches per tile, tiles per program and programs per clip, such that no clip has more than CONFIG.partials."""
    cols = triton.next_power_of_2(channels)
    rows = max(1, CONFIG.row_elements // cols)
    patches = plan.frames * plan.height * plan.width
    steps = triton.cdiv(patches, rows * CONFIG.partials)
    return dict(parts=triton.cdiv(patches, rows * steps), steps=steps, ROWS=rows), cols


def score(image_embeds, text_embeds, scale_tensor, scale, plan):
    """logits [B, T, H, W], partials [B, parts, 2] and the tiling; the first launch."""
    tiles, cols = tiling(plan, image_embeds.shape[-1])
    logits = image_embeds.new_empty(image_embeds.shape[:-1], dtype=torch.float32)
    partials = logits.new_empty(plan.batch, tiles["parts"], 2)
    sb, st, sh, sw = strides(image_embeds, plan)
    arguments = dict(
        image=image_embeds, text=text_embeds.float().contiguous(), scale_tensor=scale_tensor, logits=logits,
        partials=partials, scale=scale, T=plan.frames, H=plan.height, W=plan.width, C=image_embeds.shape[-1],
        SB=sb, ST=st, SH=sh, SW=sw, HAS_SCALE=scale_tensor is not None, COLS=cols, **plan.ragged, **tiles,
    )  # fmt: skip
    launch(score_patches, (tiles["parts"], plan.batch), image_embeds.device, arguments)
    return logits, partials, tiles


def prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames):
    plan = make_plan(image_embeds, cu_frames)
    logits, partials, tiles = score(image_embeds, text_embeds, scale_tensor, scale, plan)
    relevance = torch.empty_like(logits)
    arguments = dict(
        logits=logits, partials=partials, relevance=relevance, T=plan.frames, H=plan.height, W=plan.width,
        PARTS=triton.next_power_of_2(tiles["parts"]), **plan.ragged, **tiles,
    )  # fmt: skip
    launch(normalise_patches, (tiles["parts"], plan.batch), logits.device, arguments)
    return relevance


def prompt_relevance_backward(grad, relevance, image_embeds, text_embeds, scale_tensor, scale, cu_frames):
    plan = make_plan(image_embeds, cu_frames)
    tiles, cols = tiling(plan, image_embeds.shape[-1])
    grid, channels = (tiles["parts"], plan.batch), image_embeds.shape[-1]
    sums = relevance.new_empty(*grid[::-1], 2, dtype=torch.float64)  # [B, parts, 2]
    text_sums = relevance.new_empty(*grid[::-1], channels)  # [B, parts, C]
    scale_sums = torch.empty_like(sums[..., 0])  # [B, parts]
    grad_image = image_embeds.new_empty(image_embeds.shape)
    text = text_embeds.float().contiguous()
    shared = dict(
        grad=grad.contiguous(), relevance=relevance, partials=sums, T=plan.frames, H=plan.height, W=plan.width,
        **plan.ragged, **tiles,
    )  # fmt: skip
    launch(grad_sums, grid, grad.device, shared)
    sb, st, sh, sw = strides(image_embeds, plan)
    gb, gt, gh, gw = strides(grad_image, plan)
    arguments = dict(
        image=image_embeds, text=text, scale_tensor=scale_tensor, grad_image=grad_image, text_sums=text_sums,
        scale_sums=scale_sums, scale=scale, C=channels, SB=sb, ST=st, SH=sh, SW=sw, GB=gb, GT=gt, GH=gh, GW=gw,
        HAS_SCALE=scale_tensor is not None, COLS=cols, PARTS=triton.next_power_of_2(tiles["parts"]),
    )  # fmt: skip
    launch(relevance_backward, grid, grad.device, shared | arguments)
    # dc = (dc^ - (dc^ . c^) c^) / |c|, for B rows: nothing worth a kernel.
    norm = torch.linalg.vector_norm(text, dim=-1, keepdim=True)  # [B, 1]
    unit, grad_text = text / norm.clamp_min(EPS.value), text_sums.sum(1)  # [B, C]
    grad_text -= (grad_text * unit).sum(-1, keepdim=True) * unit
    grad_text = torch.where(norm > EPS.value, grad_text / norm, 0.0).to(text_embeds.dtype)
    return grad_image, grad_text, scale_sums.sum().float()
