"""Processors of transformers that write the placeholders of a compressed model: each a subclass made of a mixin here
and their class."""

from __future__ import annotations

import math
import re
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin

from ..compat import make_batched_metadata, make_batched_videos
from ..guide_text import check_questions, last_question, last_turn, tokenize_questions
from ..record import Record
from ..templates import VICUNA_MARKERS
from .twins import Twin, untwin
from .windows import Size, Windows

# What stands before and after a user's turn in the prompts of the models that are known here.
MARKERS = (("<|im_start|>user", "<|im_end|>"), VICUNA_MARKERS, ("[INST]", "[/INST]"))
_asked: ContextVar[list[str] | None] = ContextVar("asked", default=None)


class GuideTokens(NamedTuple):
    """How the guide's text tower reads a question."""

    tokenizer: Any
    max_length: int
    padding: str


class CompressedProcessor(Twin):
    """Mixin of a processor. It has

    windows      of the pooling
    guide        :class:`GuideTokens`, or None for the plain mean
    config       of the model
    swapped      the processor that it was made from
    """

    windows: Windows
    guide: GuideTokens | None
    config: PreTrainedConfig
    swapped: ProcessorMixin

    def __call__(self, images=None, text=None, videos=None, *args, guide_text=None, **kwargs) -> BatchFeature:
        """As the processor it was made from.

        Args:
            videos: also :class:`ppllava.video.VideoClip`, which bring their `video_metadata` and are not sampled again.
            guide_text: the question that guides the pooling, one for all prompts or one each. Default: what the user
                asks in the last turn of the conversation or of `text`.

        Returns:
            that of the processor, with the placeholders that the compressed videos need, and with videos also
            guide_input_ids and, for CLIP, guide_attention_mask int64 [B, L], one row for each video.
        """
        videos, known = open_clips(videos)
        kwargs = {**known, **kwargs}
        if videos is None or text is None or self.guide is None:
            return self.process(images, text, videos, *args, **kwargs)
        prompts = [text] if isinstance(text, str) else list(text)
        guide_text = _asked.get() if guide_text is None else guide_text
        counts = [prompt.count(self.video_token) for prompt in prompts]
        guides = check_questions(prompts, guide_text, counts, self.find_question)
        inputs = self.process(images, prompts, videos, *args, **kwargs)
        rows = [guide for guide, count in zip(guides, counts) for _ in range(count)]
        tokens = tokenize_questions(self.guide.tokenizer, rows, self.guide.max_length, self.guide.padding)
        if not isinstance(inputs["input_ids"], Tensor):
            arrays = isinstance(inputs["input_ids"], np.ndarray)
            tokens = {name: x.numpy() if arrays else x.tolist() for name, x in tokens.items()}
        inputs.update(tokens)
        return inputs

    def process(self, *args, **kwargs) -> BatchFeature:
        """All but the question."""
        return super().__call__(*args, **kwargs)

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As the processor it was made from; the last user turn of each conversation becomes its `guide_text`."""
        first = conversation[0] if len(conversation) else None
        batched = isinstance(first, (list, tuple)) or hasattr(first, "content")
        token = _asked.set([last_question(one) for one in (conversation if batched else [conversation])])
        try:
            return super().apply_chat_template(conversation, *args, **kwargs)
        finally:
            _asked.reset(token)

    def find_question(self, prompt: str) -> str:
        """The last turn of the user in a rendered prompt; all of its text where no turns are known."""
        places = (self.image_token, self.video_token, *self.tokenizer.get_added_vocab())
        found = [pair for pair in MARKERS if pair[0] in prompt]
        markers = min(found, key=lambda pair: prompt.index(pair[0]), default=None)
        return re.sub(r"(?s)<<SYS>>.*?<</SYS>>", "", last_turn(prompt, markers, places)).strip()

    def replace_video_token(self, video_inputs: dict, video_idx: int = 0, **kwargs) -> str:
        return self.placeholders(self.size(video_inputs, video_idx), video_inputs, video_idx)

    def size(self, video_inputs: dict, video_idx: int) -> Size:
        """(T, H, W), the tokens of a video before they are pooled."""
        raise NotImplementedError

    def placeholders(self, size: Size, video_inputs: dict, video_idx: int) -> str:
        """What stands for a video of this size in a prompt."""
        return self.video_token * math.prod(self.windows.pooled_size(size))

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "guide_input_ids", "guide_attention_mask"]

    def save_pretrained(self, *args, **kwargs):
        """As the class of the processor it was made from."""
        return self.plain().save_pretrained(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return self.plain().to_dict()

    def plain(self) -> ProcessorMixin:
        """This processor without the compression."""
        plain = untwin(self)
        for name in ("windows", "guide", "config", "swapped"):
            del plain.__dict__[name]
        return plain

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({self.windows}, of {self.swapped!r})"


def open_clips(videos: Any) -> tuple[Any, dict[str, Any]]:
    """(videos with the frames of each :class:`ppllava.video.VideoClip` in its place, what to tell the processor)."""
    metadata, others = [], 0

    def opened(video: Any) -> Any:
        nonlocal others
        if isinstance(video, (list, tuple)):
            return [opened(one) for one in video]
        if not (isinstance(video, Record) and hasattr(video, "frames")):
            others += 1
            return video
        indices = video.indices.tolist()
        # Of so many frames are these an even share: the rate of the sample, that of the file over this, is then right.
        spread = round((indices[-1] - indices[0]) * len(indices) / max(len(indices) - 1, 1))
        metadata.append({"total_num_frames": max(spread, 1), "fps": video.fps, "frames_indices": indices})
        return video.frames

    frames = opened(videos)
    if not metadata:
        return videos, {}
    if others:
        raise ValueError(
            f"videos must all be a VideoClip or none, got {len(metadata)} beside {others} others; read all of them "
            "with ppllava.video.read_video"
        )
    return frames, {"video_metadata": metadata, "do_sample_frames": False}


class PackedVideos(CompressedProcessor):
    """Clips of any length in one batch: the frames of all videos packed as pixel_values_videos [F, 3, S, S], with
    `video_frames` int64 [B]."""

    def _process_videos(self, videos, **kwargs) -> tuple[dict[str, Any], list[str]]:
        clips, metadata, parts = make_batched_videos(videos), kwargs.pop("video_metadata", None), []
        metadata = [metadata] * len(clips) if metadata is None else make_batched_metadata(videos, metadata)
        kwargs["return_tensors"] = "pt"
        for clip, one in zip(clips, metadata):
            given = {} if one is None else {"video_metadata": [one]}
            parts.append(self.video_processor([clip], **given, **kwargs))
        pixels = [part["pixel_values_videos"][0] for part in parts]  # of each [T, 3, S, S]
        if len({clip.shape[1:] for clip in pixels}) > 1:
            got = ", ".join("x".join(map(str, clip.shape[2:])) for clip in pixels)
            raise ValueError(
                f"videos must come out of the video processor in one size, got {got}; leave do_resize and "
                "do_center_crop on"
            )
        inputs = {"pixel_values_videos": torch.cat(pixels), "video_frames": torch.tensor([len(x) for x in pixels])}
        if "video_metadata" in parts[0]:
            inputs["video_metadata"] = [one for part in parts for one in part["video_metadata"]]
        return inputs, [self.replace_video_token(inputs, i) for i in range(len(pixels))]

    def size(self, video_inputs: dict, video_idx: int) -> Size:
        grid = self.grid(*video_inputs["pixel_values_videos"].shape[-2:])
        return (int(video_inputs["video_frames"][video_idx]), *grid)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(H, W), the tokens of a frame of so many pixels."""
        raise NotImplementedError


