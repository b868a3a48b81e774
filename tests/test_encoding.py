"""Encoded videos: the same as pixels, decoded ahead of the tower, in bounded memory however long they are."""

import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import clips
import numpy as np
import pytest
import torch
from tiny import fresh, tiny

import ppllava
from ppllava import encoding, presets, video
from ppllava.encoding import prefetch

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return clips.encode(tmp_path_factory.mktemp("encoding") / "clip.mp4", 40)


def conversation(medium, question=QUESTION):
    return [{"role": "user", "content": [{"type": "video", "video": medium}, {"type": "text", "text": question}]}]


def inputs_of(processor, medium, question=QUESTION):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return processor.apply_chat_template(conversation(medium, question), **options)


def tokens_of(model, inputs):
    media = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    return model.get_media_features(**media)["video"].pooler_output[0]


@cache
def in_float64(name):
    """A preset that sees 4 frames at a time; no test changes it."""
    model, processor = presets.build(name, dtype=torch.float64)
    model.config.vision_chunk = 4
    return model, processor


@pytest.mark.parametrize("name", ["tiny", "tiny-btadapter", "tiny-qwen2"])
@pytest.mark.parametrize(
    "sampling",
    [{"num_frames": 9}, {"num_frames": 60}, {"fps": 10.0, "start": 0.5}, {"fps": 4.0, "end": 1.0}, {}],
    ids=["few", "repeated", "rate", "end", "default"],
)
@torch.no_grad()
def test_the_features_are_those_of_pixels(name, sampling, path):
    model, processor = in_float64(name)
    encoded = ppllava.encode_video(model, processor, path, **sampling)
    clip = video.read_video(path, **(sampling or {"num_frames": processor.num_frames}))
    pixels = inputs_of(processor, clip)
    expected = model.model.encode_frames(pixels["pixel_values_videos"].double(), [len(clip.frames)])
    torch.testing.assert_close(encoded.features, expected, rtol=1e-10, atol=1e-10)
    assert np.array_equal(encoded.timestamps, clip.timestamps)
    assert len(encoded) == len(clip.frames)
    features = inputs_of(processor, encoded)
    assert torch.equal(features["input_ids"], pixels["input_ids"])
    actual, expected = (tokens_of(model, inputs.to(torch.float64)) for inputs in (features, pixels))
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


def test_decoded_frames_are_encoded_too(path):
    model, processor = tiny()
    clip = video.read_video(path, num_frames=7)
    expected = ppllava.encode_video(model, processor, path, num_frames=7).features
    for frames in (clip, clip.frames, torch.from_numpy(clip.frames).permute(0, 3, 1, 2)):
        encoded = ppllava.encode_video(model, processor, frames)
        assert torch.equal(encoded.features, expected)
        assert encoded.timestamps is None


def test_many_questions_run_the_tower_once(path):
    model, processor = presets.build("tiny")
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    encoded = ppllava.encode_video(model, processor, path, num_frames=8)
    answers = {}
    for question in (QUESTION, "Who wins, and why?"):
        answers[question] = model.generate(**inputs_of(processor, encoded, question), max_new_tokens=6)
    assert sum(seen) == 8
    for question, answer in answers.items():
        clip = video.read_video(path, num_frames=8)
        assert torch.equal(answer, model.generate(**inputs_of(processor, clip, question), max_new_tokens=6))


def test_several_encoded_videos_share_a_prompt_and_a_batch(path):
    model, processor = tiny()
    one, two = (ppllava.encode_video(model, processor, path, num_frames=n) for n in (4, 9))
    frames = [video.read_video(path, num_frames=n).frames for n in (4, 9)]
    text = ["USER: <video> and <video>\nWhat? ASSISTANT:", "USER: <video>\nWhy? ASSISTANT:"]
    encoded = processor(text=text, videos=[[one, two], [one]], padding_side="left")
    pixels = processor(text=text, videos=[frames, frames[:1]], padding_side="left")
    assert encoded["video_frames"].tolist() == [4, 9, 4]
    assert torch.equal(encoded["input_ids"], pixels["input_ids"])
    expected = model.generate(**pixels, max_new_tokens=4)
    assert torch.equal(model.generate(**encoded, max_new_tokens=4), expected)


def test_an_image_beside_an_encoded_video(path):
    model, processor = tiny()
    encoded = ppllava.encode_video(model, processor, path, num_frames=4)
    frames = video.read_video(path, num_frames=4).frames
    text, image = "USER: <image> <video>\nWhat? ASSISTANT:", frames[0]
    actual, expected = (model(**processor(text=text, images=image, videos=[v])).logits for v in (encoded, frames))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_projector(path):
    model, processor = presets.build("tiny")
    inputs = inputs_of(processor, ppllava.encode_video(model, processor, path, num_frames=4))
    model(**inputs).logits.sum().backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad is None


