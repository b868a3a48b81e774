"""What the Triton kernels share: launch knobs, the plan of a call, its clips, and the device functions of windows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...compat import current_raw_stream
from ...shapes import Window, check_sizes, largest_window, most_windows, output_shape, ragged_outputs
from ..plan import clip_counts


# As triton.cdiv and triton.next_power_of_2, which take microseconds.
def ceil_div(n: int, size: int) -> int:
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The next one from n on."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Tile:
    """Rows in one tile of a kernel, bytes of each, and warps: fixed, since tuning at run time stalls the first call.

    A lane takes 16 bytes of a row at a time and a warp 512. One warp with few rows keeps the sum over rows within each
    lane; several warps with 512 bytes of a row keep the sum over channels within each warp: neither takes a barrier.
    """

    rows: int
    bytes: int
    warps: int
    registers: int | None = None  # most of a thread; None lets ptxas spill a few for one more block on a processor

    def channels(self, x: Tensor) -> int:
        return min(self.bytes // x.element_size(), power_of_2(x.shape[-1]))


@dataclass(frozen=True)
class Product:
    """Of a matrix product: rows and columns of the result in one program, and the depth that is loaded at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    registers: int | None = None

    def arguments(self, x: Tensor) -> dict:
        """Blocks, and how exact the product of x is: in float32 as PyTorch's own on CUDA."""
        exact = x.element_size() == 2 or torch.backends.cuda.matmul.fp32_precision != "tf32"
        return dict(
            BLOCK_M=self.rows, BLOCK_N=self.columns, BLOCK_K=self.depth, PRECISION="ieee" if exact else "tf32",
            WIDEN=_interpreted and x.dtype == torch.bfloat16,
        )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The launch knobs of every kernel, for an H200; bytes and not channels, so that they hold for any dtype."""

    score_patches: Tile = Tile(8, 512, 4, 144)
    relevance_backward: Tile = Tile(16, 512, 4)
    finish_backward: Tile = Tile(64, 128, 4)
    pool_windows: Tile = Tile(4, 1024, 1)
    backward_windows: Tile = Tile(2, 4096, 4, 96)
    backward_patches: Tile = Tile(1, 2048, 1, 96)  # where no patch lies in two windows, else
    backward_overlap: Tile = Tile(4, 1024, 1, 96)
    product: Product = Product(128, 128, 64, 8)  # of 16 bits, on wgmma
    exact_product: Product = Product(64, 64, 32, 4)  # of float32, whose every bit counts
    row_statistics: Tile = Tile(8, 2048, 4)
    hidden_backward: Tile = Tile(4, 1024, 4, 168)
    neighbours: int = 4  # patches in one program of backward_patches
    frames: Tile = Tile(512, 4, 4)  # of the kernels that read no channels
    lanes: int = 32  # terms of a weighted sum that are found at a time
    parts: int = 512  # most programs of score_patches, and so partial results, for one clip


CONFIG = Config()
_interpreted = triton.knobs.runtime.interpret  # there tl.dot takes bfloat16 for integers, so that it gets float32


def product_of(x: Tensor) -> Product:
    return CONFIG.product if x.element_size() == 2 else CONFIG.exact_product


@dataclass(frozen=True, eq=False)
class Plan:
    """Frames and windows of a call, and the arguments that its launches have in common."""

    counts: tuple[int, ...]  # frames of each clip
    frames: int  # in all
    parts: int  # in all
    windows: int  # in all
    slots: int  # in all
    most: int  # windows that one patch lies in, at most
    lead: tuple[int, ...]  # the shape of what is pooled, without its channels
    sizes: dict  # H, W and along (T, H, W): outputs O, kernel K, stride J (jump), largest window L, most on a patch M
    clips: dict  # what finds the clip of a program, besides the clip table
    # The clip table [6, B], None for dense clips: first frame, frames, first pooled frame, first part, frames in the
    # largest window, first slot. Slots: scratch of the backward, as many for each window as its clip's largest needs.
    table: tuple[tuple[int, ...], ...] | None
    uploaded: dict = field(default_factory=dict)  # for each device (stream that brought the table there, tensor)


def make_plan(x: Tensor, cu_frames: Tensor | None, window: Window | None = None) -> Plan:
    """The plan for x [B, T, H, W, channels] or, with `cu_frames`, [F, H, W, channels]; remembered: calls repeat."""
    return _plan(clip_counts(x, cu_frames), *x.shape[-3:-1], window, cu_frames is None)


@lru_cache(maxsize=256)
def _plan(counts: tuple[int, ...], height: int, width: int, window: Window | None, dense: bool) -> Plan:
    if window is not None:
        check_sizes(window)
    batch, frames = len(counts), max(counts)
    parts = [parts_of(n, height * width) for n in counts]
    outputs, spans, slots = ([0] * batch for _ in range(3))
    lead, windows, most, sizes = (), 0, (1, 1, 1), dict(H=height, W=width)
    if window is not None:
        if window.output_size and (frames + 1) * (window.output_size[0] + 1) >= 2**31:
            raise ValueError(
                f"output_size must have fewer frames with backend='triton', got {window.output_size[0]} for a clip of "
                f"{frames}, whose product passes 2**31; use backend='reference'"
            )
        grid = output_shape((frames, height, width), *window)
        largest = largest_window(frames, height, width, window)
        outputs = ragged_outputs(list(counts), height, width, window)
        spans = [largest_window(n, height, width, window)[0] for n in counts]
        slots = [n * span * grid[1] * grid[2] * largest[1] * largest[2] for n, span in zip(outputs, spans)]
        lead = (batch, *grid) if dense or window.output_size else (sum(outputs), *grid[1:])
        windows = sum(outputs) * grid[1] * grid[2]
        most = most_windows(set(counts), height, width, window)
        triples = dict(O=grid, K=window.kernel_size or (0, 0, 0), J=window.stride or (1, 1, 1), L=largest, M=most)
        sizes |= {letter + axis: n for letter, triple in triples.items() for axis, n in zip("THW", triple)}
        sizes |= dict(KERNEL=bool(window.kernel_size))
    # parts, T: of each dense clip; a clip table has its own.
    clips = dict(batch=batch, T=frames, parts=parts[0], BATCH=power_of_2(batch), PARTS=CONFIG.parts)
    rows = _starts(counts), counts, _starts(outputs), _starts(parts), spans, _starts(slots)
    table = None if dense else tuple(map(tuple, rows))
    clips |= dict(RAGGED=not dense)
    return Plan(counts, sum(counts), sum(parts), windows, sum(slots), prod(most), lead, sizes, clips, table)


def _starts(sizes) -> list[int]:
    return [0, *accumulate(sizes[:-1])]


def parts_of(frames: int, patches: int) -> int:
    """Programs of score_patches for a clip, as in clip_parts."""
    tiles = frames * ceil_div(patches, CONFIG.score_patches.rows)
    return ceil_div(tiles, ceil_div(tiles, CONFIG.parts))


_captured = []  # clip tables that a CUDA graph reads at every replay: never freed


def clip_arguments(plan: Plan, device: torch.device) -> dict:
    """plan.clips and the clip table, int64 [6, B], uploaded once, by the stream that reads it."""
    if plan.table is None:
        return plan.clips | dict(clips=None)
    cuda = device.type == "cuda"
    stream, table = plan.uploaded.get(device, (None, None))
    if cuda and torch.cuda.is_current_stream_capturing():
        # A replay would upload freed memory. What the warm-up uploaded is there, by whichever stream, and stays.
        if table is None:
            raise RuntimeError(
                f"cu_frames must be known before a CUDA graph captures a call with backend='triton', got clips of "
                f"{list(plan.counts)} frames for the first time; make the same call once before the capture"
            )
        if not any(table is x for x in _captured):
            _captured.append(table)
        return plan.clips | dict(clips=table)
    current = current_raw_stream(device.index) if cuda else None
    if table is None or stream != current:
        # Not pinned, so that CUDA has read the host's memory when this returns.
        table = torch.tensor(plan.table).to(device, non_blocking=True)
        plan.uploaded[device] = current, table
    return plan.clips | dict(clips=table)


def grid_strides(letter: str, x: Tensor | None, plan: Plan) -> dict:
    """Of (batch, frame, row, column), in elements; ragged tensors have no batch axis."""
    b, t, h, w = (0,) * 4 if x is None else x.stride()[:4] if plan.table is None else (0, *x.stride()[:3])
    return {letter + "B": b, letter + "T": t, letter + "H": h, letter + "W": w}


def launch(kernel, programs: int, device: torch.device, arguments: dict, tile: Tile) -> None:
    """Launch with those of `arguments` that the kernel has, on grid x: y and z have room for 65,535 programs alone."""
    if programs >= 2**31:
        raise RuntimeError(
            f"backend='triton' could not run its kernel, which takes {programs} programs of at most 2**31 - 1; "
            "split the batch"
        )
    options = dict(num_warps=tile.warps, enable_fp_fusion=True)
    if tile.registers and torch.version.hip is None:
        options["maxnreg"] = tile.registers
    run, given = kernel[(programs,)], [arguments[name] for name in kernel.arg_names]
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        run(*given, **options)
    else:
        with torch.cuda.device(device):
            run(*given, **options)


# Rows of the clip table are numbers here and in no constants: Triton compares each constant that a kernel uses at each
# launch, which costs as much as four arguments.


@triton.jit
def clip_of(clips, index, ROW: tl.constexpr, each, batch, BATCH: tl.constexpr, RAGGED: tl.constexpr):
    """(clip, place in it) of frame (ROW 0), pooled frame (ROW 2) or part (ROW 3) `index`; a dense clip has `each`."""
    if RAGGED:
        rows = tl.arange(0, BATCH)
        firsts = tl.load(clips + ROW * batch + rows, mask=rows < batch, other=2147483647)  # [BATCH]
        b = tl.sum((firsts <= index).to(tl.int32), 0) - 1
        return b, index - tl.load(clips + ROW * batch + b).to(tl.int32)
    else:
        return index // each, index % each


@triton.jit
def clip_frames(clips, b, T, batch, RAGGED: tl.constexpr):
    """(frame axis index of the first frame of clip b, its frames); dense clips have an axis each."""
    if RAGGED:
        return tl.load(clips + b).to(tl.int32), tl.load(clips + batch + b).to(tl.int32)
    else:
        return 0 * b, T + 0 * b


@triton.jit
def clip_start(clips, b, ROW: tl.constexpr, each, batch, RAGGED: tl.constexpr):
    """Where clip b begins among all frames, pooled frames or parts, by ROW as in clip_of, in 64 bits."""
    if RAGGED:
        return tl.load(clips + ROW * batch + b)
    else:
        return b.to(tl.int64) * each


@triton.jit
def clip_slots(clips, b, batch, OT, OH, OW, LT, LH, LW, RAGGED: tl.constexpr):
    """(first slot of clip b, slots of each of its windows), in 64 bits."""
    if RAGGED:
        return tl.load(clips + 5 * batch + b), tl.load(clips + 4 * batch + b) * LH * LW
    else:
        volume = (0 * b + LT).to(tl.int64) * LH * LW
        return b.to(tl.int64) * OT * OH * OW * volume, volume


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
        return tl.minimum(i // stride + 1, (size - kernel) // stride + 1)
    else:
        return ((i + 1) * outputs + size - 1) // size


@triton.jit
def patch_offset(b, frame, row, column, SB, ST, SH, SW):
    """Offset of a patch in elements, in 64 bits: an hour of video has more than 2**31."""
    return b.to(tl.int64) * SB + frame.to(tl.int64) * ST + row.to(tl.int64) * SH + column.to(tl.int64) * SW