class LlavaVideoProcessor(PackedVideos):
    """Of LLaVA-NeXT-Video."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(H, W), the tokens of a frame of so many pixels."""
        patch, stride = self.config.vision_config.patch_size, self.config.spatial_pool_stride
        return height // patch // stride, width // patch // stride

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "video_frames"]


class LlavaOnevisionProcessor(LlavaVideoProcessor):
    """Of LLaVA-OneVision: one token more at the end of each video."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        vision = self.config.vision_config
        side = math.ceil(vision.image_size // vision.patch_size / 2)
        return side, side

    def placeholders(self, size: Size, video_inputs: dict, video_idx: int) -> str:
        return super().placeholders(size, video_inputs, video_idx) + self.video_token


class VideoLlavaProcessor(LlavaVideoProcessor):
    """Of Video-LLaVA: one class token more for each step in time."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        patch = self.config.vision_config.patch_size
        return height // patch, width // patch

    def placeholders(self, size: Size, video_inputs: dict, video_idx: int) -> str:
        steps, height, width = self.windows.pooled_size(size)
        return self.video_token * (steps * (height * width + 1))


class QwenVLProcessor(CompressedProcessor):
    """Of Qwen2.5-VL. `video_grid_thw` stays that of the patches, which the vision tower needs."""

    def size(self, video_inputs: dict, video_idx: int) -> Size:
        t, h, w = (int(n) for n in video_inputs["video_grid_thw"][video_idx])
        merge = self.config.vision_config.spatial_merge_size
        return t, h // merge, w // merge


