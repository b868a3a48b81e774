"""What the end-to-end benchmark compares: four variants of two models on the frames of one clip, and their FLOPs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import av
import numpy as np
import torch
from torch import Tensor
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration, PreTrainedModel, logging
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ppllava import PPLlavaConfig, PPLlavaForConditionalGeneration, PPLlavaProcessor, presets
from ppllava.encoding import EncodedVideo, Frames, encode_frames
from ppllava.sampling import sample_frames
from ppllava.video import open_video

from .video_report import OPS_OFF, PEER, PEER_TUNED, PPLLAVA

PROMPT = "USER: {video}\nWhat happens in this video, and in which order? ASSISTANT:"
# What `generate` is told beyond transformers' defaults, for each device. On a GPU transformers compiles the decoding
# step where the cache is static; on a CPU it does not, and a static cache only makes every step attend to all of it.
SETTINGS: dict[str, dict[str, Any]] = {"cuda": {"cache_implementation": "static"}, "cpu": {}}
CLIP_SIZE, CLIP_FPS, CLIP_FRAMES = (640, 360), 30, 120
PERIOD = 300  # a longer clip repeats so many frames, which saves most of its encoding
PIXELS = 256  # more frames than that go to PPLLaVA in chunks, and repeat the first KEPT
KEPT = 64


class Entrant(NamedTuple):
    """A variant: which model, what `generate` is told, and what is changed in the model while it runs."""

    model: str
    settings: dict[str, Any]
    change: Callable[[], AbstractContextManager]


def build_models(
    preset: str, dtype: torch.dtype, device: str, tokens: int, folder: str | None = None
) -> tuple[dict[str, PreTrainedModel], PPLlavaProcessor]:
    """(both models, processor), at most `tokens` visual tokens from PPLLaVA.

    Random weights, made on the device, the same sizes of vision tower and language model. With the `folder` of a
    PPLLaVA its weights, and a peer of random weights in its sizes.
    """
    if folder is None:
        model, processor = presets.build(preset, dtype=dtype, device=device)
        peer = presets.build_peer(preset, dtype=dtype, device=device)
    else:
        logging.disable_progress_bar()
        model = PPLlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        model = model.to(device).eval()
        processor = PPLlavaProcessor.from_pretrained(folder, trust_remote_code=False)
        peer = presets._random(LlavaNextVideoForConditionalGeneration, peer_of(model.config), dtype, device, 0)
    model.config.pooling_max_tokens = processor.pooling_max_tokens = tokens
    return {PPLLAVA: model, PEER: peer}, processor


def peer_of(config: PPLlavaConfig) -> LlavaNextVideoConfig:
    """LLaVA-NeXT-Video with the tower and the language model of this PPLLaVA; ValueError where it has no such tower."""
    if config.vision_config.model_type != "clip_vision_model":
        kind = config.vision_config.model_type
        raise ValueError(f"must have a plain CLIP tower, as LLaVA-NeXT-Video has no other, got {kind}")
    return LlavaNextVideoConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=config.text_config.to_dict(),
        video_token_index=config.video_token_id,
        image_token_index=config.image_token_id,  # not used
    )


def entrants(models: dict[str, PreTrainedModel], device: str) -> dict[str, Entrant]:
    """PPLLaVA with the ops and in plain PyTorch, the peer as it comes and with all settings of ours."""
    settings, ours = SETTINGS[torch.device(device).type], models[PPLLAVA].model
    chunk = ours.vision_chunk_frames(torch.device(device))
    return {
        PPLLAVA: Entrant(PPLLAVA, settings, nullcontext),
        PEER: Entrant(PEER, {}, nullcontext),
        PEER_TUNED: Entrant(PEER, settings, lambda: vision_in_chunks(models[PEER], chunk)),
        OPS_OFF: Entrant(
            PPLLAVA, settings, lambda: mock.patch.object(ours.multi_modal_projector, "backend", "reference")
        ),
    }


@contextmanager
def vision_in_chunks(peer: PreTrainedModel, chunk: int) -> Iterator[None]:
    """Let the peer's vision tower see so many frames at a time; of the hidden states it keeps what the peer reads."""
    tower, layer = peer.model.vision_tower, peer.config.vision_feature_layer
    whole = tower.forward

    def forward(pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        last, read = [], []
        for part in pixel_values.split(chunk):
            output = whole(part, **kwargs)
            last.append(output.last_hidden_state)
            read.append(output.hidden_states[layer])
            states = len(output.hidden_states)
            del output
        hidden: list[Tensor | None] = [None] * states
        hidden[layer] = torch.cat(read)  # [F, 1 + H * W, V]
        return BaseModelOutputWithPooling(last_hidden_state=torch.cat(last), hidden_states=tuple(hidden))

    with mock.patch.object(tower, "forward", forward):
        yield


def encode_clip(path: Path, frames: int) -> Path:
    """Write an H.264 file: a texture that drifts, and a square of another one that drifts against it. One
    longer than PERIOD has as many whole ones as `frames` need."""
    width, height = CLIP_SIZE
    noise = np.random.default_rng(0).integers(0, 256, (2, height // 8, width // 8, 3), dtype=np.uint8)
    ground, square = noise.repeat(8, axis=1).repeat(8, axis=2)  # [H, W, 3]
    edge = height // 3
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=CLIP_FPS, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        packets = []
        count = min(frames, PERIOD)
        for i in range(count):
            image = np.roll(ground, (i, 2 * i), axis=(0, 1))
            left = (5 * i) % (width - edge)
            image[edge : 2 * edge, left : left + edge] = square[:edge, :edge]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, CLIP_FPS)
            packets += stream.encode(frame)
        packets += stream.encode()
        copies = [(bytes(x), x.pts, x.dts, x.time_base, x.is_keyframe) for x in packets]
        for start in range(0, frames, count):
            for data, pts, dts, base, keyframe in copies:
                packet, shift = av.Packet(data), round(start / CLIP_FPS / base)
                packet.stream, packet.time_base, packet.is_keyframe = stream, base, keyframe
                packet.pts, packet.dts = pts + shift, dts + shift
                container.mux(packet)
    return path


@dataclass
class Footage:
    """A video of so many frames, decoded once for all variants: frame i of it is `frames[i % K]`.

    frames  uint8 [K, 3, S, S], resized
    """

    count: int
    frames: Tensor = field(repr=False)
    decode: list[float]  # seconds
    preprocess: list[float]

    def part(self, start: int, end: int) -> Tensor:
        """uint8 [end - start, 3, S, S]; no copy where it can be avoided, since threads that copy disturb the tower."""
        first = start % len(self.frames)
        if first + end - start <= len(self.frames):
            return self.frames[first : first + end - start]
        return self.frames[torch.arange(start, end) % len(self.frames)]


@dataclass(frozen=True)
class Clip:
    """The file that all variants see frames of."""

    path: Path
    own: bool = False  # of the user: frames of all of it; of ours so many from its start

    def pick(self, timestamps: np.ndarray, count: int) -> np.ndarray:
        """int64 [count], indices of frames; ValueError where the file has fewer."""
        if self.own and count > len(timestamps):
            raise TooShort(f"{self.path.name} has {len(timestamps):,} frames")
        end = None if self.own else (max(count, CLIP_FRAMES) - 1) / CLIP_FPS
        return sample_frames(timestamps, num_frames=count, end=end)


class TooShort(ValueError):
    """A video that has fewer frames than a row is about."""


def read_footage(
    clip: Clip, count: int, processor: PPLlavaProcessor, device: str, dtype: torch.dtype, repeats: int
) -> Footage:
    """Decode `count` frames of a clip; the first time only warms up, and a long one is decoded once."""
    decode, preprocess = [], []
    for n in range(1 if count > PIXELS else 1 + repeats):
        start, kept = time.perf_counter(), []
        with open_video(clip.path) as reader:
            for _, image in reader.stream_frames(clip.pick(reader.timestamps, count)):
                if len(kept) < (KEPT if count > PIXELS else count):
                    kept.append(np.array(image))
        decoded = time.perf_counter()
        frames = processor.resize(torch.from_numpy(np.stack(kept)).permute(0, 3, 1, 2))  # [K, 3, S, S]
        on_device = processor.normalize(frames).to(device=device, dtype=dtype)
        if on_device.is_cuda:
            torch.cuda.synchronize(device)
        if n or count > PIXELS:
            decode.append(decoded - start)
            preprocess.append((time.perf_counter() - decoded) * count / len(kept))
        del on_device
    return Footage(count, frames, decode, preprocess)


class Videos:
    """The same video several times, as inputs of both models."""

    def __init__(self, footage: Footage, batch: int, processor: PPLlavaProcessor, device: str, dtype: torch.dtype):
        self.footage, self.batch, self.processor, self.device, self.dtype = footage, batch, processor, device, dtype

    @cached_property
    def pixels(self) -> Tensor:
        """[B * T, 3, S, S]"""
        footage = self.footage
        frames = self.processor.normalize(footage.frames).to(device=self.device, dtype=self.dtype)  # [K, 3, S, S]
        places = torch.arange(footage.count) % len(frames)  # [T]
        return frames[places.repeat(self.batch).to(self.device)]

    def ask(self, videos: list[EncodedVideo]) -> dict[str, Tensor]:
        prompt = PROMPT.format(video=self.processor.video_token)
        return dict(self.processor(text=[prompt] * len(videos), videos=videos).to(self.device))

    @cached_property
    def prompts(self) -> dict[str, Tensor]:
        """What the processor makes of the prompts, which depends on the number of frames alone."""
        inputs = self.ask([EncodedVideo(torch.empty(self.footage.count, 0))] * self.batch)
        return {name: x for name, x in inputs.items() if name != "video_features"}

    def stream(self, model: PreTrainedModel) -> list[EncodedVideo]:
        """Each video through PPLLaVA's tower, in chunks."""
        size, count = model.model.vision_chunk_frames(model.device), self.footage.count
        bounds = [(start, min(start + size, count)) for start in range(0, count, size)]

        def chunks() -> Iterator[tuple[list[list[int]], Tensor]]:
            for start, end in bounds:
                yield [[i] for i in range(start, end)], self.footage.part(start, end)

        return [encode_frames(model, self.processor, Frames(chunks(), count)) for _ in range(self.batch)]


@dataclass
class Job:
    """What makes one row: a variant on a batch of videos."""

    variant: str
    model: PreTrainedModel
    entrant: Entrant
    videos: Videos = field(repr=False)
    visual_tokens: int  # of one video, as the next two
    text_tokens: int
    flops: dict[str, int]

    @property
    def ours(self) -> bool:
        return self.entrant.model == PPLLAVA

    @property
    def streamed(self) -> bool:
        return self.ours and self.videos.footage.count > PIXELS

    @property
    def length(self) -> int:
        """Of the prompt."""
        return self.visual_tokens + self.text_tokens

    @property
    def past_context(self) -> bool:
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        return limit is not None and self.length > limit

    def load(self) -> dict[str, Tensor]:
        """Inputs of `generate` but those that are streamed; a large tensor is made here, once for all variants."""
        if self.streamed:
            return {}
        if self.ours:
            return {**self.videos.prompts, "pixel_values_videos": self.videos.pixels}
        ids = with_placeholders(
            self.videos.prompts["input_ids"], self.model.config.video_token_id, self.visual_tokens
        )  # [B, S]
        pixels = self.videos.pixels.unflatten(0, (self.videos.batch, -1))  # [B, T, 3, S, S]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}


def make_job(models: dict[str, PreTrainedModel], variant: str, entrant: Entrant, videos: Videos) -> Job:
    """A job for a variant; nothing large is made before it is asked for."""
    config, peer, frames = models[PPLLAVA].config, models[PEER].config, videos.footage.count
    ours = config.visual_pooling.video_tokens(frames)
    text = videos.prompts["input_ids"].shape[1] - ours
    guide = videos.prompts["guide_input_ids"].shape[1]
    visual, flops = {
        PPLLAVA: lambda: (ours, presets.flops(config, frames, text, guide)),
        PEER: lambda: (peer_tokens(peer, frames), peer_flops(config, peer, frames, text)),
    }[entrant.model]()
    if variant == OPS_OFF:  # the original has the second layer on all patches
        patches, width = frames * config.patch_grid[0] * config.patch_grid[1], config.text_config.hidden_size
        flops = {**flops, "projector": flops["projector"] + 2 * (patches - ours) * width**2}
    return Job(variant, models[entrant.model], entrant, videos, visual, text, flops)


def with_placeholders(input_ids: Tensor, token: int, count: int) -> Tensor:
    """input_ids [B, S] of equal prompts with one video each, its placeholders replaced by `count` of them."""
    place = int((input_ids[0] == token).nonzero()[0])
    text = input_ids[input_ids != token].view(len(input_ids), -1)  # [B, text]
    return torch.cat([text[:, :place], text.new_full((len(text), count), token), text[:, place:]], dim=1)


def peer_tokens(peer: LlavaNextVideoConfig, frames: int) -> int:
    grid = peer.vision_config.image_size // peer.vision_config.patch_size
    return frames * (grid // peer.spatial_pool_stride) ** 2


def peer_flops(config: PPLlavaConfig, peer: LlavaNextVideoConfig, frames: int, text_tokens: int) -> dict[str, int]:
    """As `presets.flops`. transformers computes every layer of the peer's tower, also those that nothing reads."""
    vision, width = peer.vision_config, peer.text_config.hidden_size
    tokens = peer_tokens(peer, frames)
    whole = PPLlavaConfig.from_dict({**config.to_dict(), "vision_feature_layer": -1})
    like = presets.flops(whole, frames, text_tokens + tokens - config.visual_pooling.video_tokens(frames))
    return {
        "vision_tower": like["vision_tower"],
        "projector": 2 * tokens * (vision.hidden_size + width) * width,
        "language_model": like["language_model"],
    }
