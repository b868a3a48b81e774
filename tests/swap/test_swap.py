"""What holds for all families and is shown for some: guides, questions, batches, conversations."""

import by_hand
import families
import numpy as np
import pytest
import torch
import transformers
from families import BLOCKS, CLIPS, QUESTIONS, family
from test_families import answers, ask, check_against_hand

import ppllava
from ppllava.swap.guides import KNOWN
from ppllava.swap.windows import resample
from ppllava.video import VideoClip


def tower_of(name):
    return getattr(families.built(name)[0].model, "video_tower" if name == "video_llava" else "vision_tower")


@torch.no_grad()
@family(families.OWN)
def test_the_models_own_tower_is_the_guides(name):
    guide, words = families.guide("siglip" if name == "llava_onevision" else "clip", tower_of(name))
    compressed, inputs = check_against_hand(name, *families.built(name), guide, words, BLOCKS, own=True)
    assert compressed.prompt_guide.tower is None
    guide.vision_model.forward = None  # is not run
    compressed(**inputs)


@family(families.OWN)
def test_a_tower_of_other_weights_is_not_the_guides(name):
    guide, words = families.guide("siglip" if name == "llava_onevision" else "clip", tower_of(name))
    with torch.no_grad():
        guide.vision_model.embeddings.patch_embedding.weight.normal_()
    compressed, _ = ppllava.compress(*families.built(name), guide=(guide, words), **BLOCKS)
    assert compressed.prompt_guide.tower is guide.vision_model


@torch.no_grad()
@family()
def test_the_question_guides(name):
    compressed, new = ppllava.compress(*families.built(name), guide=families.guide(), **BLOCKS)
    inputs = ask(name, new, CLIPS[:1])
    other = ask(name, new, CLIPS[:1], guide_text="something else")
    assert torch.equal(inputs["input_ids"], other["input_ids"])
    assert not torch.equal(compressed(**inputs).logits, compressed(**other).logits)


@torch.no_grad()
def test_videos_in_the_layout_of_the_stock_processor():
    model, processor = families.built("llava_next_video")
    compressed, new = ppllava.compress(model, processor, guide=None, **BLOCKS)
    inputs = ask("llava_next_video", new, CLIPS[:1] * 2)
    expected = compressed(**inputs).logits
    del inputs["video_frames"]
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].unflatten(0, (2, -1))
    assert torch.equal(compressed(**inputs).logits, expected)


@family(("llava_next_video", "qwen2_5_vl", "internvl"))
def test_many_videos_in_a_prompt(name):
    compressed, new = ppllava.compress(*families.built(name), guide=families.guide(), **BLOCKS)
    prompts = [families.prompt(name, "First?") + families.prompt(name, "Second?"), families.prompt(name, "Why?")]
    clips = [*CLIPS, families.clip(4, seed=7)]
    inputs = new(text=prompts, videos=clips, padding=True, return_tensors="pt")
    assert len(inputs["guide_input_ids"]) == 3
    for beams in (1, 2):
        together = answers(compressed, inputs, num_beams=beams)
        for i, videos in enumerate((clips[:2], clips[2:])):
            alone = new(text=prompts[i], videos=videos, return_tensors="pt")
            assert together[i] == answers(compressed, alone, num_beams=beams)[0]


def test_timestamps_of_qwen3_are_in_the_middle_of_their_windows():
    _, new = ppllava.compress(*families.built("qwen3_vl"), guide=None, kernel_size=(2, 1, 1))
    metadata = [{"total_num_frames": 80, "fps": 10, "frames_indices": [10 * n for n in range(8)]}]
    prompt = families.prompt("qwen3_vl", "What?")
    ids = new(text=prompt, videos=CLIPS[:1], video_metadata=metadata, return_tensors="pt")["input_ids"][0]
    text = new.tokenizer.decode(ids).replace("<|video_pad|>", "")
    # 8 frames a second apart, two in a step, two steps in a window: 0 ... 3 and 4 ... 7 seconds.
    step = "<{} seconds><|vision_start|><|vision_end|>"
    assert step.format("1.5") + step.format("5.5") in text


