"""Video reading: every decoded frame carries its own index, so a wrong frame cannot pass for the right one."""

from __future__ import annotations

import tracemalloc

import av
import clips
import numpy as np
import pytest
from video_fixtures import CLIPS, FPS, PYAV_CLIPS, VFR_MS, N, backend, decoded, make, message

from ppllava import video, video_index
from ppllava.video import DecordReader, PyAVReader, VideoError, VideoReader, open_video

pytestmark = pytest.mark.filterwarnings("error::ppllava.video.VideoWarning")

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
    order, raw = [*range(N - 1, -1, -1), 3, 3], name.startswith("raw")
    assert clips.read_indices(PyAVReader(make(name), raw_streams=raw).get_frames(order)) == order
    with pytest.raises(VideoError, match=r"decord cannot read it \(.*\); use backend='pyav'$"):
        DecordReader(make(name), raw_streams=raw).get_frames(order)


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
    assert len(PyAVReader(make(name), raw_streams=True)) == N


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
    assert video_index.SEEK_COST == 5
    assert video_index.plan_decoding(wanted, keyframes) == runs


SEEKABLE = ["short_groups.mp4", "short_groups.ts", "open_groups.mp4", "sound.mkv", "vp9.webm"]


@pytest.mark.parametrize("name", SEEKABLE)
def test_seeking_and_one_pass_give_the_same_frames(make, monkeypatch, decoded, name):
    wanted, reader, frames, cost = [36, 2, 19, 25], PyAVReader(make(name)), {}, {}
    for seek_cost in (0, 10**6):
        monkeypatch.setattr(video_index, "SEEK_COST", seek_cost)
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
    monkeypatch.setattr(video_index, "SEEK_COST", 0)
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

    def with_a_packet_too_many(*args):
        packets, cut = original(*args)
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
