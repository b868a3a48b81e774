"""From pixels to what the language model sees of each image and video: towers, guide and projector, one pass each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .btadapter import BTAdapterVisionModel
from .compat import can_return_tuple
from .media import Clip, check_features, pack_images, pack_videos

MODALITIES = ("image", "video")
MEDIA = {"image": ("pixel_values",), "video": ("pixel_values_videos", "video_features")}
# Positions that go through the vision tower at once by default: on a CPU their activations stay in its caches, a GPU is
# busy with as many.
POSITIONS = {"cpu": 1_152}
POSITIONS_OF_GPU = 36_864


@dataclass
class PPLlavaVisualFeatures(BaseModelOutputWithPooling):
    """What the language model sees of each image or video, and why.

    pooler_output  one [tokens, D] per image or video. Of a video: frames, then rows, then columns. Of an image: the
                   base view, then the grid of views line by line without padding, `image_newline` after each line
    relevance      one float32 [T, H, W] per group of images or video, sums to 1: how relevant each patch is to the
                   question. T are the frames; the views of an image; the images of a list. None without guidance; with
                   `valuew_plus` times that, and not summing to 1
    """

    relevance: tuple[Tensor, ...] | None = None


class VisualFeatures:
    """The part of :class:`PPLlavaModel` that looks: for a module with its `config`, towers, guide and projector."""

    def encode_frames(self, pixel_values: Tensor, frames: list[int]) -> Tensor:
        """pixel_values [F, 3, S, S] -> patches of `vision_feature_layer` [F, H, W, V], without class token.

        frames are those of each clip, which a BT-Adapter mixes and the other towers do not.
        """
        chunk = self.vision_chunk_frames(pixel_values.device)
        if self.config.vision_chunk is None and (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            chunk = len(pixel_values)  # all activations are kept in any case, and a graph of chunks is a longer one
        if isinstance(self.vision_tower, BTAdapterVisionModel):
            return self._patches(self.vision_tower(pixel_values, frames=frames, chunk=chunk))
        chunks = pixel_values.split(chunk)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or len(chunks) == 1:
            return torch.cat([self._patches(self.vision_tower(part)) for part in chunks])
        places = torch.arange(len(pixel_values)).split(chunk)
        return self.encode_chunks(((where[:, None].tolist(), part) for where, part in zip(places, chunks)), sum(frames))

    def encode_chunks(self, chunks: Iterable[tuple[list[list[int]], Tensor]], frames: int) -> Tensor:
        """The features [T, H, W, V] of one video of T = frames; each of the chunks is (the places among them that each
        of n frames has, pixel_values [n, 3, S, S]). Of all pixels one chunk is in memory at a time."""
        if isinstance(self.vision_tower, BTAdapterVisionModel):  # which mixes them; `adapter_max_frames` bounds them
            pixels = [part[n] for part, n in _by_place(chunks, frames)]  # T of [3, S, S]
            return self.encode_frames(torch.stack(pixels), [frames])
        features = None
        for places, part in chunks:
            patches = self._patches(self.vision_tower(part))  # [n, H, W, V]
            if features is None:
                features = patches.new_empty(frames, *patches.shape[1:])
            wanted = [place for where in places for place in where]
            if wanted == [*range(wanted[0], wanted[0] + len(patches))]:
                features[wanted[0] : wanted[0] + len(patches)] = patches
            else:
                features[wanted] = patches[[n for n, where in enumerate(places) for _ in where]]
        return features

    def check_frames(self, frames: int) -> None:
        """A ValueError for a clip that the vision tower cannot take."""
        most = getattr(self.config.vision_config, "adapter_max_frames", None)
        if most is not None and frames > most and self.vision_tower.adapter is not None:
            raise ValueError(
                f"videos must have at most {most} frames for the BT-Adapter of this model, got {frames}; sample fewer"
            )

    def vision_chunk_frames(self, device: torch.device) -> int:
        """Frames that go through the vision tower at once."""
        if self.config.vision_chunk is not None:
            return self.config.vision_chunk
        height, width = self.config.patch_grid
        return max(1, round(POSITIONS.get(device.type, POSITIONS_OF_GPU) / (height * width + 1)))

    def _patches(self, output: BaseModelOutputWithPooling) -> Tensor:
        hidden = output.last_hidden_state  # [F, 1 + H * W, V]; SigLIP has no class token
        return (hidden if self.config.siglip else hidden[:, 1:]).unflatten(1, self.config.patch_grid)

    def get_media_features(
        self,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_views: Tensor | None = None,
        image_groups: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_frames: Tensor | None = None,
        guide_input_ids: Tensor | None = None,
        guide_attention_mask: Tensor | None = None,
        video_features: Tensor | None = None,
    ) -> dict[str, PPLlavaVisualFeatures]:
        """Encode images and videos and compress each under the guidance of its question: one pass of the vision tower,
        one of the guide, and one ragged op call for each window size.

        Args:
            pixel_values: [V, 3, S, S], the views of all images packed.
            image_sizes: int [I, 2], (height, width) of each image before preprocessing.
            image_views: int [I], views of each image; None means one each. The first is the whole image, the others the
                grid of views that `image_grid_pinpoints` gives it.
            image_groups: int [G], images of each group; None means one each. A group of several is an image list: its
                images share one softmax, and a BT-Adapter sees them as frames of one clip.
            pixel_values_videos: [F, 3, S, S], the frames of all videos packed, with `video_frames`; or [B, T, 3, S, S],
                which `torch.compile(fullgraph=True)` can trace, too.
            video_frames: int [B], the frames of each packed video.
            guide_input_ids: int [G + B, L], the question about each group of images, then those about each video.
            guide_attention_mask: int [G + B, L].
            video_features: [F, H, W, V], what the vision tower made of the frames of all videos, packed, with
                `video_frames`; takes the place of `pixel_values_videos` (`ppllava.encode_video`).

        Returns:
            {"image": ..., "video": ...}, each a :class:`PPLlavaVisualFeatures`; only what there are pixels of.

        Raises:
            ValueError: for shapes that do not fit together.
            TypeError: for pixel values that are not floating point.
        """
        pooling, pixels, clips = self.config.visual_pooling, [], []
        if pixel_values is not None:
            packed, images = pack_images(pixel_values, image_sizes, image_views, image_groups, pooling)
            pixels.append(packed)
            clips += images
        groups = len(clips)
        if pixel_values_videos is not None and video_features is not None:
            raise ValueError("pixel_values_videos and video_features are the same videos twice; pass one of them")
        if pixel_values_videos is not None:
            packed, videos = pack_videos("pixel_values_videos", pixel_values_videos, video_frames, pooling)
            pixels.append(packed)
            clips += videos
        seen = len(clips)
        if video_features is not None:
            check_features(video_features, (*self.config.patch_grid, self.config.vision_config.hidden_size))
            video_features, videos = pack_videos("video_features", video_features, video_frames, pooling)
            clips += videos
        text_embeds = self._embed_guides(clips, groups, guide_input_ids, guide_attention_mask)
        parts = [] if video_features is None else [video_features]
        if pixels:
            frames = torch.cat(pixels) if len(pixels) > 1 else pixels[0]  # [F, 3, S, S]
            parts.insert(0, self.encode_frames(frames, [n for clip in clips[:seen] for n in clip.tower_frames]))
        features = torch.cat(parts) if len(parts) > 1 else parts[0]  # [F, H, W, V]
        tokens, relevance = self.multi_modal_projector(features, clips, self.guide, text_embeds)
        outputs = {}
        if groups:
            arranged = [row for clip, x in zip(clips[:groups], tokens) for row in self._arrange(clip, x)]
            outputs["image"] = PPLlavaVisualFeatures(
                pooler_output=tuple(arranged), relevance=relevance and tuple(relevance[:groups])
            )
        if groups < len(clips):
            outputs["video"] = PPLlavaVisualFeatures(
                pooler_output=tuple(x.flatten(0, -2) for x in tokens[groups:]),
                relevance=relevance and tuple(relevance[groups:]),
            )
        return outputs

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        image_views: Tensor | None = None,
        image_groups: Tensor | None = None,
        guide_input_ids: Tensor | None = None,
        guide_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> PPLlavaVisualFeatures:
        """The images of :meth:`get_media_features`."""
        guide = {"guide_input_ids": guide_input_ids, "guide_attention_mask": guide_attention_mask}
        return self.get_media_features(pixel_values, image_sizes, image_views, image_groups, **guide)["image"]

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor | None = None,
        video_frames: Tensor | None = None,
        guide_input_ids: Tensor | None = None,
        guide_attention_mask: Tensor | None = None,
        video_features: Tensor | None = None,
        **kwargs,
    ) -> PPLlavaVisualFeatures:
        """The videos of :meth:`get_media_features`."""
        return self.get_media_features(
            pixel_values_videos=pixel_values_videos,
            video_features=video_features,
            video_frames=video_frames,
            guide_input_ids=guide_input_ids,
            guide_attention_mask=guide_attention_mask,
        )["video"]

    def _embed_guides(self, clips: list[Clip], groups: int, ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """text_embeds [G + B, C]; None where nothing is guided."""
        if self.config.pooling != "prompt_guided":
            return None
        if ids is None:
            names = [MEDIA[kind][0] for kind, n in zip(MODALITIES, (groups, len(clips) - groups)) if n]
            raise ValueError(
                f"guide_input_ids must be given with {' and '.join(names)}, got None; "
                "PPLlavaProcessor makes them from the user's question"
            )
        if len(ids) != len(clips):
            kinds = (
                f"{groups} groups of images and the {len(clips) - groups} videos" if groups else f"{len(clips)} videos"
            )
            raise ValueError(
                f"guide_input_ids must have one row for each of the {kinds}, got {len(ids)}; repeat the question of a "
                "prompt for each of them, and leave out prompts without one"
            )
        return self.guide.embed_text(ids, mask)

    def _arrange(self, clip: Clip, tokens: Tensor) -> list[Tensor]:
        """One [tokens, D] for each image of a clip from its tokens [views, h, w, D]."""
        pooling = self.config.visual_pooling
        if clip.in_list:
            return [pooling.arrange(view[None], None, size) for view, size in zip(tokens, clip.sizes)]
        return [pooling.arrange(tokens, self.image_newline, clip.sizes[0])]

    def encode_media(self, mm_encoder_outputs: dict | None = None, **media) -> dict[str, PPLlavaVisualFeatures]:
        """`mm_encoder_outputs` and :meth:`get_media_features` of the arguments `media` in one."""
        outputs = {kind: x for kind, x in (mm_encoder_outputs or {}).items() if x is not None}
        given = {name: value for name, value in media.items() if value is not None}
        for kind, names in MEDIA.items():
            for name in given.keys() & names if kind in outputs else ():
                raise ValueError(
                    f"{name} and mm_encoder_outputs[{kind!r}] are the same {kind}s twice; pass one of them"
                )
        if has_media(given):
            return {**outputs, **self.get_media_features(**given)}
        if not outputs and "guide_input_ids" in given:
            raise ValueError(
                f"guide_input_ids has {len(given['guide_input_ids'])} rows, but no pixel_values or pixel_values_videos "
                "came with it; leave it out for a prompt without image or video"
            )
        return outputs


def has_media(given: dict, kinds: Iterable[str] = MODALITIES) -> bool:
    """Whether these arguments of :meth:`VisualFeatures.get_media_features` hold images or videos."""
    return any(given.get(name) is not None for kind in kinds for name in MEDIA[kind])


def _by_place(chunks: Iterable[tuple[list[list[int]], Tensor]], frames: int) -> list[tuple[Tensor, int]]:
    found = {place: (part, n) for places, part in chunks for n, where in enumerate(places) for place in where}
    return [found[place] for place in range(frames)]


__all__ = ["MEDIA", "MODALITIES", "PPLlavaVisualFeatures", "VisualFeatures", "has_media"]
