"""Checkpoints that cannot be converted: one sentence, and nothing written."""

import json
import os
import re
import sys

import pytest
import torch
from checkpoints import (
    CLIP,
    FOLDERS,
    config_of,
    copy,
    lora_run,
    refused,
    weights_of,
    words,
    write,
)
from safetensors.torch import load_file

from ppllava.convert import convert_checkpoint


@pytest.fixture
def source(tmp_path):
    return copy(tmp_path / "source")


@pytest.fixture
def refuses(tmp_path):
    """A function that expects an error, and that nothing was written."""

    def check(message, *args, error=ValueError, **kwargs):
        parent = tmp_path / "results"
        with refused(message, error):
            convert_checkpoint(*args, parent / "model", **kwargs)
        assert not parent.exists() or not list(parent.iterdir())

    return check


def test_folders(source, tmp_path, refuses):
    message = "{} must be a folder, got {!r}; download the model and pass its folder"
    for name in ("base", "clip", "adapter", "tokenizer", "guide_tokenizer"):
        folder = tmp_path / "nowhere"
        refuses(message.format(name, str(folder)), source, error=FileNotFoundError, **{name: folder})
    refuses(message.format("source", "nowhere"), "nowhere", error=FileNotFoundError)
    refuses(
        f"{str(tmp_path)!r} must be a folder with a config.json, got none; pass the model's folder",
        tmp_path,
        error=FileNotFoundError,
    )


def test_destinations(source, tmp_path):
    message = f"destination must be another folder than source, got {str(source)!r} for both; name a new one"
    with refused(message):
        convert_checkpoint(source, source / ".." / "source")
    full = write(tmp_path / "full", config={})
    for destination in (full, full / "config.json"):
        with refused(f"destination must be a new or an empty folder, got {str(destination)!r}; name a new one"):
            convert_checkpoint(source, destination)
    (tmp_path / "empty").mkdir()
    convert_checkpoint(source, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON, got Expecting property name enclosed in double quotes: line 1 column 2 (char 1); download "
        "it again"),
        ("[]", "must be a JSON object, got list; download it again"),
        ('{"model_type": "llava_next"}', "must be that of a PPLLaVA, got model_type 'llava_next'; pass the folder of "
        "its checkpoint, and LLaVA as base"),
    ],
)  # fmt: skip
def test_config_files(source, refuses, content, message):
    (source / "config.json").write_text(content)
    refuses(f"{str(source / 'config.json')!r} {message}", source)


def test_no_weights(source, refuses):
    (source / "model.safetensors").rename(source / "weights.safetensors")
    refuses(
        f"{str(source)!r} must hold weights, model*.safetensors or model*.bin, got none; pass the folder that does",
        source,
        error=FileNotFoundError,
    )


@pytest.mark.parametrize("index", [False, True])
def test_missing_shard(source, refuses, index):
    name = "model-00001-of-00002.safetensors"
    (source / "model.safetensors").rename(source / name)
    lost = "model-00002-of-00002.safetensors"
    if index:
        lost = "model-extra.safetensors"
        (source / name).rename(source / "model.safetensors")
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": lost}}))
    message = f"{str(source)!r} must hold all shards of its weights, got no {lost}; download it again"
    refuses(message, source, error=FileNotFoundError, base=FOLDERS["clip"])


def test_weight_in_two_files(source, refuses):
    name = "image_newline"
    write(source, {name: torch.zeros(40)}, file="model_too.safetensors")
    refuses(
        f"{name} must be in one file, got model.safetensors and {source / 'model_too.safetensors'}; remove one of them",
        source,
    )


@pytest.mark.parametrize(
    ("kept", "reason"), [(200, "incomplete metadata, file not fully covered"), (-1, None), (0, None)]
)
def test_truncated_safetensors(source, refuses, kept, reason):
    file = source / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[: {200: header + 200, -1: -1, 0: 0}[kept]])
    reason = reason or ("header too small" if kept == 0 else "incomplete metadata, file not fully covered")
    refuses(
        f"{str(file)!r} must be a whole safetensors file, got Error while deserializing header: {reason}; download it "
        "again",
        source,
    )


def test_truncated_bin(source, refuses):
    (source / "model.safetensors").unlink()
    file = source / "model.bin"
    torch.save(weights_of(), file)
    file.write_bytes(file.read_bytes()[:-1000])
    reason = "PytorchStreamReader failed reading zip archive: failed finding central directory"
    refuses(f"{str(file)!r} must be a whole file of torch.save, got {reason}; download it again", source)


