"""What holds for all families and is shown for some: guides, gradients, conversations, saving, and users' errors."""

import warnings

import accelerate
import by_hand
import families
import pytest
import torch
import transformers
from close import assert_close
from safetensors.torch import load_model
from test_families import (
    CLIPS,
    QUESTIONS,
    WINDOWS,
    answers,
    as_double,
    ask,
    check_against_hand,
    in_float64,
)

import ppllava
from ppllava.swap.guides import KNOWN
from ppllava.swap.windows import resample

BLOCKS = WINDOWS["blocks"]


def tower_of(name):
    return getattr(families.built(name)[0].model, "video_tower" if name == "video_llava" else "vision_tower")


def family(names=families.NAMES):
    return pytest.mark.parametrize("name", names)


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


@family()
def test_gradients_reach_values_and_guide(name):
    model, processor = families.build(name)
    guide, words = families.guide()
    # A relevance of one part in 500 is flat where windows are as sharp as 0.01 makes them.
    compressed, new = ppllava.compress(model, processor, guide=(guide, words), temperature=1e-4, **BLOCKS)
    inputs = ask(name, new)
    compressed.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    vision = next(x for x in model.named_parameters() if "patch_embed" in x[0] and x[0].endswith("weight"))
    parameters = [
        vision,
        *((key, x) for key, x in guide.named_parameters() if key == "logit_scale"),
        ("text", guide.text_model.embeddings.token_embedding.weight),
        ("patches", guide.visual_projection.weight),
        ("tower", guide.vision_model.embeddings.patch_embedding.weight),
    ]
    for key, parameter in parameters:
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


@torch.no_grad()
@family(("llava_next_video", "qwen3_vl", "internvl"))
def test_bfloat16(name):
    model, processor = families.build(name)
    guide, words = families.guide()
    compressed, new = ppllava.compress(model.bfloat16(), processor, guide=(guide.bfloat16(), words), **BLOCKS)
    assert compressed(**ask(name, new)).logits.dtype == torch.bfloat16
    answers(compressed, ask(name, new))


@torch.no_grad()
@pytest.mark.gpu
@family()
def test_on_a_gpu(name):
    model, processor = families.build(name)
    guide, words = families.guide()
    compressed, new = ppllava.compress(model, processor, guide=(guide, words), **BLOCKS)
    inputs = ask(name, new)
    here, doubled = compressed(**inputs).logits, as_double(inputs)
    exact, *nudged = [in_float64(compressed, seed)(**doubled).logits for seed in (None, 1, 2, 3)]
    there = compressed.cuda()(**inputs.to("cuda")).logits
    assert_close("logits", there.cpu(), [here, *nudged], exact)
    answers(compressed, inputs, cache_implementation="static")


@torch.no_grad()
@family()
def test_the_base_model_takes_the_inputs_too(name):
    """As trainers with a fused head call it."""
    compressed, new = ppllava.compress(*families.built(name), guide=families.guide(), **BLOCKS)
    inputs = ask(name, new)
    hidden = compressed.base_model(**inputs).last_hidden_state
    assert torch.equal(compressed.lm_head(hidden), compressed(**inputs).logits)


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


@family(("llava_next_video", "internvl"))
def test_saving(name, tmp_path):
    model, processor = families.build(name)
    compressed, new = ppllava.compress(model, processor, guide=families.guide(), **BLOCKS)
    expected = compressed(**ask(name, new)).logits
    compressed.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.architectures == [type(model).__name__]
    again, words = families.guide()
    with torch.no_grad():
        again.visual_projection.weight.zero_()
    compressed, new = ppllava.compress(
        loaded, type(processor).from_pretrained(tmp_path), guide=(again, words), **BLOCKS
    )
    load_model(compressed.prompt_guide, tmp_path / "guide.safetensors")
    torch.testing.assert_close(compressed(**ask(name, new)).logits, expected)


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
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name: asked.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ppllava.compress(model, processor, **BLOCKS)
    assert asked == ["a/clip"]