def test_a_clip_of_another_size_in_the_batch():
    """Qwen gives each its own grid; windows of one model then run on several."""
    compressed, new = ppllava.compress(*families.built("qwen2_5_vl"), guide=families.guide(), **BLOCKS)
    clips = [CLIPS[0], families.clip(6, seed=5, height=64, width=32), families.clip(8, seed=6)]
    prompts = [families.prompt("qwen2_5_vl", q) for q in (*QUESTIONS, "Where?")]
    together = answers(compressed, new(text=prompts, videos=clips, padding=True, return_tensors="pt"))
    for i, (clip, prompt) in enumerate(zip(clips, prompts)):
        assert together[i] == answers(compressed, new(text=prompt, videos=[clip], return_tensors="pt"))[0]


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for block in message['content'] %}{% if block['type'] == 'video' %}<video>\n"
    "{% else %}{{ block['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize("batched", [False, True])
def test_the_last_turn_of_a_conversation_is_the_question(batched):
    model, processor = families.build("llava_next_video")
    processor.chat_template = TEMPLATE
    _, new = ppllava.compress(model, processor, guide=families.guide(), **BLOCKS)
    conversation = [
        {"role": "user", "content": [{"type": "video", "video": CLIPS[0]}, {"type": "text", "text": "First?"}]},
        {"role": "assistant", "content": "Something."},
        {"role": "user", "content": [{"type": "text", "text": "And then?"}]},
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    asked = new.apply_chat_template([conversation] if batched else conversation, **options)
    given = {"text": "<video>", "videos": [CLIPS[0]], "guide_text": "And then?", "return_tensors": "pt"}
    assert torch.equal(asked["guide_input_ids"], new(**given)["guide_input_ids"])
    # What is said outright goes first; and nothing of a conversation stays behind.
    options["processor_kwargs"] = {"guide_text": "And then?"}
    first = new.apply_chat_template(conversation[:1], **options)
    assert torch.equal(first["guide_input_ids"], asked["guide_input_ids"])
    given |= {"guide_text": None, "text": "<video>And then??"}
    assert new(**given)["guide_input_ids"].shape[1] == asked["guide_input_ids"].shape[1] + 1


def test_a_guide_by_name(tmp_path):
    guide, words = families.guide()
    guide.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    for given in (str(tmp_path), transformers.CLIPModel.from_pretrained(tmp_path)):
        compressed, new = ppllava.compress(*families.built("qwen3_vl"), guide=given, **BLOCKS)
        expected, other = ppllava.compress(*families.built("qwen3_vl"), guide=(guide, words), **BLOCKS)
        with torch.no_grad():
            assert torch.equal(compressed(**ask("qwen3_vl", new)).logits, expected(**ask("qwen3_vl", other)).logits)


def test_auto_knows_the_towers_that_video_llms_are_built_on(monkeypatch):
    model, processor = families.built("llava_next_video")
    asked = []
    monkeypatch.setitem(KNOWN, ("clip_vision_model", 32, 56, 7), "a/clip")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name, **_: asked.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ppllava.compress(model, processor, **BLOCKS)
    assert asked == ["a/clip"]


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("USER: <video>\nWhat is it? ASSISTANT:", "What is it?"),
        ("SYSTEM USER: <video>\nFirst? ASSISTANT: Yes.</s>USER: And then? ASSISTANT:", "And then?"),
        ("USER: <video>\nWhat is it? ASSISTANT: It is", "What is it?"),
        ("[INST] <video>\nWhat does the label USER: say? [/INST]", "What does the label USER: say?"),
        ("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<video>\nWhat? [/INST]", "What?"),
        # As LLaVA-OneVision writes it, and as Qwen does.
        (
            "<|im_start|>system \nBe brief.<|im_end|><|im_start|>user <video>\nWho?<|im_end|><|im_start|>assistant",
            "Who?",
        ),
        ("<|im_start|>user\n<video>\nWho?<|im_end|>\n<|im_start|>assistant\n", "Who?"),
        ("<|im_start|>user\n<video>\nWho?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n", "Who?"),
        ("<video>\nNo turns at all", "No turns at all"),
    ],
)
def test_the_question_of_a_prompt(prompt, question):
    _, new = ppllava.compress(*families.built("llava_next_video"), guide=families.guide(), **BLOCKS)
    assert new.find_question(prompt) == question


