"""The model: transformers' towers and language model around one call of `prompt_guided_pool3d` per window size."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from . import original
from .btadapter import BTAdapterVisionModel
from .configuration_ppllava import PPLlavaConfig
from .guide import PPLlavaGuide
from .loading import StrictLoading
from .media import Clip, pack_images, pack_videos
from .projector import PPLlavaProjector
from .stretch import stretch_position_embedding, stretch_text_model

MODALITIES = ("image", "video")
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass
class PPLlavaVisualFeatures(BaseModelOutputWithPooling):
    """What the language model sees of each image or video, and why.

    pooler_output  one [tokens, D] per image or video. Of a video: frames, then rows, then columns. Of an image: the
                   base view, then the grid of views line by line without padding, `image_newline` after each line
    relevance      one float32 [T, H, W] per group of images or video, sums to 1: how relevant each patch is to the
                   question. T are the frames; the views of an image; the images of a list. None without guidance
    """

    relevance: tuple[Tensor, ...] | None = None


class PPLlavaPreTrainedModel(StrictLoading, PreTrainedModel):
    config_class = PPLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # exp(4.6052) in bfloat16 is 99: one per cent in every exponent of the relevance.
    _keep_in_fp32_modules_strict = ["logit_scale"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PPLlavaGuide):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if self.config.siglip:
                init.normal_(module.head.probe)
                init.xavier_uniform_(module.head.attention.in_proj_weight)
                init.zeros_(module.head.attention.in_proj_bias)
            else:
                # As CLIP initialises its projections.
                init.normal_(module.visual_projection.weight, std=self.config.vision_config.hidden_size**-0.5)
                init.normal_(module.text_projection.weight, std=self.config.guide_config.hidden_size**-0.5)
        elif isinstance(module, PPLlavaModel):
            init.normal_(module.image_newline, std=self.config.token_width**-0.5)


class PPLlavaModel(PPLlavaPreTrainedModel):
    """The towers, the projector and the language model; its output is that of the language model without its head."""

    def __init__(self, config: PPLlavaConfig) -> None:
        super().__init__(config)
        self.vision_tower = _vision_tower(config)
        self.guide = PPLlavaGuide(config)
        self.multi_modal_projector = PPLlavaProjector(config)
        self.image_newline = nn.Parameter(torch.zeros(config.token_width))
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        if (width := self.get_input_embeddings().embedding_dim) != config.token_width:
            raise ValueError(
                f"text_config must embed tokens in its hidden_size {config.token_width}, got {width} from "
                f"{type(self.language_model).__name__}; use another language model"
            )
        self._language_model_arguments = frozenset(inspect.signature(self.language_model.forward).parameters)
        # Of the original's format: what no output depends on.
        self._keys_to_ignore_on_load_unexpected = original.unused_keys(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def encode_frames(self, pixel_values: Tensor, frames: list[int]) -> Tensor:
        """pixel_values [F, 3, S, S] -> patches of `vision_feature_layer` [F, H, W, V], without class token.

        frames are those of each clip, which a BT-Adapter mixes and the other towers do not.
        """
        chunk = self.config.vision_chunk
        if isinstance(self.vision_tower, BTAdapterVisionModel):
            hidden = self.vision_tower(pixel_values, frames=frames, chunk=chunk).last_hidden_state
        else:
            chunks = pixel_values.split(chunk or len(pixel_values))
            hidden = torch.cat([self.vision_tower(part).last_hidden_state for part in chunks])  # [F, 1 + H * W, V]
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
        if pixel_values_videos is not None:
            packed, videos = pack_videos(pixel_values_videos, video_frames, pooling)
            pixels.append(packed)
            clips += videos
        text_embeds = self._embed_guides(clips, groups, guide_input_ids, guide_attention_mask)
        frames = torch.cat(pixels) if len(pixels) > 1 else pixels[0]  # [F, 3, S, S]
        features = self.encode_frames(frames, [n for clip in clips for n in clip.tower_frames])  # [F, H, W, V]
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
        pixel_values_videos: Tensor,
        video_frames: Tensor | None = None,
        guide_input_ids: Tensor | None = None,
        guide_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> PPLlavaVisualFeatures:
        """The videos of :meth:`get_media_features`."""
        return self.get_media_features(
            pixel_values_videos=pixel_values_videos,
            video_frames=video_frames,
            guide_input_ids=guide_input_ids,
            guide_attention_mask=guide_attention_mask,
        )["video"]

    def _embed_guides(self, clips: list[Clip], groups: int, ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """text_embeds [G + B, C]; None where nothing is guided."""
        if self.config.pooling != "prompt_guided":
            return None
        if ids is None:
            raise ValueError(
                f"guide_input_ids must be given with {' and '.join(self._pixel_names(clips, groups))}, got None; "
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

    @staticmethod
    def _pixel_names(clips: list[Clip], groups: int) -> list[str]:
        return [PIXELS[kind] for kind, n in zip(MODALITIES, (groups, len(clips) - groups)) if n]

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
        for kind in MODALITIES:
            if PIXELS[kind] in given and kind in outputs:
                raise ValueError(
                    f"{PIXELS[kind]} and mm_encoder_outputs[{kind!r}] are the same {kind}s twice; pass one of them"
                )
        if any(PIXELS[kind] in given for kind in MODALITIES):
            return {**outputs, **self.get_media_features(**given)}
        if not outputs and "guide_input_ids" in given:
            raise ValueError(
                f"guide_input_ids has {len(given['guide_input_ids'])} rows, but no pixel_values or pixel_values_videos "
                "came with it; leave it out for a prompt without image or video"
            )
        return outputs

    def embed(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **media,
    ) -> Tensor:
        """inputs_embeds [N, S, D] with images and videos at their placeholders. Args: as :meth:`forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {got}; pass one of them")
        outputs = self.encode_media(mm_encoder_outputs, **media)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # [N, S, D]
        merged = inputs_embeds
        for kind in MODALITIES:
            if kind in outputs:
                merged = self._merge(kind, input_ids, inputs_embeds, merged, outputs[kind].pooler_output)
            elif input_ids is not None and input_ids.shape[1] > 1:
                self._check_no_placeholders(kind, input_ids, past_key_values)
        self._check_length(merged, past_key_values, outputs)
        return merged

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_views: Tensor | None = None,
        image_groups: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_frames: Tensor | None = None,
        guide_input_ids: Tensor | None = None,
        guide_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The output of the language model without its head, its placeholders replaced by images and videos.

        Args: as :meth:`get_media_features` and any causal LM of transformers; `mm_encoder_outputs`, the result of
            `get_media_features`, takes the place of pixels.
        """
        inputs_embeds = self.embed(
            input_ids,
            inputs_embeds,
            past_key_values,
            mm_encoder_outputs,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            image_views=image_views,
            image_groups=image_groups,
            pixel_values_videos=pixel_values_videos,
            video_frames=video_frames,
            guide_input_ids=guide_input_ids,
            guide_attention_mask=guide_attention_mask,
        )
        return self.language_model.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **self.positions(position_ids, attention_mask, past_key_values),
            **kwargs,
        )

    def positions(self, position_ids: Tensor | None, attention_mask: Tensor | None, past: Cache | None) -> dict:
        """position_ids [N, S] as an argument of the language model, counted from the first token of each prompt where
        they are not given: with padding on the left, learned positions would count the padding."""
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2 and not _length(past):
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        known = position_ids is not None and "position_ids" in self._language_model_arguments
        return {"position_ids": position_ids} if known else {}

    def _merge(
        self, kind: str, input_ids: Tensor | None, inputs_embeds: Tensor, merged: Tensor, media: tuple[Tensor, ...]
    ) -> Tensor:
        """`merged` [N, S, D] with the rows of `media` at the placeholders of inputs_embeds [N, S, D], in order."""
        token = getattr(self.config, f"{kind}_token_id")
        if input_ids is not None:
            mask = input_ids == token  # [N, S]
        else:
            placeholder = torch.tensor(token, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)  # [N, S]
        features = torch.cat(tuple(media)).to(merged.device, merged.dtype)  # [tokens, D]
        if not torch.compiler.is_compiling() and (found := int(mask.sum())) != len(features):
            # Prompt lookup appends a piece of the prompt to it, placeholders included.
            copied = f"with generate's prompt_lookup_num_tokens, which copies <{kind}>, pass suppress_tokens=[{token}]"
            raise ValueError(
                f"input_ids must hold one <{kind}> token (id {token}) for each visual token, {len(features)} for the "
                f"{len(media)} {kind}s, got {found}; let PPLlavaProcessor expand the prompt, and "
                f"{copied if found > len(features) else 'do not truncate it'}"
            )
        return merged.masked_scatter(mask.unsqueeze(-1), features)

    def _check_no_placeholders(self, kind: str, input_ids: Tensor, past_key_values: Cache | None) -> None:
        """A prompt without media has no placeholders; what the model itself generates after it may be anything."""
        if torch.compiler.is_compiling() or _length(past_key_values):
            return
        if found := int((input_ids == getattr(self.config, f"{kind}_token_id")).sum()):
            raise ValueError(
                f"input_ids holds {found} <{kind}> tokens, but no {kind} came with them; pass {PIXELS[kind]}"
            )

    def _check_length(self, inputs_embeds: Tensor, past: Cache | None, outputs: dict) -> None:
        """Past its context a language model answers nonsense or fails in the middle."""
        limit = self.config.context_length
        if limit is None or torch.compiler.is_compiling() or _length(past):
            return
        if (length := inputs_embeds.shape[1]) > limit:
            visual = sum(len(x) for output in outputs.values() for x in output.pooler_output)
            raise ValueError(
                f"a prompt must fit into the {limit} positions of the language model, got {length} tokens, {visual} of "
                "all prompts visual; sample fewer frames, set pooling_output_size, or shorten the text"
            )


class PPLlavaForConditionalGeneration(PPLlavaPreTrainedModel, GenerationMixin):
    """PPLLaVA with the head of its language model: `forward` for training, `generate` for answers."""

    def __init__(self, config: PPLlavaConfig) -> None:
        super().__init__(config)
        self.model = PPLlavaModel(config)
        self._keys_to_ignore_on_load_unexpected = self.model._keys_to_ignore_on_load_unexpected
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.language_model.set_output_embeddings(value)

    def get_media_features(self, *args, **kwargs) -> dict[str, PPLlavaVisualFeatures]:
        """As :meth:`PPLlavaModel.get_media_features`."""
        return self.model.get_media_features(*args, **kwargs)

    def get_image_features(self, *args, **kwargs) -> PPLlavaVisualFeatures:
        """As :meth:`PPLlavaModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def get_video_features(self, *args, **kwargs) -> PPLlavaVisualFeatures:
        """As :meth:`PPLlavaModel.get_video_features`."""
        return self.model.get_video_features(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args, **kwargs):
        """As in transformers; images and videos are encoded before, in one pass of the vision tower."""
        if any(kwargs.get(name) is not None for name in PIXELS.values()):
            names = inspect.signature(self.model.get_media_features).parameters
            media = {name: kwargs.pop(name) for name in ("mm_encoder_outputs", *names) if name in kwargs}
            self._check_chunks(*args[1:2], **kwargs)
            kwargs["mm_encoder_outputs"] = self.model.encode_media(**media)
        return super().generate(*args, **kwargs)

    @staticmethod
    def _check_chunks(generation_config=None, prefill_chunk_size: int | None = None, **kwargs) -> None:
        """Before 5.23, transformers forgets what was encoded in all chunks but the first."""
        size = prefill_chunk_size or getattr(generation_config, "prefill_chunk_size", None)
        if size and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
            raise ValueError(
                f"prefill_chunk_size with images or videos needs transformers 5.23, got {transformers.__version__}; "
                "leave it out, or upgrade"
            )

    # generate() sorts its arguments by the names in this signature.
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_views: Tensor | None = None,
        image_groups: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_frames: Tensor | None = None,
        guide_input_ids: Tensor | None = None,
        guide_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given: the output of the language model.

        Args:
            input_ids: int [N, S]; each image and video is as many `<image>` or `<video>` tokens as it has visual
            tokens. pixel_values, image_sizes, image_views, image_groups: the images of all prompts in order;
            pixel_values_videos, video_frames: and the videos;
            guide_input_ids, guide_attention_mask: and the questions, as in :meth:`PPLlavaModel.get_media_features`.
            attention_mask: int [N, S].
            labels: int [N, S], -100 where nothing is to be learned.
            logits_to_keep: compute logits for the last so many positions only; 0 is all of them.

        Raises:
            ValueError: where placeholders, media and questions do not match, or the prompt is longer than the context
                of the language model; the message has the numbers.
        """
        inputs_embeds = self.model.embed(
            input_ids,
            inputs_embeds,
            past_key_values,
            mm_encoder_outputs,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            image_views=image_views,
            image_groups=image_groups,
            pixel_values_videos=pixel_values_videos,
            video_frames=video_frames,
            guide_input_ids=guide_input_ids,
            guide_attention_mask=guide_attention_mask,
        )
        keeps = "logits_to_keep" in self.model._language_model_arguments
        return self.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            **self.model.positions(position_ids, attention_mask, past_key_values),
            **({"logits_to_keep": logits_to_keep} if keeps else {}),
            **kwargs,
        )


def _vision_tower(config: PPLlavaConfig) -> PreTrainedModel:
    """The tower up to `vision_feature_layer`: what lies above would be computed for nothing. It has no weights here."""
    tower = AutoModel.from_config(config.vision_config)
    if isinstance(tower, BTAdapterVisionModel):
        tower.truncate(config.vision_layers)
    else:
        del tower.encoder.layers[config.vision_layers :]
    if config.siglip and tower.use_head:
        tower.use_head = False
        del tower.head
    tower.post_layernorm = nn.Identity()  # so that last_hidden_state is the hidden state; the guide has the norm
    return tower


def _length(cache: Cache | None) -> int:
    return 0 if cache is None else cache.get_seq_length()


__all__ = [
    "PPLlavaForConditionalGeneration",
    "PPLlavaModel",
    "PPLlavaPreTrainedModel",
    "PPLlavaVisualFeatures",
    "stretch_position_embedding",
    "stretch_text_model",
]
