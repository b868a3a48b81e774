"""Checkpoints of the original and parts of them, for the tests of what reads them."""

import json
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppllava import PPLlavaForConditionalGeneration

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = {"clip": GOLDEN / "model" / "hf", "siglip": GOLDEN / "model_qwen" / "hf"}
TOWERS = {"clip": "clip_tiny", "siglip": "siglip_tiny"}
CLIP = FOLDERS["clip"] / "clip_tiny"
DROPPED = {
    "clip": r"vision_tower\.vision_model\.(post_layernorm|encoder\.layers\.3|btadapter_[ST]_layers\.1)\.",
    "siglip": r"vision_tower\.vision_model\.post_layernorm\.|multi_modal_projector\.logit_bias$",
}
TABLES = ("position_embedding", "position_embedding_res")


def config_of(family="clip", **changes):
    config = {**json.loads((FOLDERS[family] / "config.json").read_text()), **changes}
    return {key: value for key, value in config.items() if value is not ...}


def weights_of(family="clip"):
    return load_file(FOLDERS[family] / "model.safetensors")


def expected_weights(family="clip"):
    """The weights of the model, each by its name from the original's key: the table read from right to left."""
    theirs, expected = weights_of(family), {}
    for key, value in theirs.items():
        if re.search(DROPPED[family], key):
            continue
        name = key.replace("vision_tower.vision_model.", "vision_tower.")
        for old, new in (
            ("btadapter_cls_token", "adapter.class_token"),
            ("btadapter_time_embed", "adapter.time_embedding"),
            ("btadapter_S_layers", "adapter.spatial_layers"),
            ("btadapter_T_layers", "adapter.temporal_layers"),
            ("multi_modal_projector.clip_text_model", "guide.text_model"),
            ("multi_modal_projector.clip_visual_ln", "guide.norm"),
            ("multi_modal_projector.clip_visual_head", "guide.head"),
            ("multi_modal_projector.clip_visual_projection", "guide.visual_projection"),
            ("multi_modal_projector.clip_text_projection", "guide.text_projection"),
            ("multi_modal_projector.logit_scale", "guide.logit_scale"),
        ):
            name = name.replace(old, new)
        expected[f"model.{name}"] = value
    table, tail = (expected.pop(f"model.guide.text_model.embeddings.{name}") for name in TABLES)
    assert not torch.equal(table, tail)
    expected["model.guide.text_model.embeddings.position_embedding.weight"] = torch.cat([table[:20], tail[20:]])
    expected["model.guide.logit_scale"] = expected["model.guide.logit_scale"].reshape(())
    return expected


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
    assert not different
    assert all(actual[name].dtype == value.dtype for name, value in expected.items())


def write(folder, weights=None, config=None, file="model.safetensors"):
    """A checkpoint folder; without weights, only its config.json."""
    folder.mkdir(exist_ok=True, parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if weights is not None and file.endswith(".safetensors"):
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / file)
    elif weights is not None:
        torch.save(weights, folder / file)
    return folder


def copy(folder):
    """A whole checkpoint that a test may change, with its CLIP model."""
    write(folder, weights_of(), config_of())
    shutil.copytree(CLIP, folder / "clip_tiny")
    return folder


def is_trained(key):
    """What the original trains with LoRA: not the towers, and of the two position tables only the second."""
    tower = key.startswith("vision_tower") and "btadapter" not in key
    frozen = key.endswith((".position_embedding", "logit_scale"))
    return not tower and not frozen and not key.startswith("language_model") and key != "image_newline"


def lora_run(folder, form, scale=3.0):
    """A run of the original with LoRA in q_proj and v_proj, as PEFT or its own script writes it; the merged weights."""
    made, expected = _lora_run(form, scale)
    shutil.copytree(made.name, folder, dirs_exist_ok=True)
    return dict(expected)


@cache
def _lora_run(form, scale):
    """(folder that lives as long as this process, merged weights); training one takes a second."""
    made = tempfile.TemporaryDirectory()
    folder = Path(made.name)
    peft = pytest.importorskip("peft", reason="needs PEFT; pip install peft")
    torch.manual_seed(0)
    model = PPLlavaForConditionalGeneration.from_pretrained(FOLDERS["clip"])
    settings = peft.LoraConfig(r=2, lora_alpha=2 * scale, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model.model.language_model, settings)
    expected = expected_weights()
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "lora_B"):
            b = torch.nn.init.normal_(module.lora_B["default"].weight.data)
            a = module.lora_A["default"].weight.data
            key = f"model.language_model.{name}.weight"
            expected[key] = expected[key] + scale * b @ a
    trained = {f"base_model.model.{key}": value for key, value in weights_of().items() if is_trained(key)}
    write(folder, trained, config_of(), file="non_lora_trainables.bin")
    if form == "peft":
        wrapped.save_pretrained(folder)
    else:
        state = {f"language_model.{name}": value for name, value in wrapped.state_dict().items()}
        write(folder, {name: value for name, value in state.items() if form == "whole" or "lora_" in name})
        settings.save_pretrained(folder / "settings")
    return made, expected


def words(folder, *special):
    """A tokenizer whose ids end below the 96 of the tiny language model."""
    vocabulary = {token: i for i, token in enumerate(("<unk>", "<s>", "</s>", *special, "What", "is", "it"))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": list(special)}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def refused(message, error=ValueError):
    return pytest.raises(error, match=f"^{re.escape(message)}$")
