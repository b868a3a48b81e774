"""Video reading: every decoded frame carries its own index, so a wrong frame cannot pass for the right one."""

from __future__ import annotations

import io
import re
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import clips
import numpy as np
import pytest

from ppllava import sampling, video, video_index
from ppllava.video import DecordReader, PyAVReader, VideoError, VideoReader, VideoWarning, open_video, read_video

pytestmark = pytest.mark.filterwarnings("error::ppllava.video.VideoWarning")

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


# Exact frames


@pytest.mark.parametrize("name", CLIPS)
def test_every_frame_is_exact(make, backend, name):
    order = [*np.random.default_rng(0).permutation(N).tolist(), 5, 5, N - 1, 0]
    with open_video(make(name), backend) as reader:
        frames = reader.get_frames(order)
        assert (len(reader), isinstance(reader, VideoReader)) == (N, True)
    width, height = CLIPS[name].get("size", (64, 48))
    assert (frames.shape, frames.dtype) == ((len(order), height, width, 3), np.uint8)
    assert clips.read_indices(frames) == order


@pytest.mark.parametrize("name", PYAV_CLIPS)
def test_pyav_reads_what_decord_cannot(make, name):
    order = [*range(N - 1, -1, -1), 3, 3]
    assert clips.read_indices(PyAVReader(make(name)).get_frames(order)) == order
    with pytest.raises(VideoError, match=r"decord cannot read it \(.*\); use backend='pyav'$"):
        DecordReader(make(name)).get_frames(order)


@pytest.mark.parametrize("name", CLIPS)
def test_backends_agree_to_the_pixel(make, name):
    ours, theirs = PyAVReader(make(name)), DecordReader(make(name))
    np.testing.assert_array_equal(ours.get_frames(range(N)), theirs.get_frames(range(N)))
    np.testing.assert_array_equal(ours.timestamps, theirs.timestamps)
    assert (ours.fps, ours.height, ours.width) == (theirs.fps, theirs.height, theirs.width)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("plain.avi", "it returns wrong frames of avi files"),
        ("mpeg4.mp4", "it returns wrong frames where some before a keyframe come after it in the file"),
    ],
)
def test_decord_is_refused_where_it_returns_wrong_frames(make, name, reason):
    import decord

    decoder = decord.VideoReader(str(make(name)))
    assert clips.read_indices([decoder[i].asnumpy() for i in (2, 14, 17, 31)]) != [2, 14, 17, 31]  # why it is refused
    with pytest.raises(VideoError) as error:
        open_video(make(name), "decord")
    assert message(error) == f"{make(name)}: decord cannot read it ({reason}); use backend='pyav'"


def test_colours_survive(make):
    frame = PyAVReader(make("one_group.mp4")).get_frames([0])[0]  # RGB, not BGR; within what H.264 at crf 18 costs
    assert np.abs(frame.astype(int) - clips.draw(0, 64, 48)).mean(axis=(0, 1)).max() < 40
    red = np.zeros((48, 64, 3), np.uint8) + np.array([200, 30, 30], np.uint8)
    path = make("one_group.mp4").with_name("red.mkv")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(red, format="rgb24")))
        container.mux(stream.encode())
    reader = PyAVReader(path)
    assert (len(reader), reader.timestamps.tolist()) == (1, [0.0])
    assert np.abs(reader.get_frames([0])[0].astype(int) - red).max() <= 3


def test_timestamps_are_the_files_own(make, backend):
    reader = open_video(make("vfr.mp4"), backend)
    np.testing.assert_allclose(reader.timestamps, np.array(VFR_MS) / 1000, atol=1e-9)
    assert reader.fps == pytest.approx((N - 1) / (VFR_MS[-1] / 1000))
    assert reader.timestamps.dtype == np.float64


@pytest.mark.parametrize("name", ["stream.ts", "sound.mkv", "h264.avi", "one_group.mp4", "loop.gif"])
def test_timestamps_start_at_zero_and_ascend(make, name):
    tolerance = 0.006 if name == "loop.gif" else 0.00051  # gif counts in 10 ms, Matroska in 1 ms
    np.testing.assert_allclose(PyAVReader(make(name)).timestamps, np.arange(N) / FPS, atol=tolerance)


@pytest.mark.parametrize("name", ["sound.mkv", "vp9.webm", "stream.ts", "raw.h264"])
def test_length_without_a_frame_count(make, name):
    with av.open(str(make(name))) as container:
        assert container.streams.video[0].frames == 0
    assert len(PyAVReader(make(name))) == N


