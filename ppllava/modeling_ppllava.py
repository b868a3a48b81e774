"""The model: transformers' towers and language model around one call of `prompt_guided_project` per window size."""

from __future__ import annotations

import inspect
from itertools import accumulate

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from . import original
from .btadapter import BTAdapterVisionModel
from .compat import cache_name, can_return_tuple, init
from .configuration_ppllava import PPLlavaConfig
from .guide import PPLlavaGuide
from .loading import StrictLoading
from .projector import PPLlavaProjector
from .visual_features import MEDIA, MODALITIES, PPLlavaVisualFeatures, VisualFeatures, has_media

RELATIVE = ("bloom", "mpt")  # without position_ids, since nothing depends on where a prompt starts


class PPLlavaPreTrainedModel(StrictLoading, PreTrainedModel):
    config_class = PPLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
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


class PPLlavaModel(VisualFeatures, PPLlavaPreTrainedModel):
    """The towers, the projector and the language model; its output is that of the language model without its head."""

    def __init__(self, config: PPLlavaConfig) -> None:
        super().__init__(config)
        self.vision_tower = _vision_tower(config)
        self.guide = PPLlavaGuide(config)
        self.multi_modal_projector = PPLlavaProjector(config)
        self.image_newline = nn.Parameter(torch.zeros(config.token_width))
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        if (width := self.get_input_embeddings().embedding_dim) != config.token_width:
            raise ValueError(
                f"text_config must embed tokens in its hidden_size {config.token_width}, got {width} from "
                f"{type(self.language_model).__name__}; use another language model"
            )
        self._language_model_arguments = frozenset(inspect.signature(self.language_model.forward).parameters)
        models = (self.language_model, self.language_model.base_model)
        self._cache_name, self._base_cache_name = (cache_name(model.forward) for model in models)
        self._counts_padding = config.text_config.model_type not in RELATIVE
        # Of the original's format: what no output depends on.
        self._keys_to_ignore_on_load_unexpected = original.unused_keys(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def embed(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **media,
    ) -> Tensor:
        """inputs_embeds [N, S, D] with images and videos at their placeholders. Args: as :meth:`forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {got}; pass one of them")
        self.check_length(input_ids, inputs_embeds)
        outputs = self.encode_media(mm_encoder_outputs, **media)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # [N, S, D]
        merged = inputs_embeds
        for kind in MODALITIES:
            if kind in outputs:
                merged = self._merge(kind, input_ids, inputs_embeds, merged, outputs[kind].pooler_output)
                if has_media(media, [kind]) and input_ids is not None:
                    self.check_rows(kind, input_ids, outputs[kind].pooler_output)
            elif input_ids is not None and input_ids.shape[1] > 1:
                self._check_no_placeholders(kind, input_ids, cache)
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
        video_features: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The output of the language model without its head, its placeholders replaced by images and videos.

        Args: as :meth:`get_media_features` and any causal LM of transformers; `mm_encoder_outputs`, the result of
            `get_media_features`, takes the place of pixels; `cache` and `past_key_values` are two names of one thing.
        """
        cache = one_cache(past_key_values, cache)
        inputs_embeds = self.embed(
            input_ids,
            inputs_embeds,
            cache,
            mm_encoder_outputs,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            image_views=image_views,
            image_groups=image_groups,
            pixel_values_videos=pixel_values_videos,
            video_features=video_features,
            video_frames=video_frames,
            guide_input_ids=guide_input_ids,
            guide_attention_mask=guide_attention_mask,
        )
        return self.language_model.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **{self._base_cache_name: cache},
            **self.positions(position_ids, attention_mask, cache, inputs_embeds.shape[1]),
            **kwargs,
        )

    def positions(
        self, position_ids: Tensor | None, attention_mask: Tensor | None, past: Cache | None, length: int
    ) -> dict[str, Tensor]:
        """position_ids [N, S] as an argument of the language model, for S = length tokens after those in the cache:
        counted from the first token of each prompt where they are not given, or padding on the left would be counted.

        Raises:
            ValueError: for padding on the left where the language model counts it and takes no positions.
        """
        takes = "position_ids" in self._language_model_arguments
        if position_ids is None and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            if takes:
                start = _length(past)  # the mask of a static cache may be as long as the cache
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start : start + length]
            elif self._counts_padding and not torch.compiler.is_compiling() and not attention_mask[:, 0].all():
                raise ValueError(
                    f"attention_mask must have no padding on the left for {type(self.language_model).__name__}, which "
                    "takes no position_ids, got some; pass prompts one by one"
                )
        return {"position_ids": position_ids} if takes and position_ids is not None else {}

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

    def check_rows(self, kind: str, input_ids: Tensor, media: tuple[Tensor, ...]) -> None:
        """Each image or video lies in one prompt: none starts in one and ends in the next."""
        if torch.compiler.is_compiling():
            return
        counts = (input_ids == getattr(self.config, f"{kind}_token_id")).sum(1).tolist()  # [N]
        ends = {0, *accumulate(len(x) for x in media)}
        if not ends.issuperset(accumulate(counts)):
            raise ValueError(
                f"input_ids must hold all <{kind}> tokens of each {kind} in one prompt, got {counts} in the prompts "
                f"for {kind}s of {[len(x) for x in media]} tokens; let PPLlavaProcessor expand the prompts"
            )

    def _check_no_placeholders(self, kind: str, input_ids: Tensor, cache: Cache | None) -> None:
        """A prompt without media has no placeholders; what the model itself generates after it may be anything."""
        if torch.compiler.is_compiling() or _length(cache):
            return
        if found := int((input_ids == getattr(self.config, f"{kind}_token_id")).sum()):
            raise ValueError(
                f"input_ids holds {found} <{kind}> tokens, but no {kind} came with them; pass {MEDIA[kind][0]}"
            )

    def check_length(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
        """A ValueError for prompts past the context: the answer would be nonsense, or fail half-way."""
        prompts, limit = inputs_embeds if input_ids is None else input_ids, self.config.context_length
        if prompts is None or limit is None or torch.compiler.is_compiling() or prompts.shape[1] <= limit:
            return
        tokens = (self.config.image_token_id, self.config.video_token_id)
        visual = None if input_ids is None else max(sum((row == token).sum() for token in tokens) for row in input_ids)
        raise ValueError(
            f"a prompt must fit into the {limit} positions of the language model, got {prompts.shape[1]} tokens"
            f"{'' if visual is None else f', up to {visual} of them visual'}; sample fewer frames, set "
            "pooling_output_size, or shorten the text"
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
        names = ("mm_encoder_outputs", *inspect.signature(self.model.get_media_features).parameters)
        if kwargs.get("mm_encoder_outputs") is not None or has_media(kwargs):
            self._check_chunks(*args[1:2], **kwargs)
            if isinstance(kwargs.get("assistant_model"), PPLlavaPreTrainedModel):
                raise ValueError(
                    "assistant_model must be a language model, got a PPLLaVA, which would not see the images and "
                    "videos; pass its model.language_model"
                )
            self.model.check_length(kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            outputs = self.model.encode_media(**{name: kwargs.pop(name) for name in names if name in kwargs})
            if kwargs.get("input_ids") is not None:
                for kind, output in outputs.items():
                    self.model.check_rows(kind, kwargs["input_ids"], output.pooler_output)
            # Copies: for beams, transformers repeats what is in them.
            kwargs["mm_encoder_outputs"] = {kind: type(output)(**output) for kind, output in outputs.items()}
        return super().generate(*args, **kwargs)

    def _check_chunks(self, generation_config=None, prefill_chunk_size: int | None = None, **kwargs) -> None:
        """Before 5.23, transformers forgets what was encoded in all chunks but the first."""
        given = prefill_chunk_size or (generation_config or self.generation_config).prefill_chunk_size
        if given and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
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
        video_features: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given: the output of the language model.

        Args:
            input_ids: int [N, S]; each image and video is as many `<image>` or `<video>` tokens as it has visual ones.
            pixel_values, image_sizes, image_views, image_groups: the images of all prompts in order;
            pixel_values_videos or video_features, video_frames: and the videos;
            guide_input_ids, guide_attention_mask: and the questions, as in :meth:`PPLlavaModel.get_media_features`.
            attention_mask: int [N, S].
            cache, past_key_values: two names of one thing, of transformers since 5.24 and before.
            labels: int [N, S], -100 where nothing is to be learned.
            logits_to_keep: compute logits for the last so many positions only; 0 is all of them.

        Raises:
            ValueError: where placeholders, media and questions do not match, or the prompt is longer than the context
                of the language model; the message has the numbers.
        """
        cache = one_cache(past_key_values, cache)
        inputs_embeds = self.model.embed(
            input_ids,
            inputs_embeds,
            cache,
            mm_encoder_outputs,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            image_views=image_views,
            image_groups=image_groups,
            pixel_values_videos=pixel_values_videos,
            video_features=video_features,
            video_frames=video_frames,
            guide_input_ids=guide_input_ids,
            guide_attention_mask=guide_attention_mask,
        )
        keeps = "logits_to_keep" in self.model._language_model_arguments
        return self.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            labels=labels,
            use_cache=use_cache,
            **{self.model._cache_name: cache},
            **self.model.positions(position_ids, attention_mask, cache, inputs_embeds.shape[1]),
            **({"logits_to_keep": logits_to_keep} if keeps else {}),
            **kwargs,
        )


def _vision_tower(config: PPLlavaConfig) -> PreTrainedModel:
    """The tower up to `vision_feature_layer`: what lies above would be computed for nothing. It has no weights here."""
    tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
    if isinstance(tower, BTAdapterVisionModel):
        tower.truncate(config.vision_layers)
    else:
        del tower.encoder.layers[config.vision_layers :]
    if config.siglip and tower.use_head:
        tower.use_head = False
        del tower.head
    tower.post_layernorm = nn.Identity()  # so that last_hidden_state is the hidden state; the guide has the norm
    return tower


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, whichever name it came by."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache must be one cache, got two; pass it as cache alone")
    return past_key_values if cache is None else cache


def _length(cache: Cache | None) -> int:
    return 0 if cache is None else cache.get_seq_length()


__all__ = [
    "PPLlavaForConditionalGeneration",
    "PPLlavaModel",
    "PPLlavaPreTrainedModel",
    "PPLlavaVisualFeatures",
]
