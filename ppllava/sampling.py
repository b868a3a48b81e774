"""Which frames of a clip to look at: pure functions of counts and timestamps; `ppllava.video` decodes the choice."""

from __future__ import annotations

import math
import numbers

import numpy as np

ROUNDING = 0.5e-3 + 1e-6  # seconds; Matroska and FLV store timestamps rounded to 1 ms


def sample_uniform(num_frames: int, total_frames: int) -> np.ndarray:
    """int64 [num_frames]: the rule PPLLaVA and PLLaVA sample with.

        segment = (total_frames - 1) / num_frames
        index_k = floor(segment / 2) + round(k * segment)        k = 0 .. num_frames - 1, halves round to even

    A clip shorter than `num_frames` repeats frames, as theirs does: the model always sees `num_frames` of them.
    """
    for name, value in (("num_frames", num_frames), ("total_frames", total_frames)):
        check_count(name, value)
    segment = (total_frames - 1) / num_frames
    return int(segment / 2) + np.round(segment * np.arange(num_frames)).astype(np.int64)  # [num_frames]


def sample_range(timestamps: np.ndarray, start: float | None = None, end: float | None = None) -> tuple[int, int]:
    """(first, last): the frames on screen at `start` and at `end` seconds; None means the clip's own start or end.

    timestamps  float64 [N], seconds, ascending. The frame on screen at t is the last one with timestamp <= t; the last
    frame stays for the average frame time. An `end` after the clip means its last frame, a `start` after it is a
    ValueError.
    """
    timestamps = np.asarray(timestamps, dtype=np.float64)  # [N]
    begin, finish = 0.0 if start is None else start, math.inf if end is None else end
    if not 0 <= begin <= finish:
        raise ValueError(f"start and end are seconds and need 0 <= start <= end, got start={start}, end={end}")
    over = float(timestamps[-1] + (timestamps[-1] - timestamps[0]) / max(len(timestamps) - 1, 1))
    if begin > over + ROUNDING:
        raise ValueError(f"start={start} is after the end of the clip at {over:.3f} s; pass an earlier start")
    first, last = _on_screen(timestamps, np.array([begin, finish]))
    return int(first), int(last)


def sample_fps(
    fps: float,
    timestamps: np.ndarray,
    max_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """int64 [T]: the frames on screen at start, start + 1/fps, start + 2/fps, ... up to `end` or the last timestamp.

    timestamps  float64 [N], seconds, ascending, evenly spaced or not. An `fps` above the clip's own repeats frames.
    Where T would pass `max_frames`, that many of those times are kept, spread by `sample_uniform`.
    """
    timestamps = np.asarray(timestamps, dtype=np.float64)  # [N]
    check_fps(fps)
    fps = float(fps)
    if max_frames is not None:
        check_count("max_frames", max_frames)
    sample_range(timestamps, start, end)  # the same errors
    begin, finish = start or 0.0, min(math.inf if end is None else end, float(timestamps[-1]))
    count = 1 + int(max(finish - begin + ROUNDING, 0.0) * fps)
    kept = count if max_frames is None else min(count, max_frames)
    if kept > 1 << 20:
        raise ValueError(f"fps={fps} asks for {kept} frames of this clip; pass a lower fps or max_frames")
    steps = sample_uniform(kept, count) if kept < count else np.arange(count)  # [T]
    return _on_screen(timestamps, begin + steps / fps)


def sample_frames(
    timestamps: np.ndarray,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    start: float | None = None,
    end: float | None = None,
) -> np.ndarray:
    """int64 [T]: `sample_uniform` of the frames in `sample_range`, or `sample_fps`."""
    check_rate(num_frames, fps)
    if fps is not None:
        return sample_fps(fps, timestamps, max_frames, start, end)
    if num_frames > 1 << 20:
        raise ValueError(f"num_frames must be at most {1 << 20}, got {num_frames}; pass fewer")
    first, last = sample_range(timestamps, start, end)
    return first + sample_uniform(num_frames, last - first + 1)


def check_rate(num_frames: int | None, fps: float | None) -> None:
    """ValueError or TypeError unless exactly one of both is given, and valid."""
    if (num_frames is None) == (fps is None):
        got = "neither" if fps is None else f"num_frames={num_frames} and fps={fps}"
        raise ValueError(f"exactly one of num_frames and fps must be given, got {got}; pass one, such as num_frames=32")
    if fps is None:
        check_count("num_frames", num_frames)
    else:
        check_fps(fps)


def check_count(name: str, value: int) -> None:
    """TypeError unless `value` is an integer, Python's or NumPy's; ValueError below 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}; pass a whole number such as 8")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}; pass a whole number such as 8")


def check_fps(fps: float) -> None:
    """TypeError unless `fps` is a real number, Python's or NumPy's; ValueError unless it is positive and finite."""
    if not isinstance(fps, numbers.Real) or isinstance(fps, bool):
        raise TypeError(f"fps must be a number of frames per second, got {fps!r}; pass a number such as 2.0")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be a positive number of frames per second, got {fps}; pass a number such as 2.0")


def _on_screen(timestamps: np.ndarray, times: np.ndarray) -> np.ndarray:
    return np.maximum(np.searchsorted(timestamps, times + ROUNDING, side="right") - 1, 0).astype(np.int64)  # [T]
