"""Folders of strangers: only regular files are read, and what cannot be is said before it takes memory or time."""

import importlib.util
import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
from checkpoints import CLIP, FOLDERS, config_of, copy, lora_run, refused, words, write
from tiny import fresh, tiny

from ppllava import PPLlavaConfig, PPLlavaForConditionalGeneration, PPLlavaProcessor, original, weights
from ppllava.convert import convert_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for part in tiny():
        part.save_pretrained(folder)
    return folder


# Files


@pytest.fixture
def source(tmp_path):
    folder = copy(tmp_path / "source")
    words(folder)
    words(folder / "clip_tiny")
    return folder


KINDS = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to(os.devnull),
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_not_regular(tmp_path, kind):
    KINDS[kind](path := tmp_path / "model.safetensors")
    for read in (weights.read_json, weights.check_regular, lambda path: weights.read_files([path])):
        with refused(f"{str(path)!r} must be a regular file, got {kind}; remove it, and download the file again"):
            read(path)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "model-extra.bin",
        "non_lora_trainables.bin",
        "model.safetensors.index.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "clip_tiny/config.json",
        "clip_tiny/tokenizer_config.json",
    ],
)
def test_convert_opens_regular_files_only(source, tmp_path, name):
    path = source / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with refused(f"{str(path)!r} must be a regular file, got a pipe; remove it, and download the file again"):
        convert_checkpoint(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_from_pretrained_opens_regular_files_only(whole, tmp_path, name):
    shutil.copy(whole / "config.json", tmp_path)
    os.mkfifo(tmp_path / name)
    path = str(tmp_path / name)
    with refused(f"{path!r} must be a regular file, got a pipe; remove it, and download the file again"):
        PPLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "lost").symlink_to("nowhere")
    with refused(f"{str(tmp_path / 'lost')!r} must be a file, got none; download it again", FileNotFoundError):
        weights.check_regular(tmp_path / "lost")
    (tmp_path / "circle").symlink_to("circle")
    text = os.strerror(40)
    with refused(f"{str(tmp_path / 'circle')!r} must be a file, got {text}; download it again"):
        weights.check_regular(tmp_path / "circle")


def test_json_without_end(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000)
    start = re.escape(repr(str(path)))
    with pytest.raises(ValueError, match=rf"^{start} must be JSON, got .*recursion.*; download it again$"):
        weights.read_json(path)
    with open(path, "wb") as file:
        file.truncate(2**40)  # without a byte on the disk
    with refused(f"{str(path)!r} must be JSON of at most 67,108,864 bytes, got 1,099,511,627,776; download it again"):
        weights.read_json(path)


@pytest.mark.parametrize("name", ["../weights.safetensors", "/weights.safetensors", "sub/a.safetensors", "..", "a\\b"])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_files_beside_it(whole, tmp_path, index, name):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(whole / "config.json", folder)
    shutil.copy(whole / "model.safetensors", tmp_path / "weights.safetensors")
    (folder / index).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    message = f"{str(folder / index)!r} must name files that lie beside it, got {name!r}; download the model again"
    for load in (
        lambda: PPLlavaForConditionalGeneration.from_pretrained(folder),
        lambda: PPLlavaForConditionalGeneration.from_pretrained(folder, variant="fp16"),
        lambda: convert_checkpoint(folder, tmp_path / "converted"),
    ):
        with refused(message):
            load()


@pytest.mark.parametrize("weight", ["{folder}/clip_tiny", "../source/clip_tiny", "clip_tiny/../clip_tiny", "a\\..\\b"])
def test_a_clip_outside_of_the_folder_is_not_read(source, tmp_path, weight):
    weight = weight.format(folder=source)
    write(source, config=config_of(clip_weight=weight))
    message = (
        f"the text tower of {str(source)!r} is that of clip_weight {weight!r}, which is no folder in it and not known; "
        "pass its folder with --clip"
    )
    with refused(message):
        PPLlavaConfig.from_pretrained(source)
    with refused(message):
        convert_checkpoint(source, tmp_path / "model")
    assert convert_checkpoint(source, tmp_path / "model", clip=CLIP).parameters


# Adapters


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """The tiny model in a folder with a LoRA adapter, and the numbers of a layer with it."""
    peft = pytest.importorskip("peft", reason="needs PEFT; pip install peft")
    folder = tmp_path_factory.mktemp("adapted")
    model = fresh()
    for part in (model, tiny()[1]):
        part.save_pretrained(folder)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(folder)
    return folder


def test_an_adapter_in_the_folder_of_a_model_is_loaded(adapted):
    model = PPLlavaForConditionalGeneration.from_pretrained(adapted)
    assert any(parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if ".lora_B." in name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"r": 10**9},
            "{file!r} must have ranks of at most 48, the longest side of its weights, got 1000000000 for r;",
        ),
        (
            {"rank_pattern": {"q_proj": 10**9}},
            "{file!r} must have ranks of at most 48, the longest side of its weights, got 1000000000 for q_proj;",
        ),
        ({"peft_type": "other"}, "the adapter in {folder!r} must be one of this model, got "),
        ({"target_modules": ["nothing"]}, "the adapter in {folder!r} must be one of this model, got "),
        (None, "{file!r} must be a JSON object, got list; download it again"),
    ],
)
def test_an_adapter_that_cannot_be_loaded(adapted, tmp_path, changes, message):
    folder = shutil.copytree(adapted, tmp_path / "model")
    file = folder / "adapter_config.json"
    file.write_text("[]" if changes is None else json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(file=str(file), folder=str(folder)))}"):
        PPLlavaForConditionalGeneration.from_pretrained(folder)


