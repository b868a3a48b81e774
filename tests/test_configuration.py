"""The configuration: defaults, JSON, and every error word for word."""

import json
import re

import pytest
from transformers import Qwen2Config

from ppllava import PPLlavaConfig


def test_defaults_are_the_7b_model():
    config = PPLlavaConfig()
    assert config.patch_grid == (24, 24)
    assert config.vision_layers == 23
    assert config.guide_config.max_position_embeddings == 248
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (4096, 32)
    assert config.pooling == {"kernel_size": [2, 3, 3], "stride": None}
    assert config.video_token_id == config.video_token_index == 32000


def test_config_survives_json():
    config = PPLlavaConfig(
        text_config=Qwen2Config(), pooling_kernel_size=(1, 3, 3), pooling_stride=2, pooling_output_size=(4, 8, 8)
    )
    again = PPLlavaConfig(**json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.text_config, Qwen2Config)
    assert again.pooling == {"output_size": [4, 8, 8]}


TINY_CLIP = {"num_hidden_layers": 3, "image_size": 42, "patch_size": 7}
CONFIG_ERRORS = [
    (
        {"vision_config": {"model_type": "siglip_vision_model"}},
        "vision_config must have model_type 'clip_vision_model', got 'siglip_vision_model'; use "
        "the towers of a CLIP model, "
        "the only guide supported",
    ),
    (
        {"guide_config": {"model_type": "siglip_text_model"}},
        "guide_config must have model_type 'clip_text_model', got 'siglip_text_model'; use the towers of a CLIP model, "
        "the only guide supported",
    ),
    (
        {"vision_feature_layer": -4, "vision_config": TINY_CLIP},
        "vision_feature_layer must name the output of one of the 3 layers of vision_config, -3 ... "
        "-1 or 1 ... 3, got -4; "
        "the original model uses -2",
    ),
    (
        {"vision_feature_layer": 4, "vision_config": TINY_CLIP},
        "vision_feature_layer must name the output of one of the 3 layers of vision_config, -3 ... "
        "-1 or 1 ... 3, got 4; "
        "the original model uses -2",
    ),
    (
        {"pooling_kernel_size": [2, 3, 7], "vision_config": TINY_CLIP},
        "pooling_kernel_size must fit into the 6 x 6 patches of a frame, got [2, 3, 7]; use a smaller one, or "
        "pooling_output_size",
    ),
    (
        {"pooling_kernel_size": [3, 3]},
        "pooling_kernel_size must be three positive ints for (T, H, W), got [3, 3]; pass for example (2, 3, 3)",
    ),
    (
        {"pooling_output_size": [0, 3, 3]},
        "pooling_output_size must be three positive ints for (T, H, W), got [0, 3, 3]; pass for example (2, 3, 3)",
    ),
    ({"pooling_temperature": 0}, "pooling_temperature must be positive, got 0; the original model uses 0.01"),
    ({"vision_chunk": 0}, "vision_chunk must be at least 1 frame, got 0; None is all at once"),
    (
        {"video_token_index": 32064},
        "video_token_index must be an id of text_config, 0 ... 32063, got 32064; use the "
        "tokenizer's id of <video>, and a "
        "larger vocab_size if it was added",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), CONFIG_ERRORS)
def test_config_errors(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PPLlavaConfig(**arguments)