class Qwen3VLProcessor(QwenVLProcessor):
    """Of Qwen3-VL: a timestamp before each step, the middle of those that its window has."""

    def placeholders(self, size: Size, video_inputs: dict, video_idx: int) -> str:
        # What the model's own writes is not used, but it warns of videos without fps, and gives them some.
        super(CompressedProcessor, self).replace_video_token(video_inputs, video_idx)
        metadata = video_inputs["video_metadata"][video_idx]
        step = self.video_processor.temporal_patch_size
        times = step_times(list(metadata.frames_indices), metadata.fps, step)
        _, height, width = self.windows.pooled_size(size)
        tokens = self.vision_start_token + self.video_token * (height * width) + self.vision_end_token
        windows = self.windows.frames(size)
        return "".join(f"<{(times[first] + times[last - 1]) / 2:.1f} seconds>{tokens}" for first, last in windows)


def step_times(indices: list[int], fps: float, frames: int) -> list[float]:
    """Seconds of each step of so many frames, the middle of its first and its last; the last frame fills up."""
    indices = [*indices, *[indices[-1]] * (-len(indices) % frames)]
    return [(indices[i] / fps + indices[i + frames - 1] / fps) / 2 for i in range(0, len(indices), frames)]


class InternVLProcessor(PackedVideos):
    """Of InternVL: a video is written as images, one for each step; `video_patches` int64 [B, 2] has the first row of
    each video in pixel_values, and how many."""

    def process(self, images=None, text=None, videos=None, *args, **kwargs) -> BatchFeature:
        if videos is None:
            return super().process(images, text, videos, *args, **kwargs)
        prompts = [text] if isinstance(text, str) else list(text)
        kinds = [match.lastgroup for prompt in prompts for match in re.finditer(self.multimodal_pattern, prompt)]
        # Without InternVL's own __call__, which takes clips of one length only.
        inputs = ProcessorMixin.__call__(self, images, prompts, videos, *args, **kwargs)
        queues = {"video": iter(inputs.pop("pixel_values_videos").split(inputs.pop("video_frames").tolist()))}
        if images is not None:
            views = torch.stack([torch.as_tensor(view) for view in inputs.pop("pixel_values")])  # [V, 3, S, S]
            queues["image"] = iter(views.split(torch.as_tensor(inputs.pop("num_patches")).tolist()))
        parts, patches, start = [], [], 0
        for kind in kinds:
            parts.append(next(queues[kind]))
            if kind == "video":
                patches.append((start, len(parts[-1])))
            start += len(parts[-1])
        inputs["pixel_values"], inputs["video_patches"] = torch.cat(parts), torch.tensor(patches)
        return inputs

    def grid(self, height: int, width: int) -> tuple[int, int]:
        side = math.isqrt(self.image_seq_length)
        return side, side

    def placeholders(self, size: Size, video_inputs: dict, video_idx: int) -> str:
        steps, height, width = self.windows.pooled_size(size)
        tokens = self.start_image_token + self.image_token * (height * width) + self.end_image_token
        return "\n".join(f"Frame{i + 1}: {tokens}" for i in range(steps))

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "video_patches"]


__all__ = [
    "CompressedProcessor",
    "GuideTokens",
    "InternVLProcessor",
    "LlavaOnevisionProcessor",
    "LlavaVideoProcessor",
    "Qwen3VLProcessor",
    "QwenVLProcessor",
    "VideoLlavaProcessor",
]
