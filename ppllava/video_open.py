"""Open a local video file with PyAV: which files, which formats, and the errors that say what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import av
from av.stream import Disposition

# FFmpeg formats that keep their data in one file. Playlists (hls, dash, concat) open other files; images and text are
# not video; sound formats are here only so that the error can say that it is sound.
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,ivf,mxf,nut,rm,dv,wtv,yuv4mpegpipe,mp3,wav,aac,flac"
# Streams without a container: FFmpeg decodes them to learn what they are, before a limit of ours can hold.
RAW_FORMATS = "mpegvideo,h264,hevc,vvc,m4v,obu"
# PyAV 18 needs it for tags that are not UTF-8; 19 has neither the keyword nor the attribute.
TAGS = {"metadata_errors": "replace"} if hasattr(av.container.Container, "metadata_errors") else {}


class VideoError(ValueError):
    """The file cannot give the frames asked for; the message names the file, what is wrong and what to do."""


class VideoNotFoundError(VideoError, FileNotFoundError):
    """There is no such file."""


class VideoWarning(UserWarning):
    """The file is damaged; what exists of it is read."""


def local_file(path: str) -> str:
    """The absolute path: FFmpeg takes no leading "concat:" or "http:" of it for a protocol."""
    if not os.path.exists(path):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path):
            raise VideoError(f"{path}: is a URL, and only local files are read; download it and pass the file's path")
        where = "" if os.path.isabs(path) else f", relative ones start at {os.getcwd()}"
        raise VideoNotFoundError(f"{path}: there is no such file; check the path{where}")
    if not os.path.isfile(path):
        kind = "a directory" if os.path.isdir(path) else "not a regular file"
        raise VideoError(f"{path}: is {kind}; pass the path of one video file")
    if not os.access(path, os.R_OK):
        raise VideoError(f"{path}: may not be read by this user; change its permissions")
    if os.path.getsize(path) == 0:
        raise VideoError(f"{path}: is empty (0 bytes); download or copy it again")
    return os.path.abspath(path)


@contextmanager
def opened(path: str, file: str, threads: int, raw_streams: bool) -> Iterator:
    """(container, stream) of the video in `file`, a :func:`local_file`; `path` is how errors name it.

    threads      0 = slice threads; n = n decoder threads
    raw_streams  whether streams without a container are read
    """
    formats = f"{FORMATS},{RAW_FORMATS}" if raw_streams else FORMATS
    try:
        container = av.open(file, options={"protocol_whitelist": "file", "format_whitelist": formats}, **TAGS)
    except av.FFmpegError as error:
        if not raw_streams and _is_raw(file):
            raise VideoError(
                f"{path}: is a raw stream without a container, and FFmpeg may take gigabytes to probe one; put it into "
                "one with ffmpeg -i IN -c copy OUT.mkv, or pass raw_streams=True to read_video where it is your own"
            ) from error
        raise VideoError(
            f"{path}: FFmpeg finds no video in it; it is damaged, cut short before its index, or another kind "
            "of file (playlists, images and text are refused), so pass a complete video file"
        ) from error
    with container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:
            raise VideoError(f"{path}: holds no video, only sound, a cover picture or data; pass a video file")
        if stream.codec_context is None:
            raise VideoError(f"{path}: PyAV has no decoder for its codec; re-encode it, for example to H.264")
        stream.thread_type = "AUTO" if threads else "SLICE"
        stream.codec_context.thread_count = threads
        yield container, stream


def packets_of(container, stream, path: str) -> Iterator[av.Packet]:
    """The packets of a stream in file order.

    Raises:
        av.FFmpegError: at the end of a file cut short.
        VideoError: where PyAV's own list of streams is too short: a damaged file grows one while it is read.
    """
    try:
        yield from container.demux(stream)
    except IndexError as error:
        raise VideoError(
            f"{path}: a stream appears in the middle of it that PyAV cannot follow; the file is damaged, download or "
            "copy it again, or mend it with ffmpeg -i IN -c copy OUT.mkv"
        ) from error


def _is_raw(file: str) -> bool:
    """Whether it starts as MPEG or H.26x video, and no program stream (0xBA), or as AV1 (a temporal delimiter)."""
    with open(file, "rb") as stream:
        return re.match(rb"\0{2,3}\x01[^\xba]|\x12\0", stream.read(5), re.DOTALL) is not None


__all__ = [
    "VideoError",
    "VideoNotFoundError",
    "VideoWarning",
    "local_file",
    "opened",
    "packets_of",
]
