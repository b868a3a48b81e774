"""The tiny model, and prompts about clips of any length for it."""

from functools import cache

import numpy as np
import torch
import transformers

from ppllava import PPLlavaConfig, PPLlavaForConditionalGeneration, presets

QUESTIONS = ["What is it?", "What is the man in the middle holding?", "Why?"]
NEW = 8
# Before, transformers forgets what was encoded in all chunks of a prefill but the first.
CHUNKS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)


@cache
def tiny():
    return presets.build("tiny")


def fresh(**changes):
    """A tiny model of its own, for tests that change it."""
    return PPLlavaForConditionalGeneration(
        PPLlavaConfig(**{**presets.preset_config("tiny").to_dict(), **changes})
    ).eval()


def masked_flops(text_config, length):
    """Of eager attention to later positions, which its mask then hides."""
    return text_config.num_hidden_layers * 2 * length * (length - 1) * text_config.hidden_size


def clip(frames, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, 30, 40, 3), dtype=np.uint8)  # [T, H, W, 3]


def prompt(question, video="<video>\n"):
    return f"USER: {video}{question} ASSISTANT:"


def batch(*lengths, processor=None, **kwargs):
    """Inputs for one prompt per length, each about a clip of so many frames; 0 is without a clip, None no prompt."""
    given = [(i, n) for i, n in enumerate(lengths) if n is not None]
    texts = [prompt(QUESTIONS[i], "<video>\n" if n else "") for i, n in given]
    videos = [clip(n, seed=i) for i, n in given if n]
    return (processor or tiny()[1])(text=texts, videos=videos or None, **kwargs)


def alone(i, length):
    """The inputs of prompt i of `batch` unbatched."""
    videos = clip(length, seed=i) if length else None
    return tiny()[1](text=prompt(QUESTIONS[i], "<video>\n" if length else ""), videos=videos)


def generate(model, inputs, **kwargs):
    ids = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **kwargs)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def attended(inputs, rows):
    """The rows [N, S, ...] without padding, one tensor per prompt."""
    return [row[mask.bool()] for row, mask in zip(rows, inputs["attention_mask"])]
