"""Video reading: files that are no video, and wrong arguments, each one clear sentence."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import av
import clips
import numpy as np
import pytest
from video_fixtures import N, backend, make, message

from ppllava import video
from ppllava.video import PyAVReader, VideoError, open_video, read_video

pytestmark = pytest.mark.filterwarnings("error::ppllava.video.VideoWarning")

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


@pytest.mark.parametrize("name", ["raw.h264", "raw.hevc", "raw.m4v", "raw.m2v"])
def test_a_stream_without_a_container(make, backend, name):
    path = make(name)
    with pytest.raises(VideoError) as error:
        open_video(path, backend)
    assert message(error) == (
        f"{path}: is a raw stream without a container, and FFmpeg may take gigabytes to probe one; put it into one "
        "with ffmpeg -i IN -c copy OUT.mkv, or pass raw_streams=True to read_video where it is your own"
    )
    clip = read_video(path, num_frames=3, raw_streams=True)
    assert clips.read_indices(clip.frames) == clip.indices.tolist()


@pytest.mark.parametrize("after", [0, 10])
def test_a_stream_that_appears_in_the_middle(make, monkeypatch, after):
    """PyAV's list of streams has no such index: an IndexError out of demux."""

    class Container:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.container.close()

        def demux(self, *streams):
            yield from islice(self.container.demux(*streams), after)
            raise IndexError("list index out of range")

    original, path = av.open, make("stream.ts")
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: Container(original(*args, **kwargs)))
    with pytest.raises(VideoError) as error:
        PyAVReader(path)
    assert message(error) == (
        f"{path}: a stream appears in the middle of it that PyAV cannot follow; the file is damaged, download or copy "
        "it again, or mend it with ffmpeg -i IN -c copy OUT.mkv"
    )


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
    with pytest.raises(FileNotFoundError) as error:
        open_video(tmp_path / "nowhere.mp4", backend)
    assert message(error) == f"{tmp_path / 'nowhere.mp4'}: there is no such file; check the path"
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
    if int(av.__version__.partition(".")[0]) < 19:  # from then on PyAV has no choice of errors, and raises none
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
