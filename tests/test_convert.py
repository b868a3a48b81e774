"""Checkpoints of the original converted, whole and from parts."""

import json
import re
import resource
from pathlib import Path

import pytest
import torch
from checkpoints import (
    CLIP,
    DROPPED,
    FOLDERS,
    TOWERS,
    assert_same,
    config_of,
    copy,
    expected_weights,
    is_trained,
    lora_run,
    weights_of,
    words,
    write,
)
from safetensors.torch import load_file
from transformers import AutoProcessor

from ppllava import PPLlavaConfig, PPLlavaForConditionalGeneration
from ppllava.convert import convert_checkpoint
from ppllava.stretch import stretch_position_embedding
from ppllava.weights import read_weights, write_weights

both = pytest.mark.parametrize("family", ["clip", "siglip"])


@pytest.fixture
def source(tmp_path):
    return copy(tmp_path / "source")


@both
def test_convert(family, tmp_path):
    report = convert_checkpoint(FOLDERS[family], tmp_path / "new" / "model")
    files = {path.name for path in (tmp_path / "new" / "model").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors"} == set(report.written)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    expected = expected_weights(family)
    assert_same(load_file(tmp_path / "new" / "model" / "model.safetensors"), expected)
    assert set(report.dropped) == {key for key in weights_of(family) if re.search(DROPPED[family], key)}
    assert report.read == {"model.safetensors": len(weights_of(family))}
    assert report.parameters == sum(value.numel() for value in expected.values())
    model = PPLlavaForConditionalGeneration.from_pretrained(tmp_path / "new" / "model")
    direct = PPLlavaForConditionalGeneration.from_pretrained(FOLDERS[family])
    assert_same(model.state_dict(), direct.state_dict())
    ours, theirs = model.config.to_dict(), direct.config.to_dict()
    assert {**ours, "_name_or_path": ""} == {**theirs, "_name_or_path": "", "architectures": ours["architectures"]}
    assert model.generation_config.to_dict() == direct.generation_config.to_dict()


def test_report(tmp_path):
    lines = str(convert_checkpoint(FOLDERS["siglip"], tmp_path / "model")).splitlines()
    assert lines == [
        f"{FOLDERS['siglip']} -> {tmp_path / 'model'}",
        "read       123 weights of model.safetensors",
        "dropped    3 that no output depends on: multi_modal_projector.logit_bias, "
        "vision_tower.vision_model.post_layernorm.bias, vision_tower.vision_model.post_layernorm.weight",
        "written    38,973 parameters: config.json, generation_config.json, model.safetensors",
        "processor  not written, for want of the tokenizer and the guide-tokenizer; pass its folder with --tokenizer "
        "and its folder with --guide-tokenizer",
    ]


def test_what_was_converted_converts_again(tmp_path):
    convert_checkpoint(FOLDERS["clip"], tmp_path / "once")
    report = convert_checkpoint(tmp_path / "once", tmp_path / "twice")
    assert not report.dropped
    assert_same(load_file(tmp_path / "twice" / "model.safetensors"), expected_weights())
    once, twice = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("once", "twice"))
    assert once == twice


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(source, tmp_path, suffix):
    weights = sorted(weights_of().items())
    (source / "model.safetensors").unlink()
    for i in range(3):
        write(source, dict(weights[i::3]), file=f"model-{i + 1:05}-of-00003.{suffix}")
    report = convert_checkpoint(source, tmp_path / "model")
    assert len(report.read) == 3
    assert_same(load_file(tmp_path / "model" / "model.safetensors"), expected_weights())


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("file", ["model.bin", "pytorch_model.bin"])
def test_bin(source, tmp_path, file, options):
    (source / "model.safetensors").unlink()
    torch.save(weights_of(), source / file, **options)
    convert_checkpoint(source, tmp_path / "model")
    assert_same(load_file(tmp_path / "model" / "model.safetensors"), expected_weights())


def test_trained_weights_win(source, tmp_path):
    trained = {"base_model.model.multi_modal_projector.linear_1.bias": torch.full((40,), 7.0)}
    write(source, trained, file="non_lora_trainables.bin")
    convert_checkpoint(source, tmp_path / "model")
    name = "model.multi_modal_projector.linear_1.bias"
    assert_same(
        load_file(tmp_path / "model" / "model.safetensors"), expected_weights() | {name: torch.full((40,), 7.0)}
    )


