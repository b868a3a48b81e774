"""What the end-to-end benchmark compares: both models on the frames of one clip, their FLOPs, the gate, the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
import torch
from torch import Tensor
from transformers import LlavaNextVideoConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import ppllava_kernels
from ppllava import PPLlavaConfig, PPLlavaProcessor, presets
from ppllava.video import VideoClip
from ppllava_kernels import modules

from . import gate
from .report import PEER, PEER_TUNED, PPLLAVA

PROMPT = "USER: <video>\nWhat happens in this video, and in which order? ASSISTANT:"
# What `generate` is told beyond transformers' defaults, for each device. On a GPU transformers compiles the decoding
# step where the cache is static; on a CPU it does not, and a static cache only makes every step attend to all of it.
SETTINGS: dict[str, dict[str, Any]] = {"cuda": {"cache_implementation": "static"}, "cpu": {}}
CLIP_SIZE, CLIP_FPS, CLIP_FRAMES = (640, 360), 30, 120
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


@dataclass
class Job:
    """One row of one number of frames: a model and its inputs, without what made them."""

    name: str
    model: PreTrainedModel
    settings: dict[str, Any]  # of `generate`
    inputs: dict[str, Tensor] = field(repr=False)
    visual_tokens: int  # of one video
    text_tokens: int
    flops: dict[str, int]  # of one video


def encode_clip(path: Path, frames: int) -> Path:
    """Write an H.264 clip: a texture that drifts, and a square of another one that drifts against it."""
    width, height = CLIP_SIZE
    noise = np.random.default_rng(0).integers(0, 256, (2, height // 8, width // 8, 3), dtype=np.uint8)
    ground, square = noise.repeat(8, axis=1).repeat(8, axis=2)  # [H, W, 3]
    edge = height // 3
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=CLIP_FPS, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            image = np.roll(ground, (i, 2 * i), axis=(0, 1))
            left = (5 * i) % (width - edge)
            image[edge : 2 * edge, left : left + edge] = square[:edge, :edge]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, CLIP_FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def build_models(preset: str, dtype: torch.dtype, device: str) -> tuple[dict[str, PreTrainedModel], PPLlavaProcessor]:
    """(both models, processor). Random weights, the same sizes of vision tower and language model."""
    model, processor = presets.build(preset, dtype=dtype, device=device)
    return {PPLLAVA: model, PEER: presets.build_peer(preset, dtype=dtype, device=device)}, processor


def entrants(device: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Row -> (model, settings of `generate`). The peer as it comes, and with all settings of ours if there are any."""
    settings = SETTINGS[torch.device(device).type]
    tuned = {PEER_TUNED: (PEER, settings)} if settings else {}
    return {PPLLAVA: (PPLLAVA, settings), PEER: (PEER, {}), **tuned}


