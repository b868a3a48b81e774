"""The processor: every form of a video, the placeholders, the question, the chat template, the disk."""

import re
from functools import cache

import numpy as np
import pytest
import torch
from clips import encode, read_index
from PIL import Image
from transformers import AutoProcessor, pipeline

from ppllava import PPLlavaConfig, PPLlavaProcessor, presets
from ppllava.sampling import sample_uniform

MEAN, STD = (
    torch.tensor(x).view(3, 1, 1) for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
)
TEXT = "USER: <video>\nWhat is it? ASSISTANT:"


@cache
def tiny():
    return presets.build("tiny")


@cache
def processor():
    return presets.build_processor(presets.preset_config("tiny"))


def clip(frames=4, height=30, width=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)  # [T, H, W, 3]


def smooth(height, width):
    """One frame without detail below the size of a patch, as video has: uint8 [1, H, W, 3]."""
    coarse = Image.fromarray(clip(1, 6, 8)[0])
    return np.asarray(coarse.resize((width, height), Image.BICUBIC))[None]


def chat(*turns, video=None):
    content = [{"type": "video", "video": video}] if video is not None else []
    content.append({"type": "text", "text": turns[0]})
    rest = [
        {"role": ("assistant", "user")[i % 2], "content": [{"type": "text", "text": turn}]}
        for i, turn in enumerate(turns[1:])
    ]
    return [{"role": "user", "content": content}, *rest]


def questions(inputs):
    return processor().guide_tokenizer.batch_decode(inputs["guide_input_ids"], skip_special_tokens=True)


def answer(ids):
    return processor().tokenizer.decode(ids)


# Videos


FORMS = {
    "numpy": lambda x: x,
    "torch channels last": torch.from_numpy,
    "torch channels first": lambda x: torch.from_numpy(x).permute(0, 3, 1, 2),
    "PIL": lambda x: [Image.fromarray(frame) for frame in x],
    "list of arrays": list,
    "list of tensors": lambda x: list(torch.from_numpy(x)),
    "list of videos": lambda x: [x],
    "nested by prompt": lambda x: [[x]],
    "batch axis": lambda x: x[None],
    "nested PIL": lambda x: [[[Image.fromarray(frame) for frame in x]]],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_video(form):
    inputs = processor()(text=TEXT, videos=FORMS[form](clip()))
    assert inputs["pixel_values_videos"].dtype == torch.float32
    assert inputs["pixel_values_videos"].is_contiguous()
    assert inputs["video_frames"].tolist() == [4]
    assert torch.equal(inputs["pixel_values_videos"], processor()(text=TEXT, videos=clip())["pixel_values_videos"])


@pytest.mark.parametrize("size", [(90, 160), (160, 90), (42, 42), (30, 20)])
@pytest.mark.parametrize("mode", ["squash", "crop"])
def test_pixels_are_those_of_pillow(mode, size):
    frames = smooth(*size)
    image = Image.fromarray(frames[0])
    if mode == "squash":
        image = image.resize((42, 42), Image.BICUBIC)
    else:
        height, width = (length * 42 // min(size) for length in size)
        left, top = (width - 42) // 2, (height - 42) // 2
        image = image.resize((width, height), Image.BICUBIC).crop((left, top, left + 42, top + 42))
    expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD  # [3, 42, 42]
    config = presets.preset_config("tiny")
    other = presets.build_processor(config)
    other.resize_mode = mode
    actual = other.preprocess_video(frames)[0]
    levels = ((actual - expected) * STD * 255).abs()
    assert levels.max() < 2.01
    assert levels.mean() < 0.1


@pytest.mark.parametrize("frames", [2, 7, 32])
def test_placeholders_are_the_pooled_tokens(frames):
    ids = processor()(text=TEXT, videos=clip(frames))["input_ids"][0].tolist()
    count = frames // 2 * 2 * 2
    assert ids.count(3) == count
    start = ids.index(3)
    assert ids[start : start + count] == [3] * count
    assert answer([ids[0], *[x for x in ids[1:] if x != 3]]) == "<s>USER: \nWhat is it? ASSISTANT:"


def test_num_frames_samples_decoded_frames():
    inputs = processor()(text=TEXT, videos=clip(9), num_frames=4)
    expected = processor()(text=TEXT, videos=clip(9)[sample_uniform(4, 9)])
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=30, fps=10)


def shown(pixels):
    """The numbers drawn in frames, from pixel values [T, 3, S, S] of a square size divisible by 8."""
    frames = ((pixels * STD + MEAN) * 255).permute(0, 2, 3, 1).numpy()
    return [read_index(frame) for frame in frames]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, sample_uniform(8, 30).tolist()),
        ({"num_frames": 4}, sample_uniform(4, 30).tolist()),
        ({"fps": 2}, [0, 5, 10, 15, 20, 25]),
        ({"videos_kwargs": {"num_frames": 3}}, sample_uniform(3, 30).tolist()),
    ],
)
@pytest.mark.parametrize("form", [str, lambda x: x, lambda x: [[str(x)]]])
def test_files(path, form, options, expected):
    reader = PPLlavaProcessor(processor().tokenizer, processor().guide_tokenizer, 48, 8, num_frames=8)
    inputs = reader(text=TEXT, videos=form(path), **options)
    assert inputs["video_frames"].tolist() == [len(expected)]
    assert shown(inputs["pixel_values_videos"]) == expected