@torch.no_grad()
@pytest.mark.parametrize("own", [False, True])
def test_an_offloaded_model(own):
    model, processor = families.build("llava_next_video")
    guide = families.guide("clip", model.model.vision_tower if own else None)
    expected, new = ppllava.compress(model, processor, guide=guide, **BLOCKS)
    inputs = ask("llava_next_video", new)
    logits = expected(**inputs).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    compressed, new = ppllava.compress(model, processor, guide=guide, **BLOCKS)
    assert (compressed.prompt_guide.tower is None) == own
    assert torch.equal(compressed(**inputs).logits, logits)
    assert answers(compressed, inputs) == answers(expected, inputs)


@torch.no_grad()
def test_a_compiled_model():
    """What was compiled of the original runs the original."""
    model, processor = families.build("qwen2_5_vl")
    guide = families.guide()
    expected, new = ppllava.compress(model, processor, guide=guide, **BLOCKS)
    inputs = ask("qwen2_5_vl", new)
    model.compile(backend="eager")
    model.model.compile(backend="eager")
    model._compiled_call = model._last_compile_config = None  # as generate leaves them
    compressed, _ = ppllava.compress(model, processor, guide=guide, **BLOCKS)
    for one in (compressed, compressed.model):
        assert not {"_compiled_call_impl", "_compiled_call", "_last_compile_config"} & vars(one).keys()
    assert torch.equal(compressed(**inputs).logits, expected(**inputs).logits)
    assert model._compiled_call_impl is not None


def test_a_model_with_a_forward_of_its_own():
    model, processor = families.build("internvl")
    model.forward = model.forward
    message = "model must have the forward of its class, got a InternVLForConditionalGeneration with one of its own"
    with pytest.raises(ValueError, match=message):
        ppllava.compress(model, processor, guide=None, **BLOCKS)


def test_metadata_of_videos():
    """What is said of each clip goes with it; sampling by frames a second needs it."""
    _, new = ppllava.compress(*families.built("llava_next_video"), guide=None, kernel_size=1)
    given = {"text": ["<video>", "<video>"], "videos": CLIPS, "do_sample_frames": True, "fps": 2}
    metadata = [{"total_num_frames": len(clip), "fps": fps} for clip, fps in zip(CLIPS, (4, 5))]
    inputs = new(**given, video_metadata=metadata, padding=True, return_tensors="pt")
    assert inputs["video_frames"].tolist() == [4, 2]


def test_long_questions_lose_their_end_with_a_warning():
    _, new = ppllava.compress(*families.built("internvl"), guide=families.guide(), **BLOCKS)
    with pytest.warns(UserWarning, match="guide_text of 102 tokens is longer than the 77 of the guide"):
        ask("internvl", new, CLIPS[:1], guide_text="x" * 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask("internvl", new, CLIPS[:1], guide_text="x" * 75)


@pytest.mark.parametrize("grid", [(3, 5), (4, 6), (8, 12), (6, 4)])
def test_a_map_keeps_its_sum_on_another_grid(grid):
    maps = torch.rand(3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(resample(maps, grid), by_hand.on_grid(maps, *grid))
    torch.testing.assert_close(resample(maps, grid).sum((1, 2)), maps.sum((1, 2)))
    assert resample(maps, (4, 6)) is maps


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"model": torch.nn.Linear(1, 1)},
            TypeError,
            "model must be one of LLaVA-NeXT-Video (LlavaNextVideoForConditionalGeneration), LLaVA-OneVision "
            "(LlavaOnevisionForConditionalGeneration), Video-LLaVA (VideoLlavaForConditionalGeneration), Qwen2.5-VL "
            "(Qwen2_5_VLForConditionalGeneration), Qwen3-VL (Qwen3VLForConditionalGeneration), InternVL "
            "(InternVLForConditionalGeneration), got Linear; call the ops of ppllava_kernels in your own model "
            "instead, docs/swap.md shows how",
        ),
        (
            {"processor": None},
            TypeError,
            "processor must be the Qwen3VLProcessor of Qwen3VLForConditionalGeneration, got NoneType; load both from "
            "one checkpoint",
        ),
        (
            {"kernel_size": None},
            ValueError,
            "exactly one of kernel_size and output_size must be given, got neither; pass one of them",
        ),
        (
            {"temperature": 0.0},
            ValueError,
            "temperature must be",
        ),
        (
            {"guide": "auto"},
            ValueError,
            "guide='auto' needs a model whose text tower is known, and Qwen3VLForConditionalGeneration has no CLIP or "
            "SigLIP tower; pass the checkpoint that its vision tower comes from, any other CLIP or SigLIP as in "
            "guide='openai/clip-vit-base-patch16', which then looks at small frames, or guide=None for the plain mean",
        ),
        (
            {"guide": 7},
            TypeError,
            "guide must be 'auto', None, a checkpoint of CLIP or SigLIP, such a model, or a pair of it and its "
            "tokenizer, got int; pass for example 'openai/clip-vit-base-patch16'",
        ),
        (
            {"guide": (7, 8)},
            TypeError,
            "guide must be a pair of a CLIPModel or SiglipModel and its tokenizer, got (int, int); pass both, or the "
            "name of their checkpoint",
        ),
        (
            {"guide": "a bare model"},
            ValueError,
            "guide must come with its tokenizer, got a CLIPModel that was not loaded from a checkpoint; pass "
            "guide=(model, tokenizer)",
        ),
    ],
)
def test_errors_of_compress(change, error, message):
    model, processor = families.built("qwen3_vl")
    given = {"model": model, "processor": processor, "guide": None, **BLOCKS, **change}
    if given["guide"] == "a bare model":
        given["guide"] = families.guide()[0]
    with pytest.raises(error) as caught:
        ppllava.compress(given.pop("model"), given.pop("processor"), **given)
    assert str(caught.value).startswith(message)


