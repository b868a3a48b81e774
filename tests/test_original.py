"""The original's format: its config.json translated, its folders loaded as they are."""

import json

import pytest
import torch
from checkpoints import (
    CLIP,
    FOLDERS,
    assert_same,
    config_of,
    copy,
    expected_weights,
    refused,
    weights_of,
    write,
)
from safetensors.torch import load_file

from ppllava import PPLlavaConfig, PPLlavaForConditionalGeneration, PPLlavaModel, original
from ppllava.convert import convert_checkpoint


@pytest.fixture
def source(tmp_path):
    return copy(tmp_path / "source")


both = pytest.mark.parametrize("family", ["clip", "siglip"])


def test_translate_config():
    config = config_of()
    assert original.translate_config(config, FOLDERS["clip"]) == {
        "model_type": "ppllava",
        "vision_config": {
            "model_type": "ppllava_btadapter_vision_model",
            "adapter_depth": 2,
            "adapter_max_frames": 16,
            "hidden_size": 32,
            "image_size": 24,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "patch_size": 2,
            "projection_dim": 20,
        },
        "guide_config": {
            "model_type": "clip_text_model",
            "vocab_size": 99,
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 248,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "attention_dropout": 0.0,
            "projection_dim": 20,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        "text_config": config["text_config"],
        "projection_dim": 20,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "pooling": "prompt_guided",
        "pooling_kernel_size": [2, 3, 3],
        "pooling_stride": [2, 3, 3],
        "image_pooling_kernel_size": [1, 3, 3],
        "image_pooling_stride": [1, 3, 3],
        "pooling_temperature": 0.01,
        "valuew_plus": False,
        "image_grid_pinpoints": [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]],
        "image_token_index": 90,
        "video_token_index": 95,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    assert config == config_of()  # not changed on the way


def test_translate_config_of_siglip():
    translated = original.translate_config(config_of("siglip"), FOLDERS["siglip"])
    assert translated["vision_config"] == config_of("siglip")["vision_config"]
    assert translated["guide_config"] == {
        "model_type": "siglip_text_model",
        "vocab_size": 70,
        "hidden_size": 16,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 196,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "projection_size": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    assert "projection_dim" not in translated
    wanted = {"vision_feature_layer": -1, "image_token_index": 80, "video_token_index": 82}
    assert wanted.items() <= translated.items()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pooling": "avp"}, {"pooling": "temporal_mean"}),
        ({"pooling": "none"}, {"pooling": "none"}),
        ({"pooling": "pllava", "pllava_pooling_shape": [4, 6, 6]}, {"pooling": "adaptive_mean"}),
        ({"pooling": "pllava_npu", "pllava_pooling_shape": [4, 6, 6]}, {"pooling_output_size": [4, 6, 6]}),
        (
            {"pooling_kernel": ..., "pooling_stride": ..., "pllava_pooling_shape": [4, 6, 6]},
            {"pooling": "prompt_guided"},
        ),
        ({"image_pooling_kernel": None, "image_pooling_stride": None}, {"image_pooling_kernel_size": None}),
        ({"pooling_temp": 0.1}, {"pooling_temperature": 0.1}),
        ({"image_token_index": 95}, {"video_token_index": 94}),
        ({"video_token_index": 7}, {"video_token_index": 7}),
        ({"frame_shape": ...}, {}),
        ({"torch_dtype": ...}, {"dtype": None}),
    ],
)
def test_translated_options(changes, expected):
    config = PPLlavaConfig.from_dict(original.translate_config(config_of(**changes), FOLDERS["clip"]))
    assert {name: getattr(config, name) for name in expected} == expected


def test_towers_without_adapter_and_stretch():
    config = original.translate_config(config_of(btadapter=False, extend_clip=False), FOLDERS["clip"])
    assert config["vision_config"]["model_type"] == "clip_vision_model"
    assert not {"depth", "max_T"} & config["vision_config"].keys()
    assert config["guide_config"]["max_position_embeddings"] == 77