@pytest.mark.parametrize(("how", "kind"), [(None, list), ("np", np.ndarray), ("pt", torch.Tensor)])
def test_ids_of_the_guide_come_as_all_others(how, kind):
    _, new = ppllava.compress(*families.built("qwen2_5_vl"), guide=families.guide(), **BLOCKS)
    prompt = families.prompt("qwen2_5_vl", QUESTIONS[0])
    inputs = new(text=prompt, videos=CLIPS[:1], return_tensors=how)
    for key in ("input_ids", "guide_input_ids", "guide_attention_mask"):
        assert isinstance(inputs[key], kind)


def test_metadata_of_videos():
    """What is said of each clip goes with it; sampling by frames a second needs it."""
    _, new = ppllava.compress(*families.built("llava_next_video"), guide=None, kernel_size=1)
    given = {"text": ["<video>", "<video>"], "videos": CLIPS, "do_sample_frames": True, "fps": 2}
    metadata = [{"total_num_frames": len(clip), "fps": fps} for clip, fps in zip(CLIPS, (4, 5))]
    inputs = new(**given, video_metadata=metadata, padding=True, return_tensors="pt")
    assert inputs["video_frames"].tolist() == [4, 2]


@family()
def test_clips_that_were_read(name):
    """They come with what the processor is to know of them, in a call and in a message."""
    _, new = ppllava.compress(*families.built(name), guide=families.guide(), **BLOCKS)
    steps = (np.array([0, 4, 8, 12, 16, 20, 24, 28]), np.array([3, 5, 7, 9]))
    read = [VideoClip(families.clip(len(x)), x / 8, x, 8.0) for x in steps]
    metadata = [
        {"total_num_frames": total, "fps": 8.0, "frames_indices": x.tolist()} for total, x in zip((32, 8), steps)
    ]
    given = {"text": [families.prompt(name, QUESTIONS[0])] * 2, "padding": True, "return_tensors": "pt"}
    frames = [clip.frames for clip in read]
    expected = new(videos=frames, video_metadata=metadata, do_sample_frames=False, **given)
    actual = new(videos=read, **given)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected if isinstance(expected[key], torch.Tensor))
    with pytest.raises(ValueError, match=r"^videos must all be a VideoClip or none, got 1 beside 1 others; read all"):
        new(videos=[read[0], frames[1]], **given)


def test_a_clip_that_was_read_in_a_message():
    model, processor = families.build("llava_next_video")
    processor.chat_template = TEMPLATE
    _, new = ppllava.compress(model, processor, guide=families.guide(), **BLOCKS)
    read = VideoClip(CLIPS[0], np.arange(len(CLIPS[0])) / 4, np.arange(len(CLIPS[0])), 4.0)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    text = {"type": "text", "text": "First?"}
    asked = [
        new.apply_chat_template([{"role": "user", "content": [{"type": "video", "video": video}, text]}], **options)
        for video in (read, CLIPS[0])
    ]
    assert all(torch.equal(asked[0][key], asked[1][key]) for key in asked[1])


@pytest.mark.parametrize("grid", [(3, 5), (4, 6), (8, 12), (6, 4)])
def test_a_map_keeps_its_sum_on_another_grid(grid):
    maps = torch.rand(3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(resample(maps, grid), by_hand.on_grid(maps, *grid))
    torch.testing.assert_close(resample(maps, grid).sum((1, 2)), maps.sum((1, 2)))
    assert resample(maps, (4, 6)) is maps
