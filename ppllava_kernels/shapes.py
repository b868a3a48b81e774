"""Shape arithmetic of windows and of ragged batches: pure functions, shared by checks, fakes, backends and models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

Triple = tuple[int, int, int]


class Window(NamedTuple):
    """The pooling windows over (T, H, W): either `kernel_size` and `stride`, or `output_size`; what is unused is ()."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    output_size: tuple[int, ...]


def triple(name: str, size: int | Sequence[int]) -> Triple:
    """`size` as three positive integers for (T, H, W); one integer stands for all three axes."""
    if type(size) is tuple and len(size) == 3:  # the usual ones, in a quarter of the time
        t, h, w = size
        if type(t) is type(h) is type(w) is int and 0 < t < 2**31 and 0 < h < 2**31 and 0 < w < 2**31:
            return size
    sizes = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size,) * 3
    # A SymInt is an integer, too, while torch.compile traces.
    if any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt, Integral)) for n in sizes):
        raise TypeError(f"{name} must be an int or three ints for (T, H, W), got {size!r}; pass for example (2, 3, 3)")
    if len(sizes) != 3 or any(n < 1 or n >= 2**31 for n in sizes):
        raise ValueError(f"{name} must be three positive ints for (T, H, W), got {size!r}; pass for example (2, 3, 3)")
    return tuple(n if isinstance(n, (int, torch.SymInt)) else int(n) for n in sizes)


def make_window(
    kernel_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    output_size: int | Sequence[int] | None = None,
) -> Window:
    """The window that exactly one of `kernel_size` (with an optional `stride`) and `output_size` describes."""
    if (kernel_size is None) == (output_size is None):
        got = "neither" if kernel_size is None else f"kernel_size={kernel_size!r} and output_size={output_size!r}"
        raise ValueError(f"exactly one of kernel_size and output_size must be given, got {got}; pass one of them")
    if output_size is not None:
        if stride is not None:
            raise ValueError(
                f"stride must be None where output_size sets the windows, got stride={stride!r}; "
                "drop it or pass kernel_size instead of output_size"
            )
        size = triple("output_size", output_size)
        if size[0] * size[1] * size[2] >= 2**31:
            raise ValueError(
                f"output_size must give fewer than 2**31 tokens per video, got {size}; pass for example (16, 8, 8)"
            )
        return Window((), (), size)
    kernel = triple("kernel_size", kernel_size)
    return Window(kernel, kernel if stride is None else triple("stride", stride), ())


