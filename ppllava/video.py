"""Read the frames asked for from a video file, exactly those, with PyAV or decord.

`read_video` is the one-call form: a rule of `ppllava.sampling` picks indices and a `VideoReader` decodes them. A frame
is named by its place in presentation order, known from the timestamps of all packets, so variable frame rates, B-frames
and files without a frame count are exact. Readers never resize.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import chain, dropwhile
from typing import Protocol, runtime_checkable

import av
import numpy as np

from .record import Record
from .sampling import check_rate, sample_frames
from .video_index import number_by_decoding, plan_decoding, read_index
from .video_open import VideoError, VideoNotFoundError, VideoWarning, local_file, opened, packets_of

MAX_BYTES = 8 << 30  # default limit on the RGB output of one call


class VideoClip(Record):
    """Frames of one file; `frames, timestamps, indices, fps = clip` unpacks it.

    frames      uint8   [T, H, W, 3], RGB
    timestamps  float64 [T], seconds from the first frame of the file
    indices     int64   [T], places in presentation order
    fps         average frame rate of the whole file, not of this sample
    """

    __slots__ = ("frames", "timestamps", "indices", "fps")  # noqa: RUF023 (the order of __init__)

    frames: np.ndarray
    timestamps: np.ndarray
    indices: np.ndarray
    fps: float

    def __init__(self, frames: np.ndarray, timestamps: np.ndarray, indices: np.ndarray, fps: float) -> None:
        self._set(frames, timestamps, indices, fps)

    def __iter__(self) -> Iterator[np.ndarray | float]:
        return iter((self.frames, self.timestamps, self.indices, self.fps))


@runtime_checkable
class VideoReader(Protocol):
    """What every backend offers for a file of N = len(reader) frames.

    fps            average frames per second; 0.0 for a single frame whose file names no rate
    timestamps     float64 [N], seconds from the first frame, ascending
    height, width  pixels, after the rotation the file asks for
    """

    fps: float
    timestamps: np.ndarray
    height: int
    width: int

    def __len__(self) -> int: ...

    def get_frames(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """RGB uint8 [len(indices), height, width, 3] in the order asked; any order, duplicates allowed."""

    def stream_frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[list[int], np.ndarray]]:
        """(its places in `indices`, RGB uint8 [height, width, 3]) of each distinct frame, one in memory at a time."""

    def close(self) -> None:
        """Free what the backend keeps between calls; leaving a `with` block does the same."""

    def __enter__(self) -> VideoReader: ...

    def __exit__(self, *exception: object) -> None: ...


class PyAVReader:
    """`VideoReader` over PyAV (FFmpeg), the default.

    path         a local file; FFmpeg may open this file only, so URLs, playlists and images are refused
    num_threads  0 = slice threads (lowest memory, fastest measured on 2 cores); n = n decoder threads
    max_bytes    limit on the RGB output of one `get_frames`
    raw_streams  read H.264, HEVC, VVC and MPEG video without a container, too. Refused by default: FFmpeg decodes such
                 a stream to learn what it is, and a crafted one of some megabytes takes gigabytes of memory

    Opening reads every packet and decodes one frame. The frames that exist are the whole packets found: a file cut
    short (half an mkv, half a faststart mp4) has the length of what is left, and one VideoWarning says how much was
    promised. A frame that then fails to decode is a VideoError, never replaced by another; a frame the decoder reports
    as patched, or that follows one it failed to decode, comes with a VideoWarning. avi, asf and raw streams, whose
    timestamps name no frames, are numbered by decoding them once. Rotation by quarter turns is applied, mirroring is
    not. Nothing stays open between calls.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        num_threads: int = 0,
        max_bytes: int = MAX_BYTES,
        raw_streams: bool = False,
    ) -> None:
        if num_threads < 0:
            raise ValueError(f"num_threads must be 0 (the decoder's choice) or more, got {num_threads}")
        self.path, self._threads, self._max_bytes = os.fsdecode(path), num_threads, max_bytes
        self._raw_streams = raw_streams
        self._file = local_file(self.path)
        with self._open() as (container, stream):
            self.height, self.width = stream.codec_context.height, stream.codec_context.width
            self._check_budget(1)
            self._format, time_base = container.format.name, float(stream.time_base)
            self._index = read_index(container, stream, self._file, self.path)
        with self._open() as (container, stream):
            frames = _frames(self._packets(container, stream), stream)
            pts = self._index.pts
            first = next((f for f, _ in frames if pts is None or f.pts is None or f.pts >= pts[0]), None)
            if first is None:
                raise VideoError(f"{self.path}: none of its frames can be decoded; download or copy it again")
            self._quarter_turns = round(getattr(first, "rotation", 0) / 90) % 4  # counter-clockwise; since PyAV 14.1
            self.width, self.height = (first.width, first.height)[:: -1 if self._quarter_turns % 2 else 1]
            if pts is None or first.pts != pts[0]:
                stamps = [first.pts, *(frame.pts for frame, _ in frames)]
                self._index = number_by_decoding(self._index, stamps, time_base)
        self.timestamps = self._index.timestamps  # [N]
        if self._index.promised:
            self._warn(f"is cut short, {len(self)} frames exist of {self._index.promised}; only those are read")
        length = float(self.timestamps[-1])
        self.fps = (len(self) - 1) / length if length else self._index.rate

    def __len__(self) -> int:
        return len(self.timestamps)

    def __enter__(self) -> PyAVReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what the backend keeps between calls: nothing."""

    def get_frames(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """RGB uint8 [len(indices), height, width, 3] in the order asked; any order, duplicates allowed.

        Memory: the result, one RGB frame and the decoder's buffers. ValueError for an index outside 0 .. N - 1;
        VideoError where a frame cannot be decoded or the result would pass `max_bytes`.
        """
        slots = self._slots(indices)
        self._check_budget(len(indices))
        out = np.empty((len(indices), self.height, self.width, 3), dtype=np.uint8)  # [T, H, W, 3]
        for index, image in self._each(list(slots)):
            out[slots[index]] = image
        return out

    def stream_frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[list[int], np.ndarray]]:
        """(its places in `indices`, RGB uint8 [height, width, 3]) of each distinct frame: ascending, but for those of a
        damaged file that need a second pass. Errors as :meth:`get_frames`, whatever the number of frames."""
        slots = self._slots(indices)
        for index, image in self._each(list(slots)):
            yield slots[index], image

    def _slots(self, indices: Sequence[int] | np.ndarray) -> dict[int, list[int]]:
        """frame -> its places in `indices`, ascending."""
        indices = np.asarray(indices)  # [T]
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise ValueError(f"indices must be a list of integers, got {indices.dtype} of shape {list(indices.shape)}")
        for index in indices[(indices < 0) | (indices >= len(self))][:1]:
            raise ValueError(f"{self.path}: frame {index} does not exist; it has {len(self)}, 0 to {len(self) - 1}")
        slots: dict[int, list[int]] = {}
        for slot in np.argsort(indices, kind="stable").tolist():
            slots.setdefault(int(indices[slot]), []).append(slot)
        return slots

    def _each(self, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(index, RGB [H, W, 3]) of the frames `wanted`, ascending."""
        missing, damaged = set(wanted), []
        for from_start in (False, True):  # a second pass only for containers that seek badly and for damaged files
            if not missing:
                break
            one_pass = from_start or self._index.pts is None
            left = sorted(missing)
            runs = [(0, left)] if one_pass else plan_decoding(left, self._index.keyframes)
            with self._open() as (container, stream):
                for keyframe, run in runs:
                    for index, frame, is_damaged in self._decode(container, stream, keyframe, run, from_start):
                        if from_start or not is_damaged:
                            missing.remove(index)
                            damaged += [index] if is_damaged else []
                            yield index, self._to_rgb(frame)
        if missing:
            raise VideoError(
                f"{self.path}: {len(missing)} of the frames asked for cannot be decoded, the first is {min(missing)}; "
                "the file is damaged there, leave them out or re-encode it"
            )
        if damaged:
            self._warn(f"has damaged frames, patched by the decoder, among those asked for: {damaged}")

    def _decode(self, container, stream, keyframe: int, wanted: list[int], to_the_end: bool) -> Iterator:
        """(index, frame, is_damaged) for those of `wanted` that the decoder gives from `keyframe` on."""
        pending = {index if self._index.pts is None else int(self._index.pts[index]): index for index in wanted}
        final = max(pending)
        for count, (frame, is_damaged) in enumerate(_frames(self._packets(container, stream, keyframe), stream)):
            number = count if self._index.pts is None else frame.pts
            if number in pending:
                yield pending.pop(number), frame, is_damaged
            if not pending or (not to_the_end and number is not None and number > final):
                return

    def _packets(self, container, stream, keyframe: int = 0) -> Iterator:
        """The packets from `keyframe` or a keyframe before it on; none where the container cannot seek there."""
        limit = self._index.seek_targets[keyframe].pts if keyframe else math.inf
        # by pts first: mpegts and flv seek by dts and may land a group late, Matroska and mp4 by dts a group early
        for stamp in self._index.seek_targets[keyframe][:2] if keyframe else (None,):
            with suppress(av.FFmpegError):
                if stamp is not None:
                    container.seek(stamp, stream=stream)
                packets = dropwhile(lambda packet: not packet.is_keyframe, packets_of(container, stream, self.path))
                first = next(packets, None)
                if first is not None and (first.pts or 0) <= limit:
                    return (packet for packet in chain([first], packets) if packet.pos != self._index.cut)
        return iter(())

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        image = np.rot90(frame.to_ndarray(format="rgb24"), self._quarter_turns)  # [H, W, 3]
        if image.shape[:2] != (self.height, self.width):
            sizes = f"{self.width}x{self.height} and {image.shape[1]}x{image.shape[0]}"
            raise VideoError(f"{self.path}: its frames have different sizes, {sizes}; re-encode it at one size")
        return image

    def _open(self) -> AbstractContextManager:
        return opened(self.path, self._file, self._threads, self._raw_streams)

    def _check_budget(self, frames: int) -> None:
        need = int(frames) * self.height * self.width * 3
        if need > self._max_bytes:
            raise VideoError(
                f"{self.path}: {frames} frames of {self.width}x{self.height} take {need} bytes, more than "
                f"max_bytes={self._max_bytes}; ask for fewer frames or pass a larger max_bytes"
            )

    def _warn(self, what: str) -> None:
        warnings.warn(f"{self.path}: {what}", VideoWarning, stacklevel=4)


