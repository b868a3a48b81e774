"""From videos and text to the inputs of the model: frames, placeholders, and the question that guides the pooling."""

from __future__ import annotations

import math
import os
import reprlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ppllava_kernels import pooled_size

from .sampling import sample_uniform


class PPLlavaProcessor(ProcessorMixin):
    """Tokenizers and frame preprocessing of PPLLaVA in one object that saves and loads itself.

    Args:
        tokenizer: of the language model; knows `video_token` as one special token.
        guide_tokenizer: of the CLIP text tower; adds BOS and EOS.
        image_size, patch_size: of the vision tower.
        pooling_kernel_size, pooling_stride, pooling_output_size: as in :class:`PPLlavaConfig`.
        resize_mode: "squash" makes every frame a square, as the original does; "crop" resizes the shorter edge and
            crops the center. Bicubic.
        image_mean, image_std: of RGB in 0 ... 1, by default CLIP's.
        num_frames: frames sampled from a file where a call names neither `num_frames` nor `fps`.
        guide_max_length: positions of the guide; a longer question loses its end.
        video_token: the placeholder in prompts.
        turn_markers: what a rendered prompt writes before a user's turn and after it; used to find the question of a
            plain `text` that came without `guide_text`.
    """

    def __init__(
        self,
        tokenizer=None,
        guide_tokenizer=None,
        image_size: int = 336,
        patch_size: int = 14,
        pooling_kernel_size: Sequence[int] = (2, 3, 3),
        pooling_stride: Sequence[int] | None = None,
        pooling_output_size: Sequence[int] | None = None,
        resize_mode: Literal["squash", "crop"] = "squash",
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        num_frames: int = 32,
        guide_max_length: int = 248,
        video_token: str = "<video>",
        turn_markers: Sequence[str] = ("USER:", "ASSISTANT:"),
        chat_template: str | None = None,
    ) -> None:
        if resize_mode not in ("squash", "crop"):
            raise ValueError(f"resize_mode must be 'squash' or 'crop', got {resize_mode!r}; the original squashes")
        self.image_size, self.patch_size, self.resize_mode = image_size, patch_size, resize_mode
        self.pooling_kernel_size, self.pooling_stride = pooling_kernel_size, pooling_stride
        self.pooling_output_size = pooling_output_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.num_frames, self.guide_max_length = num_frames, guide_max_length
        self.video_token, self.turn_markers = video_token, list(turn_markers)
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        if self.video_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"tokenizer must know video_token {video_token!r} as one token, got none; add it with "
                "tokenizer.add_tokens([video_token], special_tokens=True)"
            )
        super().__init__(tokenizer, guide_tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        guide = ["guide_input_ids", "guide_attention_mask"]
        return [*self.tokenizer.model_input_names, "pixel_values_videos", "video_frames", *guide]

    def __call__(
        self,
        images: None = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: None = None,
        *,
        guide_text: str | Sequence[str] | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        return_tensors: str = "pt",
        return_text_replacement_offsets: bool = False,
        do_sample_frames: bool | None = None,
        text_kwargs: dict | None = None,
        videos_kwargs: dict | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Prompts, and the videos of all prompts in the order of their `<video>` tokens.

        Args:
            text: one prompt or a list of N; each `<video>` stands for one video.
            videos: B videos, flat or nested by prompt. One video is a path, a :class:`ppllava.video.VideoClip`, uint8
                frames [T, H, W, 3] or [T, 3, H, W] as numpy or torch (where both fit, the channels are last), or a list
                of PIL images or [H, W, 3] arrays.
            guide_text: the question that guides the pooling, one for all prompts or one each. Default: the last turn of
                the user in `text`.
            num_frames: sample so many frames uniformly, from files and from decoded frames. Default: `self.num_frames`
                for files, all frames of what is decoded.
            fps: sample so many frames a second instead; files only.
            do_sample_frames: for apply_chat_template of transformers; without effect.
            text_kwargs, kwargs: for the tokenizer. `padding` is on by default.

        Returns:
            input_ids, attention_mask int64 [N, S]; with videos also pixel_values_videos float32 [F, 3, S, S], the
            frames of all videos packed, video_frames int64 [B], guide_input_ids and guide_attention_mask int64 [B, L].

        Raises:
            ValueError: for input outside of the above; the message says what to do.
            TypeError: for `num_frames` that is not an integer.
        """
        if images is not None or audio is not None:
            raise ValueError("images and audio are not supported yet, only text and videos; pass frames as videos")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}; the model takes torch tensors only")
        prompts = self._prompts(text)
        clips = [] if videos is None else list(_flatten(videos))
        counts = [prompt.count(self.video_token) for prompt in prompts]
        if sum(counts) != len(clips):
            raise ValueError(
                f"text must hold one {self.video_token} for each video, got {sum(counts)} of them and {len(clips)} "
                "videos; write one where each video belongs"
            )
        data: dict[str, Any] = {}
        offsets: list = []
        if clips:
            options = {"num_frames": num_frames, "fps": fps, **(videos_kwargs or {})}
            pixels = [self.preprocess_video(clip, options.get("num_frames"), options.get("fps")) for clip in clips]
            guides = self._guides(prompts, guide_text)
            data["pixel_values_videos"] = torch.cat(pixels)  # [F, 3, S, S]
            data["video_frames"] = torch.tensor([len(clip) for clip in pixels])  # [B]
            data.update(self._tokenize_guide([guide for guide, n in zip(guides, counts) for _ in range(n)]))
            placeholders = [self.video_token * self.num_video_tokens(len(clip)) for clip in pixels]
            prompts, offsets = self.get_text_with_replacements(list(prompts), videos_replacements=placeholders)
        options = {"padding": True, **kwargs, **(text_kwargs or {}), "return_tensors": "pt"}
        tokens = self.tokenizer(prompts, **options)
        self._check_special_mm_tokens(prompts, tokens, modalities=["video"])
        if return_text_replacement_offsets:
            data["text_replacement_offsets"] = offsets
        return BatchFeature({**tokens, **data})

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """As in transformers; with `tokenize=True` the last user turn of each conversation becomes its `guide_text`."""
        kwargs["load_audio_from_video"] = False  # `transformers serve` asks for sound, which the model does not hear
        if kwargs.get("tokenize"):
            batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "content")
            guides = [_question(messages) for messages in (conversation if batched else [conversation])]
            # transformers 5.20 drops processor_kwargs where these come as plain arguments.
            plain = {name: kwargs.pop(name) for name in ("num_frames", "fps", "guide_text") if name in kwargs}
            given = kwargs.pop("processor_kwargs", None) or {}
            kwargs["processor_kwargs"] = {"guide_text": guides, **plain, **given}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def num_video_tokens(self, num_frames: int) -> int:
        """Visual tokens of a clip of `num_frames`: what the model's pooling leaves of it."""
        grid = self.image_size // self.patch_size
        if self.pooling_output_size is not None:
            return math.prod(pooled_size((num_frames, grid, grid), output_size=self.pooling_output_size))
        return math.prod(pooled_size((num_frames, grid, grid), self.pooling_kernel_size, self.pooling_stride))

    def preprocess_video(self, video: Any, num_frames: int | None = None, fps: float | None = None) -> Tensor:
        """One video, in any of the forms of `__call__`, as pixel values float32 [T, 3, S, S]."""
        frames = self._frames(video, num_frames, fps)  # uint8 [T, 3, H, W]
        height, width, edge = *frames.shape[2:], self.image_size
        size = (edge, edge)
        if self.resize_mode == "crop":
            shorter = min(height, width)
            size = (height * edge // shorter, width * edge // shorter)
        # uint8 in, uint8 out, as Pillow resizes: the same within two levels on natural frames, five times as fast.
        frames = torch.nn.functional.interpolate(frames, size=size, mode="bicubic", antialias=True)
        top, left = (size[0] - edge) // 2, (size[1] - edge) // 2
        frames = frames[:, :, top : top + edge, left : left + edge]
        mean = 255 * torch.tensor(self.image_mean).view(3, 1, 1)
        std = 255 * torch.tensor(self.image_std).view(3, 1, 1)
        return ((frames - mean) / std).contiguous()  # [T, 3, S, S]

    def _frames(self, video: Any, num_frames: int | None, fps: float | None) -> Tensor:
        """uint8 [T, 3, H, W]."""
        if isinstance(video, (str, os.PathLike)):
            from .video import read_video  # needs PyAV, which decoded frames do not

            count = self.num_frames if num_frames is None and fps is None else num_frames
            frames = torch.from_numpy(read_video(video, num_frames=count, fps=fps).frames)  # [T, H, W, 3]
        else:
            if fps is not None:
                raise ValueError(f"fps={fps} needs the times of a file, got decoded frames; pass a path, or num_frames")
            frames = _as_tensor(getattr(video, "frames", video))
            if num_frames is not None:
                if isinstance(num_frames, bool) or not isinstance(num_frames, Integral):
                    raise TypeError(f"num_frames must be an int, got {num_frames!r}; pass for example 32")
                frames = frames[sample_uniform(num_frames, len(frames))]
        return frames.permute(0, 3, 1, 2) if frames.shape[-1] == 3 else frames

    def _prompts(self, text: Any) -> list[str]:
        prompts = [text] if isinstance(text, str) else list(text) if isinstance(text, Iterable) else []
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            got = reprlib.repr(text)  # shortened
            raise ValueError(f"text must be a prompt or a list of prompts, got {got}; {self.video_token} marks a video")
        return prompts

    def _guides(self, prompts: list[str], guide_text: str | Sequence[str] | None) -> list[str]:
        """The question of each prompt."""
        if guide_text is None:
            return [self._last_turn(prompt) for prompt in prompts]
        guides = [guide_text] * len(prompts) if isinstance(guide_text, str) else list(guide_text)
        if len(guides) != len(prompts):
            raise ValueError(
                f"guide_text must be one question, or one for each of the {len(prompts)} prompts, got {len(guides)}"
            )
        return guides

    def _last_turn(self, prompt: str) -> str:
        before, after = self.turn_markers
        return prompt.rpartition(before)[2].partition(after)[0].replace(self.video_token, "").strip()

    def _tokenize_guide(self, guides: list[str]) -> dict[str, Tensor]:
        """guide_input_ids and guide_attention_mask [B, L]; a question that is too long keeps its start and EOS."""
        limit = self.guide_max_length
        rows = []
        for ids in self.guide_tokenizer(guides, verbose=False)["input_ids"]:
            if len(ids) > limit:
                warnings.warn(
                    f"guide_text of {len(ids)} tokens is longer than the {limit} of the guide: its last "
                    f"{len(ids) - limit} tokens are lost; pass a shorter guide_text",
                    stacklevel=3,
                )
                ids = [*ids[: limit - 1], ids[-1]]
            rows.append(ids)
        padded = self.guide_tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        return {"guide_input_ids": padded["input_ids"], "guide_attention_mask": padded["attention_mask"]}


def _question(messages: Any) -> str:
    """The text of the last user turn of a conversation."""
    turns = [message for message in getattr(messages, "messages", messages) if message["role"] == "user"]
    content = turns[-1].get("content") or "" if turns else ""
    if isinstance(content, str):
        return content
    return "\n".join(block["text"] for block in content if block.get("type") == "text")


def _flatten(videos: Any) -> Iterator[Any]:
    """The single videos in nested lists of videos."""
    if _is_clip(videos):
        yield videos
    elif isinstance(videos, (list, tuple)) or getattr(videos, "ndim", 0) > 4:
        for video in videos:
            yield from _flatten(video)
    else:
        got = f"shape {list(videos.shape)}" if hasattr(videos, "shape") else type(videos).__name__
        raise ValueError(
            f"a video must be a path, frames [T, H, W, 3], a tensor [T, 3, H, W] or a list of images, got {got}; "
            "add the axis of the frames to a single image"
        )


def _is_clip(video: Any) -> bool:
    if isinstance(video, (list, tuple)) and not hasattr(video, "frames"):
        return len(video) > 0 and (hasattr(video[0], "convert") or getattr(video[0], "ndim", 0) == 3)
    return isinstance(video, (str, os.PathLike)) or hasattr(video, "frames") or getattr(video, "ndim", 0) == 4


def _as_tensor(frames: Any) -> Tensor:
    """Decoded frames as uint8 [T, H, W, 3] or [T, 3, H, W]."""
    if isinstance(frames, (list, tuple)):
        images = [np.asarray(image.convert("RGB") if hasattr(image, "convert") else image) for image in frames]
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise ValueError(f"the frames of a video must have one size, got {sorted(shapes)}; resize them to one")
        frames = np.stack(images)
    if isinstance(frames, np.ndarray):
        frames = torch.from_numpy(
            np.require(frames, requirements=("C", "W"))
        )  # torch takes no read-only or flipped views
    if frames.dtype != torch.uint8 or 3 not in (frames.shape[-1], frames.shape[1]) or not len(frames):
        raise ValueError(
            f"the frames of a video must be uint8 [T, H, W, 3] or [T, 3, H, W] in 0 ... 255, got {frames.dtype} of "
            f"shape {list(frames.shape)}; convert them to uint8 RGB"
        )
    return frames


__all__ = ["PPLlavaProcessor"]