def test_rotation_is_applied(make, backend):
    upright = open_video(make("wide.mp4", size=(128, 64)), backend).get_frames([3, 9])
    for turns in (1, 2, 3):
        reader = open_video(clips.rotate(make("wide.mp4"), turns), backend)
        frames = reader.get_frames([3, 9])
        np.testing.assert_array_equal(frames, np.rot90(upright, turns, axes=(1, 2)))
        assert frames.shape[1:3] == (reader.height, reader.width)


def test_decord_says_when_its_rotation_fails(make):
    path = clips.rotate(make("one_group.mp4"), 1)
    assert PyAVReader(path).get_frames([0]).shape == (1, 64, 48, 3)
    with pytest.raises(VideoError, match=r"decord cannot read it \(.*\); use backend='pyav'$"):
        DecordReader(path).get_frames([0])


def test_hidden_frames_of_an_edit_list_are_not_frames(make, decoded):
    path = make("edited.mp4", gop=250, first_pts=-5)
    reader = PyAVReader(path)
    assert len(decoded) == 1  # known without decoding them
    assert clips.read_indices(reader.get_frames(range(len(reader)))) == list(range(5, N))
    assert reader.timestamps[0] == 0.0
    with pytest.raises(VideoError) as error:
        DecordReader(path)
    assert message(error) == f"{path}: decord counts {N} frames where {N - 5} exist; use backend='pyav'"


def test_hidden_vp8_frames_are_not_frames(make, tmp_path):
    with av.open(str(make("vp8.webm"))) as container:
        packet = [bytes(packet) for packet in container.demux(video=0) if packet.size][7]
    data = make("vp8.webm").read_bytes()
    path = tmp_path / "hidden.webm"
    path.write_bytes(data.replace(packet, bytes([packet[0] & ~0x10]) + packet[1:]))
    reader = PyAVReader(path)
    assert clips.read_indices(reader.get_frames(range(len(reader)))) == [i for i in range(N) if i != 7]
    with pytest.raises(VideoError, match=f"decord counts {N} frames where {N - 1} exist; use backend='pyav'$"):
        DecordReader(path)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_change_nothing(make, backend, threads):
    frames = open_video(make("b_frames.mp4"), backend, num_threads=threads).get_frames([30, 2, 17])
    np.testing.assert_array_equal(frames, PyAVReader(make("b_frames.mp4")).get_frames([30, 2, 17]))


# Seek or single pass


@pytest.mark.parametrize(
    ("wanted", "keyframes", "runs"),
    [
        ([0, 10, 500], [0], [(0, [0, 10, 500])]),  # nowhere to seek: one pass
        ([5, 305, 895], [0, 300, 600, 890], [(0, [5]), (300, [305]), (890, [895])]),
        ([5, 9, 14], [0, 8, 13, 24], [(0, [5, 9, 14])]),  # seeking saves too little
        ([0, 7], [0, 6, 7], [(0, [0]), (7, [7])]),  # a seek skips 6 frames, more than it costs
        ([0, 6], [0, 6], [(0, [0, 6])]),  # it skips 5, as many as it costs
        ([299, 300], [0, 300], [(0, [299, 300])]),
        ([], [0], []),
    ],
)
def test_plan(wanted, keyframes, runs):
    assert video.SEEK_COST == 5
    assert video.plan_decoding(wanted, keyframes) == runs


SEEKABLE = ["short_groups.mp4", "short_groups.ts", "open_groups.mp4", "sound.mkv", "vp9.webm"]


@pytest.mark.parametrize("name", SEEKABLE)
def test_seeking_and_one_pass_give_the_same_frames(make, monkeypatch, decoded, name):
    wanted, reader, frames, cost = [36, 2, 19, 25], PyAVReader(make(name)), {}, {}
    for seek_cost in (0, 10**6):
        monkeypatch.setattr(video, "SEEK_COST", seek_cost)
        decoded.clear()
        frames[seek_cost], cost[seek_cost] = reader.get_frames(wanted), len(decoded)
    assert clips.read_indices(frames[0]) == wanted
    np.testing.assert_array_equal(frames[0], frames[10**6])
    assert cost[10**6] == 37  # one pass: frames 0 to 36, each once
    keyframes = np.array(reader._index.keyframes)
    assert len(keyframes) > 3
    distance = [int(index - keyframes[keyframes <= index].max()) for index in wanted]
    assert cost[0] <= sum(distance) + 3 * len(wanted)  # from the keyframe on; 3: some leading frames and no second pass


