"""Folders of strangers: nothing in them runs, nothing outside of them is read, and what cannot be is said at once."""

import ast
import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest
from checkpoints import CLIP, FOLDERS, config_of, copy, refused, words, write
from tiny import tiny
from transformers import AutoProcessor, dynamic_module_utils
from typer.testing import CliRunner

from ppllava import PPLlavaConfig, PPLlavaForConditionalGeneration, PPLlavaProcessor, cli, original, weights
from ppllava.convert import convert_checkpoint

ROOT = Path(__file__).parent.parent

# Code


def loading_calls():
    """(place, call) of each `from_pretrained` and of each `from_config` of an Auto class."""
    for path in sorted(path for name in ("ppllava", "benchmarks", "hub") for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner, name = ast.unparse(node.func.value), node.func.attr
                if name == "from_pretrained" or (name == "from_config" and owner.startswith("Auto")):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", owner, node


def test_every_load_refuses_code():
    calls = [call for call in loading_calls() if call[1] not in ("super()", "LoraConfig")]  # the latter knows no code
    assert len(calls) >= 8
    for place, _, call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("trust_remote_code") == "False", place


CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({marker!r}).touch()
class Other(PreTrainedTokenizerFast):
    pass
"""
MAPS = {
    "tokenizer_config.json": {"AutoTokenizer": [None, "code.Other"]},
    "guide_tokenizer/tokenizer_config.json": {"AutoTokenizer": [None, "code.Other"]},
    "processor_config.json": {"AutoProcessor": "code.Other"},
    "config.json": {"AutoConfig": "code.Other", "AutoModelForImageTextToText": "code.Other"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for part in tiny():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def mapped(whole, tmp_path, monkeypatch):
    """A function that makes a folder with code for one of its files to name; (folder, what the code makes)."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(name):
        folder, marker = shutil.copytree(whole, tmp_path / "model"), tmp_path / "marker"
        content = json.loads((folder / name).read_text())
        content.pop("tokenizer_class", None)  # a class of transformers would be taken without a question
        (folder / name).write_text(json.dumps({**content, "auto_map": MAPS[name]}))
        (folder / name).with_name("code.py").write_text(CODE.format(marker=str(marker)))
        return folder, marker

    return make


@pytest.mark.parametrize("name", MAPS)
def test_ask_runs_no_code_and_asks_nobody(mapped, tmp_path, name):
    folder, marker = mapped(name)
    clip = tmp_path / "none.mp4"
    result = CliRunner().invoke(cli.app, ["ask", str(clip), "What?", "--model", str(folder)], input="y\n" * 9)
    assert result.stdout == ""
    assert "[y/N]" not in result.stderr
    assert not marker.exists()
    if "tokenizer" in name:
        assert result.exit_code == 4
        assert result.stderr == (
            f"ppllava: the model in {str(folder)!r} cannot be loaded: it needs Python code of its own, which is never "
            "run; give it a tokenizer that transformers has\n"
        )
    else:
        assert result.exit_code == 3  # there is no such clip


def test_convert_runs_no_code(mapped, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, marker = mapped("tokenizer_config.json")
    with pytest.raises(ValueError, match=r"must hold a tokenizer, got .* custom code .*; pass the folder of one$"):
        convert_checkpoint(folder, tmp_path / "converted")
    assert not marker.exists()


def test_processors_run_code_for_those_who_say_so(mapped, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    folder, marker = mapped("tokenizer_config.json")
    for load in (PPLlavaProcessor, AutoProcessor):
        with pytest.raises(ValueError, match="custom code"):
            load.from_pretrained(folder)
    assert not asked
    assert not marker.exists()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()
    assert isinstance(processor, PPLlavaProcessor)
    assert type(processor.tokenizer).__name__ == "Other"


def test_a_language_model_runs_no_code(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    config = json.loads((whole / "config.json").read_text())
    config["text_config"] = {
        **tiny()[0].config.guide_config.to_dict(),  # no language model
        "vocab_size": config["text_config"]["vocab_size"],
        "auto_map": {"AutoModelForCausalLM": "code.Other"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"custom code|text_config"):
        PPLlavaForConditionalGeneration(PPLlavaConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("section", [None, "text_config"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_names_no_kernel_of_the_hub(whole, tmp_path, section, key):
    config = json.loads((whole / "config.json").read_text())
    (config if section is None else config[section])[key] = "some/kernel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(
        f"{key} in the config.json of {str(tmp_path)!r} must be one that transformers has, got 'some/kernel'; remove "
        "it, and pass it to from_pretrained where you trust it"
    ):
        PPLlavaConfig.from_pretrained(tmp_path)
    assert PPLlavaConfig.from_pretrained(whole, attn_implementation="eager")._attn_implementation == "eager"


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
def test_convert_opens_regular_files_only(source, tmp_path, name, kind):
    path = source / name
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    with refused(f"{str(path)!r} must be a regular file, got {kind}; remove it, and download the file again"):
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
        ("guide_config", "max_position_embeddings", 2**17),
        (None, "projection_dim", 2**17),
    ],
)
def test_sizes_that_cannot_be(whole, tmp_path, section, key, most):
    for value in (10**9, 10**19, 1e9, -1, 0, float("nan")):
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