def output_shape(size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], output_size: Sequence[int]):
    """(To, Ho, Wo) of the pooled clip for a clip of `size` (T, H, W); leftover frames, rows and columns are dropped."""
    if output_size:
        return tuple(output_size)
    return tuple((n - k) // s + 1 for n, k, s in zip(size, kernel_size, stride))


def span(n: int, outputs: int) -> int:
    """Most of n positions in one of `outputs` adaptive windows: exact where one divides the other, else a bound of it.

    With the arguments swapped: most windows on one position.
    """
    if n % outputs == 0:
        return n // outputs
    # ceil((o+1)*n/O) - floor(o*n/O) is at most ceil(n/O) + 1.
    return 1 if outputs % n == 0 else min(n, (n - 1) // outputs + 2)


def largest_window(frames: int, height: int, width: int, window: Window) -> Triple:
    """Patches along (T, H, W) of the largest window in a clip of this size; for output_size, a bound of it."""
    if window.kernel_size:
        return window.kernel_size
    return tuple(span(n, outputs) for n, outputs in zip((frames, height, width), window.output_size))


def most_windows(counts: Iterable[int], height: int, width: int, window: Window) -> Triple:
    """Windows along (T, H, W) that one patch lies in, at most."""
    if window.kernel_size:
        return tuple((k + s - 1) // s for k, s in zip(window.kernel_size, window.stride))
    frames, rows, columns = window.output_size
    return max(span(frames, n) for n in counts), span(rows, height), span(columns, width)


def pooled_size(
    size: Sequence[int],
    kernel_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    output_size: int | Sequence[int] | None = None,
) -> Triple:
    """Number of pooled tokens along (T, H, W) for a clip of `size` (T, H, W) patches.

    The arguments are those of :func:`weighted_pool3d`; the product of the result is the number of visual tokens.

    Raises:
        ValueError: for arguments that the ops would reject.
    """
    window = make_window(kernel_size, stride, output_size)
    check_fits("the clip", triple("size", size), window)
    return output_shape(size, *window)


def check_fits(what: str, size: Sequence[int], window: Window) -> None:
    """Raise where `kernel_size` is larger than the (T, H, W) of `what`."""
    if not window.kernel_size:
        return
    (t, h, w), (kernel_t, kernel_h, kernel_w) = size, window.kernel_size
    if kernel_t > t or kernel_h > h or kernel_w > w:
        kernel, got = tuple(window.kernel_size), tuple(size)
        raise ValueError(
            f"kernel_size must fit into {what}, got kernel_size {kernel} for (T, H, W) = {got}; "
            "use a smaller kernel_size, or output_size, which fits any clip"
        )


def empty_shape(shape: Sequence[int], window: Window, ragged: bool) -> tuple[int, ...]:
    """The shape of what is pooled of no video: of values [0, T, H, W, D], or [0, H, W, D] where ragged."""
    if 0 in shape[1:]:
        raise ValueError(
            f"only the batch of a call may be empty, got shape {list(shape)}; leave out videos without patches"
        )
    height, width, channels = shape[-3:]
    # Packed clips that are not there have no length that the kernel could not fit into.
    frames = shape[1] if not ragged else window.kernel_size[0] if window.kernel_size else 1
    check_fits("the clip", (frames, height, width), window)
    frames, rows, columns = output_shape((frames, height, width), *window)
    lead = (0,) if ragged and window.kernel_size else (0, frames)
    return *lead, rows, columns, channels


def check_sizes(window: Window) -> None:
    """Raise where `window` is none that `make_window` makes: torch.ops take any numbers."""
    sizes = [*window.kernel_size, *window.stride, *window.output_size]
    if [len(size) for size in window] not in ([3, 3, 0], [0, 0, 3]) or any(not 0 < n < 2**31 for n in sizes):
        got = ", ".join(f"{name}={list(size)}" for name, size in zip(Window._fields, window))
        raise ValueError(
            "either kernel_size and stride or output_size must be three positive ints below 2**31, and the other "
            f"empty, got {got}; pass for example [2, 3, 3], [2, 3, 3] and []"
        )


def check_axes(shape: Sequence[int], ragged: bool) -> None:
    """Raise where clips have neither the axes [B, T, H, W, channels] nor, if ragged, [F, H, W, channels]."""
    if len(shape) != (4 if ragged else 5):
        how = "[F, H, W, channels] with" if ragged else "[B, T, H, W, channels] without"
        raise ValueError(
            f"the clips of a call must be {how} cu_frames, got shape {list(shape)}; pack the frames of all videos "
            "exactly where cu_frames is given"
        )


def frame_counts(cu_frames: Tensor, total: int) -> list[int]:
    """Frames of each video, read from `cu_frames` int32 [B+1]: starts at 0, never decreases, ends at `total`.

    A `cu_frames` on a GPU costs one synchronisation here; on the CPU none.
    """
    if cu_frames.dtype != torch.int32 or cu_frames.dim() != 1 or cu_frames.shape[0] == 0:
        raise ValueError(
            f"cu_frames must be int32 [B+1], got {cu_frames.dtype} of shape {list(cu_frames.shape)}; "
            "pass 0 and the cumulative sum of the frames of each video"
        )
    ends = cu_frames.tolist()  # [B+1]
    if ends[0] != 0:
        raise ValueError(f"cu_frames must start at 0, got {ends[0]}; prepend the 0 of the first video")
    for b, (start, end) in enumerate(pairwise(ends)):
        if end < start:
            raise ValueError(f"cu_frames must not decrease, got {start} then {end} for video {b}; pass cumulative sums")
        if end == start:
            raise ValueError(f"cu_frames must give every video a frame, got none for video {b}; leave that video out")
    if ends[-1] != total:
        raise ValueError(f"cu_frames must end at F = {total}, the packed frames, got {ends[-1]}; check the last length")
    return [end - start for start, end in pairwise(ends)]


def ragged_outputs(counts: list[int], height: int, width: int, window: Window) -> list[int]:
    """Pooled frames of each video of a ragged batch, given its frames; raises for a video shorter than the kernel."""
    for b, frames in enumerate(counts):
        check_fits(f"video {b} of cu_frames", (frames, height, width), window)
    return [output_shape((frames, height, width), *window)[0] for frames in counts]
