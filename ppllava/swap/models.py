"""Video LLMs of transformers with their video tokens compressed: each a subclass made of a mixin here and their class.

A mixin overrides what turns pixels into tokens, and what says where tokens are; all else is the model's own code.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ppllava_kernels import weighted_pool3d

from ..compat import can_return_tuple, written_names
from .guides import SwapGuide, to_grid
from .twins import Twin, untwin
from .windows import Size, Windows, joined, resample

GUIDE = ("guide_input_ids", "guide_attention_mask")
# Video-LLaVA's images have the second name before transformers 5.23.
PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


class CompressedLLM(Twin):
    """Mixin of a `...ForConditionalGeneration`; `forward` takes the arguments of the compressed model, too."""

    @property
    def prompt_guide(self) -> SwapGuide | None:
        """What compares tokens with the question; None for the plain mean."""
        return self.model.prompt_guide

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **kwargs):
        """The model as its own class saves it, without the compression, and beside it guide.safetensors, the state of
        `prompt_guide`. One that is trained is among the model's weights, too: from there Trainer resumes, and the
        model's own class says that it leaves them out."""
        plain, guide, start = self._plain(), {}, "model.prompt_guide."
        if self.prompt_guide is not None:
            # The ends of its tower are the guide's own modules.
            twice = tuple(f"{start}tower.{name}." for name in ("post_layernorm", "head"))
            state = self.state_dict() if state_dict is None else state_dict
            guide = {name: x for name, x in state.items() if name.startswith(start) and not name.startswith(twice)}
            trained = any(x.requires_grad for x in self.prompt_guide.parameters())
            # What accelerate has offloaded is not trained, and transformers gathers it without a state.
            if state_dict is not None or (trained and not any(x.is_meta for x in state.values())):
                state_dict = {name: x for name, x in state.items() if not name.startswith(start)}
                state_dict |= guide if trained else {}
        plain.save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if guide and is_main_process:
            guide = {name.removeprefix(start): x.contiguous() for name, x in guide.items()}
            save_file(guide, Path(save_directory) / "guide.safetensors", {"format": "pt"})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As of any module. Weights may also have the names that `save_pretrained` writes, those of the Hub: Trainer
        resumes from what that wrote.

        Raises:
            ValueError: for weights of other names, also where `strict` is false; transformers would go on without them.
        """
        own = self.state_dict().keys()
        if not state_dict.keys() <= own:
            written = written_names(self._plain())
            state_dict = {written.get(name, name): x for name, x in state_dict.items()}
        if unknown := sorted(state_dict.keys() - own):
            raise ValueError(
                f"state_dict must have weights of this {type(self).__name__} alone, got {len(unknown)} others, first "
                f"{unknown[0]!r}; load the checkpoint with from_pretrained and compress what that returns"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def _plain(self) -> PreTrainedModel:
        """This model without the compression."""
        plain = untwin(self)
        plain.model = untwin(self.model)
        del plain.model.prompt_guide
        return plain


class CompressedModel(Twin):
    """Mixin of the base model of a video LLM. It has

    windows        of the pooling
    prompt_guide   a :class:`SwapGuide`, or None for the plain mean
    encoders       {"image": the arguments of get_image_features, "video": ...}
    extra          names of the arguments that the model's own class does not take
    """

    windows: Windows
    prompt_guide: SwapGuide | None
    encoders: dict[str, frozenset[str]]
    extra: tuple[str, ...] = GUIDE

    def forward(self, *args, mm_encoder_outputs: dict | None = None, **kwargs):
        """As the model's own; images and videos are encoded before."""
        kwargs |= zip(inspect.signature(super().forward).parameters, args)
        outputs = {kind: x for kind, x in (mm_encoder_outputs or {}).items() if x is not None}
        for kind, names in self.encoders.items():
            given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            pixels = given.keys() & PIXELS[kind]
            if not pixels:
                continue
            if kind in outputs:
                raise ValueError(
                    f"{pixels.pop()} and mm_encoder_outputs[{kind!r}] are the same {kind}s twice; pass one of them"
                )
            outputs[kind] = getattr(self, f"get_{kind}_features")(**given, return_dict=True)
        gone = {*PIXELS["image"], *PIXELS["video"], *self.extra}
        kwargs = {name: value for name, value in kwargs.items() if name not in gone}
        return super().forward(mm_encoder_outputs=outputs or None, **kwargs)

    def relevance(
        self, features: Tensor | None, frames: list[Tensor], sizes: list[Size], ids: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """float32 [N], how relevant each of the tokens of clips of these sizes (T, H, W) is to the question.

        Args:
            features: [F, h, w, V] of the model's own tower, where that is the guide's, else None.
            frames: of each clip [T, 3, h, w], pixel values for an external guide.
            ids, mask: [B, L].
        """
        if self.prompt_guide is None:
            return None
        if ids is None:
            raise ValueError(
                "guide_input_ids must come with a video, got None; the processor that ppllava.compress returned makes "
                "them from the question"
            )
        if len(ids) != len(sizes):
            raise ValueError(
                f"guide_input_ids must have one row for each of the {len(sizes)} videos, got {len(ids)}; repeat the "
                "question of a prompt for each of its videos"
            )
        lengths = [size[0] for size in sizes]
        if features is None:
            features = self.prompt_guide.look(joined([self.prompt_guide.prepare(clip) for clip in frames]))
        maps = self.prompt_guide.relevance(features, ids, mask, lengths)  # [F, h, w]
        if len({size[1:] for size in sizes}) == 1:
            return resample(maps, sizes[0][1:]).flatten()
        return torch.cat([resample(x, size[1:]).flatten() for x, size in zip(maps.split(lengths), sizes)])

    def own_features(self, output: Any, layer: int | list[int] | None, grid: tuple[int, int]) -> Tensor | None:
        """[F, h, w, V] of the model's own tower for the guide; None for a guide with a tower, or no guide."""
        if self.prompt_guide is None or self.prompt_guide.tower is not None:
            return None
        layer = self.config.vision_feature_layer if layer is None else layer
        return to_grid(output.hidden_states[layer if isinstance(layer, int) else layer[-1]], grid)


class LlavaVideo(CompressedModel):
    """LLaVA-NeXT-Video, and what the models like it share: pixel_values_videos [F, 3, S, S], the frames of all videos
    packed, with `video_frames` int [B]; or [B, T, 3, S, S]."""

    extra = ("video_frames", *GUIDE)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        video_frames: Tensor | None = None,
        guide_input_ids: Tensor | None = None,
        guide_attention_mask: Tensor | None = None,
        **kwargs,
    ):
        pixels, frames = unpack(pixel_values_videos, video_frames)  # [F, 3, S, S]
        given = dict(
            vision_feature_layer=vision_feature_layer, vision_feature_select_strategy=vision_feature_select_strategy
        )
        given = {name: value for name, value in given.items() if value is not None}
        # Each frame as a video of its own: clips of any length, without padding.
        output = super().get_video_features(pixels[:, None], **given, **kwargs, return_dict=True)
        tokens = output.pooler_output  # [F, P, D]; before transformers 5.23 some give a tuple
        tokens = tokens if isinstance(tokens, Tensor) else joined(tokens)
        tokens, classes = self.split_tokens(tokens.reshape(len(pixels), -1, tokens.shape[-1]))
        side = math.isqrt(tokens.shape[1])
        sizes = [(n, side, side) for n in frames]
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        features = self.own_features(output, vision_feature_layer, grid)
        relevance = self.relevance(features, pixels.split(frames), sizes, guide_input_ids, guide_attention_mask)
        pooled = self.windows.pool(tokens.flatten(0, 1), relevance, sizes)
        output.pooler_output = self.join([clip.flatten(1, 2) for clip in pooled], classes, sizes)
        return output

    @property
    def patch_size(self) -> int:
        return self.config.vision_config.patch_size

    def split_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """tokens [F, P, D] -> (those on a grid [F, H * W, D], others)."""
        return tokens, None

    def join(self, pooled: list[Tensor], classes: Tensor | None, sizes: list[Size]) -> Any:
        """Of each clip [To, Ho * Wo, D] -> as the model reads them: one [tokens, D] for each clip."""
        return [clip.flatten(0, 1) for clip in pooled]