@pytest.mark.parametrize(
    "weight", ["openai/clip-vit-large-patch14-336", "/a/folder/that/was/clip-vit-large-patch14-336/"]
)
def test_known_clip_needs_no_folder(tmp_path, weight):
    config = original.translate_config(config_of(clip_weight=weight), tmp_path)
    assert config["projection_dim"] == 768
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 49408}
    rest = {"num_attention_heads": 12, "eos_token_id": 2, "max_position_embeddings": 248, "hidden_act": "quick_gelu"}
    assert (sizes | rest).items() <= config["guide_config"].items()


def test_known_siglip_needs_no_folder(tmp_path):
    config = config_of("siglip", clip_weight="google/siglip-so400m-patch14-384", extend_clip=False)
    guide = original.translate_config(config, tmp_path)["guide_config"]
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "vocab_size": 32000}
    rest = {"num_attention_heads": 16, "max_position_embeddings": 64, "projection_size": 1152}
    assert (sizes | rest).items() <= guide.items()


def test_siglip_needs_no_ids(tmp_path):
    config = json.loads((FOLDERS["siglip"] / "siglip_tiny" / "config.json").read_text())
    del config["text_config"]["bos_token_id"], config["text_config"]["eos_token_id"]
    translated = original.translate_config(config_of("siglip"), tmp_path, clip=write(tmp_path / "clip", config=config))
    assert translated["guide_config"]["bos_token_id"] is translated["guide_config"]["eos_token_id"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"clip_weight": "somewhere/else"},
            "the text tower of {folder!r} is that of clip_weight 'somewhere/else', which is no folder in it and not "
            "known; pass its folder with --clip",
        ),
        (
            {"qwen": True, "vision_feature_select_strategy": "full"},
            "vision_config must have model_type 'siglip_vision_model' where qwen is True, got 'clip_vision_model'; the "
            "original has no other towers",
        ),
        (
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy must be 'default' for clip_vision_model, got 'full'; the others would make "
            "tokens that are no patches",
        ),
        (
            {"frame_shape": [24, 24]},
            "frame_shape must be the [12, 12] patches of vision_config, got [24, 24]; correct config.json",
        ),
        (
            {"pooling": "maximum"},
            "pooling must be one of ppllava, avp, none, pllava, pllava_npu, got 'maximum'; correct config.json",
        ),
        (
            {"pooling_kernel": ...},
            "config.json must have either pooling_kernel or pllava_pooling_shape for ppllava, got neither; leave one",
        ),
        (
            {"pllava_pooling_shape": [1, 1, 1]},
            "config.json must have either pooling_kernel or pllava_pooling_shape for ppllava, got both; leave one",
        ),
        (
            {"text_config": ...},
            "config.json must have a text_config, got None; use the one that the original saved",
        ),
    ],
)
def test_wrong_configurations(changes, message):
    with refused(message.format(folder=str(FOLDERS["clip"]))):
        original.translate_config(config_of(**changes), FOLDERS["clip"])