def test_long_groups_are_read_in_one_pass_and_no_further_than_needed(make, decoded):
    PyAVReader(make("one_group.mp4")).get_frames([20, 3])
    assert len(decoded) == 1 + 21  # one at opening, then 0 to 20


def test_a_container_that_cannot_seek_is_still_exact(make, monkeypatch, decoded):
    monkeypatch.setattr(video, "SEEK_COST", 0)
    reader, packets = PyAVReader(make("short_groups.mp4")), PyAVReader._packets
    monkeypatch.setattr(PyAVReader, "_packets", lambda *args: iter(()) if args[3:] and args[3] else packets(*args))
    assert clips.read_indices(reader.get_frames([30, 3])) == [30, 3]
    assert len(decoded) > 30


def test_damage_seen_only_after_a_seek_is_the_seeks_fault(make, monkeypatch):
    passes, original = [], video._frames

    def damaged_at_first(packets, stream):
        passes.append(1)
        return ((frame, len(passes) == 1) for frame, _ in original(packets, stream))

    reader = PyAVReader(make("short_groups.mp4"))
    monkeypatch.setattr(video, "_frames", damaged_at_first)
    assert clips.read_indices(reader.get_frames([30])) == [30]  # and no VideoWarning, which would be an error here
    assert len(passes) == 2


def test_an_index_that_disagrees_with_the_decoder_is_not_believed(make, monkeypatch):
    original = video_index._scan

    def with_a_packet_too_many(container, stream):
        packets, cut = original(container, stream)
        return [packets[0]._replace(pts=-512), *packets], cut

    monkeypatch.setattr(video_index, "_scan", with_a_packet_too_many)
    reader = PyAVReader(make("b_frames.mp4"))
    assert clips.read_indices(reader.get_frames(range(len(reader)))) == list(range(N))
    np.testing.assert_allclose(reader.timestamps, np.arange(N) / FPS)


