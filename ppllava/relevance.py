"""Draws how relevant each patch is to the question over the frames that the model saw, as a contact sheet or a clip."""

from __future__ import annotations

import math
import os
import textwrap
import warnings
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

COLORS = "inferno"  # of matplotlib; perceptually uniform, its brightness rises all the way
DECADES = 3  # what is drawn reaches this far below the peak; fainter patches do not move the pooling
DIMMED = 0.6  # of the brightness of a frame stays, so that no white wall outshines the peak
OPACITY = 0.7  # of the color at the peak
WIDTH = 1600  # pixels of a contact sheet
NARROWEST = 16  # to 1; a line of pixels is drawn as wide as that, or the sheet would be none


def scale(relevance: np.ndarray) -> tuple[float, float]:
    """(floor, peak) of relevance maps that are drawn on one scale: what becomes 0, and what becomes 1.

    The floor is the median, or the peak / 10^3 where that is more.
    """
    relevance = np.asarray(relevance, dtype=np.float64)
    peak = float(relevance.max())
    return max(float(np.median(relevance)), peak / 10**DECADES), peak


def intensity(relevance: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Relevance in 0 ... 1, float32 of the same shape:

        v = log(r / floor) / max(log(peak / floor), log 2), clipped to 0 ... 1

    The logarithm, because r is a softmax: log r is the cosine of patch and question times a constant, plus another. So
    a peak a thousand times the median does not hide what is ten times the median, as it would on a linear scale. The
    floor, because half of all patches are below the median, and coloring these would hide the frames. And log 2,
    because a map whose peak is below twice its median has none and should look like it: a constant map is 0 everywhere.

    limits  as `scale` returns them, which is the default; those of several maps together make them comparable
    """
    floor, peak = scale(relevance) if limits is None else limits
    if not peak > 0:
        return np.zeros(np.shape(relevance), dtype=np.float32)
    above = np.log(np.maximum(np.asarray(relevance, dtype=np.float64), floor) / floor)
    return np.clip(above / max(math.log(peak / floor), math.log(2)), 0, 1).astype(np.float32)


def draw(frames: np.ndarray, relevance: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """uint8 [T, H, W, 3]: the frames, dimmed, under the color of their relevance.

        v   = `intensity` of the clip, one scale for all frames, bilinear from [h, w] to [H, W]
        out = (1 - a) * 0.6 * frame + a * color(v),  a = 0.7 * v

    frames     uint8 [T, H, W, 3]
    relevance  float [T, h, w], not negative; softmax probabilities over the clip
    limits     as in `intensity`

    Errors: ValueError for other shapes, dtypes and values; ImportError without matplotlib.
    """
    frames, relevance = np.asarray(frames), np.asarray(relevance)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        got = f"{frames.dtype} of shape {list(frames.shape)}"
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {got}; pass the frames as `read_video` returns them")
    if relevance.ndim != 3 or len(relevance) != len(frames):
        got = list(relevance.shape)
        raise ValueError(
            f"relevance must be [T, h, w] with T = {len(frames)} frames, got {got}; pass the map of this clip"
        )
    if not (np.isfinite(relevance).all() and (relevance >= 0).all()):
        raise ValueError("relevance must be finite and not negative, got other values; pass softmax probabilities")
    palette = _palette()  # [256, 3]
    values = torch.from_numpy(intensity(relevance, limits))[:, None]  # [T, 1, h, w]
    out = np.empty_like(frames)
    for i, frame in enumerate(frames):  # one by one, or 64 frames of 1920 x 1080 would take 2 GB in float32
        shape = frame.shape[:2]
        large = torch.nn.functional.interpolate(values[i : i + 1], size=shape, mode="bilinear", align_corners=False)
        v = large[0, 0].numpy()  # [H, W]
        color = palette[np.rint(255 * v).astype(np.uint8)]  # [H, W, 3]
        alpha = OPACITY * v[..., None]  # [H, W, 1]
        out[i] = np.rint((1 - alpha) * DIMMED * frame + alpha * color)
    return out


def save_png(
    path: str | os.PathLike, frames: Sequence[np.ndarray], timestamps: Sequence[float] | None = None, title: str = ""
) -> None:
    """Write a contact sheet: the frames row by row in about 4:3, each with its time; those beyond 16:1 are squeezed.

    frames      T of uint8 [H, W, 3]
    timestamps  T of seconds; None leaves them out
    title       above the sheet

    Errors: ImportError without matplotlib; OSError where the file cannot be written.
    """
    matplotlib = _matplotlib()
    count, (height, width) = len(frames), frames[0].shape[:2]
    ratio = min(max(height / width, 1 / NARROWEST), NARROWEST)
    columns = min(math.ceil(math.sqrt(4 / 3 * count * ratio)), count)
    rows = math.ceil(count / columns)
    # Inches; a hundred pixels each. A single frame need not be as large as a whole sheet.
    cell = min(WIDTH / 100 / columns, 8.0, 12.0 / ratio)
    label = 0.25 if timestamps is not None else 0.05
    lines = textwrap.wrap(title, max(int(columns * cell * 11), 20))[:4]
    head = 0.25 * len(lines) + 0.1
    size = (columns * cell, rows * (cell * ratio + label) + head)
    figure = matplotlib.figure.Figure(figsize=size, dpi=100)
    for i, frame in enumerate(frames):
        row, column = divmod(i, columns)
        bottom = (rows - 1 - row) * (size[1] - head) / rows
        box = (column / columns, bottom / size[1], 0.98 / columns, cell * ratio / size[1])
        axes = figure.add_axes(box)
        axes.set_axis_off()
        axes.imshow(frame, interpolation="antialiased", aspect="equal" if ratio == height / width else "auto")
        if timestamps is not None:
            axes.set_title(f"{timestamps[i]:.2f} s", fontsize=9, pad=3)
    text = figure.text(0.5, 1 - 0.05 / size[1], "\n".join(lines), fontsize=11, ha="center", va="top")
    text.set_parse_math(False)  # a dollar sign is one
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the title may be in any script
        figure.savefig(path, format="png")


def save_mp4(path: str | os.PathLike, frames: np.ndarray, fps: float) -> None:
    """Write an H.264 clip at `fps` frames a second. An odd height or width grows by its last row or column.

    frames  uint8 [T, H, W, 3]

    Errors: OSError where the file cannot be written, ValueError where PyAV has no H.264 encoder.
    """
    import av

    height, width = frames.shape[1:3]
    rate = Fraction(fps).limit_denominator(1000)
    try:
        with av.open(os.fspath(path), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "18", "preset": "veryfast"})
            stream.width, stream.height = width + width % 2, height + height % 2
            stream.pix_fmt = "yuv420p"  # what browsers play
            for i, frame in enumerate(frames):
                even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # [H, W, 3]
                picture = av.VideoFrame.from_ndarray(even, format="rgb24")
                picture.pts, picture.time_base = i, 1 / rate
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _palette() -> np.ndarray:
    """float32 [256, 3], RGB in 0 ... 255."""
    colors = _matplotlib().colormaps[COLORS](np.arange(256))[:, :3]
    return (255 * colors).astype(np.float32)


def _matplotlib():
    try:
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ImportError("drawing relevance needs matplotlib: pip install matplotlib") from error
    return matplotlib


__all__ = ["draw", "intensity", "save_mp4", "save_png", "scale"]
