"""What the Triton kernels share: the plan of a call, its clips, and the device functions of patches and windows."""

from __future__ import annotations

import contextlib
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shapes import Window, frame_counts, largest_window, most_windows, output_shape, ragged_outputs


class Config(NamedTuple):
    """Tile sizes; every kernel reads its own from here."""

    row_elements: int = 8192  # patches x channels in one tile of whole rows
    patches: int = 8  # patches in one tile of the pooling backward
    bytes: int = 512  # of one patch in one tile of the pooling kernels
    partials: int = 2048  # most programs, and so partial results, for one clip
    warps: int = 4


CONFIG = Config()


class Plan(NamedTuple):
    """Frames and windows of a call.

    clips: int32 [B, 4]: first frame, frames, first output frame, frames in the largest window; None: dense.
    slots: int64 [B]: where the windows of a clip begin in the scratch of the backward; None: dense.
    """

    batch: int
    frames: int  # of the longest clip
    height: int
    width: int
    clips: Tensor | None
    slots: Tensor | None = None
    outputs: int = 0  # output frames in all
    scratch: int = 0  # slots in all: for each window as many as the largest window of its clip has patches
    window: tuple[int, ...] = ()  # five triples, named in `axes`
    kernel: bool = False  # kernel_size and stride, not output_size

    @property
    def ragged(self) -> dict:
        padded = triton.next_power_of_2(self.batch)
        return dict(clips=self.clips, batch=self.batch, BATCH=padded, RAGGED=self.clips is not None)

    @property
    def windows(self) -> int:
        return self.outputs * self.window[1] * self.window[2]

    @property
    def volume(self) -> int:
        return self.window[9] * self.window[10] * self.window[11]


def make_plan(x: Tensor, cu_frames: Tensor | None, window: Window | None = None) -> Plan:
    """The plan for x [B, T, H, W, channels], or [F, H, W, channels] with `cu_frames`."""
    height, width = x.shape[-3:-1]
    counts = [x.shape[1]] * x.shape[0] if cu_frames is None else frame_counts(cu_frames, x.shape[0])
    plan = Plan(len(counts), max(counts), height, width, None)
    if window is not None and window.output_size and (plan.frames + 1) * (window.output_size[0] + 1) >= 2**31:
        raise ValueError(
            f"output_size must have fewer frames with backend='triton', got {window.output_size[0]} for a clip of "
            f"{plan.frames}, whose product passes 2**31; use backend='reference'"
        )
    outputs, spans, slots = ([0] * len(counts) for _ in range(3))
    if window is not None:
        grid = output_shape((plan.frames, height, width), *window)
        largest = largest_window(plan.frames, height, width, window)
        outputs = ragged_outputs(counts, height, width, window)
        spans = [largest_window(n, height, width, window)[0] for n in counts]
        slots = [n * span * grid[1] * grid[2] * largest[1] * largest[2] for n, span in zip(outputs, spans)]
        kernel, stride = window.kernel_size or (0, 0, 0), window.stride or (1, 1, 1)
        most = most_windows(set(counts), height, width, window)
        plan = plan._replace(
            outputs=sum(outputs), scratch=sum(slots), window=(*grid, *kernel, *stride, *largest, *most),
            kernel=bool(window.kernel_size),
        )  # fmt: skip
    if cu_frames is None:
        return plan
    clips = torch.tensor([_starts(counts), counts, _starts(outputs), spans], dtype=torch.int32).T.contiguous()
    firsts = torch.tensor(_starts(slots))
    return plan._replace(clips=clips.to(x.device, non_blocking=True), slots=firsts.to(x.device, non_blocking=True))


def _starts(sizes: list[int]) -> list[int]:
    return [0, *accumulate(sizes[:-1])]


def strides(x: Tensor | None, plan: Plan) -> tuple[int, ...]:
    """Of (batch, frame, row, column), in elements; ragged tensors have no batch axis."""
    if x is None:
        return (0, 0, 0, 0)
    return x.stride()[:4] if plan.clips is None else (0, *x.stride()[:3])


def axes(plan: Plan) -> dict:
    """Sizes along (T, H, W): outputs O, kernel K, stride J (jump), largest window L, most windows on a patch M."""
    names = ["TO", "HO", "WO", "KT", "KH", "KW", "JT", "JH", "JW", "LT", "LH", "LW", "MT", "MH", "MW"]
    return dict(zip(names, plan.window), T=plan.frames, H=plan.height, W=plan.width, KERNEL=plan.kernel)


def launch(kernel, grid: tuple[int, ...], device: torch.device, arguments: dict, warps: int = CONFIG.warps) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, num_warps=warps, enable_fp_fusion=True)


@triton.jit
def find_clip(clips, b, T, RAGGED: tl.constexpr):
    """(first frame, frames, first output) of clip b; dense clips start at frame 0 of their own batch index."""
    if RAGGED:
        return tl.load(clips + 4 * b), tl.load(clips + 4 * b + 1), tl.load(clips + 4 * b + 2)
    else:
        return 0 * b, T + 0 * b, 0 * b


@triton.jit
def clip_start(b, first, T, H, W, RAGGED: tl.constexpr):
    """Where the patches of clip b begin in a contiguous [B, T, H, W] or [F, H, W]."""
    if RAGGED:
        return first.to(tl.int64) * H * W
    else:
        return b.to(tl.int64) * T * H * W


@triton.jit
def clip_of_output(clips, output, TO, batch, BATCH: tl.constexpr, RAGGED: tl.constexpr):
    """The clip that an output frame belongs to."""
    if RAGGED:
        rows = tl.arange(0, BATCH)
        firsts = tl.load(clips + 4 * rows + 2, mask=rows < batch, other=2147483647)  # [BATCH]
        return tl.sum((firsts <= output).to(tl.int32), 0) - 1
    else:
        return output // TO


@triton.jit
def clip_slots(clips, slots, b, TO, HO, WO, LT, LH, LW, RAGGED: tl.constexpr):
    """(first slot of clip b, slots of each of its windows) in the scratch of the backward."""
    if RAGGED:
        return tl.load(slots + b), tl.load(clips + 4 * b + 3) * LH * LW
    else:
        return b.to(tl.int64) * TO * HO * WO * LT * LH * LW, LT * LH * LW + 0 * b


@triton.jit
def axis_begin(o, size, outputs, kernel, stride, KERNEL: tl.constexpr):
    if KERNEL:
        return o * stride
    else:
        return o * size // outputs


@triton.jit
def axis_end(o, size, outputs, kernel, stride, KERNEL: tl.constexpr):
    if KERNEL:
        return o * stride + kernel
    else:
        return ((o + 1) * size + outputs - 1) // outputs


@triton.jit
def axis_first(i, size, outputs, kernel, stride, KERNEL: tl.constexpr):
    """The first window that holds position i."""
    if KERNEL:
        return tl.where(i < kernel, 0, (i - kernel) // stride + 1)
    else:
        return i * outputs // size


@triton.jit
def axis_last(i, size, outputs, kernel, stride, KERNEL: tl.constexpr):
    """One past the last window that holds position i; at or below axis_first in a gap."""
    if KERNEL:
        return tl.minimum(i // stride + 1, outputs)
    else:
        return ((i + 1) * outputs + size - 1) // size


@triton.jit
def patch_offset(b, frame, row, column, SB, ST, SH, SW):
    """Offset of a patch in elements, in 64 bits: an hour of video has more than 2**31."""
    return b.to(tl.int64) * SB + frame.to(tl.int64) * ST + row.to(tl.int64) * SH + column.to(tl.int64) * SW
