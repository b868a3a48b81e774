"""`ppllava ask --relevance`: where the drawings go, checked before anything is loaded, and what is drawn there."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .asking import Medium
from .console import Exit, Failure, is_memory, sentence
from .processing_ppllava import PPLlavaProcessor


def drawings(path: Path, media: list[str], kinds: list[str]) -> list[Path]:
    """The file of each drawing: `path`, or path-1, path-2, ... for several media. Nothing is written yet.

    Errors: Failure where one of them is no .png or .mp4, is one of the media, or cannot be written.
    """
    if path.suffix.lower() not in (".png", ".mp4"):
        raise Failure(Exit.USAGE, f"--relevance must end in .png or .mp4, got '{path}'; the ending says what is drawn")
    if not os.path.isdir(path.parent):
        raise Failure(Exit.USAGE, f"--relevance must be in a folder that exists, got '{path}'; make '{path.parent}'")
    if path.suffix.lower() == ".mp4" and "image" in kinds:
        image = media[kinds.index("image")]
        raise Failure(Exit.USAGE, f"--relevance draws images as .png only, got '{path}' for '{image}'; write .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise Failure(Exit.USAGE, "--relevance needs matplotlib, which is missing; pip install matplotlib")
    numbers = range(1, len(media) + 1)
    targets = [path] if len(media) == 1 else [path.with_stem(f"{path.stem}-{number}") for number in numbers]
    for target in targets:
        _check_target(target, media)
    return targets


def _check_target(target: Path, media: list[str]) -> None:
    exists = os.path.exists(target)
    for medium in media:
        if exists and os.path.exists(medium) and os.path.samefile(target, medium):
            raise Failure(
                Exit.USAGE, f"--relevance must not overwrite what is asked about, got '{target}'; choose another name"
            )
    try:
        if exists and not os.path.isfile(target):  # a folder, or a pipe, which would wait for a reader
            raise OSError("it is no regular file")
        new = not os.path.lexists(target)
        with open(target, "ab"):
            pass
        if new:
            os.remove(target)
    except OSError as error:
        reason = error.strerror or sentence(error)
        raise Failure(
            Exit.USAGE,
            f"--relevance must be a file that can be written, got '{target}' ({reason}); choose another place",
        ) from error


def draw_relevance(
    targets: list[Path],
    groups: list[list[Medium]],
    features: dict[str, Any],
    processor: PPLlavaProcessor,
    question: str,
    preset: str | None = None,
) -> Iterator[Path]:
    """Write the relevance of each file to its target; each target as soon as it is there.

    preset  the name of the model where its weights are random, which the drawing then says
    """
    for target, (medium, relevance, shared) in zip(targets, _relevance(groups, features), strict=True):
        in_views = medium.kind == "image" and len(shared) == 1 and processor.image_grid_pinpoints
        cropped = processor.resize_mode == "crop" and not in_views
        frames = _center(medium.frames) if cropped else medium.frames
        try:
            _draw(target, medium, frames, relevance, shared, question, preset)
        except BaseException as error:
            with suppress(OSError):
                os.remove(target)  # half of it
            if is_memory(error) or not isinstance(error, (OSError, ValueError)):
                raise
            reason = getattr(error, "strerror", None) or sentence(error)
            raise Failure(
                Exit.MEDIA,
                f"the answer is complete, but '{target}' cannot be drawn ({reason}); choose another place for "
                "--relevance",
            ) from error
        yield target


def _draw(
    target: Path,
    medium: Medium,
    frames: np.ndarray,
    relevance: np.ndarray,
    shared: np.ndarray,
    question: str,
    preset: str | None,
) -> None:
    from .relevance import draw, save_mp4, save_png, scale, span

    name = os.fsencode(os.path.basename(medium.path)).decode(errors="replace")  # it may be no text
    title, ends = f"{name}: \u201c{question}\u201d", span(shared)
    what = "image" if medium.kind == "image" else "clip"
    whose = f"this {what}" if relevance is shared else f"these {len(shared)} images"
    remarks = [
        "Color: how relevant a patch is to the question, from the median patch (no color) to the most relevant one of "
        f"{whose} (full color). The scale is that of {whose} alone."
    ]
    if preset is not None:
        remarks.append(f"The preset {preset} has random weights: this map means nothing.")
    times = medium.source.timestamps if medium.kind == "video" else None
    if target.suffix.lower() == ".png":
        if times is not None:
            frames, relevance, times = _once(medium.source.indices, frames, relevance, times)
        save_png(target, draw(frames, relevance, scale(shared)), times, title, ends, remarks)
    else:
        seconds = float(times[-1] - times[0])
        rate = min(max((len(times) - 1) / seconds if seconds else 1, 1), 30)
        save_mp4(target, draw(frames, relevance, scale(shared)), rate, title, remarks)


def _once(
    indices: np.ndarray, frames: np.ndarray, relevance: np.ndarray, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames [N, H, W, 3], relevance [N, h, w] and times [N] of the N different frames of a clip [T]: one with fewer
    frames than were asked for has some of them several times. These have the mean of their maps."""
    known, first = np.unique(indices, return_index=True)  # [N], ascending as the clip is
    means = np.stack([relevance[indices == index].mean(axis=0) for index in known])
    return frames[first], means, times[first]


def _relevance(groups: list[list[Medium]], features: dict[str, Any]) -> Iterator[tuple[Medium, np.ndarray, np.ndarray]]:
    """Each file, its relevance [T, h, w], and the relevance on whose scale it is drawn."""
    maps = {kind: iter([x.float().cpu().numpy() for x in output.relevance]) for kind, output in features.items()}
    for group in groups:
        images = sum(medium.kind == "image" for medium in group)
        # The only image of a prompt is seen whole, and then in parts, which are not drawn. Several are a list.
        listed = next(maps["image"])[:images] if images else None  # [images, h, w]
        views = iter(listed[:, None] if images else ())
        for medium in group:
            relevance = next(maps["video"] if medium.kind == "video" else views)
            yield medium, relevance, relevance if medium.kind == "video" else listed


def _center(frames: np.ndarray) -> np.ndarray:
    """The square [T, S, S, 3] in the middle of frames [T, H, W, 3], which is what resize_mode "crop" leaves."""
    height, width = frames.shape[1:3]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    return frames[:, top : top + edge, left : left + edge]


__all__ = ["draw_relevance", "drawings"]
