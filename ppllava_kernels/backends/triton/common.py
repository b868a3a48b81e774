"""What the Triton kernels share: the plan of a call, its clips, and the device functions of patches and windows."""

from __future__ import annotations

import contextlib
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
    bytes: int = 1024  # of one patch in one tile of the pooling kernels
    partials: int = 2048  # most programs, and so partial results, for one clip
    warps: int = 4


CONFIG = Config()


class Plan(NamedTuple):
    """Frames and windows of a call. `clips` int32 [B, 3]: first frame, frames, first output frame; None: dense."""

    batch: int
    frames: int  # of the longest clip
    height: int
    width: int
    clips: Tensor | None
    outputs: int = 0  # output frames in all
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
    outputs = [0] * len(counts) if window is None else ragged_outputs(counts, height, width, window)
    clips = None
    if cu_frames is not None:
        firsts = [[sum(n[:b]) for b in range(len(n))] for n in (counts, outputs)]
        clips = torch.tensor([firsts[0], counts, firsts[1]], dtype=torch.int32).T.contiguous()
        clips = clips.to(x.device, non_blocking=True)
    plan = Plan(len(counts), max(counts), height, width, clips, sum(outputs))
    if window is None:
        return plan
    kernel, stride = window.kernel_size or (0, 0, 0), window.stride or (1, 1, 1)
    grid = output_shape((plan.frames, height, width), *window)
    bounds = [bound(set(counts), height, width, window) for bound in (largest_window, most_windows)]
    return plan._replace(window=(*grid, *kernel, *stride, *bounds[0], *bounds[1]), kernel=bool(window.kernel_size))


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
        return tl.load(clips + 3 * b), tl.load(clips + 3 * b + 1), tl.load(clips + 3 * b + 2)
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
        firsts = tl.load(clips + 3 * rows + 2, mask=rows < batch, other=2147483647)  # [BATCH]
        return tl.sum((firsts <= output).to(tl.int32), 0) - 1
    else:
        return output // TO


@triton.jit
def axis_begin(o, size, outputs, kernel, stride, KERNEL: tl.constexpr):
    if KERNEL:
        return o * stride
    else:
        return (o.to(tl.int64) * size // outputs).to(tl.int32)


@triton.jit
def axis_end(o, size, outputs, kernel, stride, KERNEL: tl.constexpr):
    if KERNEL:
        return o * stride + kernel
    else:
        return (((o + 1).to(tl.int64) * size + outputs - 1) // outputs).to(tl.int32)


@triton.jit
def axis_first(i, size, outputs, kernel, stride, KERNEL: tl.constexpr):
    """The first window that holds position i."""
    if KERNEL:
        return tl.where(i < kernel, 0, (i - kernel) // stride + 1)
    else:
        return (i.to(tl.int64) * outputs // size).to(tl.int32)


@triton.jit
def axis_last(i, size, outputs, kernel, stride, KERNEL: tl.constexpr):
    """One past the last window that holds position i; at or below axis_first in a gap."""
    if KERNEL:
        return tl.minimum(i // stride + 1, outputs)
    else:
        return (((i + 1).to(tl.int64) * outputs + size - 1) // size).to(tl.int32)


@triton.jit
def patch_offset(b, frame, row, column, SB, ST, SH, SW):
    """Offset of a patch in elements, in 64 bits: an hour of video has more than 2**31."""
    return b.to(tl.int64) * SB + frame.to(tl.int64) * ST + row.to(tl.int64) * SH + column.to(tl.int64) * SW