def test_frames_before_the_first_keyframe_do_not_exist(make, tmp_path, decoded):
    data = make("open_groups.ts", gop=12, bframes=3, options={"x264-params": "open-gop=1"}).read_bytes()
    path = tmp_path / "tail.ts"
    path.write_bytes(data[len(data) // 2 // 188 * 188 :])  # starts inside a group, as a recording of a broadcast does
    reader = PyAVReader(path)
    assert len(decoded) < 6  # known without decoding the file
    indices = clips.read_indices(reader.get_frames(range(len(reader))))
    assert indices == list(range(N - len(reader), N))
    whole = PyAVReader(make("open_groups.ts"))
    assert indices[0] in whole._index.keyframes
    np.testing.assert_array_equal(reader.get_frames(range(len(reader))), whole.get_frames(indices))


def test_frames_in_the_decoder_when_a_file_ends_in_an_error_still_come(make):
    def broken_off(packets):
        yield from packets
        raise av.error.InvalidDataError(0, "broken off")

    with av.open(str(make("b_frames.mp4"))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size][:25]
        frames = [frame for frame, _ in video._frames(broken_off(packets), container.streams.video[0])]
    assert len(frames) == 25


# Memory


def test_only_wanted_frames_are_converted_and_each_once(make, monkeypatch):
    converted, original = [], PyAVReader._to_rgb
    monkeypatch.setattr(PyAVReader, "_to_rgb", lambda self, frame: converted.append(frame.pts) or original(self, frame))
    frames = PyAVReader(make("one_group.mp4")).get_frames([30, 7, 7, 30, 7])
    assert (len(converted), clips.read_indices(frames)) == (2, [30, 7, 7, 30, 7])


def test_memory_is_the_result_and_little_more(make, backend):
    reader = open_video(make("large.mp4", size=(320, 240), gop=12), backend)
    tracemalloc.start()
    try:
        frames = reader.get_frames([0, 13, 26, 39])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < frames.nbytes + 2.5 * frames[0].nbytes  # not the N = 40 frames decoded on the way


def test_decord_is_rewound_to_stop_it_reading_ahead(make, monkeypatch):
    import decord

    sought = []
    monkeypatch.setattr(decord.VideoReader, "seek", lambda self, position: sought.append(position))
    DecordReader(make("one_group.mp4")).get_frames([4])
    assert sought == [0]


def test_budget(make, backend):
    path, frame = make("one_group.mp4"), 64 * 48 * 3
    assert len(open_video(path, backend, max_bytes=2 * frame).get_frames([0, 1])) == 2
    with pytest.raises(VideoError) as error:
        open_video(path, backend, max_bytes=2 * frame).get_frames([0, 0, 0])
    assert message(error) == (
        f"{path}: 3 frames of 64x48 take 27648 bytes, more than max_bytes=18432; "
        "ask for fewer frames or pass a larger max_bytes"
    )
    with pytest.raises(VideoError, match="1 frames of 64x48 take 9216 bytes, more than max_bytes=9215"):
        open_video(path, backend, max_bytes=frame - 1)  # refused before anything of that size is decoded


# Damaged files


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
        about = "at least" if name == "live.webm" else "about"
        found = re.fullmatch(
            rf"{len(reader)} frames exist of {about} (\d+)", text.split("cut short, ")[1].split(";")[0]
        )
        assert int(found[1]) == len(reader) + 1 if name == "live.webm" else abs(int(found[1]) - N) <= 1 or "vfr" in name


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
        PyAVReader(path).get_frames([0, N])
    assert message(error) == f"{path}: its frames have different sizes, 64x48 and 128x96; re-encode it at one size"


# Files that are no video

NO_VIDEO = (
    "{path}: FFmpeg finds no video in it; it is damaged, cut short before its index, or another kind of file "
    "(playlists, images and text are refused), so pass a complete video file"
)
SOUND = "{path}: holds no video, only sound, a cover picture or data; pass a video file"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.mp4", b"", "{path}: is empty (0 bytes); download or copy it again"),
        ("notes.txt", b"not a video " * 100, NO_VIDEO),
        ("renamed.mp4", b"not a video " * 100, NO_VIDEO),
        ("noise.mp4", np.random.default_rng(0).bytes(5000), NO_VIDEO),
    ],
)
def test_other_files(tmp_path, backend, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(VideoError) as error:
        open_video(path, backend)
    assert message(error) == expected.format(path=path)


def test_an_mp4_without_its_index(make, backend):
    path = clips.cut(make("b_frames.mp4"), 0.5)
    with pytest.raises(VideoError) as error:
        open_video(path, backend)
    assert message(error) == NO_VIDEO.format(path=path)


def test_an_image(tmp_path, backend):
    path = clips.encode(tmp_path / "still.png", 1, codec="png", format="image2")
    with av.open(str(path)) as container:
        assert container.streams.video
    with pytest.raises(VideoError) as error:
        open_video(path, backend)
    assert message(error) == NO_VIDEO.format(path=path)


@pytest.mark.parametrize("cover", [False, True])
def test_sound_with_and_without_a_cover(tmp_path, backend, cover):
    path = clips.encode_audio(tmp_path / "song.mp4", cover=cover)
    with pytest.raises(VideoError) as error:
        open_video(path, backend)
    assert message(error) == SOUND.format(path=path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\nstream.ts\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile stream.ts\n"),
        ("list.mp4", "ffconcat version 1.0\nfile stream.ts\n"),  # FFmpeg looks at the content, not at the name
    ],
)
def test_a_playlist_cannot_open_another_file(make, backend, name, text):
    path = make("stream.ts").with_name(name)
    path.write_text(text)
    with av.open(str(path)) as container:  # FFmpeg itself would have followed it
        assert next(container.decode(video=0)).width == 64
    with pytest.raises(VideoError) as error:
        open_video(path, backend)
    assert message(error) == NO_VIDEO.format(path=path)


@pytest.mark.parametrize(
    "url", ["http://localhost:9/clip.mp4", "concat:a.mp4|b.mp4", "file:clip.mp4", "rtsp://localhost/1"]
)
def test_urls(backend, url):
    with pytest.raises(VideoError) as error:
        open_video(url, backend)
    assert message(error) == f"{url}: is a URL, and only local files are read; download it and pass the file's path"


def test_a_file_whose_name_looks_like_a_url(make, tmp_path, monkeypatch, backend):
    monkeypatch.chdir(tmp_path)
    Path("concat:clip.mp4").write_bytes(make("one_group.mp4").read_bytes())
    assert clips.read_indices(open_video("concat:clip.mp4", backend).get_frames([8])) == [8]


