"""Rows of datasets.Video(), decoders and frames of torchcodec, as stand-ins that have what those have."""

from dataclasses import dataclass
from types import SimpleNamespace

import clips
import numpy as np
import pytest
import torch
from tiny import tiny

import ppllava
from ppllava import preprocessing
from ppllava.preprocessing import read_frames, read_image
from ppllava.video import VideoError, open_video, read_video

N, FPS = 20, 10


@dataclass
class FrameBatch:
    data: torch.Tensor
    pts_seconds: torch.Tensor
    duration_seconds: torch.Tensor


class Decoder:
    """Of torchcodec, for a clip of 10 frames a second whose time starts at 3 s; frames [3, H, W]."""

    def __init__(self, path, order="NCHW", row=None):
        frames = torch.from_numpy(open_video(path).get_frames(range(N)))
        self.images = frames.permute(0, 3, 1, 2) if order == "NCHW" else frames
        self.metadata = SimpleNamespace(begin_stream_seconds=3.0, end_stream_seconds=3.0 + N / FPS)
        if row is not None:
            self._hf_encoded = row

    def __len__(self):
        return len(self.images)

    def get_frames_at(self, indices):
        return FrameBatch(self.images[indices], 3 + torch.tensor(indices) / FPS, torch.full((len(indices),), 1 / FPS))

    def get_frames_played_at(self, seconds):
        assert all(3.0 <= second < 3.0 + N / FPS for second in seconds)
        return self.get_frames_at([int((second - 3) * FPS + 1e-6) for second in seconds])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return clips.encode(tmp_path_factory.mktemp("rows") / "clip.avi", N, fps=FPS, bframes=2)


def numbers(frames):
    """Of uint8 [T, 3, H, W]."""
    return clips.read_indices(frames.permute(0, 2, 3, 1).numpy())


def rows(path):
    """Each form of the same file; of those that are decoded, torchcodec's own frames would be wrong."""
    wrong = Decoder(path)
    wrong.images = wrong.images.flip(0)
    decoded = []
    for row in ({"path": str(path), "bytes": None}, {"path": "name.avi", "bytes": path.read_bytes()}):
        wrong._hf_encoded = row
        decoded.append(Decoder(path, row=row))
        decoded[-1].images = wrong.images
        yield row
    yield {"bytes": path.read_bytes()}
    yield {"path": str(path)}
    yield from decoded


def test_a_row_is_the_file_that_it_holds(path):
    expected = read_video(path, num_frames=5)
    model, processor = tiny()
    features = ppllava.encode_video(model, processor, path, num_frames=4, start=0.5).features
    for row in rows(path):
        assert numbers(read_frames(row, 5, None, 1)) == expected.indices.tolist()
        assert numbers(read_frames(row, None, 2.0, 1)) == [0, 5, 10, 15]
        assert len(read_frames(row, None, None, 3)) == 3
        encoded = ppllava.encode_video(model, processor, row, num_frames=4, start=0.5)
        assert torch.equal(encoded.features, features)
        assert encoded.timestamps[0] >= 0.5


@pytest.mark.parametrize("order", ["NCHW", "NHWC"])
def test_a_decoder_gives_the_frames_asked_for(path, order):
    decoder = Decoder(path, order)
    assert numbers(read_frames(decoder, 5, None, 1)) == read_video(path, num_frames=5).indices.tolist()
    assert numbers(read_frames(decoder, None, 2.0, 1)) == [0, 5, 10, 15]
    assert numbers(read_frames(decoder, None, 3.0, 1)) == read_video(path, fps=3.0).indices.tolist()
    assert len(read_frames(decoder, None, None, 3)) == 3
    model, processor = tiny()
    expected = ppllava.encode_video(model, processor, path, num_frames=4).features
    assert torch.equal(ppllava.encode_video(model, processor, decoder, num_frames=4).features, expected)
    with pytest.raises(ValueError, match=r"^start chooses frames of a file, got decoded frames; pass a path, or leave"):
        ppllava.encode_video(model, processor, decoder, start=1.0)
    with pytest.raises(ValueError, match=r"^fps=1000000000\.0 asks for \d+ frames of this clip; pass a lower fps$"):
        read_frames(decoder, None, 1e9, 1)


def test_frames_of_torchcodec(path):
    batch = Decoder(path).get_frames_at([3, 7])
    frame = FrameBatch(batch.data[1], 0.7, 0.1)
    for video in (batch, vars(batch)):  # chat templates of transformers 5.24 make a dict of a dataclass
        assert preprocessing.is_one("video", video)
        assert numbers(read_frames(video, None, None, 1)) == [3, 7]
    for images in ([frame, frame], [vars(frame)]):
        assert preprocessing.is_one("video", images)
        assert numbers(read_frames(images, None, None, 1)) == [7] * len(images)
        assert preprocessing.flatten("image", images) == images
    for image in (frame, vars(frame)):
        assert clips.read_index(np.asarray(read_image(image))) == 7


def test_in_messages_and_in_batches(path):
    model, processor = tiny()
    batch = Decoder(path).get_frames_at(list(range(processor.num_frames % N)))
    expected = processor(text="<video>Why?", videos=path, num_frames=8)
    eight = Decoder(path).get_frames_at(read_video(path, num_frames=8).indices)
    for medium in [*rows(path), Decoder(path), eight]:
        blocks = [{"type": "video", "video": medium}, {"type": "text", "text": "Why?"}]
        given = {} if medium is eight else {"num_frames": 8}
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": blocks}], tokenize=True, return_dict=True, processor_kwargs=given
        )
        assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    requests = [{"id": i, "prompt": "Why?", "video": medium} for i, medium in enumerate([Decoder(path), batch])]
    answers = list(ppllava.batch(model, processor, requests, max_new_tokens=2))
    assert all("answer" in answer for answer in answers), answers


@pytest.mark.parametrize("row", [{"path": None, "bytes": None}, {"path": None}])
def test_a_row_of_nothing(row):
    message = "^a video of datasets must have a path or bytes, got neither; leave the row out$"
    with pytest.raises(ValueError, match=message):
        read_frames(row, None, None, 4)


@pytest.mark.parametrize("name", ["talk.mp4", None])
def test_errors_name_the_row(name):
    expected = rf"^{name or 'bytes of a video'}: FFmpeg finds no video in it"
    with pytest.raises(VideoError, match=expected):
        read_frames({"path": name, "bytes": b"not a video" * 100}, None, None, 4)