def test_dtype(source, tmp_path):
    convert_checkpoint(source, tmp_path / "model", dtype=torch.bfloat16)
    scale = "model.guide.logit_scale"
    expected = {name: value.bfloat16() for name, value in expected_weights().items()} | {
        scale: expected_weights()[scale]
    }
    assert_same(load_file(tmp_path / "model" / "model.safetensors"), expected)
    assert PPLlavaForConditionalGeneration.from_pretrained(tmp_path / "model").dtype == torch.bfloat16


def test_mixed_dtypes_stay(source, tmp_path):
    half = {name: value.half() if "language_model" in name else value for name, value in weights_of().items()}
    write(source, half)
    convert_checkpoint(source, tmp_path / "model")
    expected = {name: value.half() if "language_model" in name else value for name, value in expected_weights().items()}
    assert_same(load_file(tmp_path / "model" / "model.safetensors"), expected)


def test_tied_weights(source, tmp_path):
    config = config_of()
    weights = weights_of()
    weights["language_model.lm_head.weight"] = weights["language_model.model.embed_tokens.weight"].clone()
    write(source, weights, {**config, "text_config": {**config["text_config"], "tie_word_embeddings": True}})
    report = convert_checkpoint(source, tmp_path / "model")
    assert "language_model.lm_head.weight" in report.dropped
    expected = expected_weights()
    del expected["model.language_model.lm_head.weight"]
    assert_same(load_file(tmp_path / "model" / "model.safetensors"), expected)
    model = PPLlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_written_shards(tmp_path):
    weights = expected_weights()
    dtypes = {name: value.dtype for name, value in weights.items()}
    write_weights(tmp_path, weights, dtypes, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same({name: weight.tensor for name, weight in read_weights(tmp_path).items()}, weights)
    PPLlavaConfig.from_pretrained(FOLDERS["clip"]).save_pretrained(tmp_path)
    assert_same(PPLlavaForConditionalGeneration.from_pretrained(tmp_path).state_dict(), weights)


def test_one_tensor_under_two_names(source, tmp_path):
    weights = weights_of()
    names = [f"multi_modal_projector.clip_text_model.encoder.layers.{i}.layer_norm1.bias" for i in range(2)]
    weights[names[1]] = weights[names[0]]
    (source / "model.safetensors").unlink()
    write(source, weights, file="model.bin")
    convert_checkpoint(source, tmp_path / "model")
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(written["model.guide.text_model.encoder.layers.1.layer_norm1.bias"], weights[names[0]])


# From parts


def llava(tmp_path, form):
    """LLaVA-NeXT as transformers writes it today or wrote it before 4.52."""
    weights = {
        key: 2 * value
        for key, value in weights_of().items()
        if "btadapter" not in key and not key.startswith("multi_modal_projector.clip") and "logit" not in key
    }
    if form == "new":
        renames = (("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."))
        for old, new in (*renames, *((x, f"model.{x}") for x in ("vision_tower", "multi_modal", "image_newline"))):
            weights = {re.sub(rf"^{re.escape(old)}", new, key): value for key, value in weights.items()}
    return write(tmp_path / form, weights, {"model_type": "llava_next"})


@pytest.mark.parametrize("form", ["old", "new"])
def test_partial_checkpoint(tmp_path, form):
    trained = {key: value for key, value in weights_of().items() if is_trained(key)}
    source = write(tmp_path / "source", trained, config_of())
    report = convert_checkpoint(source, tmp_path / "model", base=llava(tmp_path, form), clip=CLIP)
    expected, table = expected_weights(), "model.guide.text_model.embeddings.position_embedding.weight"
    frozen = re.compile(r"model\.(language_model|vision_tower\.(?!adapter)|image_newline)")
    expected = {name: 2 * value if frozen.match(name) else value for name, value in expected.items()}
    stock = load_file(CLIP / "model.safetensors")
    stretched = stretch_position_embedding(stock["text_model.embeddings.position_embedding.weight"])
    expected[table] = torch.cat([stretched[:20].float(), expected[table][20:]])
    expected["model.guide.logit_scale"] = stock["logit_scale"].float()
    assert_same(load_file(tmp_path / "model" / "model.safetensors"), expected)
    assert report.filled[str(CLIP)] == ["model.guide.logit_scale", f"{table} (first rows)"]
    assert set(report.filled[str(tmp_path / form)]) == {name for name in expected if frozen.match(name)}


@both
def test_guide_from_clip(family, tmp_path):
    weights = {
        key: value for key, value in weights_of(family).items() if not key.startswith("multi_modal_projector.clip")
    }
    source = write(tmp_path / "source", weights, config_of(family))
    convert_checkpoint(source, tmp_path / "model", clip=FOLDERS[family] / TOWERS[family])
    written = load_file(tmp_path / "model" / "model.safetensors")
    stock = load_file(FOLDERS[family] / TOWERS[family] / "model.safetensors")
    table = stock["text_model.embeddings.position_embedding.weight"]
    expected = {
        f"guide.{key}": value for key, value in stock.items() if key.startswith(("text_model.", "text_proj", "visu"))
    }
    expected["guide.text_model.embeddings.position_embedding.weight"] = stretch_position_embedding(table)
    for key, value in stock.items():
        for old, new in (("vision_model.post_layernorm", "guide.norm"), ("vision_model.head", "guide.head")):
            if key.startswith(old):
                expected[key.replace(old, new)] = value
    guide = {name.removeprefix("model."): value for name, value in written.items() if name.startswith("model.guide.")}
    assert torch.equal(guide.pop("guide.logit_scale"), expected_weights(family)["model.guide.logit_scale"])
    assert_same(guide, expected)


@pytest.mark.parametrize("form", ["peft", "original", "whole"])
def test_lora(tmp_path, form):
    expected = lora_run(tmp_path / "source", form)
    adapter = {} if form == "peft" else {"adapter": tmp_path / "source" / "settings"}
    report = convert_checkpoint(tmp_path / "source", tmp_path / "model", base=FOLDERS["clip"], clip=CLIP, **adapter)
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(written[name], value, rtol=0, atol=1e-6)
    layers = [
        f"model.language_model.model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")
    ]
    assert report.merged == layers
    assert "LoRA into 4: model.language_model.model.layers.0.self_attn.q_proj, " in str(report)
    original_weights = expected_weights()
    assert all((expected[f"{name}.weight"] - original_weights[f"{name}.weight"]).abs().max() > 0.1 for name in layers)
    changed = {name for name, value in original_weights.items() if not torch.equal(written[name], value)}
    assert changed == {f"{name}.weight" for name in layers}


