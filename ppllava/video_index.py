"""Which frames a video file holds, when they are shown and where decoding can start, from its packets alone."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import BinaryIO, NamedTuple

import av
import numpy as np

from .video_open import packets_of

# FFmpeg formats whose timestamps may be those of decoding: with B-frames they name no frames.
UNORDERED = ("avi", "asf")
SEEK_COST = 5  # frames; of 0, 5, 10 and 20 the fastest for 8 to 64 of 900 frames, 640x360 H.264, on 2 CPU cores
EBML, SEGMENT, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675  # element ids of Matroska


class Packet(NamedTuple):
    pts: int | None
    dts: int | None
    end: int  # pts + duration
    is_keyframe: bool
    is_shown: bool


class Index(NamedTuple):
    """The N frames of a file.

    pts           int64 [N], ascending, names the frames; None: only decoding tells them
    timestamps    float64 [N], seconds from the first frame
    seek_targets  first frame that needs a keyframe -> the keyframe's packet
    keyframes     keys of seek_targets, ascending
    cut           byte position of the packet the file was cut in, -1: none
    promised      "about 40": how many frames the file should have, where some are missing; else ""
    rate          frames per second as the file says, 0.0 where it does not
    """

    pts: np.ndarray | None
    timestamps: np.ndarray
    seek_targets: dict[int, Packet]
    keyframes: list[int]
    cut: int
    promised: str
    rate: float


def read_index(container, stream, file: str, path: str) -> Index:
    """Read every packet of the open `file`, which errors name `path`; decodes nothing."""
    time_base, rate = float(stream.time_base), float(stream.average_rate or stream.guessed_rate or 0)
    packets, cut = _scan(container, stream, path)
    pts, promised = [packet.pts for packet in packets], _promised(container, stream, file, packets, cut, rate)
    if container.format.name in UNORDERED or None in pts or len(set(pts)) != len(pts):
        return Index(None, np.empty(0), {}, [], cut, promised, rate)
    keys = [packet for packet in packets if packet.is_keyframe]  # an edit list may hide some: not frames
    shown = sorted(packet.pts for packet in packets if packet.is_shown and keys and packet.pts >= keys[0].pts)
    if not shown:
        return Index(None, np.empty(0), {}, [], cut, promised, rate)
    seek_targets = dict(zip(np.searchsorted(shown, [packet.pts for packet in keys]).tolist(), keys))
    timestamps = (np.array(shown) - shown[0]) * time_base  # [N]
    return Index(np.array(shown, np.int64), timestamps, seek_targets, sorted(seek_targets), cut, promised, rate)


def number_by_decoding(index: Index, pts: Sequence[int | None], time_base: float) -> Index:
    """The index of a file whose timestamps do not name its frames, numbered as the decoder gives them: `pts`, [N]."""
    timestamps = np.arange(len(pts)) / (index.rate or 25.0)  # [N]; 25 is FFmpeg's own rate for raw streams
    if None not in pts and (np.diff(pts) > 0).all():
        timestamps = (np.array(pts) - pts[0]) * time_base  # [N]
    return index._replace(pts=None, timestamps=timestamps)


def plan_decoding(wanted: Sequence[int], keyframes: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Group `wanted` frames (ascending) into runs `(keyframe, frames)`: seek to the keyframe, decode on to the last.

    A run ends where seeking would skip more frames than a seek costs (SEEK_COST). So with long keyframe gaps all is one
    pass, and with short ones each wanted frame is one seek. `keyframes` ascends and starts at or before `wanted`.
    """
    runs: list[tuple[int, list[int]]] = []
    starts = np.asarray(keyframes)[np.searchsorted(keyframes, wanted, side="right") - 1].tolist()
    for index, keyframe in zip(wanted, starts):
        if runs and keyframe - runs[-1][1][-1] - 1 <= SEEK_COST:
            runs[-1][1].append(index)
        else:
            runs.append((keyframe, [index]))
    return runs


def _scan(container, stream, path: str) -> tuple[list[Packet], int]:
    """All whole packets in file order, and the byte position of the one the file was cut in (-1: none)."""
    packets, last, vp8 = [], None, stream.codec_context.name == "vp8"
    with suppress(av.FFmpegError):  # a file cut short may end in an error
        for packet in packets_of(container, stream, path):
            if packet.size or packet.pts is not None:  # not PyAV's flush packet
                hidden = not packet.size or packet.is_discard or (vp8 and not memoryview(packet)[0] & 0x10)
                end = (packet.dts or 0 if packet.pts is None else packet.pts) + (packet.duration or 0)
                packets.append(Packet(packet.pts, packet.dts, end, packet.is_keyframe, not hidden))
                last = packet
    if last is not None and last.is_corrupt:
        return packets[:-1], last.pos
    return packets, -1


def _promised(container, stream, file: str, packets: list[Packet], cut: int, rate: float) -> str:
    """How many frames the file should have, in words; "" where none is missing."""
    is_cut, declared = True if cut >= 0 else None, _declared_end(container, stream)
    if is_cut is None and container.format.name.startswith("matroska"):
        with open(file, "rb") as content:
            is_cut = _is_cut(content)
    begin = (packets[0].pts or 0 if packets else 0) * float(stream.time_base)
    short = declared - max((packet.end for packet in packets), default=0) * float(stream.time_base)  # seconds
    count = stream.frames or round((declared - begin) * rate)
    if is_cut is None:  # half a frame where the header counts frames, else half a second: the last may stay for long
        is_cut = count > len(packets) and short * rate > (0.5 if stream.frames else 0.5 * rate)
    if not is_cut:
        return ""
    return f"about {count}" if count > len(packets) else "an unknown number"


def _declared_end(container, stream) -> float:
    """Where the header says the video ends, in seconds on the file's own clock; 0.0 where it does not say."""
    if stream.duration:
        return ((stream.start_time or 0) + stream.duration) * float(stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))  # Matroska
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0


def _is_cut(file: BinaryIO) -> bool | None:
    """Whether a Matroska file ends before its last cluster of frames does; None where its sizes do not tell.

    Durations tell less: the last frame's own is in them and not in its packet, and sound may last longer.
    """
    end = file.seek(0, os.SEEK_END)
    kind, at, size = _element(file, 0)
    if kind != EBML or size is None or size > end:
        return None
    kind, at, size = _element(file, at + size)
    if kind != SEGMENT:
        return None
    stop = None if size is None else at + size
    while at < min(end, stop or end):
        kind, at, size = _element(file, at)
        if size is None:
            return None
        at += size
    if at > end:
        return kind == CLUSTER  # not in the seek table, nor in the tags, that may follow
    return None if stop is None else stop > end


def _element(file: BinaryIO, at: int) -> tuple[int, int, int | None]:
    """(id, where its content starts, the content's size) of the Matroska element at byte `at`; None: no size known."""
    file.seek(at)
    head = file.read(12).ljust(12, b"\0")
    first = 9 - head[0].bit_length()  # bytes of the id: one more than the zero bits that lead it
    count = 9 - head[min(first, 4)].bit_length()  # bytes of the size
    bits = 7 * count
    size = int.from_bytes(head[first : first + count], "big") & (1 << bits) - 1
    known = first <= 4 and count <= 8 and size != (1 << bits) - 1
    return int.from_bytes(head[:first], "big"), at + first + count, size if known else None