def test_video_clip(path):
    from ppllava.video import read_video

    video = read_video(path, num_frames=4)
    expected = processor()(text=TEXT, videos=video.frames)
    for videos in (video, [video], [[video]]):
        actual = processor()(text=TEXT, videos=videos)
        assert torch.equal(actual["pixel_values_videos"], expected["pixel_values_videos"])


# The question


def test_question_of_a_prompt():
    text = ["USER: <video>\nWhat is it? ASSISTANT: A cat.</s>USER: Really? ASSISTANT:", "<video> just a text"]
    inputs = processor()(text=text, videos=[clip(), clip()])
    assert questions(inputs) == ["really?", "just a text"]


@pytest.mark.parametrize("guide", ["Where is the cat?", ["Where is the cat?"]])
def test_guide_text_replaces_it(guide):
    assert questions(processor()(text=TEXT, videos=clip(), guide_text=guide)) == ["where is the cat?"]


def test_one_question_for_each_video_and_none_without():
    text = ["USER: <video> <video>\nSame? ASSISTANT:", "USER: Hello ASSISTANT:", TEXT]
    inputs = processor()(text=text, videos=[clip(2), clip(3), clip(4)])
    assert inputs["video_frames"].tolist() == [2, 3, 4]
    assert questions(inputs) == ["same?", "same?", "what is it?"]
    assert inputs["guide_attention_mask"].sum(1).tolist() == [7, 7, 13]
    assert inputs["guide_input_ids"][0, 6:].tolist() == [257] * 7  # padded on the right, with EOS


def test_long_question_keeps_its_start_and_eos():
    message = (
        "guide_text of 302 tokens is longer than the 248 of the guide: its last 54 tokens are "
        "lost; pass a shorter guide_text"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        inputs = processor()(text=TEXT, videos=clip(), guide_text="a" * 300)
    ids = inputs["guide_input_ids"][0]
    assert ids.shape == (248,)
    assert ids[0] == 256
    assert ids[-1] == 257
    assert ids[1:-1].unique().tolist() == [processor().guide_tokenizer.convert_tokens_to_ids("a")]
    assert tiny()[0](**inputs).logits.isfinite().all()


# Text


def test_pads_on_the_left():
    inputs = processor()(text=["a", "abcd"])
    assert inputs["attention_mask"].tolist() == [[0, 0, 0, 1, 1], [1] * 5]
    right = processor()(text=["a", "abcd"], padding_side="right")
    assert right["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]


@pytest.mark.parametrize("text", ["", "naïve café 你好 🎬\n\ttabs", "<s></s>"])
def test_any_text_encodes(text):
    ids = processor()(text=text)["input_ids"][0]
    assert answer(ids) == "<s>" + text


def test_chat_template():
    video = clip(5)
    conversation = chat("What is it?", "A cat.", "Where?", video=video)
    rendered = "USER: <video>\nWhat is it? ASSISTANT: A cat.</s>USER: Where? ASSISTANT: "
    assert processor().apply_chat_template(conversation, add_generation_prompt=True) == rendered
    inputs = processor().apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
    expected = processor()(text=rendered, videos=video, guide_text="Where?")
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], value) for name, value in expected.items())


def test_chat_template_asks_the_last_user_turn_whatever_it_says():
    turns = ("USER: who said ASSISTANT: here?", "Nobody.")
    inputs = processor().apply_chat_template(chat(*turns, video=clip()), tokenize=True, return_dict=True)
    assert questions(inputs) == ["user: who said assistant: here?"]


def test_chat_template_in_batches():
    conversations = [chat("What?", video=clip(4)), chat("Hello there"), chat("Why is that so?", video=clip(6))]
    inputs = processor().apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs={"num_frames": 2}
    )
    assert inputs["video_frames"].tolist() == [2, 2]
    assert questions(inputs) == ["what?", "why is that so?"]
    assert len(inputs["input_ids"]) == 3
    assert tiny()[0](**inputs).logits.isfinite().all()