def test_adapter_in_its_own_folder(tmp_path):
    expected = lora_run(tmp_path / "run", "peft")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "run" / name).rename(adapter / name)
    convert_checkpoint(FOLDERS["clip"], tmp_path / "one", adapter=adapter)
    convert_checkpoint(adapter, tmp_path / "two", base=FOLDERS["clip"])
    for folder in ("one", "two"):
        for name, value in load_file(tmp_path / folder / "model.safetensors").items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["peft", "original"])
@pytest.mark.parametrize(
    ("pattern", "changed"),
    [
        (r"^model\.layers\.0\.self_attn\.q_proj", "layers.0.self_attn.q_proj"),
        ("model.layers.1.self_attn.v_proj", "layers.1.self_attn.v_proj"),
        (r"layers\.0\..*", "layers.0."),
        ("language_model.model.layers.0.self_attn.q_proj", None),  # not a name that PEFT saw
    ],
)
def test_lora_with_patterns(tmp_path, form, pattern, changed):
    expected = lora_run(tmp_path / "source", form, scale=3.0)
    folder = tmp_path / "source" / ("" if form == "peft" else "settings")
    file = folder / "adapter_config.json"
    patterns = {"alpha_pattern": {pattern: 10}, "rank_pattern": {pattern: 2, "q_proj": 2}}  # r = 2: a scale of 5, not 3
    file.write_text(json.dumps({**json.loads(file.read_text()), **patterns}))
    convert_checkpoint(tmp_path / "source", tmp_path / "model", base=FOLDERS["clip"], clip=CLIP, adapter=folder)
    written, before = load_file(tmp_path / "model" / "model.safetensors"), expected_weights()
    for name, value in expected.items():
        scale = 5 / 3 if changed is not None and f"language_model.model.{changed}" in name else 1
        merged = before[name] + scale * (value - before[name])
        torch.testing.assert_close(written[name], merged, rtol=0, atol=1e-5)