VISION, TEXT = config_of()["vision_config"], config_of()["text_config"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"pooling_temp": "0.01"},
            "Field 'pooling_temperature' with value '0.01' doesn't match any type in (<class 'float'>, <class 'int'>)",
        ),
        ({"clip_weight": 5}, "clip_weight must be the folder or name of a model, got 5"),
        ({"clip_post_pretrain": [1]}, "clip_post_pretrain must be the folder or name of a model, got [1]"),
        ({"projector_hidden_act": "x"}, "projector_hidden_act must be an activation of transformers, got 'x'"),
        ({"vision_config": {**VISION, "hidden_act": 1}}, "hidden_act must be an activation of transformers, got 1"),
        ({"torch_dtype": "x"}, "torch_dtype must be that of weights, such as 'bfloat16', got 'x'"),
        ({"torch_dtype": 7}, "torch_dtype must be that of weights, such as 'bfloat16', got 7"),
        (
            {"vision_config": {**VISION, "patch_size": 0}},
            "patch_size of vision_config must be a positive number of pixels, got 0",
        ),
        (
            {"vision_config": {key: value for key, value in VISION.items() if key != "num_attention_heads"}},
            "The hidden size (32) is not a multiple of the number of attention heads (12)",
        ),
        ({"btadapter_depth": None}, "Field 'adapter_depth' expected int, got NoneType (value: None)"),
        ({"btadapter": "false"}, "btadapter must be true or false, got 'false'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings must be true or false, got None"),
        (
            {"text_config": {**TEXT, "tie_word_embeddings": 1}},
            "tie_word_embeddings must be true or false, got 1",
        ),
        (
            {"text_config": {**TEXT, "model_type": "clip"}},
            "text_config must be that of a language model of transformers, got 'clip'",
        ),
    ],
)
def test_wrong_types(tmp_path, changes, reason):
    source = write(tmp_path / "source", weights_of(), config_of(**changes))
    (source / "clip_tiny").symlink_to(CLIP)
    message = f"{str(source / 'config.json')!r} must describe a PPLLaVA, but {reason}; correct it"
    with refused(message):
        PPLlavaForConditionalGeneration.from_pretrained(source)
    with refused(message):
        convert_checkpoint(source, tmp_path / "model")


def test_wrong_sizes(source, tmp_path):
    write(source, config=config_of(max_T=-1))
    message = "adapter_max_frames of vision_config must be in 1 ... 1,048,576, got -1; correct the configuration"
    with refused(message):
        convert_checkpoint(source, tmp_path / "model")


def test_a_wrong_clip(source):
    config = json.loads((source / "clip_tiny" / "config.json").read_text())
    config["text_config"]["hidden_size"] = "24"
    write(source / "clip_tiny", config=config)
    file = str(source / "clip_tiny" / "config.json")
    reason = "Field 'hidden_size' expected int, got str (value: '24')"
    with refused(f"{file!r} must describe a PPLLaVA, but {reason}; correct it"):
        PPLlavaConfig.from_pretrained(source)


def test_wrong_siglip_and_clip(tmp_path):
    with refused("btadapter must be false where qwen is true, got true; the BT-Adapter is for CLIP"):
        original.translate_config(config_of("siglip", btadapter=True), FOLDERS["siglip"])
    message = "{!r} must be a model of type 'siglip' to match vision_config, got 'clip'; pass its folder with --clip"
    with refused(message.format(str(CLIP))):
        original.translate_config(config_of("siglip"), FOLDERS["siglip"], clip=CLIP)
    message = f"{str(tmp_path)!r} must be a folder with a config.json, got none; pass the model's folder"
    with refused(message, FileNotFoundError):
        original.translate_config(config_of(), FOLDERS["clip"], clip=tmp_path)


def test_is_original():
    assert original.is_original(config_of())
    assert original.is_original(config_of(architectures=...))
    assert not original.is_original(
        {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]}
    )
    assert not original.is_original(PPLlavaConfig.from_pretrained(FOLDERS["clip"]).to_dict())


# Loaded as they are


@both
def test_from_pretrained_reads_the_originals_folder(family, tmp_path):
    model, info = PPLlavaForConditionalGeneration.from_pretrained(FOLDERS[family], output_loading_info=True)
    assert not any(info.values())
    assert_same(model.state_dict(), expected_weights(family))
    base = PPLlavaModel.from_pretrained(FOLDERS[family])
    assert_same({f"model.{name}": value for name, value in base.state_dict().items()}, expected_weights(family))
    model.save_pretrained(tmp_path / "model")
    assert_same(load_file(tmp_path / "model" / "model.safetensors"), expected_weights(family))
    base.save_pretrained(tmp_path / "base")
    for folder in (tmp_path / "model", tmp_path / "base"):
        for cls in (PPLlavaForConditionalGeneration, PPLlavaModel):
            again = cls.from_pretrained(folder)
            for name, value in again.state_dict().items():
                assert torch.equal(value, model.state_dict()[name if name in model.state_dict() else f"model.{name}"])


