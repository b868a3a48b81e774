"""The model: transformers' CLIP towers and language model around one call of `prompt_guided_pool3d`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ppllava_kernels import pooled_size, prompt_guided_pool3d

from .configuration_ppllava import PPLlavaConfig
from .stretch import stretch_position_embedding, stretch_text_model


@dataclass
class PPLlavaVideoFeatures(BaseModelOutputWithPooling):
    """What the language model sees of each video, and why.

    pooler_output  one [tokens, D] per video: frames, then rows, then columns
    relevance      one float32 [T, H, W] per video, sums to 1: how relevant each patch is to the question
    """

    relevance: tuple[Tensor, ...] | None = None


class PPLlavaPreTrainedModel(PreTrainedModel):
    config_class = PPLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("video", "text")
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
        if isinstance(module, PPLlavaModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            # As CLIP initialises its projections.
            init.normal_(module.visual_projection.weight, std=self.config.vision_config.hidden_size**-0.5)
            init.normal_(module.text_projection.weight, std=self.config.guide_config.hidden_size**-0.5)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """As in transformers, but strict: a parameter that the weights lack would be random, and only be logged.

        Args: as in transformers; `ignore_mismatched_sizes=True` makes parameters of another shape random ones.

        Raises:
            ValueError: where the weights are not exactly those of the model; the message names them.
        """
        # True, or transformers would raise before the missing and unexpected keys are known.
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        mismatched = () if ignore_mismatched_sizes else info["mismatched_keys"]
        shapes = [f"{name} {list(got)} instead of {list(expected)}" for name, got, expected in mismatched]
        found = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "mis-shaped": shapes}
        if wrong := "; ".join(f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in found.items() if keys):
            remedy = ", or pass ignore_mismatched_sizes=True to make the mis-shaped ones random" if shapes else ""
            raise ValueError(
                f"the weights in {str(pretrained_model_name_or_path)!r} must be exactly those of {cls.__name__} with "
                f"its config.json, got {wrong}; load a folder as save_pretrained wrote it{remedy}"
            )
        return (model, info) if output_loading_info else model


class PPLlavaProjector(nn.Module):
    """LLaVA's projector with the prompt-guided pooling between its two layers."""

    def __init__(self, config: PPLlavaConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.config = config
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)

    def forward(
        self,
        features: Tensor,  # [F, H, W, V]
        image_embeds: Tensor,  # [F, H, W, C]
        text_embeds: Tensor,  # [B, C]
        logit_scale: Tensor,  # []
        cu_frames: Tensor,  # [B+1]
    ) -> tuple[Tensor, Tensor]:
        """(tokens [sum of the tokens of all videos, D], relevance [F, H, W])."""
        # The weights of a window sum to one, so pooling commutes with the linear second layer: pooled first, it runs on
        # 18 times fewer rows. Exact up to rounding, and 4 times fewer FLOPs for the whole projector.
        pooled, relevance = prompt_guided_pool3d(
            self.act(self.linear_1(features)),  # [F, H, W, D]
            image_embeds,
            text_embeds,
            logit_scale=logit_scale,
            temperature=self.config.pooling_temperature,
            return_relevance=True,
            cu_frames=cu_frames,
            **self.config.pooling,
        )
        return self.linear_2(pooled.flatten(0, -2)), relevance