class Payload:
    """What a pickle can do that `weights_only` does not let it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "got"),
    [
        (lambda path: {"image_newline": Payload(path)}, f"{os.mkdir.__module__}.mkdir"),
        (lambda path: [torch.zeros(1)], "list"),
        (lambda path: {"model": {"image_newline": torch.zeros(40)}}, "dict for model"),
        (lambda path: {"epoch": 3}, "int for epoch"),
    ],
)
def test_bin_that_is_not_plain_tensors(source, tmp_path, refuses, content, got, zipped):
    file = source / "non_lora_trainables.bin"
    torch.save(content(tmp_path / "made"), file, _use_new_zipfile_serialization=zipped)
    refuses(
        f"{str(file)!r} must hold plain tensors by name, got {got}; nothing else is unpickled, save it as safetensors "
        "where you trust it",
        source,
    )
    assert not (tmp_path / "made").exists()


TABLES = "multi_modal_projector.clip_text_model.embeddings"
LINEAR = "multi_modal_projector.linear_1.bias"


@pytest.mark.parametrize(
    ("changes", "got", "remedy"),
    [
        ({LINEAR: None}, f"1 missing: model.{LINEAR}", "pass the folder of a model that has them with --base"),
        (
            {"multi_modal_projector.clip_visual_ln.bias": None, LINEAR: None},
            f"2 missing: model.guide.norm.bias, model.{LINEAR}",
            "pass the folder of a model that has them with --base and --clip",
        ),
        ({"extra.b": torch.ones(1), "extra.a": torch.ones(1)}, "2 unexpected: extra.a, extra.b", ""),
        (
            {"vision_tower.vision_model.encoder.layers.4.layer_norm1.bias": torch.ones(32)},
            "1 unexpected: vision_tower.vision_model.encoder.layers.4.layer_norm1.bias",
            "",
        ),
        ({LINEAR: torch.ones(3)}, f"1 mis-shaped: {LINEAR} in {{file!r}} [3] instead of [40]", ""),
        (
            {LINEAR: torch.ones(40, dtype=torch.int8)},
            f"1 mis-shaped: {LINEAR} in {{file!r}} torch.int8 instead of floating point",
            "",
        ),
        (
            {f"{TABLES}.{name}": torch.ones(77, 24) for name in ("position_embedding", "position_embedding_res")},
            f"1 mis-shaped: {TABLES}.position_embedding in {{file!r}} [77, 24] instead of [248, 24]",
            "",
        ),
        (
            {f"{TABLES}.position_embedding_res": torch.ones(77, 24)},
            f"1 mis-shaped: {TABLES}.position_embedding_res in {{file!r}} [77, 24] instead of [248, 24]",
            "",
        ),
        (
            {f"{TABLES}.position_embedding.weight": torch.ones(248, 24)},
            f"1 unexpected: {TABLES}.position_embedding.weight",
            "",
        ),
        ({LINEAR: torch.full((40,), torch.nan)}, f"1 not finite: {LINEAR} in {{file!r}}", ""),
        ({LINEAR: torch.full((40,), -torch.inf)}, f"1 not finite: {LINEAR} in {{file!r}}", ""),
    ],
)
def test_wrong_weights(source, refuses, changes, got, remedy):
    # A config.json alone: the text tower is known, and nothing to fill from.
    (source / "clip_tiny" / "model.safetensors").unlink()
    write(source, {name: value for name, value in {**weights_of(), **changes}.items() if value is not None})
    got = got.format(file=str(source / "model.safetensors"))
    message = f"the weights in {str(source)!r} must be those of its config.json, got {got}; "
    refuses(message + (remedy or "download or save it again"), source)


def test_too_large_for_half_precision(source, refuses):
    write(source, weights_of() | {LINEAR: torch.full((40,), 1e5)})
    name = f"model.{LINEAR}"
    message = f"{name} must fit into torch.float16, got larger numbers; use torch.bfloat16 instead"
    refuses(message, source, dtype=torch.float16)


def test_vocabulary_without_a_free_row(source, tmp_path, refuses):
    tokenizer = words(tmp_path / "words", *(f"<{i}>" for i in range(90)))
    refuses(
        f"the vocabulary of text_config must have a row for <image>, got 96 rows and the id 96 from {str(tokenizer)!r}"
        "; pass the tokenizer of this language model",
        source,
        tokenizer=tokenizer,
        guide_tokenizer=words(tmp_path / "guide"),
    )


def test_broken_tokenizer(source, tmp_path, refuses):
    folder = words(tmp_path / "words")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(
        ValueError, match=rf"^{re.escape(repr(str(folder)))} must hold a tokenizer, got .*; pass the folder"
    ):
        convert_checkpoint(source, tmp_path / "model", tokenizer=folder, guide_tokenizer=folder)


# Adapters that are refused


def test_adapter_without_settings(tmp_path, refuses):
    source = tmp_path / "source"
    lora_run(source, "original")
    refuses(
        f'the LoRA weights in {str(source)!r} need an adapter_config.json, got none; write one with "peft_type": '
        '"LORA", "r" and "lora_alpha", which the training configuration has, and pass its folder with --adapter',
        source,
        error=FileNotFoundError,
        base=FOLDERS["clip"],
        clip=CLIP,
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    message = f"{str(empty)!r} must hold adapter_model.safetensors, got none; pass its folder"
    refuses(message, FOLDERS["clip"], error=FileNotFoundError, adapter=empty)


def test_two_adapters(tmp_path, refuses):
    lora_run(tmp_path / "one", "original")
    lora_run(tmp_path / "two", "peft")
    file = tmp_path / "two" / "adapter_model.safetensors"
    refuses(
        f"there must be one LoRA adapter, got one in {str(tmp_path / 'one')!r} and {str(file)!r}; remove one",
        tmp_path / "one",
        base=FOLDERS["clip"],
        clip=CLIP,
        adapter=tmp_path / "two",
    )
    refuses(
        f"base must be a model without LoRA weights, got 8 in {str(tmp_path / 'one')!r}; convert it first and pass the "
        "result",
        FOLDERS["clip"],
        base=tmp_path / "one",
    )


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
@pytest.mark.parametrize("value", [..., None, "16", 0, True])
def test_adapter_without_a_scale(tmp_path, refuses, name, value):
    folder = tmp_path / "source"
    lora_run(folder, "peft")
    file = folder / "adapter_config.json"
    settings = {**json.loads(file.read_text()), name: value}
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))
    got = None if value is ... else value
    refuses(
        f"{str(file)!r} must have {name} as a positive number, got {got!r}; use that of the training configuration",
        folder,
        base=FOLDERS["clip"],
        clip=CLIP,
    )


def test_a_guide_that_was_trained_further(source, tmp_path, refuses):
    weights = {key: value for key, value in weights_of().items() if not key.endswith("clip_visual_ln.bias")}
    write(source, weights, config_of(clip_post_pretrain="trained/clip"))
    refuses(
        f"{str(source)!r} must hold all weights of the guide, for clip_post_pretrain 'trained/clip' is not "
        "clip_weight, got 1 missing: model.guide.norm.bias; pass the folder of that model with --clip",
        source,
    )
    report = convert_checkpoint(source, tmp_path / "model", clip=CLIP)
    assert report.filled == {str(CLIP): ["model.guide.norm.bias"]}


@pytest.mark.parametrize("shape", [[], [77], [10, 24]])
def test_position_tables_of_clip(source, refuses, shape):
    table, file = "text_model.embeddings.position_embedding.weight", source / "clip_tiny" / "model.safetensors"
    write(source / "clip_tiny", load_file(file) | {table: torch.ones(shape)})
    write(source, {key: value for key, value in weights_of().items() if not key.startswith(TABLES)})
    refuses(
        f"the weights in {str(source)!r} must be those of its config.json, got 1 mis-shaped: {table} in {str(file)!r} "
        f"{shape} instead of [248, 24]; download or save it again",
        source,
    )


def changed_adapter(folder, settings=None, weights=None):
    lora_run(folder, "peft")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(settings or {})}))
    write(
        folder, {**load_file(folder / "adapter_model.safetensors"), **(weights or {})}, file="adapter_model.safetensors"
    )
    return folder


def test_wrong_adapters(tmp_path, refuses):
    options = {"base": FOLDERS["clip"], "clip": CLIP}
    folder = changed_adapter(tmp_path / "kind", {"peft_type": "IA3"})
    file = str(folder / "adapter_config.json")
    refuses(f"{file!r} must have peft_type 'LORA', got 'IA3'; no other adapter can be merged", folder, **options)
    folder = changed_adapter(tmp_path / "rank", {"r": 3})
    file, key = str(folder / "adapter_config.json"), "layers.0.self_attn.q_proj.lora_A.default.weight"
    with pytest.raises(
        ValueError, match=rf"^{re.escape(repr(file))} must describe the .*{re.escape(key)}.*; pass the two"
    ):
        convert_checkpoint(folder, tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()
    key = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    folder = changed_adapter(tmp_path / "more", weights={key: torch.ones(2, 40)})
    file = str(folder / "adapter_model.safetensors")
    refuses(
        f"LoRA weights must be those of layers of the model, got 1 others: {key} in {file!r}; pass the adapter of this "
        "model",
        folder,
        **options,
    )
    folder = changed_adapter(tmp_path / "other", weights={"base_model.model.model.norm.weight": torch.ones(40)})
    file = str(folder / "adapter_model.safetensors")
    refuses(
        f"{file!r} must hold LoRA weights only, got 1 others: model.norm.weight; merge the adapter with PEFT",
        folder,
        **options,
    )
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    folder = changed_adapter(tmp_path / "nan", weights={key: torch.full((40, 2), torch.nan)})
    name = "model.language_model.model.layers.1.self_attn.v_proj.weight"
    refuses(
        f"LoRA weights must be finite numbers, got NaN or infinity in 1 merged: {name}; save the adapter again",
        folder,
        **options,
    )


def test_without_peft(tmp_path, refuses, monkeypatch):
    lora_run(tmp_path / "source", "peft")
    monkeypatch.setitem(sys.modules, "peft", None)
    refuses(
        f"merging the LoRA adapter in {str(tmp_path / 'source')!r} needs peft; pip install peft",
        tmp_path / "source",
        error=ImportError,
        base=FOLDERS["clip"],
        clip=CLIP,
    )
