"""The relevance and the pooling in two launches: scores, then windows that normalise the scores that they need."""

from __future__ import annotations

from .common import make_plan
from .prompt_relevance import score
from .weighted_pool3d import pool


def prompt_guided_pool3d(values, image_embeds, text_embeds, scale_tensor, scale, window, temperature, cu_frames):
    plan = make_plan(values, cu_frames, window)
    logits, partials = score(image_embeds, text_embeds, scale_tensor, scale, plan)
    return pool(values, None, plan, temperature, logits, partials)
