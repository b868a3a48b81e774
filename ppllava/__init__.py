"""PPLLaVA on transformers; importing it registers the model with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto import modeling_auto

from ppllava_kernels import __version__

from .batching import BatchWarning, batch
from .configuration_ppllava import PPLlavaConfig
from .encoding import EncodedVideo, encode_video
from .modeling_ppllava import (
    PPLlavaForConditionalGeneration,
    PPLlavaModel,
)
from .processing_ppllava import PPLlavaProcessor
from .stretch import stretch_position_embedding, stretch_text_model
from .swap import compress
from .visual_features import PPLlavaVisualFeatures

AutoConfig.register("ppllava", PPLlavaConfig)
AutoModel.register(PPLlavaConfig, PPLlavaModel)
AutoProcessor.register(PPLlavaConfig, PPLlavaProcessor)
for _auto, _names in (
    (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    (AutoModelForMultimodalLM, modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
):
    _auto.register(PPLlavaConfig, PPLlavaForConditionalGeneration)
    # `transformers serve` and pipelines look the class up by name, which register() does not enter.
    _names["ppllava"] = PPLlavaForConditionalGeneration.__name__

__all__ = [
    "BatchWarning",
    "EncodedVideo",
    "PPLlavaConfig",
    "PPLlavaForConditionalGeneration",
    "PPLlavaModel",
    "PPLlavaProcessor",
    "PPLlavaVisualFeatures",
    "__version__",
    "batch",
    "compress",
    "encode_video",
    "stretch_position_embedding",
    "stretch_text_model",
]