class DecordReader(PyAVReader):
    """`VideoReader` over decord: the same index, errors and warnings as `PyAVReader`, pixels decoded by decord.

    decord 0.6 bundles FFmpeg 4.1 (2018): no AV1, and it fails on some narrow rotated clips, edit lists and files cut
    short. It seeks to wrong frames outside mp4, mov, mkv and webm, and in open groups of pictures, x265's default. Each
    is a VideoError that names the remedy, backend="pyav". It hides damage in the middle of a file by returning other
    frames, and so old an FFmpeg should not see files from strangers.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        num_threads: int = 0,
        max_bytes: int = MAX_BYTES,
        raw_streams: bool = False,
    ) -> None:
        try:
            import decord
        except ImportError as error:
            raise ImportError("backend='decord' needs decord: pip install decord, or use backend='pyav'") from error
        super().__init__(path, num_threads, max_bytes, raw_streams)
        self._module, self._decord = decord, None
        self._errors = (RuntimeError, AssertionError, decord.DECORDError, decord.DECORDLimitReachedError)
        if not self._format.startswith(("mov,", "matroska,")):  # wrong in avi, asf, flv, mpeg, mpegts, nut
            raise self._failure(f"it returns wrong frames of {self._format} files")
        found = len(self._decoder())
        if found != len(self):  # it counts hidden packets too (edit lists, VP8), and would be off by as many
            raise VideoError(f"{self.path}: decord counts {found} frames where {len(self)} exist; use backend='pyav'")
        if self._decoder().get_key_indices() != self._index.keyframes:  # it counts in the order of decoding
            raise self._failure("it returns wrong frames where some before a keyframe come after it in the file")

    def close(self) -> None:
        """Free decord's decoder."""
        self._decord = None

    def _decoder(self):
        if self._decord is None:
            context = self._module.cpu(0)
            try:  # fault_tol: raise, rather than return a neighbour, when more than this share of the frames fails
                self._decord = self._module.VideoReader(self._file, context, num_threads=self._threads, fault_tol=1e-9)
            except self._errors as error:
                raise self._failure(error) from error
        return self._decord

    def _each(self, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        decoder, shape = self._decoder(), (self.height, self.width, 3)
        for index in wanted:
            try:
                frame = decoder[index]  # [H, W, 3], a torch tensor where the caller set that bridge
                image = frame.asnumpy() if hasattr(frame, "asnumpy") else np.asarray(frame)
                if image.shape != shape:
                    raise RuntimeError(f"it returned {list(image.shape)} for {list(shape)}")
            except self._errors as error:
                raise self._failure(error) from error
            yield index, image
        with suppress(*self._errors):
            decoder.seek(0)  # or its thread decodes ahead and memory grows, dmlc/decord#208

    def _failure(self, error: Exception | str) -> VideoError:
        reason = re.sub(r"^\[[\d:]+\] ", "", (str(error).splitlines() or ["unknown reason"])[0])
        return VideoError(f"{self.path}: decord cannot read it ({reason}); use backend='pyav'")


BACKENDS = {"pyav": PyAVReader, "decord": DecordReader}


def open_video(
    path: str | os.PathLike,
    backend: str | None = None,
    num_threads: int = 0,
    max_bytes: int = MAX_BYTES,
    raw_streams: bool = False,
) -> VideoReader:
    """Open a local video file. `backend` is "pyav" or "decord", never replaced by another; None means "pyav". The
    others as in `PyAVReader`.

    Errors: VideoNotFoundError, VideoError (see `PyAVReader`), ImportError without the backend, ValueError for its name,
    TypeError for what is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be the path of a video file, got {type(path).__name__}; write the video to a file")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be 'pyav', 'decord' or None (pyav), got {backend!r}")
    return BACKENDS[backend or "pyav"](path, num_threads, max_bytes, raw_streams)


def read_video(
    path: str | os.PathLike,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    max_frames: int | None = None,
    backend: str | None = None,
    num_threads: int = 0,
    max_bytes: int = MAX_BYTES,
    raw_streams: bool = False,
) -> VideoClip:
    """Sample a file: `num_frames` (`sample_uniform`), or `fps` frames a second (`sample_fps`, at most `max_frames`).

    start, end  seconds; the frames on screen at both are included (`sample_range`). Errors are those of `open_video`,
    `get_frames` and the sampling rule.
    """
    check_rate(num_frames, fps)
    reader = open_video(path, backend, num_threads, max_bytes, raw_streams)
    try:
        if fps is None:
            reader._check_budget(num_frames)  # before the indices, which may be a billion
        indices = sample_frames(reader.timestamps, num_frames, fps, max_frames, start, end)  # [T]
        return VideoClip(reader.get_frames(indices), reader.timestamps[indices], indices, reader.fps)
    finally:
        reader.close()


def _frames(packets: Iterable, stream) -> Iterator[tuple[av.VideoFrame, bool]]:
    """(frame, is_damaged) in presentation order: patched, or built on frames that could not be decoded."""
    broken = False  # a packet failed and no keyframe came since
    with suppress(av.FFmpegError):  # the end of a file cut short
        for packet in packets:
            try:
                frames = packet.decode()
            except av.FFmpegError:
                broken = True
                continue
            for frame in frames:
                broken = broken and not frame.key_frame
                yield frame, broken or frame.is_corrupt
    with suppress(av.FFmpegError):
        yield from ((frame, broken or frame.is_corrupt) for frame in stream.decode(None))


__all__ = [
    "BACKENDS",
    "DecordReader",
    "PyAVReader",
    "VideoClip",
    "VideoError",
    "VideoNotFoundError",
    "VideoReader",
    "VideoWarning",
    "open_video",
    "read_video",
]
