"""Videos as other libraries hand them over: rows of `datasets.Video()`, decoders and frames of torchcodec.

None of them is imported: they are known by what they have.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from .compat import ENCODED
from .sampling import ROUNDING, check_rate, sample_uniform

FILE = {"path", "bytes"}  # a row of datasets that is not decoded
FRAMES = {"data", "pts_seconds", "duration_seconds"}  # a Frame or FrameBatch of torchcodec


def is_row(medium: Any) -> bool:
    """Whether it is a file in a row of datasets, decoded or not, or a decoder of torchcodec."""
    return is_decoder(medium) or _is_file(medium)


def is_decoder(medium: Any) -> bool:
    return hasattr(medium, "get_frames_at") and hasattr(medium, "get_frames_played_at")


def _is_file(medium: Any) -> bool:
    return isinstance(medium, Mapping) and len(medium) > 0 and medium.keys() <= FILE


def frames_of(medium: Any) -> Any:
    """The tensor in a Frame or FrameBatch of torchcodec, which chat templates make a dict of; all else as it is."""
    if isinstance(medium, Mapping):
        return medium["data"] if medium.keys() == FRAMES else medium
    return medium.data if all(hasattr(medium, name) for name in FRAMES) else medium


@contextmanager
def file_of(video: Any) -> Iterator[str | os.PathLike | None]:
    """The path of a video that is a file: a path, or a row of datasets, whose bytes are in a file for so long; else
    None. A row that came decoded is read from its file, too: torchcodec gives other frames than asked for of some AVI
    files and transport streams, without a word.

    Raises:
        ValueError: for a row with neither.
    """
    if isinstance(video, (str, os.PathLike)):
        yield video
        return
    row = video if _is_file(video) else getattr(video, ENCODED, None) if is_decoder(video) else None
    if row is None:
        yield None
        return
    path, content = row.get("path"), row.get("bytes")
    if content is None and path is None:
        raise ValueError("a video of datasets must have a path or bytes, got neither; leave the row out")
    if content is None:
        yield path
        return
    from .video import VideoError

    with tempfile.TemporaryDirectory(prefix="ppllava-") as folder:
        name = os.path.join(folder, "video")
        with open(name, "wb") as file:
            file.write(content)
        try:
            yield name
        except VideoError as error:
            raise VideoError(str(error).replace(name, path or "bytes of a video")) from error


def decode(decoder: Any, num_frames: int | None, fps: float | None) -> Any:
    """Frames of a torchcodec decoder, uint8 [T, 3, H, W] or [T, H, W, 3] as it gives them: `num_frames` uniformly, or
    those on screen at each 1 / fps seconds."""
    check_rate(num_frames, fps)
    if fps is None:
        indices = sample_uniform(num_frames, len(decoder))  # [T]
        return decoder.get_frames_at(indices.tolist()).data.cpu()
    begin, end = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
    count = max(1, math.ceil((end - begin - ROUNDING) * fps))
    if count > 1 << 20:
        raise ValueError(f"fps={fps} asks for {count} frames of this clip; pass a lower fps")
    times = begin + np.arange(count) / fps  # [T]
    return decoder.get_frames_played_at(times.tolist()).data.cpu()


__all__ = ["decode", "file_of", "frames_of", "is_decoder", "is_row"]
