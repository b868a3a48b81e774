"""What the compiled kernels want to know of the clips and windows of a call; remembered, since calls repeat.

Small calls are bound by the host: new_empty(*shape) takes 1 us, new_empty(shape) with a torch.Size 3.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ..shapes import (
    Window,
    check_axes,
    check_fits,
    check_sizes,
    frame_counts,
    largest_window,
    output_shape,
    ragged_outputs,
)


class Plan(NamedTuple):
    arguments: tuple[Window, tuple[int, ...]]  # of the kernels: the window, and the frames of each clip
    pooled_shape: tuple[int, ...]
    slots: int  # scratch of the backward: for each window as many as the largest window of its clip has patches

    @property
    def lead(self) -> tuple[int, ...]:
        """pooled_shape without its channels: the windows."""
        return self.pooled_shape[:-1]


def clip_counts(x: Tensor, cu_frames: Tensor | None) -> tuple[int, ...]:
    """Frames of each clip of x [B, T, H, W, D] or [F, H, W, D]."""
    check_axes(x.shape, cu_frames is not None)
    return (x.shape[1],) * x.shape[0] if cu_frames is None else tuple(frame_counts(cu_frames, x.shape[0]))


def make_plan(values: Tensor, window: Window, cu_frames: Tensor | None) -> Plan:
    packed = None if cu_frames is None else clip_counts(values, cu_frames)
    return _plan(values.shape, packed, window)


@lru_cache(maxsize=256)
def _plan(shape: tuple[int, ...], packed: tuple[int, ...] | None, window: Window) -> Plan:
    """packed: frames of each clip of a ragged batch."""
    check_axes(shape, packed is not None)
    check_sizes(window)
    height, width, channels = shape[-3:]
    if packed is None:
        check_fits("the clip", shape[1:4], window)
    counts = (shape[1],) * shape[0] if packed is None else packed
    outputs = ragged_outputs(list(counts), height, width, window)
    spans = [largest_window(n, height, width, window)[0] for n in counts]
    frames, rows, columns = output_shape((max(counts), height, width), *window)
    high, wide = largest_window(max(counts), height, width, window)[1:]
    lead = (len(counts), frames) if packed is None or window.output_size else (sum(outputs),)
    slots = sum(n * span for n, span in zip(outputs, spans)) * rows * columns * high * wide
    return Plan((window, counts), (*lead, rows, columns, channels), slots)
