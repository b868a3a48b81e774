"""Users' errors, each in one sentence."""

import copy
import warnings

import families
import pytest
import torch
from families import BLOCKS, CLIPS, family
from test_families import ask

import ppllava


def test_long_questions_lose_their_end_with_a_warning():
    _, new = ppllava.compress(*families.built("internvl"), guide=families.guide(), **BLOCKS)
    with pytest.warns(UserWarning, match="guide_text of 102 tokens is longer than the 77 of the guide"):
        ask("internvl", new, CLIPS[:1], guide_text="x" * 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask("internvl", new, CLIPS[:1], guide_text="x" * 75)


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
            {"guide": "a pair with a function"},
            TypeError,
            "guide must be a pair of a CLIPModel or SiglipModel and its tokenizer, got (CLIPModel, function); pass "
            "both, or the name of their checkpoint",
        ),
        (
            {"guide": "a pair with a large tokenizer"},
            ValueError,
            "guide must be a pair of a model and its own tokenizer, got one of 259 tokens for a text tower of 258; "
            "load both from one checkpoint",
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
    clip, words = families.guide()
    larger = copy.deepcopy(words)
    larger.add_tokens(["another"])
    named = {"a bare model": clip, "a pair with a function": (clip, lambda x: x)}
    named["a pair with a large tokenizer"] = (clip, larger)
    if isinstance(given["guide"], str):
        given["guide"] = named.get(given["guide"], given["guide"])
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
    with pytest.raises(ValueError, match="guide_text must be a question, or one for each prompt, got 7; pass text"):
        ask(name, new, guide_text=7)
    with pytest.raises(ValueError, match="prompt 0 must ask something in the user's last turn, got images or videos"):
        new(text=families.prompt(name, ""), videos=CLIPS[:1], return_tensors="pt")