# ---- the budget of tokens


def test_a_budget_makes_larger_windows_only_where_it_must():
    model, processor = fresh(pooling_max_tokens=16), presets.build_processor(presets.preset_config("tiny"))
    processor.pooling_max_tokens = 16
    pooling = model.config.visual_pooling
    for frames, window in ((2, (1, 2, 2)), (8, (4, 2, 2)), (9, (4, 2, 2)), (50, (4, 2, 2)), (3600, (4, 2, 2))):
        assert pooling.pooled_size(frames, pooling.video_window(frames)) == window
    assert pooling.video_window(8).kernel_size == (2, 3, 3)  # as without a budget
    clip = [np.zeros((n, 30, 40, 3), np.uint8) for n in (8, 50)]
    inputs = processor(text=["USER: <video> a ASSISTANT:"] * 2, videos=clip)
    assert [len(x) for x in model.get_video_features(**inputs).pooler_output] == [16, 16]


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_a_budget_is_never_passed(most):
    for frames in (1, 2, 3, 5, 31, 1000):
        assert 1 <= fresh(pooling_max_tokens=most).config.visual_pooling.video_tokens(frames) <= most


def test_a_budget_of_a_pooling_that_has_none():
    for pooling in ("none", "temporal_mean"):
        with pytest.raises(
            ValueError, match="pooling_max_tokens needs one of the poolings prompt_guided, adaptive_mean"
        ):
            fresh(pooling=pooling, pooling_max_tokens=4)
    with pytest.raises(ValueError, match="pooling_max_tokens must be at least 1, got 0"):
        fresh(pooling_max_tokens=0)
    config = fresh(pooling="adaptive_mean", pooling_output_size=(4, 3, 3), pooling_max_tokens=20).config
    assert config.visual_pooling.video_tokens(8) == 18


# ---- memory and threads


def test_frames_wait_in_bounded_number(path, monkeypatch):
    model, processor = presets.build("tiny")
    model.config.vision_chunk = 2
    monkeypatch.setattr(encoding, "AHEAD_BYTES", 2 * 2 * 3 * 42 * 42)  # two chunks of two frames
    decoded, seen, most = [], [], []
    original = video.PyAVReader.stream_frames

    def counted(reader, indices):
        for frame in original(reader, indices):
            decoded.append(threading.current_thread().name)
            yield frame

    def look(_, inputs):
        seen.append(len(inputs[0]))
        most.append(len(decoded) - sum(seen))

    monkeypatch.setattr(video.PyAVReader, "stream_frames", counted)
    model.model.vision_tower.register_forward_pre_hook(look)
    ppllava.encode_video(model, processor, path, num_frames=20)
    assert seen == [2] * 10
    assert len(decoded) == 20
    assert max(most) <= 3 * 2 + 1  # two chunks that wait, one in the making, and the frame that starts the next
    assert all(name.startswith("ppllava-frames") for name in decoded)


def test_prefetch_ends_with_its_consumer():
    closed, threads = [], threading.active_count()

    def count():
        try:
            yield from range(100)
        finally:
            closed.append(True)

    items = prefetch(count(), 3)
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert closed == [True]
    assert threading.active_count() == threads
    assert list(prefetch(range(5), 2)) == [0, 1, 2, 3, 4]


def test_an_error_in_the_thread_is_one_of_the_caller(path, monkeypatch):
    threads = threading.active_count()
    monkeypatch.setattr(video.PyAVReader, "_decode", lambda *args: iter(()))
    with pytest.raises(video.VideoError, match="4 of the frames asked for cannot be decoded"):
        ppllava.encode_video(*tiny(), path, num_frames=4)
    assert threading.active_count() == threads


def test_an_error_of_the_tower_ends_the_thread(path):
    def fail(*_):
        raise RuntimeError("no tower")

    model, processor = presets.build("tiny")
    model.model.vision_tower.register_forward_pre_hook(fail)
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="no tower"):
        ppllava.encode_video(model, processor, path, num_frames=40)
    assert threading.active_count() == threads


HOUR = """
import resource, sys, torch, ppllava
from ppllava import PPLlavaForConditionalGeneration, presets
config = presets.preset_config("tiny")
# Frames of 336 pixels in few patches: all of them at once would take 1.2 GB, as pixel values 4.9 GB.
config.vision_config.image_size, config.vision_config.patch_size = 336, 56
config.image_grid_pinpoints, config.pooling_max_tokens = None, 64
torch.manual_seed(0)
model, processor = PPLlavaForConditionalGeneration(config).eval(), presets.build_processor(config)
processor.image_grid_pinpoints = []
def ask(fps):
    given = {"id": 1, "video": sys.argv[1], "fps": fps, "prompt": "What happens, and when?", "max_new_tokens": 4}
    [answer] = ppllava.batch(model, processor, [given])
    assert "answer" in answer, answer
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
print(ask(0.1), ask(1.0))
"""


