"""Read the frames asked for from a video file, exactly those, with PyAV or decord.

`read_video` is the one-call form: a rule of `ppllava.sampling` picks indices and a `VideoReader` decodes them. A frame is
named by its place in presentation order, known from the timestamps of all packets, so variable frame rates, B-frames and
files without a frame count are exact. Readers never resize.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, dropwhile
from typing import NamedTuple, NoReturn, Protocol, runtime_checkable

import av
import numpy as np
from av.stream import Disposition

from .sampling import sample_fps, sample_range, sample_uniform

MAX_BYTES = 8 << 30  # default limit on the RGB output of one call
SEEK_COST = 10  # frames; 640x360 H.264, 2 CPU cores: a seek took 1.8 to 2.9 ms, decoding one frame 0.17 to 0.34 ms

# FFmpeg formats that keep their data in one file. Playlists (hls, dash, concat) open other files, images and text are no
# video; sound formats are here only so that the error can say "no video stream".
_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng,ivf,mxf,nut,rm,dv,wtv,obu,yuv4mpegpipe,h264,hevc,vvc,m4v,"
    "mp3,wav,aac,flac"
)


class VideoError(ValueError):
    """The file cannot give the frames asked for; the message names the file, what is wrong and what to do."""


class VideoNotFoundError(VideoError, FileNotFoundError):
    """There is no such file."""


class VideoWarning(UserWarning):
    """The file is damaged; what exists of it is read."""


class VideoClip(NamedTuple):
    """Frames of one file.

    frames      uint8   [T, H, W, 3], RGB
    timestamps  float64 [T], seconds from the first frame of the file
    indices     int64   [T], places in presentation order
    fps         average frame rate of the whole file, not of this sample
    """

    frames: np.ndarray
    timestamps: np.ndarray
    indices: np.ndarray
    fps: float


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

    def close(self) -> None:
        """Free what the backend keeps between calls."""


def plan_decoding(wanted: Iterable[int], keyframes: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Group `wanted` frames (ascending) into runs `(keyframe, frames)`: seek to the keyframe, decode forward to the last.

    A run ends where seeking would skip more frames than a seek costs (SEEK_COST). So with long keyframe gaps everything is
    one pass, and with short ones each wanted frame is one seek. `keyframes` ascends and starts at or before `wanted`.
    """
    runs: list[tuple[int, list[int]]] = []
    for index in wanted:
        keyframe = int(keyframes[int(np.searchsorted(keyframes, index, side="right")) - 1])
        if runs and keyframe - runs[-1][1][-1] - 1 <= SEEK_COST:
            runs[-1][1].append(index)
        else:
            runs.append((keyframe, [index]))
    return runs


