"""What the compiled kernels want to know of the clips and windows of a call; remembered, since calls repeat."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ..shapes import Window, frame_counts, largest_window, output_shape, ragged_outputs


class Plan(NamedTuple):
    """`arguments` are those of the kernels, in the order in which they take them."""

    # kernel and stride, zeros for adaptive; windows along (T, H, W); patches in the largest along (H, W)
    window: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]  # frames of each clip
    outputs: tuple[int, ...]  # pooled frames of each clip
    spans: tuple[int, ...]  # frames in the largest window of each clip
    pooled_shape: tuple[int, ...]
    slots: int  # scratch of the backward: for each window as many as the largest window of its clip has patches

    @property
    def arguments(self) -> tuple:
        return self[:4]


def clip_counts(x: Tensor, cu_frames: Tensor | None) -> tuple[int, ...]:
    """Frames of each clip of x [B, T, H, W, D] or [F, H, W, D]."""
    return (x.shape[1],) * x.shape[0] if cu_frames is None else tuple(frame_counts(cu_frames, x.shape[0]))


def make_plan(values: Tensor, window: Window, cu_frames: Tensor | None) -> Plan:
    return _plan(clip_counts(values, cu_frames), *values.shape[-3:], window, cu_frames is None)


@lru_cache(maxsize=256)
def _plan(counts: tuple[int, ...], height: int, width: int, channels: int, window: Window, dense: bool) -> Plan:
    none, size = (0, 0, 0), (max(counts), height, width)
    outputs = tuple(ragged_outputs(list(counts), height, width, window))
    spans = tuple(largest_window(n, height, width, window)[0] for n in counts)
    frames, rows, columns = output_shape(size, *window)
    high, wide = largest_window(*size, window)[1:]
    sizes = (window.kernel_size or none, window.stride or none, (frames, rows, columns), (high, wide))
    lead = (len(counts), frames) if dense or window.output_size else (sum(outputs),)
    slots = sum(n * span for n, span in zip(outputs, spans)) * rows * columns * high * wide
    return Plan(sizes, counts, outputs, spans, (*lead, rows, columns, channels), slots)
