"""What the tests of video reading share: clips by name, encoded once, and the backends."""

from __future__ import annotations

from pathlib import Path

import clips
import numpy as np
import pytest

from ppllava import video

N = 40
FPS = 30
VFR_MS = np.cumsum([0] + [133 if i % 3 == 0 else 10 for i in range(N - 1)]).tolist()

# name -> how to encode it; every backend must read these exactly
CLIPS = {
    "one_group.mp4": {"gop": 250},
    "short_groups.mp4": {"gop": 8},
    "b_frames.mp4": {"gop": 12, "bframes": 3},
    "vfr.mkv": {"gop": 12, "pts_ms": VFR_MS},  # its header says 30 fps
    "vfr.mp4": {"gop": 12, "bframes": 2, "pts_ms": VFR_MS},
    "sound.mkv": {"gop": 12, "bframes": 2, "audio": True},
    "vp9.webm": {"codec": "libvpx-vp9", "gop": 12},
    "vp8.webm": {"codec": "libvpx", "gop": 12},
    "hevc.mp4": {"codec": "libx265", "gop": 12, "bframes": 2, "options": {"x265-params": "log-level=none:open-gop=0"}},
    "mpeg4.mkv": {"codec": "mpeg4", "gop": 12},
    "odd.mp4": {"size": (104, 50)},
}
# decord 0.6 cannot read these, or gives other frames than asked for
PYAV_CLIPS = {
    "open_groups.mp4": {"gop": 12, "bframes": 3, "options": {"x264-params": "open-gop=1"}},
    "open_hevc.mkv": {"codec": "libx265", "gop": 12, "bframes": 2, "options": {"x265-params": "log-level=none"}},
    "mpeg4.mp4": {"codec": "mpeg4", "gop": 3, "bframes": 2},
    "mpeg4.avi": {"codec": "mpeg4", "gop": 12, "bframes": 2},
    "h264.avi": {"gop": 12, "bframes": 2},  # its packets' timestamps are in the wrong order
    "plain.avi": {"gop": 12},  # decord gives 2, 2, 5, 7 for 2, 14, 17, 31
    "b_frames.asf": {"gop": 12, "bframes": 2},  # its timestamps are those of decoding
    "mpeg2.ts": {"codec": "mpeg2video", "gop": 12},
    "video.flv": {"gop": 12, "bframes": 2},
    "stream.ts": {"gop": 12, "bframes": 2},
    "short_groups.ts": {"gop": 3, "bframes": 3},  # seeking by pts lands a group late
    "loop.gif": {"codec": "gif"},
    "raw.h264": {"gop": 12, "bframes": 2, "format": "h264"},
    "raw.hevc": {"codec": "libx265", "gop": 12, "options": {"x265-params": "log-level=none"}, "format": "hevc"},
    "raw.m4v": {"codec": "mpeg4", "gop": 12, "format": "m4v"},
    "raw.m2v": {"codec": "mpeg2video", "gop": 12, "format": "mpeg2video"},
}


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """make(name, **how): the path of an encoded clip, encoded once."""
    folder, made = tmp_path_factory.mktemp("clips"), {}

    def make(name: str, **how) -> Path:
        if name not in made:
            made[name] = clips.encode(folder / name, N, **(how or CLIPS.get(name) or PYAV_CLIPS[name]))
        return made[name]

    return make


@pytest.fixture(params=["pyav", "decord"])
def backend(request):
    return request.param


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by one for every frame the decoder gives."""
    frames, original = [], video._frames

    def counted(*args):
        for item in original(*args):
            frames.append(item[0].pts)
            yield item

    monkeypatch.setattr(video, "_frames", counted)
    return frames


def message(error) -> str:
    return str(error.value)
