"""Draws how relevant each patch is to the question over the frames that the model saw, as a contact sheet or a clip."""

from __future__ import annotations

import math
import os
import textwrap
import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

COLORS = "cool"  # of matplotlib: cyan to magenta, which few things in a video have, on a dark frame and on a bright one
DECADES = 3  # what is drawn reaches this far below the peak; fainter patches do not move the pooling
OPACITY = 0.75  # of the color at the peak
WIDTH = 1600  # pixels of a contact sheet
LEAST = 5.0  # inches that the colour bar and the sentences below it need
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


def span(relevance: np.ndarray) -> tuple[float, float]:
    """What the first and the last color of maps on one scale stand for, as multiples of the mean patch; (0, 0) where
    all is 0."""
    floor, peak = scale(relevance)
    mean = float(np.mean(np.asarray(relevance, dtype=np.float64)))
    return (floor / mean, max(peak, 2 * floor) / mean) if peak > 0 else (0.0, 0.0)


def draw(frames: np.ndarray, relevance: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """uint8 [T, H, W, 3]: the frames, as bright as they are, under the color of their relevance.

        v   = `intensity` of the clip, one scale for all frames, bilinear from [h, w] to [H, W]
        out = (1 - a) * frame + a * color(v),  a = 0.75 * v

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
    values = intensity(relevance, limits)  # [T, h, w]
    out = np.empty_like(frames)
    for i, frame in enumerate(frames):  # one by one, or 64 frames of 1920 x 1080 would take 2 GB in float32
        size = frame.shape[1::-1]
        v = np.asarray(Image.fromarray(values[i]).resize(size, Image.Resampling.BILINEAR))  # [H, W]
        color = palette[np.rint(255 * v).astype(np.uint8)]  # [H, W, 3]
        alpha = OPACITY * v[..., None]  # [H, W, 1]
        out[i] = np.rint((1 - alpha) * frame + alpha * color)
    return out


def save_png(
    path: str | os.PathLike,
    frames: Sequence[np.ndarray],
    timestamps: Sequence[float] | None = None,
    title: str = "",
    ends: tuple[float, float] | None = None,
    remarks: Sequence[str] = (),
) -> None:
    """Write a contact sheet: the frames row by row in about 4:3, each with its time; those beyond 16:1 are squeezed.

    frames      T of uint8 [H, W, 3]
    timestamps  T of seconds; None leaves them out
    title       above the sheet
    ends        what the colour bar below it begins and ends with, as `span` returns them; None leaves it out
    remarks     sentences below the bar

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
    across = columns * cell if ends is None and not remarks else max(columns * cell, LEAST)
    letters = max(int(across * 11), 20)
    lines = textwrap.wrap(title, letters)[:4]
    below = [line for remark in remarks for line in textwrap.wrap(remark, int(letters * 1.1))]
    head, bar = 0.25 * len(lines) + 0.1, 0.75 if ends is not None and ends[1] > 0 else 0.0
    foot = bar + 0.2 * len(below) + (0.1 if below else 0.0)
    grid = rows * (cell * ratio + label)
    size = (across, grid + head + foot)
    figure = matplotlib.figure.Figure(figsize=size, dpi=100)
    left = (across - columns * cell) / 2
    for i, frame in enumerate(frames):
        row, column = divmod(i, columns)
        bottom = foot + (rows - 1 - row) * (cell * ratio + label)
        box = ((left + column * cell) / across, bottom / size[1], 0.98 * cell / across, cell * ratio / size[1])
        axes = figure.add_axes(box)
        axes.set_axis_off()
        axes.imshow(frame, interpolation="antialiased", aspect="equal" if ratio == height / width else "auto")
        if timestamps is not None:
            axes.set_title(_seconds(timestamps[i]), fontsize=9, pad=3)
    if bar:
        _draw_bar(figure.add_axes((0.5 - 2.2 / across, (foot - 0.3) / size[1], 4.4 / across, 0.16 / size[1])), ends)
    where = dict(ha="center", va="top")
    texts = [
        figure.text(0.5, 1 - 0.05 / size[1], "\n".join(lines), fontsize=11, **where),
        figure.text(0.5, (foot - bar) / size[1], "\n".join(below), fontsize=9, linespacing=1.3, **where),
    ]
    for text in texts:
        text.set_parse_math(False)  # a dollar sign is one
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the title may be in any script
        figure.savefig(path, format="png")


def _draw_bar(axes: Any, ends: tuple[float, float]) -> None:
    """The colors over a grey frame, on the logarithmic scale of `intensity`, with numbers at 1, 2, 5, 10, ..."""
    low, high = ends
    v = np.linspace(0, 1, 256, dtype=np.float32)[:, None]  # [256, 1]
    grey = np.full((256, 3), 128, dtype=np.float32)
    alpha = OPACITY * v
    axes.imshow(
        np.rint((1 - alpha) * grey + alpha * _palette()).astype(np.uint8)[None], aspect="auto", extent=(0, 1, 0, 1)
    )
    steps = [
        m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)
    ]
    known = {step: math.log(step / low) / math.log(high / low) for step in steps}
    inner = {step: place for step, place in known.items() if 0.08 < place < 0.92}
    if len(inner) > 7:
        inner = {step: place for step, place in inner.items() if f"{step:e}"[0] == "1"}
    marks = {low: 0.0, **inner, high: 1.0}
    axes.set_xticks(
        list(marks.values()), [f"{mark:.2g}" if mark < 100 else f"{mark:.0f}" for mark in marks], fontsize=8
    )
    axes.set_yticks([])
    axes.tick_params(length=2, pad=2)
    axes.set_xlabel("relevance, x the mean patch", fontsize=9, labelpad=1)


def _seconds(time: float) -> str:
    text = f"{time:.3f}".rstrip("0").rstrip(".")
    return f"{text} s"


def save_mp4(
    path: str | os.PathLike, frames: np.ndarray, fps: float, title: str = "", remarks: Sequence[str] = ()
) -> None:
    """Write an H.264 clip at `fps` frames a second. An odd height or width grows by its last row or column.

    frames   uint8 [T, H, W, 3]
    title    of the file, in its tags
    remarks  sentences, in its tag "comment"

    Errors: OSError where the file cannot be written, ValueError where PyAV has no H.264 encoder.
    """
    import av

    height, width = frames.shape[1:3]
    rate = Fraction(fps).limit_denominator(1000)
    try:
        with av.open(os.fspath(path), "w", format="mp4") as container:
            container.metadata.update(title=title, comment=" ".join(remarks))
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


__all__ = ["draw", "intensity", "save_mp4", "save_png", "scale", "span"]