def test_a_model_that_was_not_loaded_saves_its_own_names(tmp_path):
    PPLlavaForConditionalGeneration(PPLlavaConfig.from_pretrained(FOLDERS["clip"])).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == expected_weights().keys()


def test_a_table_without_its_tail_is_missing(source):
    weights = weights_of()
    del weights["multi_modal_projector.clip_text_model.embeddings.position_embedding_res"]
    write(source, weights)
    with pytest.raises(
        ValueError, match=r"got 1 missing: model\.guide\.text_model\.embeddings\.position_embedding\.wei"
    ):
        PPLlavaForConditionalGeneration.from_pretrained(source)


LAYER = "language_model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("key", "other", "name"),
    [
        ("model.image_newline", "image_newline", "model.image_newline"),
        (
            "vision_tower.pre_layrnorm.weight",
            "vision_tower.vision_model.pre_layrnorm.weight",
            "model.vision_tower.pre_layrnorm.weight",
        ),
        ("model.guide.logit_scale", "multi_modal_projector.logit_scale", "model.guide.logit_scale"),
        ("base_model.model.image_newline", "image_newline", "image_newline"),
        (f"{LAYER}.base_layer.weight", f"{LAYER}.weight", f"{LAYER}.weight"),
    ],
)
def test_two_keys_of_one_weight(source, tmp_path, key, other, name):
    weights, file = weights_of(), str(source / "model.safetensors")
    write(source, {**weights, key: torch.zeros_like(weights[other])})
    first, second = sorted((key, other))
    message = f"{name} must be given once, got {first} in {file!r} and {second} in {file!r}; remove one of them"
    with refused(message):
        convert_checkpoint(source, tmp_path / "model")
    if "base_" in key:  # not a key that transformers takes
        message = (
            f"the weights in {str(source)!r} must be exactly those of PPLlavaForConditionalGeneration with its "
            f"config.json, got 1 unexpected: {key}; load a folder as save_pretrained wrote it"
        )
    with refused(message):
        PPLlavaForConditionalGeneration.from_pretrained(source)


def test_tied_weights_that_differ(source, tmp_path):
    write(source, config=config_of(text_config={**TEXT, "tie_word_embeddings": True}))
    head, table = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    message = "{} in {!r} must equal {} where tie_word_embeddings is true, got other numbers; correct config.json"
    with refused(message.format(head, str(source / "model.safetensors"), table)):
        convert_checkpoint(source, tmp_path / "model")
    with refused(message.format(f"model.{head}", str(source), f"model.{table}")):
        PPLlavaForConditionalGeneration.from_pretrained(source)


def test_adapters_of_peft_keep_their_names(tmp_path):
    peft = pytest.importorskip("peft", reason="needs PEFT; pip install peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "linear_1"], init_lora_weights=False)
    trained = peft.get_peft_model(PPLlavaForConditionalGeneration.from_pretrained(FOLDERS["clip"]), settings)
    trained.save_pretrained(tmp_path)
    expected = {name: value for name, value in trained.state_dict().items() if "lora_" in name}
    again = peft.PeftModel.from_pretrained(PPLlavaForConditionalGeneration.from_pretrained(FOLDERS["clip"]), tmp_path)
    assert_same({name: value for name, value in again.state_dict().items() if "lora_" in name}, expected)
    loaded = PPLlavaForConditionalGeneration.from_pretrained(FOLDERS["clip"])
    loaded.load_adapter(tmp_path)
    state = {f"base_model.model.{name}": value for name, value in loaded.state_dict().items() if "lora_" in name}
    assert_same(state, expected)
