"""Small clips encoded at test time. Every frame carries its index as a bar code that survives lossy compression."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

BITS = 8


def draw(index: int, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3]: the top half holds the bits of `index` (white = 1, highest bit left), the bottom is noise."""
    image = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)  # [H, W, 3]
    for bit in range(BITS):
        block = slice(bit * width // BITS, (bit + 1) * width // BITS)
        image[: height // 2, block] = 235 if index >> (BITS - 1 - bit) & 1 else 16
    return image


def read_index(image: np.ndarray) -> int:
    """The number drawn by `draw` in a decoded frame, uint8 [H, W, 3]."""
    height, width, _ = image.shape
    bits = image[: height // 2].mean(axis=(0, 2)).reshape(BITS, width // BITS).mean(axis=1) > 128  # [8]
    return int("".join("1" if bit else "0" for bit in bits), 2)


def read_indices(frames: np.ndarray) -> list[int]:
    """The numbers drawn in frames, uint8 [T, H, W, 3]."""
    return [read_index(frame) for frame in frames]


def encode(
    path: Path,
    frames: int = 60,
    *,
    codec: str = "libx264",
    gop: int = 12,
    bframes: int = 0,
    fps: int = 30,
    pts_ms: list[int] | None = None,
    size: tuple[int, int] = (64, 48),
    first_pts: int = 0,
    audio: bool | float = False,
    title: str | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    format: str | None = None,
) -> Path:
    """Write a clip of `frames` frames, at a constant `fps` or at the given `pts_ms`.

    size is (width, height); audio the seconds of silence, True for as long as the frames.
    """
    width, height = size
    chosen = {"libx264": {"preset": "veryfast", "crf": "18", "sc_threshold": "0"}, "libvpx": {"crf": "8"}}.get(
        codec, {}
    )
    with av.open(str(path), "w", format=format, options=container_options or {}) as container:
        if title:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=fps, options={**chosen, **(options or {})})
        stream.width, stream.height = width, height
        stream.pix_fmt = {"gif": "rgb8", "png": "rgb24"}.get(codec, "yuv420p")
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = bframes
        if pts_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=8000) if audio else None
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(draw(i, width, height), format="rgb24")
            frame.pts = pts_ms[i] if pts_ms else first_pts + i
            frame.time_base = stream.codec_context.time_base = Fraction(1, 1000) if pts_ms else Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _encode_silence(container, sound, seconds=frames / fps if audio is True else audio)
    return path


def encode_audio(path: Path, seconds: float = 1.0, cover: bool = False) -> Path:
    """Write a file that holds sound and, if `cover`, one picture that belongs to it."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_ndarray(draw(0, 64, 48), format="rgb24")))
            container.mux(picture.encode())
        _encode_silence(container, sound, seconds)
    return path


def _encode_silence(container, stream, seconds: float) -> None:
    for start in range(0, int(8000 * seconds), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, start, Fraction(1, 8000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def cut(path: Path, fraction: float) -> Path:
    """A copy of `path` that keeps only the first `fraction` of its bytes, as an interrupted download does."""
    data = path.read_bytes()
    short = path.with_name("cut_" + path.name)
    short.write_bytes(data[: int(len(data) * fraction)])
    return short


def wipe_packet(path: Path, number: int) -> Path:
    """A copy of `path` whose packet `number` (in file order) is all zeros, as a bad disk block leaves it."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
        start, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[start : start + size] = bytes(size)
    wiped = path.with_name("wiped_" + path.name)
    wiped.write_bytes(data)
    return wiped


def rotate(path: Path, quarter_turns: int) -> Path:
    """A copy of an mp4 whose track header says to show it turned counter-clockwise by `quarter_turns`."""
    a, b = {0: (1, 0), 1: (0, -1), 2: (-1, 0), 3: (0, 1)}[quarter_turns % 4]
    data, one = bytearray(path.read_bytes()), 1 << 16
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of flags, times, ids, layer and volume
    assert struct.unpack(">9i", data[at : at + 36]) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", a * one, b * one, 0, -b * one, a * one, 0, 0, 0, 1 << 30)
    turned = path.with_name(f"turned{quarter_turns}_{path.name}")
    turned.write_bytes(data)
    return turned
