"""What the compiled kernels want to know of the clips and windows of a call; remembered, since calls repeat.

Small calls are bound by the host: new_empty(*shape) takes 1 us, new_empty(shape) with a torch.Size 3.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ..shapes import Window, frame_counts, largest_window, output_shape, ragged_outputs


class Plan(NamedTuple):
    # Those of the kernels, in the order in which they take them:
    #   kernel and stride, zeros for adaptive; windows along (T, H, W); patches in the largest along (H, W)
    #   frames of each clip
    #   pooled frames of each clip
    #   frames in the largest window of each clip
    arguments: tuple[tuple, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    pooled_shape: tuple[int, ...]
    slots: int  # scratch of the backward: for each window as many as the largest window of its clip has patches


def clip_counts(x: Tensor, cu_frames: Tensor | None) -> tuple[int, ...]:
    """Frames of each clip of x [B, T, H, W, D] or [F, H, W, D]."""
    return (x.shape[1],) * x.shape[0] if cu_frames is None else tuple(frame_counts(cu_frames, x.shape[0]))


def make_plan(values: Tensor, window: Window, cu_frames: Tensor | None) -> Plan:
    return _plan(values.shape, None if cu_frames is None else clip_counts(values, cu_frames), window)


@lru_cache(maxsize=256)
def _plan(shape: tuple[int, ...], packed: tuple[int, ...] | None, window: Window) -> Plan:
    """packed: frames of each clip of a ragged batch."""
    height, width, channels = shape[-3:]
    counts = (shape[1],) * shape[0] if packed is None else packed
    none, size = (0, 0, 0), (max(counts), height, width)
    outputs = tuple(ragged_outputs(list(counts), height, width, window))
    spans = tuple(largest_window(n, height, width, window)[0] for n in counts)
    frames, rows, columns = output_shape(size, *window)
    high, wide = largest_window(*size, window)[1:]
    sizes = (window.kernel_size or none, window.stride or none, (frames, rows, columns), (high, wide))
    lead = (len(counts), frames) if packed is None or window.output_size else (sum(outputs),)
    slots = sum(n * span for n, span in zip(outputs, spans)) * rows * columns * high * wide
    return Plan((sizes, counts, outputs, spans), (*lead, rows, columns, channels), slots)
