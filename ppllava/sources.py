"""What a batch job asks about: opened first, so that lengths are known, decoded ahead in threads, encoded once."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from .encoding import EncodedVideo, Frames, decoded_frames, encode_frames, file_frames
from .preprocessing import read_frames, read_image
from .request import Source
from .rows import frames_of, is_row
from .sampling import sample_frames

if TYPE_CHECKING:
    from .modeling_ppllava import PPLlavaForConditionalGeneration
    from .processing_ppllava import PPLlavaProcessor

SHORT = 64 << 20  # bytes of resized frames: up to here a whole video is decoded ahead, a longer one as the tower runs


class Opened(Protocol):
    """A source whose lengths are known.

    kind          "video" or "image"
    placeholders  that stand for it in a prompt
    tokens        visual tokens, together
    frames        that the vision tower sees of it
    """

    kind: str
    placeholders: int
    tokens: int
    frames: int

    def load(self) -> Any:
        """What :meth:`encode` takes; in a thread."""

    def encode(self, loaded: Any) -> list[Any]:
        """What the processor takes for it, in any number of prompts."""

    def looks_at_once(self, requests: int) -> bool:
        """Whether the visual tokens of so many requests take no more memory than what :meth:`encode` gives."""


class OpenedVideo:
    kind, placeholders = "video", 1

    def __init__(
        self, model: PPLlavaForConditionalGeneration, processor: PPLlavaProcessor, source: Source, memory: int
    ) -> None:
        [video] = source.items
        self.model, self.processor, self.decoded = model, processor, None
        self.encoded = video if isinstance(video, EncodedVideo) else None
        frames, fps, start, end = source.sampling
        if isinstance(video, (str, os.PathLike)):
            from .video import open_video

            self.reader = open_video(video)
            frames = processor.num_frames if frames is None and fps is None else frames
            try:
                self.indices = sample_frames(self.reader.timestamps, frames, fps, None, start, end)  # [T]
            except ValueError as error:
                raise ValueError(f"{os.fspath(video)}: {error}") from error
            count = len(self.indices)
        elif self.encoded is not None:
            if any(value is not None for value in source.sampling):
                raise ValueError(
                    "frames, fps, start and end choose frames of a file, got an EncodedVideo; leave them out"
                )
            count = len(self.encoded)
        else:
            if any(value is not None for value in (fps, start, end)):
                raise ValueError(
                    "fps, start and end choose frames of a file, got decoded frames; pass a path, or frames"
                )
            video = frames_of(video)
            frames = processor.num_frames if frames is None and is_row(video) else frames
            self.decoded = video, frames
            count = frames or len(getattr(video, "frames", video))
        self.tokens, self.frames = processor.num_video_tokens(count), count
        self.bytes = count * 3 * processor.image_size**2
        self._check(count, memory)

    def _check(self, count: int, memory: int) -> None:
        self.model.model.check_frames(count)
        patches = count * math.prod(self.model.config.patch_grid)
        need = patches * self.model.config.vision_config.hidden_size * self.model.dtype.itemsize
        if self.encoded is None and need > memory:
            raise ValueError(
                f"the features of {count} frames take {need / 2**20:,.1f} MiB, more than the {memory / 2**20:,.1f} MiB "
                "of memory; ask for fewer frames, or allow more"
            )

    def load(self) -> Frames | None:
        if self.encoded is not None:
            return None
        if self.decoded is not None:
            frames = read_frames(*self.decoded, None, 1)  # uint8 [T, 3, H, W]
            return decoded_frames(self.model, self.processor, frames)
        frames = file_frames(self.model, self.processor, self.reader, self.indices)
        return frames if self.bytes > SHORT else Frames(list(frames.chunks), frames.count, frames.timestamps)

    def looks_at_once(self, requests: int) -> bool:
        config = self.model.config
        patches = self.frames * math.prod(config.patch_grid)
        return requests * self.tokens * config.token_width <= patches * config.vision_config.hidden_size

    def encode(self, loaded: Frames | None) -> list[EncodedVideo]:
        return [encode_frames(self.model, self.processor, loaded) if self.encoded is None else self.encoded]


class OpenedImages:
    kind = "image"

    def __init__(self, processor: PPLlavaProcessor, source: Source) -> None:
        self.items, self.placeholders = source.items, len(source.items)
        views = max((h * w // processor.image_size**2 for h, w in processor.image_grid_pinpoints), default=0)
        self.frames = len(source.items) if len(source.items) > 1 else 1 + views
        sizes = [(image.height, image.width) for image in map(read_image, source.items)]
        if len(sizes) == 1:
            self.tokens = processor.num_image_tokens(*sizes[0])
        else:
            self.tokens = sum(processor.visual_pooling.image_tokens(size, 1, in_list=True) for size in sizes)

    def load(self) -> list[Image.Image]:
        return [read_image(item) for item in self.items]

    def looks_at_once(self, requests: int) -> bool:
        return True  # the vision tower runs then, and may run out of memory

    def encode(self, loaded: list[Image.Image]) -> list[Image.Image]:
        return loaded


def open_source(
    model: PPLlavaForConditionalGeneration, processor: PPLlavaProcessor, source: Source, memory: int
) -> Opened:
    """Raises what a file that cannot be read raises; `memory`: bytes that the features of a video may take."""
    if source.kind == "image":
        return OpenedImages(processor, source)
    return OpenedVideo(model, processor, source, memory)


class Loads:
    """Opened sources that are loaded in threads, in order, a bounded number of them ahead of their use."""

    def __init__(self, pool: ThreadPoolExecutor, ahead: int, order: Iterable[tuple[Hashable, Opened]]) -> None:
        self.pool, self.ahead, self.waiting = pool, ahead, deque(order)
        self.futures: dict[Hashable, Future] = {}

    def take(self, key: Hashable) -> Any:
        """What was loaded of the next source."""
        self._start()
        try:
            return self.futures.pop(key).result()
        finally:
            self._start()

    def _start(self) -> None:
        while self.waiting and len(self.futures) < self.ahead:
            key, opened = self.waiting.popleft()
            self.futures[key] = self.pool.submit(opened.load)


__all__ = ["Loads", "Opened", "open_source"]