class LlavaOnevision(LlavaVideo):
    """LLaVA-OneVision: one `image_newline` at the end of each video."""

    def split_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        return tokens[:, :-1], None

    def join(self, pooled: list[Tensor], classes: Tensor | None, sizes: list[Size]) -> Tensor:
        newline = self.image_newline[None].to(pooled[0])  # [1, D]
        return as_rows([part for clip in pooled for part in (clip.flatten(0, 1), newline)])


class VideoLlava(LlavaVideo):
    """Video-LLaVA: the class token of each frame is a token, too. Those of the frames of a window become their mean."""

    def split_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        return tokens[:, 1:], tokens[:, 0]

    def join(self, pooled: list[Tensor], classes: Tensor | None, sizes: list[Size]) -> Tensor:
        parts = []
        for clip, token, size in zip(pooled, classes.split([size[0] for size in sizes]), sizes):
            window = self.windows.at(size)
            one = {name: (value[0], 1, 1) for name, value in window._asdict().items() if value}
            token = weighted_pool3d(token[None, :, None, None], None, **one)[0, :, 0]  # [To, 1, D]
            parts.append(torch.cat([token, clip], dim=1).flatten(0, 1))
        return as_rows(parts)


class QwenVL(CompressedModel):
    """Qwen2.5-VL and Qwen3-VL: a grid of its own for each video, and positions over time, rows and columns. They are
    those of the pooled grid, in Qwen2.5-VL with as many seconds between steps as between windows. Qwen3-VL's features
    of deeper layers are pooled as the tokens are."""

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        video_grid_thw: Tensor | None = None,
        guide_input_ids: Tensor | None = None,
        guide_attention_mask: Tensor | None = None,
        **kwargs,
    ):
        output = super().get_video_features(pixel_values_videos, video_grid_thw, **kwargs, return_dict=True)
        sizes, frames = self.sizes(video_grid_thw), []
        if self.prompt_guide is not None:
            grids = video_grid_thw.tolist()
            clips = pixel_values_videos.split([math.prod(grid) for grid in grids])
            frames = [self.first_frames(clip, grid) for clip, grid in zip(clips, grids)]
        relevance = self.relevance(None, frames, sizes, guide_input_ids, guide_attention_mask)

        def pool(tokens: Sequence[Tensor]) -> list[Tensor]:
            return [clip.flatten(0, 2) for clip in self.windows.pool(joined(tokens), relevance, sizes)]

        output.pooler_output = pool(output.pooler_output)
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [pool(layer) for layer in output.deepstack_features]
        return output

    def sizes(self, video_grid_thw: Tensor) -> list[Size]:
        """(T, H, W) in tokens of each video."""
        merge = self.config.vision_config.spatial_merge_size
        return [(t, h // merge, w // merge) for t, h, w in video_grid_thw.tolist()]

    def first_frames(self, patches: Tensor, grid: list[int]) -> Tensor:
        """patches [t * h * w, 3 * frames * p * p] of one video -> the first frame of each step [t, 3, h * p, w * p]."""
        vision, (t, h, w) = self.config.vision_config, grid
        m, p = vision.spatial_merge_size, vision.patch_size
        patches = patches.view(t, h // m, w // m, m, m, -1, vision.temporal_patch_size, p, p)[:, :, :, :, :, :, 0]
        return patches.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(t, -1, h * p, w * p)

    def get_rope_index(self, *args, **kwargs):
        kwargs |= zip(inspect.signature(super().get_rope_index).parameters, args)
        if (video_grid_thw := kwargs.get("video_grid_thw")) is not None:
            sizes, seconds = self.sizes(video_grid_thw), kwargs.get("second_per_grid_ts")
            seconds = [1.0] * len(sizes) if seconds is None else torch.as_tensor(seconds).tolist()
            kwargs["second_per_grid_ts"] = [x * self.windows.step(size) for x, size in zip(seconds, sizes)]
            merge = self.config.vision_config.spatial_merge_size
            pooled = [self.windows.pooled_size(size) for size in sizes]
            kwargs["video_grid_thw"] = video_grid_thw.new_tensor([(t, h * merge, w * merge) for t, h, w in pooled])
        return super().get_rope_index(**kwargs)


class InternVL(CompressedModel):
    """InternVL: frames are images among the others, `video_patches` int [B, 2] says which: the first row of each video
    in pixel_values, and how many. Without it all are images."""

    extra = ("video_patches", *GUIDE)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        video_patches: Tensor | None = None,
        guide_input_ids: Tensor | None = None,
        guide_attention_mask: Tensor | None = None,
        **kwargs,
    ):
        given = dict(
            vision_feature_layer=vision_feature_layer, vision_feature_select_strategy=vision_feature_select_strategy
        )
        given = {name: value for name, value in given.items() if value is not None}
        output = super().get_image_features(pixel_values, **given, **kwargs, return_dict=True)
        if video_patches is None:
            return output
        tokens, places = output.pooler_output, torch.as_tensor(video_patches).tolist()  # [V, P, D]
        side = math.isqrt(tokens.shape[1])
        sizes = [(n, side, side) for _, n in places]
        frames = [pixel_values[start : start + n] for start, n in places]
        relevance = self.relevance(None, frames, sizes, guide_input_ids, guide_attention_mask)
        values = joined([tokens[start : start + n] for start, n in places])  # [F, P, D]
        pooled = iter(self.windows.pool(values.flatten(0, 1), relevance, sizes))
        parts, last = [], 0
        for start, n in places:
            parts += [tokens[last:start].flatten(0, 1), next(pooled).flatten(0, 2)]
            last = start + n
        output.pooler_output = as_rows([*parts, tokens[last:].flatten(0, 1)])
        return output


def as_rows(parts: list[Tensor]) -> Tensor:
    """Of each [tokens, D] -> [all tokens, 1, D]: for a model that takes one tensor, which `generate` then repeats for
    each beam by the token."""
    return torch.cat(parts)[:, None]


def unpack(pixel_values_videos: Tensor, video_frames: Tensor | None) -> tuple[Tensor, list[int]]:
    """(all frames [F, 3, S, S], the frames of each video)."""
    shape = list(pixel_values_videos.shape)
    if video_frames is None:
        if len(shape) != 5:
            raise ValueError(
                f"pixel_values_videos must be [B, T, 3, S, S] where video_frames is None, got shape {shape}; pass the "
                "number of frames of each video to pack videos as [F, 3, S, S]"
            )
        return pixel_values_videos.flatten(0, 1), [shape[1]] * shape[0]
    frames = torch.as_tensor(video_frames).tolist()
    if len(shape) != 4 or sum(frames) != shape[0] or min(frames, default=0) < 1:
        raise ValueError(
            f"pixel_values_videos must be [F, 3, S, S] with F = {sum(frames)}, the sum of video_frames, each at least "
            f"1, got shape {shape} and video_frames {frames}; concatenate the frames of all videos"
        )
    return pixel_values_videos, frames
