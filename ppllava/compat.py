"""Every name of another library that its documentation does not promise, in one place; `tests/test_compat.py` imports
each, and finds that no other file of the package uses one.

`SEEN` names them with the versions in which they were seen. What moves in a next version is mended here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    load_image,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead
from transformers.utils.generic import can_return_tuple
from transformers.video_utils import make_batched_metadata, make_batched_videos

try:
    from transformers.configuration_utils import SubConfigSpec

    ComposedConfig = PreTrainedConfig
except ImportError:  # transformers 5.19

    @dataclass
    class SubConfigSpec:
        """What a part of a configuration is where it is not said."""

        config_class: type
        model_type: str
        init_kwargs: dict

    class ComposedConfig(PreTrainedConfig):
        """A configuration whose parts are made from `sub_configs_defaults`, as from 5.20 on every one is."""

        sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {}

        def __init_subclass__(cls, *args, **kwargs) -> None:
            cls.sub_configs = {name: spec.config_class for name, spec in cls.sub_configs_defaults.items()}
            super().__init_subclass__(*args, **kwargs)

        def __post_init__(self, **kwargs) -> None:
            for name, spec in self.sub_configs_defaults.items():
                given = getattr(self, name)
                given = spec.init_kwargs if given is None else given
                if isinstance(given, dict):
                    kind = given.get("model_type", spec.model_type)
                    given = CONFIG_MAPPING[kind](**{key: x for key, x in given.items() if key != "model_type"})
                setattr(self, name, given)
            super().__post_init__(**kwargs)


# versions -> names
SEEN = {
    "transformers 5.19, 5.20, 5.23, 5.24": (
        "transformers.GenerationMixin.prepare_inputs_for_generation",
        "transformers.PreTrainedModel._can_compile_fullgraph",
        "transformers.PreTrainedModel._from_config",
        "transformers.PreTrainedModel._init_weights",
        "transformers.PreTrainedModel._keep_in_fp32_modules_strict",
        "transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected",
        "transformers.PreTrainedModel._no_split_modules",
        "transformers.PreTrainedModel._skip_keys_device_placement",
        "transformers.PreTrainedModel._supports_attention_backend",
        "transformers.PreTrainedModel._supports_flash_attn",
        "transformers.PreTrainedModel._supports_flex_attn",
        "transformers.PreTrainedModel._supports_sdpa",
        "transformers.PreTrainedModel.get_expanded_tied_weights_keys",
        "transformers.ProcessorMixin._process_videos",
        "transformers.ProcessorMixin.get_text_with_replacements",
        "transformers.activations.ACT2FN",
        "transformers.conversion_mapping.register_checkpoint_conversion_mapping",
        "transformers.core_model_loading.ConversionOps.convert",
        "transformers.core_model_loading.WeightConverter.reverse_transform",
        "transformers.core_model_loading.WeightRenaming.reverse_transform",
        "transformers.core_model_loading.revert_weight_conversion",
        "transformers.image_utils.IMAGENET_STANDARD_MEAN",
        "transformers.image_utils.IMAGENET_STANDARD_STD",
        "transformers.image_utils.OPENAI_CLIP_MEAN",
        "transformers.image_utils.OPENAI_CLIP_STD",
        "transformers.image_utils.load_image",
        "transformers.initialization.constant_",
        "transformers.initialization.normal_",
        "transformers.initialization.xavier_uniform_",
        "transformers.initialization.zeros_",
        "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "transformers.models.auto.modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
        "transformers.models.clip.modeling_clip.CLIPAttention",
        "transformers.models.clip.modeling_clip.CLIPEncoderLayer",
        "transformers.models.llava_next.modeling_llava_next.get_anyres_image_grid_shape",
        "transformers.models.llava_next.modeling_llava_next.unpad_image",
        "transformers.models.siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead",
        "transformers.utils.generic.can_return_tuple",
        "transformers.video_utils.make_batched_metadata",
        "transformers.video_utils.make_batched_videos",
    ),
    "torch 2.13": (
        "torch.nn.Module._apply",
        "torch.nn.Module._compiled_call_impl",
    ),
    "accelerate 1.15": (
        "accelerate.hooks.ModelHook",  # which it leaves in a module as HOOK, its old forward beside it
        "accelerate.utils.align_module_device",
    ),
    "ray 2.60": ("ray.data.Dataset._current_executor",),
}

# Attributes of an nn.Module: parameters and buffers by name; and, bound to it, what was compiled of it.
WEIGHTS = ("_parameters", "_buffers")
COMPILED = ("_compiled_call_impl", "_compiled_call", "_last_compile_config")
# What accelerate leaves in a module: its hook, and the forward that the hook wraps.
HOOK, HOOKED_FORWARD = "_hf_hook", "_old_forward"
# Where a model of transformers notes how long the longest static cache was.
PREVIOUS_CACHE = "_previous_max_cache_length"
# Of a dataset of Ray: what runs it. Of a decoder that datasets made: the row that it came from.
EXECUTOR, ENCODED = "_current_executor", "_hf_encoded"

init = initialization  # initialises what was not loaded, and leaves alone what was


def from_config(cls: type[PreTrainedModel], config: Any, **kwargs: Any) -> Any:
    """A model of this very class with random weights; AutoModel has no entry for SigLIP's text tower."""
    return cls._from_config(config, **kwargs)


def cache_name(forward: Callable) -> str:
    """What `forward` of a language model calls the cache: `cache` since transformers 5.24, before `past_key_values`."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def written_names(model: PreTrainedModel) -> dict[str, str]:
    """Name in a checkpoint that `save_pretrained` writes -> name in the model, of weights that are only renamed."""
    names = [*model.state_dict()]
    markers = {name: torch.tensor(place) for place, name in enumerate(names)}  # that stand for the weights
    return {written: names[int(place)] for written, place in revert_weight_conversion(model, markers).items()}


def align_module_device(module: torch.nn.Module, device: str) -> Any:
    """A context in which the weights of a module that accelerate has offloaded are on `device`."""
    from accelerate.utils import align_module_device

    return align_module_device(module, device)


__all__ = [
    "ACT2FN",
    "COMPILED",
    "ENCODED",
    "EXECUTOR",
    "HOOK",
    "HOOKED_FORWARD",
    "IMAGENET_STANDARD_MEAN",
    "IMAGENET_STANDARD_STD",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "OPENAI_CLIP_MEAN",
    "OPENAI_CLIP_STD",
    "PREVIOUS_CACHE",
    "SEEN",
    "WEIGHTS",
    "CLIPAttention",
    "CLIPEncoderLayer",
    "ComposedConfig",
    "ConversionOps",
    "SiglipMultiheadAttentionPoolingHead",
    "SubConfigSpec",
    "WeightConverter",
    "WeightRenaming",
    "align_module_device",
    "cache_name",
    "can_return_tuple",
    "from_config",
    "get_anyres_image_grid_shape",
    "init",
    "load_image",
    "make_batched_metadata",
    "make_batched_videos",
    "register_checkpoint_conversion_mapping",
    "unpad_image",
    "written_names",
]