# Folders


def test_a_link_to_an_empty_folder(source, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("new")
    for link, folder in (("link", "empty"), ("dangling", "new")):
        report = convert_checkpoint(source, tmp_path / link)
        assert (tmp_path / link).is_symlink()
        assert {path.name for path in (tmp_path / folder).iterdir()} == set(report.written)


def test_an_empty_folder_is_kept(source, tmp_path):
    (tmp_path / "mount").mkdir()
    inode = (tmp_path / "mount").stat().st_ino  # a mount point can be neither removed nor replaced
    words(source)
    words(source / "clip_tiny")
    report = convert_checkpoint(source, tmp_path / "mount")
    assert (tmp_path / "mount").stat().st_ino == inode
    assert "guide_tokenizer" in report.written
    assert {path.name for path in (tmp_path / "mount").iterdir()} == set(report.written)


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk(source, tmp_path, there):
    folder = tmp_path / "results" / "model"
    if there:
        folder.mkdir(parents=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    message = rf"^{re.escape(repr(str(folder)))} must be a folder that can be written, got .*; make room there, or name"
    try:
        with pytest.raises(OSError, match=message):
            convert_checkpoint(source, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path for path in tmp_path.glob("results/**/*") if path != folder] == []


@pytest.mark.parametrize("there", [False, True])
def test_an_interruption(source, tmp_path, monkeypatch, there):
    folder = tmp_path / "results" / "model"
    if there:
        folder.mkdir(parents=True)
    rename, left = Path.rename, [2 if there else 0]  # two files of three are in their place

    def interrupted(path, target):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    (source / "generation_config.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, folder)
    assert [path for path in tmp_path.glob("results/**/*") if path != folder] == []


# Processors


@pytest.mark.parametrize(
    ("special", "ids", "added"), [((), (6, 7), ", with <image>, <video>"), (("<image>",), (3, 7), ", with <video>")]
)
def test_processor(source, tmp_path, special, ids, added):
    words(source, *special)
    words(source / "clip_tiny")
    report = convert_checkpoint(source, tmp_path / "model")
    assert report.processor == f"tokenizer of {source}{added}; guide's of {source / 'clip_tiny'}"
    config = PPLlavaConfig.from_pretrained(tmp_path / "model")
    assert (config.image_token_index, config.video_token_index) == ids
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert (processor.image_token_id, processor.video_token_id) == ids
    assert processor.visual_pooling.video_tokens(8) == config.visual_pooling.video_tokens(8) == 4 * 4 * 4
    assert processor.image_grid_pinpoints == config.image_grid_pinpoints
    assert processor.tokenizer.padding_side == "left"
    assert processor.tokenizer.pad_token == "<unk>"
    clip = torch.zeros(4, 24, 24, 3, dtype=torch.uint8)
    inputs = processor(text="USER: <video> What is it ASSISTANT:", videos=[clip])
    assert (inputs["input_ids"] == ids[1]).sum() == 2 * 4 * 4
    again = convert_checkpoint(tmp_path / "model", tmp_path / "again")  # the processor brings its tokenizers
    assert again.processor.startswith("tokenizer of")


def test_processor_from_other_folders(tmp_path):
    folders = {"tokenizer": words(tmp_path / "words"), "guide_tokenizer": words(tmp_path / "guide")}
    report = convert_checkpoint(FOLDERS["siglip"], tmp_path / "model", **folders)
    assert str(folders["tokenizer"]) in report.processor
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert processor.guide_padding == "max_length"
    assert processor.image_mean == [0.5, 0.5, 0.5]
    assert "<|im_start|>" in processor.chat_template