def test_a_guide_of_another_kind(tmp_path):
    families.built("llava_next_video")[0].config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"guide must be a checkpoint of a model of type clip or siglip, got '.*' of "):
        ppllava.compress(*families.built("qwen3_vl"), guide=str(tmp_path), **BLOCKS)


def test_auto_where_no_checkpoint_is_known():
    with pytest.raises(ValueError, match="has a clip_vision_model that no checkpoint of a text tower is known for"):
        ppllava.compress(*families.built("video_llava"), **BLOCKS)


@family()
def test_compressing_twice(name):
    model, processor = families.built(name)
    compressed, new = ppllava.compress(model, processor, guide=None, **BLOCKS)
    with pytest.raises(
        ValueError, match=r"model must not be compressed yet, got Compressed\w+; pass model\.swapped_mo"
    ):
        ppllava.compress(compressed, processor, guide=None, **BLOCKS)
    with pytest.raises(
        ValueError, match=r"processor must not be compressed yet, got Compressed\w+; pass its `swapped`"
    ):
        ppllava.compress(model, new, guide=None, **BLOCKS)
    assert compressed.swapped_model is model
    assert new.swapped is processor


@family()
def test_a_window_larger_than_a_frame(name):
    _, new = ppllava.compress(*families.built(name), guide=None, kernel_size=(1, 2, 9))
    message = (
        r"kernel_size must fit into the tokens of a frame, got kernel_size \(1, 2, 9\) for \(T, H, W\) = \(\d, 4, \d\)"
    )
    with pytest.raises(ValueError, match=message):
        ask(name, new)


@family()
def test_questions_that_are_missing(name):
    compressed, new = ppllava.compress(*families.built(name), guide=families.guide(), **BLOCKS)
    inputs = ask(name, new)
    rows = inputs.pop("guide_input_ids")
    mask = inputs.pop("guide_attention_mask")
    with pytest.raises(ValueError, match="guide_input_ids must come with a video, got None; the processor that"):
        compressed(**inputs)
    with pytest.raises(ValueError, match="guide_input_ids must have one row for each of the 2 videos, got 1; repeat"):
        compressed.generate(**inputs, guide_input_ids=rows[:1], guide_attention_mask=mask[:1], max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt 0 must ask something in the user's last turn, got images or videos"):
        new(text=families.prompt(name, ""), videos=CLIPS[:1], return_tensors="pt")