def test_an_hour_takes_the_memory_of_minutes(tmp_path):
    hour = clips.encode(tmp_path / "hour.mp4", 3600, fps=1, gop=60)
    command = [sys.executable, "-c", HOUR, str(hour)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=250)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())  # MiB, at most, after 361 frames and after 3,600
    assert many - few < 100  # the features are 16 MiB


# ---- what goes wrong


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_frames": 4, "fps": 1.0}, "must be given, got num_frames=4 and fps=1.0; pass one"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"num_frames": 10**9}, "num_frames must be at most 1048576, got 1000000000"),
        ({"fps": 0.0}, "fps must be a positive number"),
        ({"num_frames": 4, "start": 99.0}, "start=99.0 is after the end of the clip"),
        ({"num_frames": 4, "backend": "magic"}, "backend must be 'pyav', 'decord' or None"),
    ],
)
def test_wrong_arguments(given, message, path):
    with pytest.raises(ValueError, match=message):
        ppllava.encode_video(*tiny(), path, **given)


def test_more_frames_than_an_adapter_takes_are_refused_before_they_are_decoded(path, monkeypatch):
    model, processor = presets.build("tiny-btadapter")
    monkeypatch.setattr(video.PyAVReader, "stream_frames", None)
    with pytest.raises(ValueError, match="videos must have at most 64 frames for the BT-Adapter of this model, got 65"):
        ppllava.encode_video(model, processor, path, num_frames=65)


@pytest.mark.parametrize("compiling", [False, True])
def test_training_and_compilation_run_the_tower_once(compiling, monkeypatch):
    model, seen = fresh(), []
    model.model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    with torch.set_grad_enabled(not compiling):
        model.model.encode_frames(torch.zeros(100, 3, 42, 42), [100])
    assert seen == [100]
    monkeypatch.undo()
    with torch.no_grad():
        model.model.encode_frames(torch.zeros(100, 3, 42, 42), [100])
    assert seen == [100, 31, 31, 31, 7]


def test_sampling_is_for_files(path):
    frames = video.read_video(path, num_frames=4).frames
    with pytest.raises(ValueError, match="num_frames chooses frames of a file, got decoded frames"):
        ppllava.encode_video(*tiny(), frames, num_frames=2)
    with pytest.raises(video.VideoNotFoundError):
        ppllava.encode_video(*tiny(), "none.mp4")
    with pytest.raises(TypeError, match=r"^a video must be a path, .*, got int; pass one of these$"):
        ppllava.encode_video(*tiny(), 5)
    model, processor = tiny()
    with pytest.raises(TypeError, match=r"^model must come before processor, got PPLlavaProcessor first; swap them$"):
        ppllava.encode_video(processor, model, path)


def test_the_processor_says_what_does_not_go_together(path):
    model, processor = tiny()
    encoded = ppllava.encode_video(model, processor, path, num_frames=4)
    frames = np.zeros((4, 30, 40, 3), np.uint8)
    text = "USER: <video> <video>\nWhat? ASSISTANT:"
    with pytest.raises(ValueError, match="videos must all be an EncodedVideo or none, got 1 of 2"):
        processor(text=text, videos=[encoded, frames])
    with pytest.raises(ValueError, match="choose frames before they are encoded"):
        processor(text=text, videos=[encoded, encoded], num_frames=2)


def test_the_model_says_what_does_not_go_together(path):
    model, processor = tiny()
    inputs = inputs_of(processor, ppllava.encode_video(model, processor, path, num_frames=4))
    with pytest.raises(ValueError, match="pixel_values_videos and video_features are the same videos twice"):
        model(**inputs, pixel_values_videos=torch.zeros(4, 3, 42, 42))
    wrong = {**inputs, "video_features": torch.zeros(4, 6, 6, 24)}
    with pytest.raises(ValueError, match=r"video_features must be \[F, 6, 6, 32\] of this model's vision tower, got"):
        model(**wrong)
    wrong = {**inputs, "video_features": inputs["video_features"][:3]}
    with pytest.raises(ValueError, match=r"video_features must be \[F, H, W, V\] with F = 4"):
        model(**wrong)
    wrong = {**inputs, "video_features": inputs["video_features"].long()}
    with pytest.raises(TypeError, match="video_features must be floating point"):
        model(**wrong)


def test_dense_features_are_packed_features(path):
    model, processor = tiny()
    encoded = ppllava.encode_video(model, processor, path, num_frames=4)
    inputs = processor(text=["USER: <video> a ASSISTANT:"] * 2, videos=[encoded, encoded])
    expected = model(**inputs).logits
    inputs["video_features"] = inputs["video_features"].unflatten(0, (2, 4))  # [B, T, H, W, V]
    del inputs["video_frames"]
    assert torch.equal(model(**inputs).logits, expected)