def test_chat_template_as_serve_calls_it(path):
    inputs = processor().apply_chat_template(
        [{"role": "user", "content": [{"type": "video", "url": str(path)}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
        tools=None,
        return_tensors="pt",
        return_dict=True,
        tokenize=True,
        load_audio_from_video=True,
        num_frames=4,
    )
    assert inputs["video_frames"].tolist() == [4]
    assert questions(inputs) == ["what?"]


def test_assistant_mask():
    inputs = processor().apply_chat_template(
        chat("What is it?", "A cat.", video=clip()), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = torch.as_tensor(inputs["assistant_masks"]).bool()
    assert answer(inputs["input_ids"][mask]).strip() == "A cat.</s>"


def test_pipeline():
    model, own = tiny()
    talk = pipeline("image-text-to-text", model=model, processor=own)
    out = talk(text=chat("What is it?", video=clip()), max_new_tokens=4, min_new_tokens=4, return_full_text=False)
    inputs = own.apply_chat_template(
        chat("What is it?", video=clip()), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert out[0]["generated_text"] == own.decode(ids, skip_special_tokens=True)


# The disk


def test_round_trip(tmp_path):
    config = presets.preset_config("tiny")
    config.pooling_output_size = [2, 2, 1]
    saved = presets.build_processor(config)
    saved.resize_mode, saved.num_frames, saved.guide_max_length = "crop", 5, 20
    saved.turn_markers = ["Q:", "A:"]
    saved.save_pretrained(tmp_path)
    for loaded in (PPLlavaProcessor.from_pretrained(tmp_path), _auto(tmp_path)):
        assert type(loaded) is PPLlavaProcessor
        assert loaded.to_dict() == saved.to_dict()
        assert loaded.chat_template == saved.chat_template
        assert loaded.tokenizer.get_vocab() == saved.tokenizer.get_vocab()
        assert loaded.guide_tokenizer.get_vocab() == saved.guide_tokenizer.get_vocab()
        text, videos = ["Q: <video> Éa? A:", "Q: <video> abc A:"], [clip(4), clip(7)]
        first, second = saved(text=text, videos=videos), loaded(text=text, videos=videos)
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    text, images = ["Q: <image> <video> a? A:", "b"], [Image.new("RGB", (60, 30))]
    inputs = saved(text=text, images=images, videos=videos[:1])
    assert [*inputs, "video_features"] == saved.model_input_names  # the last is of encoded videos


def _auto(folder):
    presets.preset_config("tiny").save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


# Wrong input


ERRORS = {
    "images": (
        {"text": "x", "images": [Image.new("RGB", (8, 8))]},
        "text must hold one <image> for each image, got 0 of them and 1 images; write one where each image belongs",
    ),
    "audio": (
        {"text": "x", "audio": [np.zeros(8)]},
        "audio is not supported, only text, images and videos; leave it out",
    ),
    "no question": (
        {"text": [TEXT, "USER: <video> ASSISTANT:"], "videos": [clip(), clip()]},
        "prompt 1 must ask something in the user's last turn, got images or videos alone; write a question, or pass "
        "guide_text",
    ),
    "nested otherwise": (
        {"text": [TEXT, "USER: <video> <video> Same? ASSISTANT:"], "videos": [[clip(), clip()], [clip()]]},
        "text must hold one <video> for each video of its prompt, got [1, 2] of them and [2, 1] videos; write one "
        "where each video belongs",
    ),
    "no text": ({"videos": clip()}, "text must be a prompt or a list of prompts, got None; <video> marks a video"),
    "empty text": ({"text": []}, "text must be a prompt or a list of prompts, got []; <video> marks a video"),
    "text of a number": ({"text": 3}, "text must be a prompt or a list of prompts, got 3; <video> marks a video"),
    "text with a number": (
        {"text": ["x", 3]},
        "text must be a prompt or a list of prompts, got ['x', 3]; <video> marks a video",
    ),
    "no frames": (
        {"text": TEXT, "videos": clip(), "num_frames": 0},
        "num_frames must be at least 1, got 0; pass a whole number such as 8",
    ),
    "no placeholder": (
        {"text": ["a", "b"], "videos": [clip(), clip()]},
        "text must hold one <video> for each video, got 0 of them and 2 videos; write one where each video belongs",
    ),
    "no video": (
        {"text": TEXT},
        "text must hold one <video> for each video, got 1 of them and 0 videos; write one where each video belongs",
    ),
    "numpy": (
        {"text": "x", "return_tensors": "np"},
        "return_tensors must be 'pt', got 'np'; the model takes torch tensors only",
    ),
    "fps": (
        {"text": TEXT, "videos": clip(), "fps": 2},
        "fps=2 needs the times of a file, got decoded frames; pass a path, or num_frames",
    ),
    "guides": (
        {"text": TEXT, "videos": clip(), "guide_text": ["a", "b"]},
        "guide_text must be one question, or one for each of the 1 prompts, got 2",
    ),
    "float": (
        {"text": TEXT, "videos": clip() / 255.0},
        "the frames of a video must be uint8 [T, H, W, 3] or [T, 3, H, W] in 0 ... 255, got torch.float64 of shape "
        "[4, 30, 40, 3]; convert them to uint8 RGB",
    ),
    "four channels": (
        {"text": TEXT, "videos": np.zeros((4, 30, 40, 4), np.uint8)},
        "the frames of a video must be uint8 [T, H, W, 3] or [T, 3, H, W] in 0 ... 255, got torch.uint8 of shape "
        "[4, 30, 40, 4]; convert them to uint8 RGB",
    ),
    "one image": (
        {"text": TEXT, "videos": clip()[0]},
        "a video must be a path, frames [T, H, W, 3], a tensor [T, 3, H, W] or a list of images, got shape "
        "[30, 40, 3]; add the axis of the frames to a single image",
    ),
    "sizes": (
        {"text": TEXT, "videos": [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]},
        "the frames of a video must have one size, got [(8, 8, 3), (8, 9, 3)]; resize them to one",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        processor()(**arguments)


@pytest.mark.parametrize("num_frames", [2.0, "4", True])
def test_num_frames_is_an_int(num_frames):
    message = f"num_frames must be an int, got {num_frames!r}; pass for example 32"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        processor()(text=TEXT, videos=clip(), num_frames=num_frames)
    assert len(processor()(text=TEXT, videos=clip(), num_frames=np.int64(2))["pixel_values_videos"]) == 2


@pytest.mark.parametrize("options", [{"num_frames": 0}, {"num_frames": 4, "fps": 2}])
def test_the_default_num_frames_replaces_nothing(path, options):
    with pytest.raises(ValueError, match="num_frames"):
        processor()(text=TEXT, videos=path, **options)


def test_resize_mode_error():
    message = "resize_mode must be 'squash' or 'crop', got 'pad'; the original squashes"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PPLlavaProcessor(processor().tokenizer, processor().guide_tokenizer, resize_mode="pad")


def test_a_misspelt_argument():
    message = (
        "nframes, tuncation must be an argument of the processor or of its tokenizer to have an effect, and is none; "
        "check the spelling"
    )
    with pytest.warns(UserWarning, match=f"^{message}$"):
        processor()(text=TEXT, videos=clip(), nframes=2, tuncation=True, max_new_tokens=3, do_resize=None)


def test_plain_arguments_of_a_chat_template_count_together():
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    plain = {"num_frames": 2, "guide_text": "Who?", "padding_side": "right"}
    inputs = processor().apply_chat_template(chat("What?", video=clip(8)), **plain, **options)
    assert inputs["video_frames"].tolist() == [2]
    assert questions(inputs) == ["who?"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "mean"}, "pooling must be one of prompt_guided, adaptive_mean, temporal_mean, none, got 'mean'"),
        (
            {"pooling": "adaptive_mean"},
            "pooling_output_size must be given for adaptive_mean, got None; PLLaVA uses (16, 12, 12)",
        ),
        (
            {"image_grid_pinpoints": [[336]]},
            "image_grid_pinpoints must be [height, width] in multiples of the 336 pixels of a view, got [336]; round "
            "it",
        ),
    ],
)
def test_pooling_is_checked_as_in_the_configuration(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PPLlavaProcessor(processor().tokenizer, processor().guide_tokenizer, **fields)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PPLlavaConfig(**fields)


def test_one_number_is_all_three():
    other = PPLlavaProcessor(processor().tokenizer, processor().guide_tokenizer, pooling_kernel_size=3)
    assert other.num_video_tokens(6) == 2 * 8 * 8


def test_video_token_error():
    message = (
        "tokenizer must know video_token '<clip>' as one token, got none; add it with "
        "tokenizer.add_tokens([video_token], special_tokens=True)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PPLlavaProcessor(processor().tokenizer, processor().guide_tokenizer, video_token="<clip>")


def test_truncation_inside_a_video_is_an_error():
    with pytest.raises(
        ValueError,
        match=r"^input_ids must hold all \[8\] <video> tokens of the prompts, got \[\d+\] after truncation; pass",
    ):
        processor()(text=TEXT, videos=clip(), truncation=True, max_length=12)