def test_an_adapter_without_weights_or_peft(adapted, tmp_path, monkeypatch):
    folder = shutil.copytree(adapted, tmp_path / "model")
    (folder / "adapter_model.safetensors").unlink()
    with refused(
        f"{str(folder)!r} must hold adapter_model.safetensors beside adapter_config.json, got none; add it, or remove "
        "that file to load the model alone",
        FileNotFoundError,
    ):
        PPLlavaForConditionalGeneration.from_pretrained(folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused(
        f"the adapter in {str(folder)!r} needs peft, which is missing; pip install peft, or remove adapter_config.json "
        "to load the model alone",
        ImportError,
    ):
        PPLlavaForConditionalGeneration.from_pretrained(folder)


def test_an_adapter_that_takes_all_memory_or_time(tmp_path):
    lora_run(tmp_path / "run", "peft")
    file = tmp_path / "run" / "adapter_config.json"
    settings = json.loads(file.read_text())
    for changes, message in (
        (
            {"r": 10**9},
            "ranks of at most 40, the longest side of its weights, got 1000000000 for r; pass the two that "
            "belong together",
        ),
        *(
            (
                {"alpha_pattern": {pattern: 4}},
                f"names of layers or simple patterns in alpha_pattern, got {pattern!r}; "
                "write it without repeated groups",
            )
            for pattern in ("(q+)+_proj", ".*.*.*.*.*q_proj")
        ),
    ):
        file.write_text(json.dumps({**settings, **changes}))
        with refused(f"{str(file)!r} must have {message}"):
            convert_checkpoint(tmp_path / "run", tmp_path / "model", base=FOLDERS["clip"], clip=CLIP)


# Sizes


@pytest.mark.parametrize(
    ("section", "key", "most"),
    [
        ("text_config", "num_hidden_layers", 1_000),
        ("text_config", "hidden_size", 2**17),
        ("text_config", "vocab_size", 2**24),
        ("vision_config", "intermediate_size", 2**20),
        ("vision_config", "num_attention_heads", 10_000),
        ("vision_config", "image_size", 2**14),
        ("vision_config", "num_channels", 2**10),
        ("guide_config", "max_position_embeddings", 2**17),
        (None, "projection_dim", 2**17),
    ],
)
def test_sizes_that_cannot_be(whole, tmp_path, section, key, most):
    for value in (10**9, 10**19, -1, 0, *((1e9, float("nan")) if section else ())):
        config = json.loads((whole / "config.json").read_text())
        (config if section is None else config[section])[key] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        name = key if section is None else f"{key} of {section}"
        with refused(f"{name} must be in 1 ... {most:,}, got {value!r}; correct the configuration"):
            PPLlavaConfig.from_pretrained(tmp_path)


def test_sizes_of_the_original_that_cannot_be():
    text = {**config_of("siglip")["text_config"], "num_hidden_layers": 10**9}
    for family, changes, name, most in (
        ("siglip", {"text_config": text}, "num_hidden_layers of text_config", 1_000),  # Qwen2 lists its layers
        ("clip", {"max_T": 10**9}, "adapter_max_frames of vision_config", 2**20),
    ):
        with refused(f"{name} must be in 1 ... {most:,}, got 1000000000; correct the configuration"):
            original.translate_config(config_of(family, **changes), FOLDERS[family])


def test_sizes_of_a_processor_that_cannot_be():
    _, processor = tiny()
    parts = processor.tokenizer, processor.guide_tokenizer
    for name, most in (("image_size", 2**14), ("patch_size", 2**14), ("guide_max_length", 2**17)):
        with refused(f"{name} must be in 1 ... {most:,}, got 1000000000; correct the configuration"):
            PPLlavaProcessor(*parts, **{name: 10**9})
    message = "pooling_output_size must be at most 1,048,576 tokens, got [1000, 1000, 1000]; pass a smaller one"
    with refused(message):
        PPLlavaProcessor(*parts, pooling_output_size=(1000, 1000, 1000))
    with refused(message):
        PPLlavaConfig(pooling_output_size=(1000, 1000, 1000))
    edge = 42 * 10**6
    with refused(
        f"image_grid_pinpoints must be grids of at most 1,024 views, got [{edge}, {edge}] pixels; pass a smaller one"
    ):
        PPLlavaProcessor(*parts, image_size=42, patch_size=7, image_grid_pinpoints=[[edge, edge]])


# Written


def test_what_is_written_is_on_the_disk_before_it_has_its_name(source, tmp_path, monkeypatch):
    synced, fsync, rename = set(), os.fsync, Path.rename

    def note(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def move(path, target):
        for each in (path, *path.rglob("*")):
            assert each.stat().st_ino in synced, each
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", move)
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "new", tmp_path / "there"):
        report = convert_checkpoint(source, folder)
        assert folder.parent.stat().st_ino in synced or folder.stat().st_ino in synced
        assert {"model.safetensors", "tokenizer.json", "guide_tokenizer"} <= {*report.written}


def test_new_folders_have_the_rights_of_new_folders(source, tmp_path):
    before = os.umask(0o027)
    try:
        convert_checkpoint(source, tmp_path / "model")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o750
