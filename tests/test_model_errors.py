"""The model given wrong input: every error word for word."""

import re

import pytest
import torch
from tiny import batch, clip, tiny


def without(inputs, *names):
    return {name: value for name, value in inputs.items() if name not in names}


def moved(ids):
    """The first placeholder of prompt 0 stands in prompt 1."""
    ids = ids.clone()
    ids[0, (ids[0] == 3).nonzero()[0]] = 50
    ids[1, -1] = 3
    return ids


def wrong_inputs():
    good = batch(4, 5)
    guide = ("guide_input_ids", "guide_attention_mask")
    ids = good["input_ids"]
    return {
        "guide": (
            without(good, *guide),
            "guide_input_ids must be given with pixel_values_videos, got None; PPLlavaProcessor makes "
            "them from the user's "
            "question",
        ),
        "guide rows": (
            {**good, "guide_input_ids": good["guide_input_ids"][:1], "guide_attention_mask": None},
            "guide_input_ids must have one row for each of the 2 videos, got 1; repeat the question of "
            "a prompt for each of "
            "them, and leave out prompts without one",
        ),
        "guide length": (
            {**good, "guide_input_ids": torch.ones(2, 249, dtype=torch.long), "guide_attention_mask": None},
            "guide_input_ids must be [B, L] with at most the 248 positions of the guide, got shape [2, 249]; let "
            "PPLlavaProcessor truncate the question",
        ),
        "guide mask": (
            {**good, "guide_attention_mask": good["guide_attention_mask"][:, 1:]},
            "guide_attention_mask must have the shape of guide_input_ids, [2, 40], got [2, 39]; pass both as "
            "PPLlavaProcessor makes them",
        ),
        "guide padded on the left": (
            {**good, "guide_attention_mask": good["guide_attention_mask"].flip(1)},
            "guide_attention_mask must be ones and then zeros, got padding on the left; pass it as PPLlavaProcessor "
            "makes it, and to pipelines batch_size=1",
        ),
        "placeholders of another prompt": (
            {**good, "input_ids": moved(ids), "attention_mask": None},
            "input_ids must hold all <video> tokens of each video in one prompt, got [7, 9] in the prompts for videos "
            "of [8, 8] tokens; let PPLlavaProcessor expand the prompts",
        ),
        "guide alone": (
            {"input_ids": torch.ones(1, 4, dtype=torch.long), "guide_input_ids": good["guide_input_ids"]},
            "guide_input_ids has 2 rows, but no pixel_values or pixel_values_videos came with it; leave it out for a "
            "prompt without image or video",
        ),
        "frames": (
            {**good, "video_frames": torch.tensor([4, 4])},
            "pixel_values_videos must be [F, 3, S, S] with F = 8, the sum of video_frames, each at least 1, got shape "
            "[9, 3, 42, 42] and video_frames [4, 4]; concatenate the frames of all videos",
        ),
        "no frames": (
            {**good, "video_frames": torch.tensor([9, 0])},
            "pixel_values_videos must be [F, 3, S, S] with F = 9, the sum of video_frames, each at least 1, got shape "
            "[9, 3, 42, 42] and video_frames [9, 0]; concatenate the frames of all videos",
        ),
        "unpacked": (
            without(good, "video_frames"),
            "pixel_values_videos must be [B, T, 3, S, S] where video_frames is None, got shape [9, 3, "
            "42, 42]; pass the "
            "number of frames of each video to pack videos as [F, 3, S, S]",
        ),
        "placeholders": (
            {**good, "input_ids": ids[:, -20:], "attention_mask": None},
            "input_ids must hold one <video> token (id 3) for each visual token, 16 for the 2 videos, got 0; let "
            "PPLlavaProcessor expand the prompt, and do not truncate it",
        ),
        "too many placeholders": (
            {**good, "input_ids": torch.cat([ids, ids[:, -1:] * 0 + 3], 1), "attention_mask": None},
            "input_ids must hold one <video> token (id 3) for each visual token, 16 for the 2 videos, got 18; let "
            "PPLlavaProcessor expand the prompt, and with generate's prompt_lookup_num_tokens, which copies <video>, "
            "pass suppress_tokens=[3]",
        ),
        "no video": (
            {"input_ids": ids},
            "input_ids holds 16 <video> tokens, but no video came with them; pass pixel_values_videos",
        ),
        "images": (
            {**good, "pixel_values": torch.zeros(1, 3, 42, 42)},
            "guide_input_ids must have one row for each of the 1 groups of images and the 2 videos, got 2; repeat the "
            "question of a prompt for each of them, and leave out prompts without one",
        ),
        "twice": (
            {**good, "mm_encoder_outputs": {"video": tiny()[0].get_video_features(**good)}},
            "pixel_values_videos and mm_encoder_outputs['video'] are the same videos twice; pass one of them",
        ),
        "frames of no axis": (
            {**good, "video_frames": torch.tensor(9)},
            "video_frames must be whole numbers [B], got torch.int64 of shape []; pass it as PPLlavaProcessor makes it",
        ),
        "frames that are not whole": (
            {**good, "video_frames": torch.tensor([4.0, 5.0])},
            "video_frames must be whole numbers [B], got torch.float32 of shape [2]; pass it as PPLlavaProcessor makes "
            "it",
        ),
        "sizes of one axis": (
            {**good, "pixel_values": torch.zeros(1, 3, 42, 42), "image_sizes": torch.tensor([42, 42])},
            "image_sizes must be whole numbers [I, 2], got torch.int64 of shape [2]; pass it as PPLlavaProcessor makes "
            "it",
        ),
        "views that are none": (
            {**good, "pixel_values": torch.zeros(1, 3, 42, 42), "image_views": torch.tensor([True])},
            "image_views must be whole numbers [I], got torch.bool of shape [1]; pass it as PPLlavaProcessor makes it",
        ),
        "pixels of another tower": (
            {**good, "pixel_values_videos": torch.zeros(9, 3, 24, 24)},
            "pixel_values_videos must end with [3, S, S], S = 42 pixels of this model's vision tower, got shape [9, 3, "
            "24, 24]; let PPLlavaProcessor make it",
        ),
        "pixels with channels last": (
            {**good, "pixel_values": torch.zeros(1, 42, 42, 3)},
            "pixel_values must end with [3, S, S], S = 42 pixels of this model's vision tower, got shape [1, 42, 42, "
            "3]; let PPLlavaProcessor make it",
        ),
        "guide ids that are not whole": (
            {**good, "guide_input_ids": good["guide_input_ids"].float()},
            "guide_input_ids must be int64 or int32, got torch.float32; pass them as PPLlavaProcessor makes them",
        ),
        "neither": ({}, "exactly one of input_ids and inputs_embeds must be given, got neither; pass one of them"),
    }


@pytest.mark.parametrize("case", wrong_inputs())
def test_errors(case):
    inputs, message = wrong_inputs()[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tiny()[0](**inputs)


@pytest.mark.parametrize(
    ("change", "got"),
    [(lambda pixels: pixels.to(torch.uint8), "torch.uint8"), (lambda pixels: pixels.numpy(), "ndarray")],
)
def test_pixels_are_not_bytes(change, got):
    inputs = batch(4, 5)
    inputs["pixel_values_videos"] = change(inputs["pixel_values_videos"])
    message = (
        f"pixel_values_videos must be floating point, normalised as the vision tower wants it, got {got}; let "
        "PPLlavaProcessor make it"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        tiny()[0](**inputs)


@pytest.mark.parametrize("name", ["text", "guide_text"])
def test_half_of_a_surrogate_pair(name):
    given = {"text": "<video> What is it?", "guide_text": "What?", "videos": clip(4), name: "What\ud83d?"}
    message = f"{name} must be valid text, got '\\ud83d' at character 4; decode it as UTF-8 with errors='replace'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tiny()[1](**given)