class PyAVReader:
    """`VideoReader` over PyAV (FFmpeg), the default.

    path         a local file; FFmpeg may open this file only, so URLs, playlists and images are refused
    num_threads  0 = slice threads (lowest memory, fastest measured on 2 cores); n = n decoder threads, n frames in flight
    max_bytes    limit on the RGB output of one `get_frames`

    Opening reads every packet and decodes one frame. The frames that exist are the whole packets found: a file cut short
    (half an mkv, half a faststart mp4) has the length of what is left, and one VideoWarning says how much was promised. A
    frame that then fails to decode is a VideoError, never replaced by another; where the decoder patched over damage inside
    a frame, that frame comes with a VideoWarning. avi and raw streams, whose timestamps name no frames, are numbered by
    decoding them once. Rotation by quarter turns is applied, mirroring is not. Nothing stays open between calls.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int = 0, max_bytes: int = MAX_BYTES) -> None:
        self.path, self.num_threads, self.max_bytes = os.fsdecode(path), num_threads, max_bytes
        if num_threads < 0:
            raise ValueError(f"num_threads must be 0 (the decoder's choice) or more, got {num_threads}")
        self._file = self._local_file()
        with self._open() as (container, stream):
            self.height, self.width = stream.codec_context.height, stream.codec_context.width
            self._check_budget(1)
            self._read_index(container, stream)
        self._first_frame()

    def __len__(self) -> int:
        return len(self.timestamps)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what the backend keeps between calls."""

    def get_frames(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """RGB uint8 [len(indices), height, width, 3] in the order asked; any order, duplicates allowed.

        Memory: the result, one RGB frame and the decoder's buffers. ValueError for an index outside 0 .. N - 1; VideoError
        where a frame cannot be decoded or the result would pass `max_bytes`.
        """
        indices = np.asarray(indices)  # [T]
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise ValueError(f"indices must be a list of integers, got {indices.dtype} of shape {list(indices.shape)}")
        for index in indices[(indices < 0) | (indices >= len(self))][:1]:
            raise ValueError(f"{self.path}: frame {index} does not exist; it has {len(self)}, 0 to {len(self) - 1}")
        self._check_budget(len(indices))
        out = np.empty((len(indices), self.height, self.width, 3), dtype=np.uint8)  # [T, H, W, 3]
        slots: dict[int, list[int]] = {}  # frame -> its places in out
        for slot, index in enumerate(indices.tolist()):
            slots.setdefault(index, []).append(slot)
        self._fill(out, {index: slots[index] for index in sorted(slots)})
        return out

    def _fill(self, out: np.ndarray, slots: dict[int, list[int]]) -> None:
        """Decode the frames of `slots` (ascending) into their places in out, [T, H, W, 3]."""
        missing, damaged = list(slots), []
        for from_start in (False, True):  # the second pass is for containers that seek badly, and for damaged files
            if not missing:
                break
            one_pass = from_start or self._pts is None
            with self._open() as (container, stream):
                for keyframe, frames in [(0, list(missing))] if one_pass else plan_decoding(missing, self._keyframes):
                    for index, frame in self._decode(container, stream, keyframe, frames, to_the_end=from_start):
                        if from_start or not frame.is_corrupt:
                            out[slots[index]] = self._to_rgb(frame)
                            missing.remove(index)
                            damaged += [index] if frame.is_corrupt else []
        if missing:
            self._fail(f"frames {missing} of {len(self)} are damaged beyond decoding", "leave them out or re-encode it")
        if damaged:
            self._warn(f"frames {damaged} are damaged, and the decoder patched them")

    def _decode(self, container, stream, keyframe: int, frames: list[int], to_the_end: bool) -> Iterator:
        """(index, frame) for those of `frames` that the decoder gives from `keyframe` on."""
        pending = {index if self._pts is None else int(self._pts[index]): index for index in frames}
        final = max(pending)
        packets = _seek(container, stream, *self._seek_points[keyframe]) if keyframe else container.demux(stream)
        for count, frame in enumerate(_frames(packets, stream)):
            number = count if self._pts is None else frame.pts
            if number in pending:
                yield pending.pop(number), frame
            if not pending or (not to_the_end and number is not None and number > final):
                return

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        image = np.rot90(frame.to_ndarray(format="rgb24"), self._quarter_turns)  # [H, W, 3]
        if image.shape[:2] != (self.height, self.width):
            size = f"from {self.width}x{self.height} to {image.shape[1]}x{image.shape[0]}"
            self._fail(f"changes size {size} at {frame.time:.3f} s", "re-encode it at one size")
        return image

    def _read_index(self, container, stream) -> None:
        """Find the frames: their pts and timestamps, and where decoding can start."""
        found, packets, lost = [], 0, 0  # found: (pts, dts, is_keyframe, place among all packets), in file order
        vp8 = stream.codec_context.name == "vp8"
        with suppress(av.FFmpegError):
            for packet in container.demux(stream):
                if packet.size:
                    hidden = packet.is_discard or (vp8 and not memoryview(packet)[0] & 0x10)  # VP8's show_frame bit
                    lost += packet.is_corrupt  # the packet at which a file was cut
                    if not (hidden or packet.is_corrupt):
                        found.append((packet.pts, packet.dts, packet.is_keyframe))
                    packets += 1
