"""The configuration: defaults, JSON, and every error word for word."""

import json
import re
from pathlib import Path

import pytest
from transformers import Qwen2Config

from ppllava import PPLlavaConfig
from ppllava.pooling import Window


def test_defaults_are_the_7b_model():
    config = PPLlavaConfig()
    assert config.patch_grid == (24, 24)
    assert config.vision_layers == 23
    assert config.context_length == 4096
    assert config.guide_config.max_position_embeddings == 248
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (4096, 32)
    assert (config.pooling, config.pooling_kernel_size, config.pooling_stride) == ("prompt_guided", [2, 3, 3], None)
    assert config.image_token_id == config.image_token_index == 32000
    assert config.video_token_id == config.video_token_index == 32002


def test_config_survives_json():
    config = PPLlavaConfig(
        text_config=Qwen2Config(), pooling_kernel_size=(1, 3, 3), pooling_stride=2, pooling_output_size=(4, 8, 8)
    )
    again = PPLlavaConfig(**json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.text_config, Qwen2Config)
    assert again.visual_pooling == config.visual_pooling
    assert again.visual_pooling.video_window(9) == Window(output_size=(4, 8, 8))


LLAMA = {"model_type": "llama", "max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("text_config", "positions"),
    [
        (LLAMA, 4096),
        ({**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 16384),
        ({**LLAMA, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, None),
        (
            {
                **LLAMA,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
            },
            16384,
        ),
        (
            {
                **LLAMA,
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        ({"model_type": "bloom"}, None),
    ],
)
def test_context_length(text_config, positions):
    config = PPLlavaConfig(text_config={"vocab_size": 32064, **text_config})
    assert config.context_length == positions


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, "1,024"),
        ({"pooling": "adaptive_mean", "pooling_output_size": (16, 12, 12)}, "2,304"),
        ({"pooling": "temporal_mean"}, "576"),
        ({"pooling": "none"}, "18,432"),
    ],
)
def test_tokens_of_32_frames_are_those_of_the_docs(fields, tokens):
    page = (Path(__file__).parent.parent / "docs" / "model.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{fields.get('pooling', 'prompt_guided')}`"))
    assert row.endswith(f"| {tokens} |")
    assert f"{PPLlavaConfig(**fields).visual_pooling.video_tokens(32):,}" == tokens


TINY_CLIP = {"num_hidden_layers": 3, "image_size": 42, "patch_size": 7}
CONFIG_ERRORS = [
    (
        {"vision_config": {"model_type": "dinov2"}},
        "vision_config must have one of the model types clip_vision_model, ppllava_btadapter_vision_model, "
        "siglip_vision_model, got 'dinov2'; use the tower of a CLIP or SigLIP model",
    ),
    (
        {"guide_config": {"model_type": "siglip_text_model"}},
        "guide_config must have model_type 'clip_text_model' to match vision_config, got 'siglip_text_model'; use both "
        "towers of one CLIP or SigLIP model",
    ),
    (
        {"vision_config": {"model_type": "siglip_vision_model"}},
        "guide_config must have model_type 'siglip_text_model' to match vision_config, got 'clip_text_model'; use both "
        "towers of one CLIP or SigLIP model",
    ),
    (
        {"pooling": "average"},
        "pooling must be one of prompt_guided, adaptive_mean, temporal_mean, none, got 'average'",
    ),
    (
        {"pooling": "adaptive_mean"},
        "pooling_output_size must be given for adaptive_mean, got None; PLLaVA uses (16, 12, 12)",
    ),
    (
        {"image_pooling_kernel_size": [2, 3, 3]},
        "image_pooling_kernel_size must be one frame deep, got [2, 3, 3]; several would mix the images of a list",
    ),
    (
        {"image_pooling_kernel_size": [1, 3, 7], "vision_config": TINY_CLIP},
        "image_pooling_kernel_size must fit into the 6 x 6 patches of a frame, got [1, 3, 7]; use a smaller one, or "
        "pooling_output_size",
    ),
    (
        {"pooling_output_size": 2, "vision_config": {**TINY_CLIP, "patch_size": 21}},
        "pooling_kernel_size must fit into the 2 x 2 patches of a frame for images, got [2, 3, 3]; use a smaller one, "
        "or image_pooling_kernel_size",
    ),
    ({"valuew_plus": True}, "valuew_plus needs the pooling head of SigLIP, got a CLIP tower; leave it False"),
    (
        {"image_grid_pinpoints": [[336, 672], [300, 336]]},
        "image_grid_pinpoints must be [height, width] in multiples of the 336 pixels of a view, got [300, 336]; round "
        "it",
    ),
    (
        {"video_token_index": 32000},
        "image_token_index and video_token_index must differ, got 32000 for both; add a token to the tokenizer for one "
        "of them",
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
    ({"vision_chunk": 0}, "vision_chunk must be at least 1 frame, got 0; None chooses"),
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