def test_missing_file_and_directory(tmp_path, monkeypatch, backend):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        open_video("nowhere.mp4", backend)
    expected = f"nowhere.mp4: there is no such file; check the path, relative ones start at {tmp_path}"
    assert (message(error), isinstance(error.value, VideoError)) == (expected, True)
    with pytest.raises(VideoError) as error:
        open_video(tmp_path, backend)
    assert message(error) == f"{tmp_path}: is a directory; pass the path of one video file"
    with pytest.raises(VideoError) as error:
        open_video("/dev/null", backend)
    assert message(error) == "/dev/null: is not a regular file; pass the path of one video file"


def test_a_file_one_may_not_read(make, monkeypatch):
    monkeypatch.setattr(video.os, "access", lambda path, mode: False)  # root may read everything
    path = make("one_group.mp4")
    with pytest.raises(VideoError) as error:
        open_video(path)
    assert message(error) == f"{path}: may not be read by this user; change its permissions"


def test_metadata_that_is_not_unicode(make, tmp_path):
    path = tmp_path / "title.mkv"
    data = make("titled.mkv", title="TITLETITLE").read_bytes()
    assert data.count(b"TITLETITLE") == 1
    path.write_bytes(data.replace(b"TITLETITLE", b"\xff" * 10))
    with pytest.raises(UnicodeDecodeError), av.open(str(path)):
        pass
    assert len(PyAVReader(path)) == N


# Arguments


def test_index_errors(make, backend):
    reader, path = open_video(make("one_group.mp4"), backend), make("one_group.mp4")
    for index in (N, -1):
        with pytest.raises(ValueError, match="does not exist") as error:
            reader.get_frames([0, index])
        assert message(error) == f"{path}: frame {index} does not exist; it has {N}, 0 to {N - 1}"
    with pytest.raises(ValueError, match="integers") as error:
        reader.get_frames([0.5])
    assert message(error) == "indices must be a list of integers, got float64 of shape [1]"
    with pytest.raises(ValueError, match="integers") as error:
        reader.get_frames([[1, 2]])
    assert message(error) == "indices must be a list of integers, got int64 of shape [1, 2]"
    assert reader.get_frames([]).shape == (0, 48, 64, 3)


def test_backend_errors(make, monkeypatch):
    with pytest.raises(ValueError, match="backend") as error:
        open_video(make("one_group.mp4"), "opencv")
    assert message(error) == "backend must be 'pyav', 'decord' or None (pyav), got 'opencv'"
    assert type(open_video(make("one_group.mp4"))) is PyAVReader
    with pytest.raises(ValueError, match="num_threads") as error:
        open_video(make("one_group.mp4"), num_threads=-1)
    assert message(error) == "num_threads must be 0 (the decoder's choice) or more, got -1"
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ImportError) as error:
        open_video(make("one_group.mp4"), "decord")
    assert message(error) == "backend='decord' needs decord: pip install decord, or use backend='pyav'"


def test_a_reader_works_after_close_and_leaves_no_file_open(make, tmp_path, backend):
    path = tmp_path / "own.mp4"
    path.write_bytes(make("one_group.mp4").read_bytes())
    reader = open_video(path, backend)
    reader.close()
    assert clips.read_indices(reader.get_frames([6])) == [6]
    reader.close()
    open_files = [str(link.resolve()) for link in Path("/proc/self/fd").iterdir()]
    assert str(path) not in open_files


# Sampling rules


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
        assert message(error) == f"{name} must be at least 1, got 0"
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
        assert message(error) == f"fps must be a positive number of frames per second, got {fps}"
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
    with pytest.raises(ValueError, match=r"^max_frames must be at least 1, got 0$"):
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
    for rule in ({}, {"num_frames": 4, "fps": 1.0}):
        with pytest.raises(ValueError, match="exactly one") as error:
            read_video(make("one_group.mp4"), **rule)
        assert message(error) == (
            f"pass exactly one of num_frames and fps, got num_frames={rule.get('num_frames')} and fps={rule.get('fps')}"
        )
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
        ({"num_frames": -3}, ValueError, "num_frames must be at least 1, got -3"),
        ({"fps": "2"}, TypeError, "fps must be a number of frames per second, got '2'; pass a number such as 2.0"),
        ({"fps": float("nan")}, ValueError, "fps must be a positive number of frames per second, got nan"),
        ({"fps": -1}, ValueError, "fps must be a positive number of frames per second, got -1"),
    ],
)
def test_read_video_looks_at_its_numbers_before_the_file(rule, kind, text):
    with pytest.raises(kind) as error:
        read_video("nowhere.mp4", **rule)
    assert message(error) == text
