"""Sampling rules as pure functions, and read_video, which applies them."""

from __future__ import annotations

import io
import tracemalloc
from fractions import Fraction

import clips
import numpy as np
import pytest
from video_fixtures import VFR_MS, N, backend, make, message

from ppllava import sampling, video
from ppllava.video import VideoError, read_video

pytestmark = pytest.mark.filterwarnings("error::ppllava.video.VideoWarning")
POSITIVE = "fps must be a positive number of frames per second"


@pytest.mark.parametrize(
    ("num_frames", "total_frames", "indices"),
    [
        (4, 10, [1, 3, 5, 8]),  # segment 2.25: 1 + round(0, 2.25, 4.5 to even, 6.75)
        (4, 100, [12, 37, 62, 86]),  # segment 24.75, starts at floor(12.375)
        (1, 9, [4]),
        (3, 1, [0, 0, 0]),
        (6, 4, [0, 0, 1, 2, 2, 2]),  # shorter than asked: repeats, as PPLLaVA does
        (4, 4, [0, 1, 2, 2]),
    ],
)
def test_sample_uniform(num_frames, total_frames, indices):
    result = sampling.sample_uniform(num_frames, total_frames)
    assert (result.tolist(), result.dtype) == (indices, np.int64)


def test_sample_uniform_is_ppllavas_rule_everywhere():
    for total in (*range(1, 70), 899, 900, 100_003):
        for count in (1, 2, 7, 8, 16, 32, 64):
            segment = float(total - 1) / count
            theirs = [int(0 + (segment / 2) + np.round(segment * k)) for k in range(count)]
            result = sampling.sample_uniform(count, total)
            assert result.tolist() == theirs
            assert 0 <= result[0] <= result[-1] < total


def test_sample_uniform_errors():
    for arguments, name in (((0, 5), "num_frames"), ((5, 0), "total_frames")):
        with pytest.raises(ValueError, match=name) as error:
            sampling.sample_uniform(*arguments)
        assert message(error) == f"{name} must be at least 1, got 0; pass a whole number such as 8"
    for value in (2.5, 8.0, "8", None, True, np.float32(8)):
        with pytest.raises(TypeError) as error:
            sampling.sample_uniform(value, 5)
        assert message(error) == f"num_frames must be an integer, got {value!r}; pass a whole number such as 8"
    for kind in (np.int8, np.uint8, np.int64):
        assert sampling.sample_uniform(kind(4), kind(100)).tolist() == [12, 37, 62, 86]


VFR = np.array([0.0, 0.1, 0.2, 1.0, 1.9, 2.0])


@pytest.mark.parametrize(
    ("fps", "arguments", "indices"),
    [
        (1, {}, [0, 3, 5]),  # on screen at 0, 1, 2 s
        (2, {}, [0, 2, 3, 3, 5]),  # at 0.5 s the frame of 0.2 s, at 1.5 s the frame of 1.0 s
        (2, {"max_frames": 5}, [0, 2, 3, 3, 5]),
        (2, {"max_frames": 2}, [2, 3]),  # of the five times, sample_uniform(2, 5) = 1, 3
        (2, {"start": 1.0}, [3, 3, 5]),
        (2, {"start": 0.95, "end": 1.5}, [2, 3]),  # at 0.95 and 1.45 s
        (2, {"end": 100.0}, [0, 2, 3, 3, 5]),
        (0.1, {}, [0]),
        (1, {"start": 2.3}, [5]),  # the last frame is still on screen: the average frame time is 0.4 s
    ],
)
def test_sample_fps(fps, arguments, indices):
    result = sampling.sample_fps(fps, VFR, **arguments)
    assert (result.tolist(), result.dtype) == (indices, np.int64)


@pytest.mark.parametrize("rate", [24, 25, 30, 60, 120, 30000 / 1001])
def test_sample_fps_at_the_clips_own_rate_takes_every_frame(rate):
    exact = np.arange(500) / rate
    for timestamps in (exact, np.round(exact, 3), np.round(exact * 90000) / 90000):  # mp4, Matroska, mpegts
        assert sampling.sample_fps(rate, timestamps).tolist() == list(range(500))
        assert sampling.sample_fps(2 * rate, exact).tolist() == [k // 2 for k in range(999)]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, (0, 5)),
        (0.0, 0.0, (0, 0)),
        (0.15, 1.9, (1, 4)),  # both ends belong to it
        (0.2, 1.8999, (2, 4)),  # within the rounding of timestamps
        (0.2, 1.89, (2, 3)),
        (1.95, 99.0, (4, 5)),
    ],
)
def test_sample_range(start, end, expected):
    assert sampling.sample_range(VFR, start, end) == expected