class PPLlavaModel(PPLlavaPreTrainedModel):
    """The towers, the projector and the language model without its head."""

    # The head in a checkpoint of PPLlavaForConditionalGeneration.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]  # noqa: RUF012

    def __init__(self, config: PPLlavaConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        # Layers above vision_feature_layer would be computed for nothing. They have no weights here: a conversion drops
        # theirs. post_layernorm stays, the guide uses it.
        del self.vision_tower.encoder.layers[config.vision_layers :]
        self.guide_tower = AutoModel.from_config(config.guide_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.guide_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.multi_modal_projector = PPLlavaProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def encode_frames(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [F, 3, S, S] -> patches of `vision_feature_layer` [F, H, W, V], the class token dropped."""
        chunks = pixel_values.split(self.config.vision_chunk or len(pixel_values))
        patches = torch.cat([self.vision_tower(chunk).last_hidden_state[:, 1:] for chunk in chunks])
        return patches.unflatten(1, self.config.patch_grid)

    def encode_guide(self, guide_input_ids: Tensor, guide_attention_mask: Tensor | None = None) -> Tensor:
        """ids and mask [B, L] of the questions -> text_embeds [B, C], not normalised."""
        limit = self.config.guide_config.max_position_embeddings
        if guide_input_ids.shape[1] > limit:
            raise ValueError(
                f"guide_input_ids must have at most the {limit} positions of the guide, got "
                f"{guide_input_ids.shape[1]}; let PPLlavaProcessor truncate the question"
            )
        if guide_attention_mask is not None and guide_attention_mask.shape != guide_input_ids.shape:
            raise ValueError(
                f"guide_attention_mask must have the shape of guide_input_ids, {list(guide_input_ids.shape)}, got "
                f"{list(guide_attention_mask.shape)}; pass both as PPLlavaProcessor makes them"
            )
        pooled = self.guide_tower(guide_input_ids, attention_mask=guide_attention_mask).pooler_output
        return self.text_projection(pooled)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        video_frames: Tensor | None = None,
        guide_input_ids: Tensor | None = None,
        guide_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> PPLlavaVideoFeatures:
        """Encode B videos and compress each under the guidance of its question: one vision pass, one ragged op call.

        Args:
            pixel_values_videos: [F, 3, S, S], the frames of all videos packed, with `video_frames`; or [B, T, 3, S, S],
                which `torch.compile(fullgraph=True)` can trace, too.
            video_frames: int [B], the frames of each packed video.
            guide_input_ids: int [B, L], the question about each video in the guide's vocabulary, at most 248 tokens.
            guide_attention_mask: int [B, L].

        Returns:
            :class:`PPLlavaVideoFeatures`.

        Raises:
            ValueError: for shapes that do not fit together.
            TypeError: for pixel values that are not floating point.
        """
        pixel_values, frames = _pack(pixel_values_videos, video_frames)
        if guide_input_ids is None:
            raise ValueError(
                "guide_input_ids must be given with pixel_values_videos, got None; PPLlavaProcessor makes them from "
                "the user's question"
            )
        if len(guide_input_ids) != len(frames):
            raise ValueError(
                f"guide_input_ids must have one row for each of the {len(frames)} videos, got {len(guide_input_ids)}; "
                "repeat the question of a prompt for each of its videos, and leave out prompts without one"
            )
        grid = self.config.patch_grid
        tokens = [math.prod(pooled_size((t, *grid), **self.config.pooling)) for t in frames]
        features = self.encode_frames(pixel_values)  # [F, H, W, V]
        # On the CPU, where the op reads it without a synchronisation.
        cu_frames = torch.tensor([0, *accumulate(frames)], dtype=torch.int32, device="cpu")  # [B+1]
        scale_dtype = torch.promote_types(self.logit_scale.dtype, torch.float32)
        pooled, relevance = self.multi_modal_projector(
            features,
            self.visual_projection(self.vision_tower.post_layernorm(features)),
            self.encode_guide(guide_input_ids, guide_attention_mask),
            self.logit_scale.to(scale_dtype).exp(),
            cu_frames,
        )
        return PPLlavaVideoFeatures(pooler_output=pooled.split(tokens), relevance=relevance.split(frames))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
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
        """The output of the language model, its `<video>` tokens replaced by the videos.

        Args: as :meth:`get_video_features` and any causal LM of transformers; `mm_encoder_outputs={"video": ...}` takes
            the result of `get_video_features` in place of pixels, which is what `generate` does.
        """
        if pixel_values is not None:
            raise ValueError("pixel_values are images, only videos are supported; pass frames as pixel_values_videos")
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {got}; pass one of them")
        video = (mm_encoder_outputs or {}).get("video")
        if pixel_values_videos is not None:
            if video is not None:
                raise ValueError(
                    "pixel_values_videos and mm_encoder_outputs['video'] are the same videos twice; pass one of them"
                )
            video = self.get_video_features(
                pixel_values_videos, video_frames, guide_input_ids, guide_attention_mask, return_dict=True
            )
        elif video is None and guide_input_ids is not None:
            raise ValueError(
                f"guide_input_ids has {len(guide_input_ids)} rows, but no pixel_values_videos came with it; "
                "leave it out for a prompt without a video"
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # [N, S, D]
        if video is not None:
            inputs_embeds = self._merge(input_ids, inputs_embeds, video.pooler_output)
        elif input_ids is not None and input_ids.shape[1] > 1:
            self._check_no_placeholders(input_ids, past_key_values)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def _merge(self, input_ids: Tensor | None, inputs_embeds: Tensor, videos: tuple[Tensor, ...]) -> Tensor:
        """inputs_embeds [N, S, D] with the rows of `videos` at the placeholders, in order."""
        token = self.config.video_token_id
        if input_ids is not None:
            mask = input_ids == token  # [N, S]
        else:
            placeholder = torch.tensor(token, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)  # [N, S]
        features = torch.cat(tuple(videos)).to(inputs_embeds.device, inputs_embeds.dtype)  # [tokens, D]
        if not torch.compiler.is_compiling() and (found := int(mask.sum())) != len(features):
            # Prompt lookup appends a piece of the prompt to it, placeholders included.
            copied = f"with generate's prompt_lookup_num_tokens, which copies <video>, pass suppress_tokens=[{token}]"
            raise ValueError(
                f"input_ids must hold one <video> token (id {token}) for each visual token, {len(features)} for the "
                f"{len(videos)} videos, got {found}; let PPLlavaProcessor expand the prompt, and "
                f"{copied if found > len(features) else 'do not truncate it'}"
            )
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), features)

    def _check_no_placeholders(self, input_ids: Tensor, past_key_values: Cache | None) -> None:
        """A prompt without videos has no placeholders; what the model itself generates after it may be anything."""
        if torch.compiler.is_compiling() or (past_key_values is not None and past_key_values.get_seq_length() > 0):
            return
        if found := int((input_ids == self.config.video_token_id).sum()):
            raise ValueError(
                f"input_ids holds {found} <video> tokens, but no video came with them; pass pixel_values_videos "
                "(generate's prefill_chunk_size loses them before transformers 5.23)"
            )


class PPLlavaForConditionalGeneration(PPLlavaPreTrainedModel, GenerationMixin):
    """PPLLaVA with its language model head: `forward` for training, `generate` for answers."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PPLlavaConfig) -> None:
        super().__init__(config)
        self.model = PPLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        video_frames: Tensor | None = None,
        guide_input_ids: Tensor | None = None,
        guide_attention_mask: Tensor | None = None,
        **kwargs,
    ) -> PPLlavaVideoFeatures:
        """As :meth:`PPLlavaModel.get_video_features`; further inputs of `forward` are ignored."""
        return self.model.get_video_features(
            pixel_values_videos, video_frames, guide_input_ids, guide_attention_mask, **kwargs
        )

    # generate() sorts its arguments by the names in this signature and in that of get_video_features.
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
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
        """Logits, and the loss where labels are given.

        Args:
            input_ids: int [N, S]; each video is as many `<video>` tokens as it has visual tokens.
            pixel_values: images are not supported.
            pixel_values_videos, video_frames, guide_input_ids, guide_attention_mask: the B videos of all prompts in
                order, as in :meth:`PPLlavaModel.get_video_features`.
            attention_mask: int [N, S].
            labels: int [N, S], -100 where nothing is to be learned.
            logits_to_keep: compute logits for the last so many positions only; 0 is all of them.

        Raises:
            ValueError: where placeholders, videos and questions do not match; the message has the numbers.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            video_frames=video_frames,
            guide_input_ids=guide_input_ids,
            guide_attention_mask=guide_attention_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])  # [N, S, vocabulary]
        loss = None
        if labels is not None:
            vocabulary = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _first(keys: Iterable[str], limit: int = 10) -> str:
    """The first keys in order, and how many more there are."""
    names = sorted(keys)
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _pack(pixel_values_videos: Tensor, video_frames: Tensor | None) -> tuple[Tensor, list[int]]:
    """(pixel_values [F, 3, S, S], frames of each video) for packed frames as well as for [B, T, 3, S, S]."""
    if not pixel_values_videos.is_floating_point():
        raise TypeError(
            f"pixel_values_videos must be floating point, normalised as the vision tower wants it, got "
            f"{pixel_values_videos.dtype}; let PPLlavaProcessor make it from the frames"
        )
    shape = list(pixel_values_videos.shape)
    if video_frames is None:
        if len(shape) != 5:
            raise ValueError(
                f"pixel_values_videos must be [B, T, 3, S, S] where video_frames is None, got shape {shape}; "
                "pass the number of frames of each video to pack videos as [F, 3, S, S]"
            )
        return pixel_values_videos.flatten(0, 1), [shape[1]] * shape[0]
    frames = torch.as_tensor(video_frames).tolist()
    if len(shape) != 4 or sum(frames) != shape[0] or min(frames, default=0) < 1:
        raise ValueError(
            f"pixel_values_videos must be [F, 3, S, S] with F = {sum(frames)}, the sum of video_frames, each at least "
            f"1, got shape {shape} and video_frames {frames}; concatenate the frames of all videos"
        )
    return pixel_values_videos, frames


__all__ = [
    "PPLlavaForConditionalGeneration",
    "PPLlavaModel",
    "PPLlavaPreTrainedModel",
    "PPLlavaProjector",
    "PPLlavaVideoFeatures",
    "stretch_position_embedding",
    "stretch_text_model",
]
