"""From images, videos and text to the inputs of the model: pixels, placeholders, and the question that guides."""

from __future__ import annotations

import inspect
import re
import reprlib
import warnings
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BatchFeature,
    GenerationConfig,
    LlavaNextImageProcessorPil,
    ProcessorMixin,
    TextKwargs,
)

from .compat import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from .configuration_ppllava import PPLlavaConfig
from .encoding import EncodedVideo
from .guide_text import check_blocks, check_questions, check_text, last_question, last_turn, tokenize_questions
from .pooling import VisualPooling
from .preprocessing import (
    as_frames,
    flatten,
    is_one,
    normalize,
    read_frames,
    read_image,
    resize,
)
from .sizes import check_sizes
from .templates import QWEN_MARKERS, QWEN_TEMPLATE, VICUNA_MARKERS, VICUNA_TEMPLATE

# What transformers' pipelines and templates pass to every processor.
_OTHER = ("common_kwargs", "images_kwargs", "audio_kwargs", "sanitize_control_tokens", "sampling_rate")


class PPLlavaProcessor(ProcessorMixin):
    """Tokenizers and preprocessing of PPLLaVA in one object that saves and loads itself.

    Args:
        tokenizer: of the language model; knows `image_token` and `video_token` as one special token each.
        guide_tokenizer: of the guide's text tower; adds its own special tokens.
        image_size, patch_size: of the vision tower.
        pooling, pooling_kernel_size, pooling_stride, pooling_output_size, pooling_max_tokens,
            image_pooling_kernel_size, image_pooling_stride, image_grid_pinpoints: as in :class:`PPLlavaConfig`.
        resize_mode: "squash" makes every frame a square, as the original does; "crop" resizes the shorter edge and
            crops the center. Bicubic. The views of an image are resized and padded, as in LLaVA-NeXT.
        image_mean, image_std: of RGB in 0 ... 1, by default CLIP's.
        num_frames: frames sampled from a file where a call names neither `num_frames` nor `fps`.
        guide_max_length: positions of the guide; a longer question loses its end.
        guide_padding: "longest" with an attention mask, for CLIP; "max_length" without one, for SigLIP, which was
            trained so and pools the last position.
        image_token, video_token: the placeholders in prompts.
        turn_markers: what a rendered prompt writes before a user's turn and after it; used to find the question of a
            plain `text` that came without `guide_text`.
    """

    def __init__(
        self,
        tokenizer=None,
        guide_tokenizer=None,
        image_size: int = 336,
        patch_size: int = 14,
        pooling: str = "prompt_guided",
        pooling_kernel_size: Sequence[int] = (2, 3, 3),
        pooling_stride: Sequence[int] | None = None,
        pooling_output_size: Sequence[int] | None = None,
        pooling_max_tokens: int | None = None,
        image_pooling_kernel_size: Sequence[int] | None = None,
        image_pooling_stride: Sequence[int] | None = None,
        image_grid_pinpoints: Sequence[Sequence[int]] | None = None,
        resize_mode: Literal["squash", "crop"] = "squash",
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        num_frames: int = 32,
        guide_max_length: int = 248,
        guide_padding: Literal["longest", "max_length"] = "longest",
        image_token: str = "<image>",
        video_token: str = "<video>",
        turn_markers: Sequence[str] = ("USER:", "ASSISTANT:"),
        chat_template: str | None = None,
    ) -> None:
        if resize_mode not in ("squash", "crop"):
            raise ValueError(f"resize_mode must be 'squash' or 'crop', got {resize_mode!r}; the original squashes")
        if guide_padding not in ("longest", "max_length"):
            raise ValueError(
                f"guide_padding must be 'longest' or 'max_length', got {guide_padding!r}; CLIP takes the first"
            )
        sizes = {"image_size": image_size, "patch_size": patch_size, "guide_max_length": guide_max_length}
        check_sizes(None, sizes)
        self.image_size, self.patch_size, self.resize_mode = image_size, patch_size, resize_mode
        self.pooling = pooling
        self.pooling_kernel_size, self.pooling_stride = pooling_kernel_size, pooling_stride
        self.pooling_output_size, self.pooling_max_tokens = pooling_output_size, pooling_max_tokens
        self.image_pooling_kernel_size, self.image_pooling_stride = image_pooling_kernel_size, image_pooling_stride
        self.image_grid_pinpoints = [list(pinpoint) for pinpoint in image_grid_pinpoints or ()]
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.num_frames, self.guide_max_length, self.guide_padding = num_frames, guide_max_length, guide_padding
        self.image_token, self.video_token, self.turn_markers = image_token, video_token, list(turn_markers)
        _ = self.visual_pooling  # which checks itself
        self.image_token_id = self._token_id(tokenizer, "image_token")
        self.video_token_id = self._token_id(tokenizer, "video_token")
        super().__init__(tokenizer, guide_tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, trust_remote_code: bool | None = None, **kwargs):
        """As in transformers, but for two things. Python code of the folder only runs with `trust_remote_code=True`;
        nobody is asked. And a guide's tokenizer that cannot be loaded is an error; transformers takes the other one.

        Raises:
            FileNotFoundError: for a folder without the guide's tokenizer.
        """
        place, inside = pretrained_model_name_or_path, kwargs.get("subfolder") or ""
        guide = f"{inside}/guide_tokenizer" if inside else "guide_tokenizer"
        if Path(place).is_dir() and not Path(place, guide).is_dir():
            raise FileNotFoundError(
                f"{str(place)!r} must hold the guide's tokenizer in {guide}, got none; convert the model again with "
                "--guide-tokenizer"
            )
        settings, ours = cls.get_processor_dict(place, **kwargs)
        own = inspect.signature(cls).parameters  # which are not the tokenizers'
        theirs = {name: value for name, value in kwargs.items() if name not in own}
        theirs["trust_remote_code"] = bool(trust_remote_code)
        tokenizers = [AutoTokenizer.from_pretrained(place, **{**theirs, "subfolder": part}) for part in (inside, guide)]
        return cls.from_args_and_dict(tokenizers, settings, **ours)

    @classmethod
    def from_config(cls, config: PPLlavaConfig, tokenizer, guide_tokenizer, **kwargs) -> PPLlavaProcessor:
        """The processor of a model with this configuration; `kwargs` as the class takes them."""
        shared = [name for name in config.to_dict() if re.match("(image_)?pooling|image_grid", name)]
        chat = (
            (QWEN_TEMPLATE, QWEN_MARKERS)
            if "qwen" in config.text_config.model_type
            else (VICUNA_TEMPLATE, VICUNA_MARKERS)
        )
        known = {
            "image_size": config.vision_config.image_size,
            "patch_size": config.vision_config.patch_size,
            **{name: getattr(config, name) for name in shared if name != "pooling_temperature"},
            "guide_max_length": config.guide_config.max_position_embeddings,
            "chat_template": chat[0],
            "turn_markers": chat[1],
        }
        if config.siglip:
            known.update(image_mean=IMAGENET_STANDARD_MEAN, image_std=IMAGENET_STANDARD_STD, guide_padding="max_length")
        return cls(tokenizer, guide_tokenizer, **{**known, **kwargs})

    @property
    def model_input_names(self) -> list[str]:
        images = ["pixel_values", "image_sizes", "image_views", "image_groups"]
        videos = ["pixel_values_videos", "video_frames"]
        guide = ["guide_input_ids", "guide_attention_mask"]
        return [*self.tokenizer.model_input_names, *images, *videos, *guide, "video_features"]

    @property
    def visual_pooling(self) -> VisualPooling:
        """The pooling as the model computes it."""
        return VisualPooling.of(self, (self.image_size // self.patch_size,) * 2, self.image_size)

    def __call__(
        self,
        images: Any = None,
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
        """Prompts, and the images and videos of all prompts in the order of their placeholders.

        Args:
            text: one prompt or a list of N; each `<image>` stands for one image, each `<video>` for one video.
            images: I images, flat or nested by prompt. One image is a path, a PIL image, or uint8 [H, W, 3] or
                [3, H, W] as numpy or torch. The only image of a prompt is cut into high-resolution views; several are
                an image list: one view each, compressed together.
            videos: B videos, flat or nested by prompt. One video is a path, a :class:`ppllava.video.VideoClip`, uint8
                frames [T, H, W, 3] or [T, 3, H, W] as numpy or torch (where both fit, the channels are last), a list of
                PIL images or [H, W, 3] arrays, a row of `datasets.Video()`, a decoder or a FrameBatch of torchcodec, or
                a :class:`ppllava.EncodedVideo`, which the tower has seen already.
            guide_text: the question that guides the pooling, one for all prompts or one each. Default: the last turn of
                the user in `text`.
            num_frames: sample so many frames uniformly, from files and from decoded frames. Default: `self.num_frames`
                for files and decoders, all frames of what is decoded.
            fps: sample so many frames a second instead; files only.
            do_sample_frames: for apply_chat_template of transformers; without effect.
            text_kwargs, kwargs: for the tokenizer. `padding` is on by default.

        Returns:
            input_ids, attention_mask int64 [N, S]; with images pixel_values float32 [V, 3, S, S], the views of all
            images packed, image_sizes int64 [I, 2], image_views int64 [I], image_groups int64 [G]; with videos
            pixel_values_videos float32 [F, 3, S, S], the frames of all videos packed, or of encoded ones video_features
            [F, H, W, V], and video_frames int64 [B]; with either guide_input_ids and, for CLIP, guide_attention_mask
            int64 [G + B, L], where the pooling is guided.

        Raises:
            ValueError: for input outside of the above; the message says what to do.
            TypeError: for `num_frames` that is not an integer.
        """
        if audio is not None:
            raise ValueError("audio is not supported, only text, images and videos; leave it out")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}; the model takes torch tensors only")
        self._check_names(kwargs)
        prompts = self._prompts(text)
        pictures = [] if images is None else flatten("image", images)
        clips = [] if videos is None else flatten("video", videos)
        image_counts = self._counts(prompts, "image", images, pictures)
        video_counts = self._counts(prompts, "video", videos, clips)
        data, image_runs, video_runs = {}, [], []
        if pictures:
            inputs, image_runs = self._images(pictures, [n for n in image_counts if n])
            data.update(inputs)
        if clips:
            options = {"num_frames": num_frames, "fps": fps, **(videos_kwargs or {})}
            inputs, video_runs = self._videos(clips, options.get("num_frames"), options.get("fps"))
            data.update(inputs)
        if data and self.visual_pooling.guided:
            counts = [a + b for a, b in zip(image_counts, video_counts)]
            tokens = (self.image_token, self.video_token)
            guides = check_questions(prompts, guide_text, counts, lambda one: last_turn(one, self.turn_markers, tokens))
            rows = [guide for guide, n in zip(guides, image_counts) if n]  # one for each group
            rows += [guide for guide, n in zip(guides, video_counts) for _ in range(n)]
            data.update(tokenize_questions(self.guide_tokenizer, rows, self.guide_max_length, self.guide_padding))
        prompts, offsets = self.get_text_with_replacements(list(prompts), image_runs, video_runs)
        options = {"padding": True, **kwargs, **(text_kwargs or {}), "return_tensors": "pt"}
        tokens = self.tokenizer(prompts, **options)
        self._check_whole("image", tokens["input_ids"], image_counts, image_runs)
        self._check_whole("video", tokens["input_ids"], video_counts, video_runs)
        if return_text_replacement_offsets:
            data["text_replacement_offsets"] = offsets
        return BatchFeature({**tokens, **data})

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """As in transformers; with `tokenize=True` the last user turn of each conversation becomes its `guide_text`."""
        kwargs["load_audio_from_video"] = False  # `transformers serve` asks for sound, which the model does not hear
        first = conversation[0] if len(conversation) else None
        batched = isinstance(first, (list, tuple)) or hasattr(first, "content")
        conversations = conversation if batched else [conversation]
        for messages in conversations:
            check_blocks(messages, (self.image_token, self.video_token) if kwargs.get("tokenize") else ())
        if kwargs.get("tokenize"):
            guides = [last_question(messages) for messages in conversations]
            # transformers 5.20 drops processor_kwargs where one of these comes as a plain argument.
            ours = self._known_names() - {*inspect.signature(ProcessorMixin.apply_chat_template).parameters}
            plain = {name: kwargs.pop(name) for name in ours.intersection(kwargs)}
            given = kwargs.pop("processor_kwargs", None) or {}
            kwargs["processor_kwargs"] = {"guide_text": guides, **plain, **given}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def num_video_tokens(self, num_frames: int) -> int:
        """Visual tokens of a clip of `num_frames`: what the model's pooling leaves of it."""
        return self.visual_pooling.video_tokens(num_frames)

    def num_image_tokens(self, height: int, width: int) -> int:
        """Visual tokens of the only image of a prompt, of so many pixels."""
        views = 1
        if self.image_grid_pinpoints:
            rows, columns = self.visual_pooling.view_grid((height, width))
            views += rows * columns
        return self.visual_pooling.image_tokens((height, width), views)

    def preprocess_video(self, video: Any, num_frames: int | None = None, fps: float | None = None) -> Tensor:
        """One video, in any of the forms of `__call__`, as pixel values float32 [T, 3, S, S]."""
        return self._pixels(read_frames(video, num_frames, fps, self.num_frames))

    def preprocess_image(self, image: Any, views: bool = True) -> Tensor:
        """One image, in any of the forms of `__call__`, as pixel values float32 [views, 3, S, S]: the whole image, and
        with `views` the grid that `image_grid_pinpoints` gives it, row by row."""
        return self._views(read_image(image), views)

    def _views(self, image: Image.Image, views: bool) -> Tensor:
        """:meth:`preprocess_image` of an image in RGB."""
        if not (views and self.image_grid_pinpoints):
            return self._pixels(as_frames(image))
        edge = {"height": self.image_size, "width": self.image_size}
        cut = LlavaNextImageProcessorPil(
            size=edge,
            crop_size=edge,
            image_grid_pinpoints=self.image_grid_pinpoints,
            image_mean=self.image_mean,
            image_std=self.image_std,
            do_pad=False,
        )
        return torch.from_numpy(cut(image)["pixel_values"][0]).float()

    def _images(self, images: list, groups: list[int]) -> tuple[dict[str, Tensor], list[str]]:
        """(the model's inputs, the placeholders of each image) of images in groups."""
        pixels, sizes, tokens, queue = [], [], [], iter(images)
        for count in groups:
            for image in map(read_image, islice(queue, count)):
                pixels.append(self._views(image, views=count == 1))
                size = (image.height, image.width)
                tokens.append(self.visual_pooling.image_tokens(size, len(pixels[-1]), in_list=count > 1))
                sizes.append(size)
        inputs = {
            "pixel_values": torch.cat(pixels),  # [V, 3, S, S]
            "image_sizes": torch.tensor(sizes),  # [I, 2]
            "image_views": torch.tensor([len(views) for views in pixels]),  # [I]
            "image_groups": torch.tensor(groups),  # [G]
        }
        return inputs, [self.image_token * n for n in tokens]

    def resize(self, frames: Tensor) -> Tensor:
        """frames uint8 [T, 3, H, W] as the vision tower sees them, uint8 [T, 3, S, S]."""
        return resize(frames, self.image_size, self.resize_mode)

    def normalize(self, frames: Tensor) -> Tensor:
        """:meth:`resize` d frames uint8 [T, 3, S, S] -> pixel values float32 [T, 3, S, S], on the same device."""
        return normalize(frames, self.image_mean, self.image_std)

    def _videos(self, clips: list, num_frames: int | None, fps: float | None) -> tuple[dict[str, Tensor], list[str]]:
        """(the model's inputs, the placeholders of each video)."""
        encoded = [isinstance(clip, EncodedVideo) for clip in clips]
        if not any(encoded):
            parts = [self.preprocess_video(clip, num_frames, fps) for clip in clips]  # of each [T, 3, S, S]
        elif not all(encoded):
            raise ValueError(
                f"videos must all be an EncodedVideo or none, got {sum(encoded)} of {len(clips)}; encode all of them "
                "with ppllava.encode_video"
            )
        elif num_frames is not None or fps is not None:
            raise ValueError(
                f"num_frames={num_frames} and fps={fps} choose frames before they are encoded, got an EncodedVideo; "
                "pass them to ppllava.encode_video"
            )
        else:
            parts = [clip.features for clip in clips]  # of each [T, H, W, V]
        inputs = {
            "video_features" if all(encoded) else "pixel_values_videos": _packed(parts),
            "video_frames": torch.tensor([len(part) for part in parts]),  # [B]
        }
        return inputs, [self.video_token * self.num_video_tokens(len(part)) for part in parts]

    def _pixels(self, frames: Tensor) -> Tensor:
        return self.normalize(self.resize(frames))

    def _token_id(self, tokenizer: Any, name: str) -> int:
        token = getattr(self, name)
        found = tokenizer.convert_tokens_to_ids(token)
        if found in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"tokenizer must know {name} {token!r} as one token, got none; add it with "
                f"tokenizer.add_tokens([{name}], special_tokens=True)"
            )
        return found

    def _known_names(self) -> set[str]:
        """The arguments of this processor and of its tokenizer."""
        calls = (type(self).__call__, type(self.tokenizer).__call__)
        return {*TextKwargs.__annotations__, *(name for call in calls for name in inspect.signature(call).parameters)}

    def _check_names(self, given: dict[str, Any]) -> None:
        """The tokenizer would swallow a misspelt name in silence."""
        known = {*self._known_names(), *GenerationConfig().to_dict(), *_OTHER}  # pipelines pass on what is for generate
        if wrong := [name for name, value in given.items() if name not in known and value is not None]:
            warnings.warn(
                f"{', '.join(wrong)} must be an argument of the processor or of its tokenizer to have an effect, and "
                "is none; check the spelling",
                stacklevel=3,
            )

    def _counts(self, prompts: list[str], kind: str, given: Any, media: list) -> list[int]:
        """How many placeholders each prompt has."""
        token = getattr(self, f"{kind}_token")
        counts = [prompt.count(token) for prompt in prompts]
        if sum(counts) != len(media):
            raise ValueError(
                f"text must hold one {token} for each {kind}, got {sum(counts)} of them and {len(media)} {kind}s; "
                f"write one where each {kind} belongs"
            )
        # Nested by prompt, media belong to theirs; one list of single media is in order of the placeholders.
        nested = isinstance(given, (list, tuple)) and not is_one(kind, given)
        if nested and any(isinstance(one, (list, tuple)) and not is_one(kind, one) for one in given):
            lengths = [len(flatten(kind, one)) for one in given]
            if lengths != counts:
                raise ValueError(
                    f"text must hold one {token} for each {kind} of its prompt, got {counts} of them and {lengths} "
                    f"{kind}s; write one where each {kind} belongs"
                )
        return counts

    def _check_whole(self, kind: str, input_ids: Tensor, counts: list[int], runs: list[str]) -> None:
        """A tokenizer that truncates leaves all placeholders of input_ids [N, S] or is an error."""
        token, queue = getattr(self, f"{kind}_token"), iter(runs)
        expected = [sum(run.count(token) for run in islice(queue, count)) for count in counts]
        found = (input_ids == getattr(self, f"{kind}_token_id")).sum(1).tolist()
        if found != expected:
            raise ValueError(
                f"input_ids must hold all {expected} {token} tokens of the prompts, got {found} after truncation; pass "
                "a larger max_length, or sample fewer frames"
            )

    def _prompts(self, text: Any) -> list[str]:
        prompts = [text] if isinstance(text, str) else list(text) if isinstance(text, Iterable) else []
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            got = reprlib.repr(text)  # shortened
            raise ValueError(f"text must be a prompt or a list of prompts, got {got}; {self.video_token} marks a video")
        for prompt in prompts:
            check_text("text", prompt)
        return prompts


def _packed(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # an hour of features is not copied


__all__ = ["PPLlavaProcessor"]