def test_sampling_errors():
    order = "start and end are seconds and need 0 <= start <= end, got start={}, end={}"
    for start, end in ((-1.0, None), (1.0, 0.5), (float("nan"), None), (None, float("nan"))):
        for rule in (sampling.sample_range, lambda *args: sampling.sample_fps(1, args[0], None, *args[1:])):
            with pytest.raises(ValueError, match="start and end") as error:
                rule(VFR, start, end)
            assert message(error) == order.format(start, end)
    with pytest.raises(ValueError, match="after the end") as error:
        sampling.sample_range(VFR, 2.5)
    assert message(error) == "start=2.5 is after the end of the clip at 2.400 s; pass an earlier start"
    for fps in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="fps") as error:
            sampling.sample_fps(fps, VFR)
        assert message(error) == f"{POSITIVE}, got {fps}; pass a number such as 2.0"
    for fps in ("2", None, True, 1j):
        with pytest.raises(TypeError) as error:
            sampling.sample_fps(fps, VFR)
        assert message(error) == f"fps must be a number of frames per second, got {fps!r}; pass a number such as 2.0"
    for fps in (2, np.int64(2), np.float16(2), Fraction(2)):
        assert sampling.sample_fps(fps, VFR).tolist() == [0, 2, 3, 3, 5]
    for max_frames in (None, 10**9):
        with pytest.raises(ValueError, match="max_frames") as error:
            sampling.sample_fps(1e6, VFR, max_frames)
        assert message(error) == "fps=1000000.0 asks for 2000501 frames of this clip; pass a lower fps or max_frames"
    with pytest.raises(ValueError, match=r"^max_frames must be at least 1, got 0; pass a whole number such as 8$"):
        sampling.sample_fps(1, VFR, 0)
    with pytest.raises(TypeError, match=r"max_frames must be an integer, got 2\.5; pass a whole number such as 8$"):
        sampling.sample_fps(1, VFR, 2.5)


# read_video


def test_read_video(make, backend, monkeypatch):
    closed = []
    monkeypatch.setattr(video.BACKENDS[backend], "close", lambda self: closed.append(1))
    clip = read_video(make("vfr.mp4"), num_frames=8, backend=backend)
    assert clip.indices.tolist() == clips.read_indices(clip.frames) == sampling.sample_uniform(8, N).tolist()
    np.testing.assert_allclose(clip.timestamps, np.array(VFR_MS)[clip.indices] / 1000, atol=1e-9)
    assert clip.fps == pytest.approx((N - 1) / (VFR_MS[-1] / 1000))

    assert closed == [1]

    clip = read_video(make("vfr.mp4"), fps=4, start=0.5, end=1.5, backend=backend)
    seconds = np.array(VFR_MS) / 1000
    on_screen = [int((seconds <= t + 1e-6).sum()) - 1 for t in (0.5, 0.75, 1.0, 1.25, 1.5)]
    assert clip.indices.tolist() == clips.read_indices(clip.frames) == on_screen

    clip = read_video(make("one_group.mp4"), num_frames=3, start=0.5, end=1.0, backend=backend)
    assert clips.read_indices(clip.frames) == [17, 22, 27]  # frames 15 to 30: segment 5, starting at 15 + 2

    assert len(read_video(make("one_group.mp4"), fps=30, max_frames=5, backend=backend).frames) == 5


def test_read_video_takes_one_rule(make):
    for rule, got in (({}, "neither"), ({"num_frames": 4, "fps": 1.0}, "num_frames=4 and fps=1.0")):
        with pytest.raises(ValueError, match="exactly one") as error:
            read_video(make("one_group.mp4"), **rule)
        text = f"exactly one of num_frames and fps must be given, got {got}; pass one, such as num_frames=32"
        assert message(error) == text
    with pytest.raises(VideoError, match="max_bytes=100;"):
        read_video(make("one_group.mp4"), num_frames=4, max_bytes=100)


@pytest.mark.parametrize("number", [10**9, 10**18, np.int32(10**9)])
def test_read_video_refuses_too_many_frames_before_it_makes_their_indices(make, backend, number):
    tracemalloc.start()
    try:
        with pytest.raises(VideoError, match=rf"{number} frames of 64x48 take {9216 * int(number)} bytes, more than"):
            read_video(make("one_group.mp4"), num_frames=number, backend=backend)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 24


@pytest.mark.parametrize(
    ("rule", "kind", "text"),
    [
        ({"num_frames": "8"}, TypeError, "num_frames must be an integer, got '8'; pass a whole number such as 8"),
        ({"num_frames": 2.5}, TypeError, "num_frames must be an integer, got 2.5; pass a whole number such as 8"),
        ({"num_frames": -3}, ValueError, "num_frames must be at least 1, got -3; pass a whole number such as 8"),
        ({"fps": "2"}, TypeError, "fps must be a number of frames per second, got '2'; pass a number such as 2.0"),
        ({"fps": float("nan")}, ValueError, f"{POSITIVE}, got nan; pass a number such as 2.0"),
        ({"fps": -1}, ValueError, f"{POSITIVE}, got -1; pass a number such as 2.0"),
    ],
)
def test_read_video_looks_at_its_numbers_before_the_file(rule, kind, text):
    with pytest.raises(kind) as error:
        read_video("nowhere.mp4", **rule)
    assert message(error) == text


@pytest.mark.parametrize("path", [5, io.BytesIO(b""), None])
def test_what_is_no_path(path):
    with pytest.raises(TypeError) as error:
        read_video(path, num_frames=2)
    kind = type(path).__name__
    assert message(error) == f"path must be the path of a video file, got {kind}; write the video to a file"
