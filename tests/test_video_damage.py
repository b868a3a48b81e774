"""Video reading: cut and damaged files give the frames that exist and a warning, or one error."""

from __future__ import annotations

import io
import re

import clips
import numpy as np
import pytest
from video_fixtures import CLIPS, FPS, N, decoded, make, message

from ppllava import video_index
from ppllava.video import DecordReader, PyAVReader, VideoError, VideoWarning

pytestmark = pytest.mark.filterwarnings("error::ppllava.video.VideoWarning")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("sound.mkv", {}),
        ("vp9.webm", {}),
        ("fast.mp4", {"gop": 12, "bframes": 2, "audio": True, "container_options": {"movflags": "faststart"}}),
        ("mpeg4.avi", {}),
        ("video.flv", {}),
    ],
)
def test_a_file_cut_in_half_gives_the_frames_that_exist(make, name, how):
    path = clips.cut(make(name, **how), 0.5)
    with pytest.warns(VideoWarning) as caught:
        reader = PyAVReader(path)
    assert 5 < len(reader) < N * 3 // 4
    assert [str(warning.message) for warning in caught] == [
        f"{path}: is cut short, {len(reader)} frames exist of about {N}; only those are read"
    ]
    # each is the frame its timestamp says; with B-frames the last ones before the cut have gaps
    assert clips.read_indices(reader.get_frames(range(len(reader)))) == np.round(reader.timestamps * FPS).tolist()
    with pytest.raises(ValueError, match=f"frame {len(reader)} does not exist"):
        reader.get_frames([len(reader)])


MATROSKA = {
    "b_frames.mkv": {"gop": 12, "bframes": 2},
    "sound.mkv": CLIPS["sound.mkv"],
    "long_sound.mkv": {"gop": 12, "audio": 5.0},
    "vp8.webm": CLIPS["vp8.webm"],
    "vfr.mkv": CLIPS["vfr.mkv"],
    "clusters.mkv": {"gop": 12, "container_options": {"cluster_time_limit": "200"}},
    "live.webm": {"codec": "libvpx", "gop": 12, "container_options": {"live": "1"}},  # says no duration, no size
}
SEEK_TABLE = bytes.fromhex("1c53bb6b")


@pytest.mark.parametrize("name", MATROSKA)
def test_a_cut_matroska_file_always_warns(make, name):
    whole = make(name, **MATROSKA[name])
    assert len(PyAVReader(whole)) == N  # without a warning
    for percent in (40, 60, 70, 76, 80, 85, 90, 93, 96):
        path = clips.cut(whole, percent / 100)
        with pytest.warns(VideoWarning) as caught:
            reader = PyAVReader(path)
        (text,) = [str(warning.message) for warning in caught]
        if len(reader) == N:  # only sound is missing
            assert name == "long_sound.mkv"
            continue
        claim = text.split("cut short, ")[1].split(";")[0]
        if name == "live.webm":
            assert claim == f"{len(reader)} frames exist of an unknown number"
            continue
        found = re.fullmatch(rf"{len(reader)} frames exist of about (\d+)", claim)
        assert abs(int(found[1]) - N) <= 1 or "vfr" in name


def test_a_matroska_file_cut_between_clusters_warns_and_one_cut_behind_them_does_not(make):
    whole = make("clusters.mkv", **MATROSKA["clusters.mkv"])
    data, path = whole.read_bytes(), whole.with_name("boundary.mkv")
    path.write_bytes(data[: data.rindex(video_index.CLUSTER.to_bytes(4, "big"))])
    with pytest.warns(VideoWarning, match=f"frames exist of about {N}; only those are read"):
        assert N - 7 < len(PyAVReader(path)) < N
    path.write_bytes(data[: data.rindex(SEEK_TABLE) + 9])
    assert len(PyAVReader(path)) == N


def test_whole_matroska_files_whose_durations_promise_more(make):
    whole = make("b_frames.mkv", **MATROSKA["b_frames.mkv"])
    data, path = whole.read_bytes(), whole.with_name("long_last.mkv")
    assert data.count(b"00:00:01.333") == 1
    data = data.replace(b"00:00:01.333", b"00:00:09.333")  # the last frame stays for 8 s, which its packet does not say
    path.write_bytes(data)
    assert len(PyAVReader(path)) == N
    path.write_bytes(data + bytes(1000))  # other bytes behind it
    assert len(PyAVReader(path)) == N


