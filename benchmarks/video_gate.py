"""PPLLaVA's op inside the model against the reference in float64."""

from __future__ import annotations

from itertools import chain
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ppllava_kernels
from ppllava_kernels import modules

from . import gate
from .video_models import Job

GATE_CHANNELS = 64  # of the tokens; all patches and their whole embeddings are compared
# The last axes of the op's tensors: V channels of the features, C of the text, H of the hidden layer, D of the tokens.
GATE_AXES = {
    "features": "V",
    "text_embeds": "C",
    "norm_weight": "V",
    "norm_bias": "V",
    "guide_weight": "CV",
    "linear_1_weight": "HV",
    "linear_1_bias": "H",
    "linear_2_weight": "DH",
    "linear_2_bias": "D",
}
GATE_SUMMED = {"V": "features", "C": "text_embeds", "H": "linear_2_weight"}  # summed over, and so in any order
# A model's relevance may hang on a few patches, and then its error on the rounding of their logits: the reference
# itself was off by 7.6e-7 in one order of the channels and by 4.1e-6 in another (tiny, 4 frames), so few say little.
GATE_ORDERS = 16


def check_op(job: Job) -> gate.Verdict:
    """Run PPLLaVA's op inside the model, and the reference on the same tensors in float64, by the rule of gate.py."""
    calls = []
    op = modules.prompt_guided_project

    def record(features: Tensor, text_embeds: Tensor, **options: Any):
        options |= {"features": features, "text_embeds": text_embeds}
        calls.append((options, op(**options)))
        return calls[-1][-1]

    inputs, names = job.load(), ("pixel_values_videos", "video_frames", "guide_input_ids", "guide_attention_mask")
    with torch.no_grad(), mock.patch.object(modules, "prompt_guided_project", record):
        job.model.get_video_features(**{name: inputs[name] for name in names})
    [(given, (pooled, relevance))] = calls
    device = pooled.device
    channels = torch.linspace(0, pooled.shape[-1] - 1, GATE_CHANNELS, device=device).long().unique()
    actual = (pooled[..., channels], relevance)
    tensors = {name: given[name] for name in GATE_AXES if given[name] is not None}
    tensors |= {name: tensors[name][channels] for name in ("linear_2_weight", "linear_2_bias") if name in tensors}
    sizes = {axis: tensors[name].shape[-1] for axis, name in GATE_SUMMED.items()}

    @torch.no_grad()
    def reference(changed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return ppllava_kernels.prompt_guided_project(**{**given, **changed, "backend": "reference"})

    def reordered(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        orders = {axis: torch.randperm(n, generator=generator).to(device) for axis, n in sizes.items()}
        changed = {}
        for name, x in tensors.items():
            for n, axis in enumerate(GATE_AXES[name], -len(GATE_AXES[name])):
                x = x if axis == "D" else x.index_select(n, orders[axis])
            changed[name] = x
        return changed

    exact = reference({name: x.double() for name, x in tensors.items()})
    moved = ({name: gate.nudged(x, seed) for name, x in tensors.items()} for seed in range(gate.RUNS))
    others = chain(moved, map(reordered, range(GATE_ORDERS)))
    errors = [gate.relative_errors(reference(each), exact) for each in others]
    unavoidable = [max(each) for each in zip(*errors)]
    return gate.judge(gate.relative_errors(actual, exact), unavoidable, [x.dtype for x in actual])
