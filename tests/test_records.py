"""VideoClip and EncodedVideo pass whole through whatever walks through a message (B01), and are values otherwise."""

import copy
import dataclasses
import pickle
from collections.abc import Mapping

import clips
import numpy as np
import pytest
import torch
from tiny import prompt, tiny
from typer.testing import CliRunner

import ppllava
from ppllava import cli
from ppllava.encoding import EncodedVideo
from ppllava.video import VideoClip, read_video


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return clips.encode(tmp_path_factory.mktemp("records") / "clip.mp4", 12)


def rebuilt(value):
    """As transformers 5.24 rebuilds messages."""
    if isinstance(value, Mapping):
        return {key: rebuilt(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(rebuilt, value)) if type(value) is list else tuple(map(rebuilt, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: rebuilt(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return rebuilt(value.model_dump()) if callable(getattr(value, "model_dump", None)) else value


def made():
    frames = np.zeros((2, 6, 8, 3), np.uint8)
    return VideoClip(frames, np.arange(2) / 5, np.arange(2), 5.0), EncodedVideo(torch.zeros(2, 3, 3, 4), np.arange(2.0))


def test_b01_no_walker_takes_them_apart():
    for value in made():
        assert rebuilt([{"content": ({"video": value},)}])[0]["content"][0]["video"] is value
        leaves = torch.utils._pytree.tree_leaves({"video": [value]})
        assert leaves == [value]


@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
def test_b01_a_message_takes_what_the_processor_takes(path, batched):
    """On every version of transformers in the range: the prompt and the media of a message are those of a call."""
    model, processor = tiny()
    clip = read_video(path, num_frames=4)
    encoded = ppllava.encode_video(model, processor, clip)
    for medium in (clip, encoded, clip.frames, torch.from_numpy(clip.frames)):
        blocks = [{"type": "video", "video": medium}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": blocks}]
        inputs = processor.apply_chat_template(
            [messages] if batched else messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        expected = processor(text=prompt("What is it?"), videos=[medium])
        assert inputs.keys() == expected.keys()
        for name in expected.keys() - {"input_ids", "attention_mask"}:  # the template's text ends in a space
            assert torch.equal(inputs[name], expected[name]), name
        visual = [(x["input_ids"] == processor.video_token_id).sum() for x in (inputs, expected)]
        assert visual[0] == visual[1] > 0
        assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_b01_the_command_answers(path):
    asked = CliRunner().invoke(
        cli.app, ["ask", str(path), "What happens?", "--preset", "tiny", "--max-new-tokens", "2"]
    )
    assert asked.exit_code == 0, asked.output


def test_they_are_values():
    clip, encoded = made()
    frames, timestamps, indices, fps = clip
    assert frames is clip.frames
    assert timestamps is clip.timestamps
    assert indices is clip.indices
    assert fps == 5.0
    assert repr(clip) == (
        "VideoClip(frames=<uint8 [2, 6, 8, 3]>, timestamps=<float64 [2]>, indices=<int64 [2]>, fps=5.0)"
    )
    expected = "EncodedVideo(features=<torch.float32 [2, 3, 3, 4]>, timestamps=None)"
    assert repr(EncodedVideo(encoded.features)) == expected
    assert len(encoded) == 2
    for value in (clip, encoded):
        for other in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
            assert type(other) is type(value)
            assert other != value
            assert np.array_equal(other.timestamps, value.timestamps)
        assert copy.copy(value).timestamps is value.timestamps
        assert copy.deepcopy(value).timestamps is not value.timestamps
        with pytest.raises(AttributeError, match=r"^timestamps of a \w+ cannot be set; make a new \w+$"):
            value.timestamps = None
        with pytest.raises(AttributeError, match="cannot be deleted"):
            del value.timestamps
        with pytest.raises(AttributeError):
            value.other = 1
