"""What the ops are measured against: the original's way to compute them, and the reference, for torch.compile.

All peers of an op take its tensors, channels last, and return one tensor, as the op does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppllava_kernels.backends import reference
from ppllava_kernels.shapes import make_window

from .shapes import OPS, Shape, Triple

LOGIT_SCALE, TEMPERATURE = 100.0, 0.01
Peer = Callable[..., Tensor]


def original_pool3d(
    values: Tensor,  # [N, D, T, H, W]
    weights: Tensor | None,  # [N, T, H, W]
    kernel_size: Triple,
    stride: Triple,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """PPLLaVA's pooling: every window of every channel is copied, then weighted and summed."""
    if weights is None:
        weights = values.new_ones(values.shape[:1] + values.shape[2:])
    for axis, (k, s) in enumerate(zip(kernel_size, stride), start=1):
        values, weights = values.unfold(axis + 1, k, s), weights.unfold(axis, k, s)
    rows = values.contiguous().flatten(5)  # [N, D, To, Ho, Wo, K]
    shares = (weights.contiguous().flatten(4) / temperature).softmax(-1)  # [N, To, Ho, Wo, K]
    return (rows * shares.unsqueeze(1)).sum(-1)  # [N, D, To, Ho, Wo]


def original_window(size: Triple, kernel_size: Triple | None, output_size: Triple | None) -> tuple[Triple, Triple]:
    """Kernel and stride of the original. Its output_size takes equal windows; ours are those of AdaptiveAvgPool3d."""
    if kernel_size is not None:
        return kernel_size, kernel_size
    if any(n % o for n, o in zip(size, output_size)):
        raise ValueError(f"the original has other windows where output_size {output_size} does not divide {size}")
    stride = tuple(n // o for n, o in zip(size, output_size))
    return stride, stride


def original_relevance(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    image = image_embeds.flatten(1, 3)  # [B, T*H*W, C]
    image = image / image.norm(p=2, dim=-1, keepdim=True)
    text = text_embeds / text_embeds.norm(p=2, dim=-1, keepdim=True)  # [B, C]
    cosine = torch.einsum("bnc,bc->bn", image, text)  # [B, T*H*W]
    return (cosine * LOGIT_SCALE).softmax(-1).view(image_embeds.shape[:-1])  # [B, T, H, W]


def original_pool(values: Tensor, weights: Tensor, window: dict[str, Triple]) -> Tensor:
    size = tuple(values.shape[1:4])
    kernel_size, stride = original_window(size, window.get("kernel_size"), window.get("output_size"))
    # The original carries its weights in the dtype of the model.
    pooled = original_pool3d(values.permute(0, 4, 1, 2, 3), weights.to(values.dtype), kernel_size, stride)
    return pooled.permute(0, 2, 3, 4, 1)  # [B, To, Ho, Wo, D]


def _original(op: str, window: dict[str, Triple]) -> Peer:
    return {
        "prompt_relevance": original_relevance,
        "weighted_pool3d": lambda values, weights: original_pool(values, weights, window),
        "prompt_guided_pool3d": lambda values, image, text: original_pool(
            values, original_relevance(image, text), window
        ),
    }[op]


def _reference(op: str, window: dict[str, Triple]) -> Peer:
    windows = make_window(**window)
    return {
        "prompt_relevance": lambda image, text: reference.prompt_relevance(image, text, LOGIT_SCALE, None),
        "weighted_pool3d": lambda values, weights: reference.weighted_pool3d(
            values, weights, windows, TEMPERATURE, None
        ),
        "prompt_guided_pool3d": lambda values, image, text: reference.prompt_guided_pool3d(
            values, image, text, LOGIT_SCALE, windows, TEMPERATURE, None
        )[0],
    }[op]


def original(op: str, shape: Shape) -> Peer:
    """The original's eager PyTorch; a ragged batch one video at a time."""
    return _video_by_video(_original(op, shape.window), op, shape)


def plain_reference(op: str, shape: Shape) -> Peer:
    """The reference without the library around it."""
    return _video_by_video(_reference(op, shape.window), op, shape)


def compiled(function: Peer) -> Peer:
    """torch.compile with its defaults, for this one shape, at the first call: to import the compiler takes seconds."""
    wrapped: list[Peer] = []

    def run(*tensors: Tensor) -> Tensor:
        if not wrapped:
            wrapped.append(torch.compile(function, dynamic=False))
        return wrapped[0](*tensors)

    return run


def _video_by_video(function: Peer, op: str, shape: Shape) -> Peer:
    """`function` of dense batches on a ragged one. Lengths are Python integers here, a favour to torch.compile."""
    if not shape.ragged:
        return function
    dense = shape.output_size is not None and op != "prompt_relevance"

    def run(*tensors: Tensor) -> Tensor:
        videos = zip(
            *(
                x.split(1) if name == "text_embeds" else [clip[None] for clip in x.split(shape.frames)]
                for name, x in zip(OPS[op], tensors)
            )
        )
        pooled = [function(*video) for video in videos]  # B x [1, To, Ho, Wo, D]
        return torch.cat(pooled) if dense else torch.cat([x[0] for x in pooled])

    return run