def prepare(processor: PPLlavaProcessor, clip: VideoClip, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Frames and prompt of one video on the device, in the dtype of the model."""
    return dict(processor(text=PROMPT, videos=clip).to(device=device, dtype=dtype))


def make_jobs(models: dict[str, PreTrainedModel], one: dict[str, Tensor], batch: int, device: str) -> list[Job]:
    """A job for each row; `one` is the result of `prepare`, and each model gets `batch` times these frames."""
    config, peer = models[PPLLAVA].config, models[PEER].config
    frames = int(one["video_frames"])
    ours = pooled_tokens(config, frames)
    theirs = peer_tokens(peer, frames)
    text = one["input_ids"].shape[1] - ours
    inputs = {name: x.repeat(batch, *[1] * (x.dim() - 1)) for name, x in one.items()}
    ids = with_placeholders(inputs["input_ids"], config.video_token_id, theirs)
    of_model = {
        PPLLAVA: (inputs, ours, presets.flops(config, frames, text, one["guide_input_ids"].shape[1])),
        PEER: (
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values_videos": inputs["pixel_values_videos"].unflatten(0, (batch, frames)),
            },
            theirs,
            peer_flops(config, peer, frames, text),
        ),
    }
    return [
        Job(name, models[model], settings, given, visual, text, flops)
        for name, (model, settings) in entrants(device).items()
        for given, visual, flops in [of_model[model]]
    ]


def with_placeholders(input_ids: Tensor, token: int, count: int) -> Tensor:
    """input_ids [B, S] of equal prompts with one video each, its placeholders replaced by `count` of them."""
    place = int((input_ids[0] == token).nonzero()[0])
    text = input_ids[input_ids != token].view(len(input_ids), -1)  # [B, text]
    return torch.cat([text[:, :place], text.new_full((len(text), count), token), text[:, place:]], dim=1)


def pooled_tokens(config: PPLlavaConfig, frames: int) -> int:
    return config.visual_pooling.video_tokens(frames)


def peer_tokens(peer: LlavaNextVideoConfig, frames: int) -> int:
    grid = peer.vision_config.image_size // peer.vision_config.patch_size
    return frames * (grid // peer.spatial_pool_stride) ** 2


def peer_flops(config: PPLlavaConfig, peer: LlavaNextVideoConfig, frames: int, text_tokens: int) -> dict[str, int]:
    """As `presets.flops`. transformers computes every layer of the peer's tower, also those that nothing reads."""
    vision, width = peer.vision_config, peer.text_config.hidden_size
    tokens = peer_tokens(peer, frames)
    whole = PPLlavaConfig.from_dict({**config.to_dict(), "vision_feature_layer": -1})
    like = presets.flops(whole, frames, text_tokens + tokens - pooled_tokens(config, frames))
    return {
        "vision_tower": like["vision_tower"],
        "projector": 2 * tokens * (vision.hidden_size + width) * width,
        "language_model": like["language_model"],
    }


def check_op(job: Job) -> gate.Verdict:
    """Run PPLLaVA's op inside the model, and the reference on the same tensors in float64, by the rule of gate.py."""
    calls = []
    op = modules.prompt_guided_project

    def record(features: Tensor, text_embeds: Tensor, **options: Any):
        options |= {"features": features, "text_embeds": text_embeds}
        calls.append((options, op(**options)))
        return calls[-1][-1]

    names = ("pixel_values_videos", "video_frames", "guide_input_ids", "guide_attention_mask")
    with torch.no_grad(), mock.patch.object(modules, "prompt_guided_project", record):
        job.model.get_video_features(**{name: job.inputs[name] for name in names})
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


@dataclass
class Sample:
    """Seconds of one `generate`, and what came out of it."""

    vision: float = 0.0
    first_token: float = 0.0
    token: float | None = None
    generate: float = 0.0
    visual_tokens: int = 0
    output: Any = field(default=None, repr=False)


class TokenTimes(StoppingCriteria):
    """Never stops; notes when each token is there."""

    def __init__(self, now: Callable[[], float]):
        self.now, self.times = now, []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.times.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def vision_times(job: Job, now: Callable[[], float], sample: Sample) -> Iterator[None]:
    """Note the seconds from the first frame into the tower to the last visual token out of the projector."""
    starts: list[float] = []

    def end(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        tokens = output[0] if isinstance(output, tuple) else [output]  # one [.., D] per clip
        sample.visual_tokens += sum(rows.shape[:-1].numel() for rows in tokens)
        sample.vision = now() - starts[0]

    inner = job.model.model
    hooks = [
        inner.vision_tower.register_forward_pre_hook(lambda module, inputs: starts.append(now())),
        inner.multi_modal_projector.register_forward_hook(end),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def generate(job: Job, new_tokens: int, now: Callable[[], float], **kwargs: Any) -> Sample:
    """One greedy `generate` of exactly `new_tokens`; vision, prefill and decoding are timed inside it."""
    sample, tokens = Sample(), TokenTimes(now)
    with vision_times(job, now, sample):
        start = now()
        sample.output = job.model.generate(
            **job.inputs,
            **job.settings,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([tokens]),
            **kwargs,
        )
        sample.generate = now() - start
    sample.first_token = tokens.times[0] - start
    if new_tokens > 1:
        sample.token = (tokens.times[-1] - tokens.times[0]) / (new_tokens - 1)
    return sample