def test_a_duration_does_not_outvote_a_frame_count(make, monkeypatch):
    monkeypatch.setattr(video_index, "_declared_end", lambda container, stream: 9.0)
    assert len(PyAVReader(make("one_group.mp4"))) == N  # without a warning


def test_a_matroska_file_whose_rest_is_zeros(make):
    whole = make("b_frames.mkv", **MATROSKA["b_frames.mkv"])
    data, path = whole.read_bytes(), whole.with_name("zeros.mkv")
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))  # space kept for a broken download
    with pytest.warns(VideoWarning, match=f"frames exist of about {N}; only those are read"):
        PyAVReader(path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", None),
        (b"not Matroska", None),
        ("1a45dfa3 81 00", None),  # no segment
        ("1a45dfa3 ff 00", None),
        ("1a45dfa3 01ffffffffffff00", None),
        ("1a45dfa3 81 00 18538067 85 1f43b675 80", False),  # empty cluster, whole segment
        ("1a45dfa3 81 00 18538067 86 1f43b675 80", True),  # one byte of the segment missing
        ("1a45dfa3 81 00 18538067 86 1f43b675 81", True),  # of its cluster
        ("1a45dfa3 81 00 18538067 86 1c53bb6b 81", False),  # of the seek table
        ("1a45dfa3 81 00 18538067 86 1f43b675 ff", None),  # a cluster that says no size
        ("1a45dfa3 81 00 18538067 ff 1f43b675 80", None),
        ("1a45dfa3 81 00 18538067 ff 1f43b675 01ffffffffffff00", True),
        ("1a45dfa3 81 00 18538067 86 00000000 00", None),
    ],
)
def test_the_sizes_of_a_matroska_file(data, expected):
    assert video_index._is_cut(io.BytesIO(data if isinstance(data, bytes) else bytes.fromhex(data))) is expected


def test_a_file_cut_inside_its_last_packet(make):
    path = make("video.flv")
    short = path.with_name("last.flv")
    short.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(VideoWarning) as caught:
        PyAVReader(short)
    assert [str(warning.message) for warning in caught] == [
        f"{short}: is cut short, {N - 1} frames exist of about {N}; only those are read"
    ]


def test_decord_reads_half_an_mkv_and_refuses_half_an_mp4(make):
    path = clips.cut(make("sound.mkv"), 0.5)
    with pytest.warns(VideoWarning, match="is cut short"):
        reader = DecordReader(path)
    assert clips.read_indices(reader.get_frames(range(len(reader)))) == np.round(reader.timestamps * FPS).tolist()
    path = clips.cut(make("fast.mp4", gop=12, bframes=2, audio=True, container_options={"movflags": "faststart"}), 0.5)
    with pytest.warns(VideoWarning, match="is cut short"), pytest.raises(VideoError, match=r"use backend='pyav'$"):
        DecordReader(path)


def test_a_frame_that_cannot_be_decoded_is_never_replaced(make, decoded):
    path = clips.wipe_packet(make("groups12.mp4", gop=12), 20)
    reader = PyAVReader(path)
    assert clips.read_indices(reader.get_frames([19, 30])) == [19, 30]  # before it, and after the next keyframe
    with pytest.raises(VideoError) as error:
        reader.get_frames([19, 20, 30])
    decoded.clear()
    with pytest.raises(VideoError):
        reader.get_frames([20])
    assert N - 1 <= len(decoded) < N + 14  # once from its keyframe to just after it, once all of the file
    assert message(error) == (
        f"{path}: 1 of the frames asked for cannot be decoded, the first is 20; "
        "the file is damaged there, leave them out or re-encode it"
    )
    with pytest.warns(VideoWarning) as caught:
        reader.get_frames([19, 21, 30])
    assert [str(warning.message) for warning in caught] == [  # once
        f"{path}: has damaged frames, patched by the decoder, among those asked for: [21]"
    ]


def test_frames_that_change_size(make, tmp_path):
    path = tmp_path / "two.h264"
    small, large = make("raw.h264"), make("raw_large.h264", size=(128, 96), format="h264")
    path.write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(VideoError) as error:
        PyAVReader(path, raw_streams=True).get_frames([0, N])
    assert message(error) == f"{path}: its frames have different sizes, 64x48 and 128x96; re-encode it at one size"
