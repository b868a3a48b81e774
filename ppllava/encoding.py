"""Videos of any length through the vision tower: decoded in one thread while the tower runs on what came before."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .preprocessing import read_frames
from .record import Record
from .rows import file_of, is_decoder
from .sampling import check_rate, sample_frames

if TYPE_CHECKING:
    from .modeling_ppllava import PPLlavaForConditionalGeneration
    from .processing_ppllava import PPLlavaProcessor
    from .video import VideoReader

Item = TypeVar("Item")
AHEAD_BYTES = 64 << 20  # of resized frames that wait for the tower


class EncodedVideo(Record):
    """What the vision tower made of a video: any number of questions about it need no more of the file.

    features    [T, H, W, V], in the dtype and on the device of the model
    timestamps  float64 [T], seconds from the first frame of the file; None for frames that came without a file
    """

    __slots__ = ("features", "timestamps")

    features: Tensor
    timestamps: np.ndarray | None

    def __init__(self, features: Tensor, timestamps: np.ndarray | None = None) -> None:
        self._set(features, timestamps)

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Frames:
    """A video on its way into the tower.

    chunks      (the places among the T frames that each of n has, uint8 [n, 3, S, S], resized)
    count       T
    timestamps  float64 [T] or None
    """

    chunks: Iterable[tuple[list[list[int]], Tensor]]
    count: int
    timestamps: np.ndarray | None = None


@torch.no_grad()
def encode_video(
    model: PPLlavaForConditionalGeneration,
    processor: PPLlavaProcessor,
    video: Any,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    backend: str | None = None,
) -> EncodedVideo:
    """Run the vision tower over a video of any length, once for all questions about it.

        video = ppllava.encode_video(model, processor, "lecture.mp4", fps=1)

    A thread decodes and resizes the next frames while the tower runs on the last ones. Memory: the features, and of
    frames what fits into 64 MiB and one chunk of the tower, however long the video is.

    Args:
        video: the path of a file, a row of `datasets.Video()`, or decoded frames in any form that
            :class:`PPLlavaProcessor` takes.
        num_frames, fps: frames in all, or a second, of a file; default: `processor.num_frames`. Of decoded frames all
            are taken.
        start, end: seconds of a file, as in :func:`ppllava.video.read_video`.
        backend: that decodes a file.

    Returns:
        What `processor` takes in place of a video. Features are as `get_media_features` computes them from pixels.

    Raises:
        ValueError, OSError: for files that cannot be read and frames that do not exist, as `read_video`.
        TypeError: for what is no video, and for arguments in another order.
    """
    if hasattr(processor, "generate"):
        raise TypeError(f"model must come before processor, got {type(model).__name__} first; swap them")
    sampling = {"num_frames": num_frames, "fps": fps, "start": start, "end": end}
    with file_of(video) as path:
        if path is not None:
            return _encode_file(model, processor, path, sampling, backend)
    ours = ("num_frames", "fps") if is_decoder(video) else ()
    if given := [name for name, value in sampling.items() if value is not None and name not in ours]:
        raise ValueError(f"{given[0]} chooses frames of a file, got decoded frames; pass a path, or leave it out")
    frames = read_frames(video, num_frames, fps, processor.num_frames)  # [T, 3, H, W]
    return encode_frames(model, processor, decoded_frames(model, processor, frames))


def _encode_file(
    model: PPLlavaForConditionalGeneration,
    processor: PPLlavaProcessor,
    path: str | os.PathLike,
    sampling: dict[str, Any],
    backend: str | None,
) -> EncodedVideo:
    from .video import open_video

    if sampling["num_frames"] is None and sampling["fps"] is None:
        sampling["num_frames"] = processor.num_frames
    check_rate(sampling["num_frames"], sampling["fps"])
    with open_video(path, backend) as reader:
        indices = sample_frames(reader.timestamps, **sampling)  # [T]
        model.model.check_frames(len(indices))
        return encode_frames(model, processor, file_frames(model, processor, reader, indices))


def file_frames(
    model: PPLlavaForConditionalGeneration, processor: PPLlavaProcessor, reader: VideoReader, indices: np.ndarray
) -> Frames:
    """The frames `indices` [T] of a file, decoded when they are asked for."""
    size = model.model.vision_chunk_frames(model.device)

    def chunks() -> Iterator[tuple[list[list[int]], Tensor]]:
        places, images = [], []
        for where, image in reader.stream_frames(indices):
            places.append(where)
            frame = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]  # [1, 3, H, W]
            images.append(processor.resize(frame))
            if len(images) == size:
                yield places, _joined(images)
                places, images = [], []
        if images:
            yield places, _joined(images)

    return Frames(chunks(), len(indices), reader.timestamps[indices])


def decoded_frames(model: PPLlavaForConditionalGeneration, processor: PPLlavaProcessor, frames: Tensor) -> Frames:
    """frames uint8 [T, 3, H, W]."""
    size = model.model.vision_chunk_frames(model.device)
    starts = range(0, len(frames), size)
    parts = ((i, frames[i : i + size]) for i in starts)
    return Frames((([[i + n] for n in range(len(part))], processor.resize(part)) for i, part in parts), len(frames))


def _joined(images: list[Tensor]) -> Tensor:
    """Of each [1, 3, S, S]. By NumPy: torch.cat would start threads beside those of the tower, for the same cores."""
    return torch.from_numpy(np.concatenate([image.numpy() for image in images]))


@torch.no_grad()
def encode_frames(model: PPLlavaForConditionalGeneration, processor: PPLlavaProcessor, frames: Frames) -> EncodedVideo:
    """:func:`encode_video` of frames on their way."""
    device, dtype, gpu = model.device, model.dtype, model.device.type == "cuda"
    chunk = model.model.vision_chunk_frames(device)  # may be less than when the frames were read
    depth = max(1, AHEAD_BYTES // (3 * processor.image_size**2 * chunk))

    def pinned(item: tuple[list[list[int]], Tensor]) -> tuple[list[list[int]], Tensor]:
        return item[0], item[1].pin_memory() if gpu else item[1]

    def pixels(ahead: Iterator[tuple[list[list[int]], Tensor]]) -> Iterator[tuple[list[list[int]], Tensor]]:
        for places, images in ahead:
            for start in range(0, len(images), chunk):
                part = images[start : start + chunk].to(device, non_blocking=True)
                yield places[start : start + chunk], processor.normalize(part).to(dtype)  # [n, 3, S, S]

    with closing(prefetch(frames.chunks, depth, pinned)) as ahead:
        return EncodedVideo(model.model.encode_chunks(pixels(ahead), frames.count), frames.timestamps)


def prefetch(items: Iterable[Item], depth: int, prepare: Callable[[Item], Item] = lambda item: item) -> Iterator[Item]:
    """The items, prepared, up to `depth` of them made ahead in a thread."""
    iterator, end = iter(items), object()

    def make() -> Item | object:
        item = next(iterator, end)
        return item if item is end else prepare(item)

    pool = ThreadPoolExecutor(1, "ppllava-frames")
    try:
        pending = deque(pool.submit(make) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(make))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        if hasattr(iterator, "close"):
            iterator.close()


__all__ = ["EncodedVideo", "Frames", "decoded_frames", "encode_frames", "encode_video", "file_frames", "prefetch"]
