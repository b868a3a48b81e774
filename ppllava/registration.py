"""Importing this module enters the model into the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .compat import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from .configuration_ppllava import PPLlavaConfig
from .modeling_ppllava import PPLlavaForConditionalGeneration, PPLlavaModel
from .processing_ppllava import PPLlavaProcessor

AutoConfig.register("ppllava", PPLlavaConfig)
AutoModel.register(PPLlavaConfig, PPLlavaModel)
AutoProcessor.register(PPLlavaConfig, PPLlavaProcessor)
for _auto, _names in (
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
):
    _auto.register(PPLlavaConfig, PPLlavaForConditionalGeneration)
    # `transformers serve` and pipelines look the class up by name, which register() does not enter.
    _names["ppllava"] = PPLlavaForConditionalGeneration.__name__
