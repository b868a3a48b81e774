"""The configuration: a vision tower, the text tower that guides it, a language model, the windows."""

import re
from collections.abc import Sequence

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from ppllava_kernels.shapes import triple

from . import (
    btadapter,  # registers its vision tower with the Auto classes
    original,
)
from .compat import ComposedConfig, SubConfigSpec
from .pooling import SIZES, VisualPooling
from .sizes import check_sizes

# The text tower that belongs to each vision tower.
GUIDES = {
    "clip_vision_model": "clip_text_model",
    btadapter.BTAdapterVisionConfig.model_type: "clip_text_model",
    "siglip_vision_model": "siglip_text_model",
}


@strict
class PPLlavaConfig(ComposedConfig):
    """Configuration of :class:`PPLlavaForConditionalGeneration`; the defaults are those of the 7B model.

    Args:
        vision_config: `clip_vision_model`, default ViT-L/14 at 336 pixels; `ppllava_btadapter_vision_model`, the same
            with a BT-Adapter; or `siglip_vision_model`. Described whole; only the layers up to `vision_feature_layer`
            are built.
        guide_config: the text tower of the same family, which reads the user's question: `clip_text_model`, default
            that of ViT-L/14 with its position table stretched to 248, or `siglip_text_model`.
        text_config: the language model, any that `AutoModelForCausalLM` knows; default Llama 7B.
        projection_dim: C, width of the space in which patches and question are compared; CLIP's own. SigLIP has none.
        logit_scale_init_value: logarithm of the scale s of the cosines; trained CLIP models have ln(100).
        projector_hidden_act: "gelu" is the exact erf form.
        vision_feature_layer: which of the hidden states of the vision tower becomes the patches, as in LLaVA.
        pooling: "prompt_guided"; or what people compare it with: "none" keeps every patch, "temporal_mean" averages
            each patch over time, "adaptive_mean" is PLLaVA's AdaptiveAvgPool3d to `pooling_output_size`.
        pooling_kernel_size, pooling_stride: windows over (frames, rows, columns) of a video; None as stride means the
            kernel size. A clip shorter than the kernel is one window in time.
        pooling_output_size: a fixed number of tokens over (frames, rows, columns) for a clip of any length; when given,
            it replaces kernel and stride.
        pooling_max_tokens: the most tokens of one video; longer clips get larger windows, shorter ones stay as they
            are. None is no limit. For "prompt_guided" and "adaptive_mean".
        image_pooling_kernel_size, image_pooling_stride: the windows of images, one frame deep; None means those of
            videos without their frames.
        pooling_temperature: of the softmax inside each window. (`temperature` would become generate's.)
        valuew_plus: SigLIP only; the relevance times the attention of the tower's pooling head, times 1000.
        image_grid_pinpoints: sizes (height, width) in pixels of the grids of views that an image may be cut into, as in
            LLaVA-NeXT; None or empty is one view for every image.
        image_token_index, video_token_index: ids of the placeholders `<image>` and `<video>`, aliases `image_token_id`
            and `video_token_id`.
        vision_chunk: frames that go through the vision tower at once, which bounds the memory of its activations; None
            is as many as a device is fast with, on a CPU what stays in its caches.

    Raises:
        ValueError: for a combination that cannot work; the message says what to do.
    """

    model_type = "ppllava"
    attribute_map = {"image_token_id": "image_token_index", "video_token_id": "video_token_index"}  # noqa: RUF012
    sub_configs_defaults = {  # noqa: RUF012
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            },
        ),
        "guide_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_text_model",
            init_kwargs={
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "projection_dim": 768,
                "max_position_embeddings": 248,
            },
        ),
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="llama",
            init_kwargs={"vocab_size": 32064, "max_position_embeddings": 4096},
        ),
    }

    vision_config: dict | PreTrainedConfig | None = None
    guide_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 768
    logit_scale_init_value: float | int = 4.6052
    projector_hidden_act: str = "gelu"
    vision_feature_layer: int = -2
    pooling: str = "prompt_guided"
    pooling_kernel_size: list[int] | tuple[int, ...] | int = (2, 3, 3)
    pooling_stride: list[int] | tuple[int, ...] | int | None = None
    pooling_output_size: list[int] | tuple[int, ...] | int | None = None
    pooling_max_tokens: int | None = None
    image_pooling_kernel_size: list[int] | tuple[int, ...] | int | None = None
    image_pooling_stride: list[int] | tuple[int, ...] | int | None = None
    pooling_temperature: float | int = 0.01
    valuew_plus: bool = False
    image_grid_pinpoints: list[list[int]] | list[tuple[int, int]] | None = None
    image_token_index: int = 32000
    video_token_index: int = 32002
    vision_chunk: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs) -> None:
        for name in ("vision_config", "guide_config", "text_config"):  # which may make a list as long as a number
            section = getattr(self, name)
            check_sizes(name, section if isinstance(section, dict) else getattr(section, "__dict__", {}))
        check_sizes(None, {"projection_dim": self.projection_dim})
        super().__post_init__(**kwargs)
        for name in SIZES:
            if getattr(self, name) is not None:
                setattr(self, name, list(triple(name, getattr(self, name))))  # a list, as in config.json
        tied = self.tie_word_embeddings or bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.tie_word_embeddings = self.text_config.tie_word_embeddings = tied
        self._check()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers; a folder of the original implementation is translated (`ppllava.original`)."""
        config, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        _check_code(config, pretrained_model_name_or_path)
        if original.is_original(config):
            config = original.translate_config(config, pretrained_model_name_or_path)
        return config, rest

    @property
    def siglip(self) -> bool:
        """Whether vision tower and guide are those of SigLIP."""
        return self.vision_config.model_type.startswith("siglip")

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(H, W): patches of one frame."""
        image, patch = _pair(self.vision_config.image_size), _pair(self.vision_config.patch_size)
        return image[0] // patch[0], image[1] // patch[1]

    @property
    def context_length(self) -> int | None:
        """Positions of the language model, with those that scaled rotary embeddings add; None where it has no limit."""
        limit = getattr(self.text_config, "max_position_embeddings", None)
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        if limit is None or rope.get("rope_type") == "dynamic":
            return None
        # Some configurations count the positions before the scaling, some after it.
        before = rope.get("original_max_position_embeddings") or (limit if rope.get("rope_type") == "linear" else 0)
        return max(limit, int(before * float(rope.get("factor") or 1)))

    @property
    def token_width(self) -> int:
        """D, width of the tokens that the language model takes; a few embed in less than their hidden size."""
        return getattr(self.text_config, "word_embed_proj_dim", None) or self.text_config.hidden_size

    @property
    def vision_layers(self) -> int:
        """Layers of the vision tower that `vision_feature_layer` needs: hidden state k is the output of layer k."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    @property
    def visual_pooling(self) -> VisualPooling:
        """The pooling as the model and the processor compute it."""
        return VisualPooling.of(self, self.patch_grid, _pair(self.vision_config.image_size)[0])

    def _check(self) -> None:
        vision, guide = self.vision_config.model_type, self.guide_config.model_type
        if vision not in GUIDES:
            raise ValueError(
                f"vision_config must have one of the model types {', '.join(GUIDES)}, got {vision!r}; use the tower of "
                "a CLIP or SigLIP model"
            )
        if guide != GUIDES[vision]:
            raise ValueError(
                f"guide_config must have model_type {GUIDES[vision]!r} to match vision_config, got {guide!r}; use both "
                "towers of one CLIP or SigLIP model"
            )
        layers = self.vision_config.num_hidden_layers
        if not 1 <= self.vision_layers <= layers:
            raise ValueError(
                f"vision_feature_layer must name the output of one of the {layers} layers of vision_config, "
                f"{-layers} ... -1 or 1 ... {layers}, got {self.vision_feature_layer}; the original model uses -2"
            )
        _ = self.visual_pooling  # which checks itself
        if not self.pooling_temperature > 0:
            got = self.pooling_temperature
            raise ValueError(f"pooling_temperature must be positive, got {got}; the original model uses 0.01")
        if self.valuew_plus and not self.siglip:
            raise ValueError("valuew_plus needs the pooling head of SigLIP, got a CLIP tower; leave it False")
        if self.vision_chunk is not None and self.vision_chunk < 1:
            raise ValueError(f"vision_chunk must be at least 1 frame, got {self.vision_chunk}; None chooses")
        vocabulary = self.text_config.vocab_size
        for name in ("image_token_index", "video_token_index"):
            if not 0 <= getattr(self, name) < vocabulary:
                raise ValueError(
                    f"{name} must be an id of text_config, 0 ... {vocabulary - 1}, got {getattr(self, name)}; use the "
                    f"tokenizer's id of <{name[:5]}>, and a larger vocab_size if it was added"
                )
        if self.image_token_index == self.video_token_index:
            raise ValueError(
                f"image_token_index and video_token_index must differ, got {self.image_token_index} for both; add a "
                "token to the tokenizer for one of them"
            )


def _check_code(content: object, place: object) -> None:
    """A config.json must not choose code of the Hub: transformers takes `OWNER/NAME` for a kernel to download."""
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if not re.fullmatch("_?(attn|experts)_implementation", key):
            _check_code(value, place)
        elif "/" in str(value):
            raise ValueError(
                f"{key} in the config.json of {str(place)!r} must be one that transformers has, got {value!r}; remove "
                "it, and pass it to from_pretrained where you trust it"
            )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


__all__ = ["PPLlavaConfig"]
