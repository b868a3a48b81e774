"""The model on disk: round trips, and weights that are not exactly its own."""

import random
import re

import pytest
import torch
from checkpoints import copy, refused, weights_of, write
from safetensors.torch import load_file, save_file
from tiny import batch, close, fresh, generate, tiny
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from ppllava import PPLlavaConfig, PPLlavaForConditionalGeneration, PPLlavaModel, PPLlavaProcessor
from ppllava.weights import read_files

INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
BIAS = "model.multi_modal_projector.linear_1.bias"
HEAD = "model.language_model.lm_head.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    model, processor = tiny()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_round_trip(folder, auto):
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in INFO)
    assert isinstance(model, PPLlavaForConditionalGeneration)
    assert model.config.to_dict().keys() == tiny()[0].config.to_dict().keys()
    expected = tiny()[0].state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, PPLlavaProcessor)
    inputs = batch(4, 5, processor=processor)
    assert inputs.keys() == batch(4, 5).keys()
    assert all(torch.equal(value, inputs[name]) for name, value in batch(4, 5).items())
    close(model(**inputs).logits, tiny()[0](**inputs).logits, 1e-4)
    assert generate(model, inputs) == generate(tiny()[0], inputs)


def test_base_model_and_config_load(folder):
    assert isinstance(AutoConfig.from_pretrained(folder), PPLlavaConfig)
    model = AutoModel.from_pretrained(folder)
    assert isinstance(model, PPLlavaModel)
    assert torch.equal(model.guide.logit_scale, tiny()[0].model.guide.logit_scale)


def test_loading_in_bfloat16_keeps_the_scale(folder):
    model = PPLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.model.guide.logit_scale.dtype == torch.float32
    assert {p.dtype for name, p in model.named_parameters() if "logit_scale" not in name} == {torch.bfloat16}


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText])
def test_arguments_pass_through(folder, auto):
    model, info = auto.from_pretrained(folder, dtype=torch.float16, device_map="meta", output_loading_info=True)
    assert not any(info[name] for name in INFO)  # the head that AutoModel leaves over is no surplus
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for name, p in model.named_parameters() if "logit_scale" not in name} == {torch.float16}


def test_shards_and_a_state_dict(tmp_path):
    model = tiny()[0]
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    given = PPLlavaForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    for loaded in (PPLlavaForConditionalGeneration.from_pretrained(tmp_path), given):
        assert torch.equal(loaded.get_parameter(BIAS), model.get_parameter(BIAS))


def test_tied_weights(tmp_path):
    model = fresh(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "whole")
    assert HEAD not in load_file(tmp_path / "whole" / "model.safetensors")
    model.model.save_pretrained(tmp_path / "base")
    for name in ("whole", "base"):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert torch.equal(loaded.get_parameter(HEAD), model.get_parameter(HEAD))
        assert isinstance(AutoModel.from_pretrained(tmp_path / name), PPLlavaModel)


def test_tied_weights_that_differ(tmp_path):
    model = fresh(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.config.save_pretrained(tmp_path)
    message = (
        f"{HEAD} in {str(tmp_path)!r} must equal model.language_model.model.embed_tokens.weight where "
        "tie_word_embeddings is true, got other numbers; correct config.json"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PPLlavaForConditionalGeneration.from_pretrained(tmp_path)


# Weights that are not those of the model


@pytest.fixture
def changed(folder, tmp_path):
    """A function that writes the checkpoint with other weights: None leaves one out."""

    def write(weights):
        tiny()[0].config.save_pretrained(tmp_path)
        whole = {**load_file(folder / "model.safetensors"), **weights}
        kept = {name: value for name, value in whole.items() if value is not None}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return write


def error(folder, got, cls="PPLlavaForConditionalGeneration", remedy=""):
    message = (
        f"the weights in {str(folder)!r} must be exactly those of {cls} with its config.json, got {got}; "
        f"load a folder as save_pretrained wrote it{remedy}"
    )
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


RANDOM = ", or pass ignore_mismatched_sizes=True to make the mis-shaped ones random"


@pytest.mark.parametrize("auto", [PPLlavaForConditionalGeneration, AutoModelForImageTextToText])
@pytest.mark.parametrize(
    ("weights", "got", "remedy"),
    [
        ({BIAS: None}, f"1 missing: {BIAS}", ""),
        ({HEAD: None}, f"1 missing: {HEAD}", ""),
        ({"extra": torch.ones(1)}, "1 unexpected: extra", ""),
        ({"lm_head.bias": torch.ones(320)}, "1 unexpected: lm_head.bias", ""),
        ({BIAS: torch.ones(3)}, f"1 mis-shaped: {BIAS} [3] instead of [48]", RANDOM),
        (
            {"extra.b": torch.ones(1), "extra.a": torch.ones(1), BIAS: None, "model.guide.logit_scale": torch.ones(2)},
            f"1 missing: {BIAS}; 2 unexpected: extra.a, extra.b; "
            "1 mis-shaped: model.guide.logit_scale [2] instead of []",
            RANDOM,
        ),
    ],
)
def test_wrong_weights(changed, weights, got, remedy, auto):
    folder = changed(weights)
    with error(folder, got, remedy=remedy):
        auto.from_pretrained(folder)


@pytest.mark.parametrize(
    ("weights", "got"),
    [
        ({BIAS: None}, f"1 missing: {BIAS.removeprefix('model.')}"),
        ({"extra": torch.ones(1)}, "1 unexpected: extra"),
        ({"lm_head.bias": torch.ones(320)}, "1 unexpected: lm_head.bias"),
    ],
)
def test_wrong_weights_of_the_base_model(changed, weights, got):
    folder = changed(weights)
    with error(folder, got, "PPLlavaModel"):
        AutoModel.from_pretrained(folder, output_loading_info=True)


def test_many_wrong_weights_are_counted(changed):
    folder = changed({f"extra.{i:02}": torch.ones(1) for i in range(37)})
    first = ", ".join(f"extra.{i:02}" for i in range(10))
    with error(folder, f"37 unexpected: {first} and 27 more"):
        PPLlavaForConditionalGeneration.from_pretrained(folder)


def test_a_base_model_has_the_head_too(tmp_path):
    tiny()[0].model.save_pretrained(tmp_path)
    loaded = PPLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_parameter(HEAD), tiny()[0].get_parameter(HEAD))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_are_numbers(changed, value):
    weight = tiny()[0].get_parameter(BIAS).detach().clone()
    weight[7] = value
    folder = changed({BIAS: weight})
    message = (
        f"the weights in {str(folder)!r} must be finite numbers, got NaN or infinity in 1: {BIAS}; download or convert "
        "them again"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PPLlavaForConditionalGeneration.from_pretrained(folder)


def test_ignore_mismatched_sizes_ignores_nothing_else(changed):
    ignore = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = AutoModelForImageTextToText.from_pretrained(changed({BIAS: torch.ones(3)}), **ignore)
    assert model.get_parameter(BIAS).shape == (48,)
    assert {name for name, *_ in info["mismatched_keys"]} == {BIAS}
    folder = changed({BIAS: torch.ones(3), HEAD: None})
    with error(folder, f"1 missing: {HEAD}"):
        AutoModelForImageTextToText.from_pretrained(folder, **ignore)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"pooling": "none"}, 5 * 36),
        ({"pooling": "temporal_mean"}, 36),
        ({"pooling": "adaptive_mean", "pooling_output_size": [2, 3, 3]}, 18),
        ({"pooling_output_size": [2, 2, 2]}, 8),
    ],
)
def test_another_pooling_of_the_same_weights(folder, fields, tokens):
    model = AutoModelForImageTextToText.from_pretrained(folder, **fields)
    processor = AutoProcessor.from_pretrained(folder, **fields)
    inputs = batch(5, 0, processor=processor)
    assert int((inputs["input_ids"] == 3).sum()) == tokens
    assert ("guide_input_ids" in inputs) == ("pooling" not in fields)
    assert len(generate(model, inputs)) == 2


# Folders of the original


@pytest.fixture
def source(tmp_path):
    return copy(tmp_path / "source")


TABLE = "multi_modal_projector.clip_text_model.embeddings.position_embedding"


def test_a_third_table(source):
    write(source, weights_of() | {f"{TABLE}.weight": torch.zeros(248, 24)})
    with refused(
        f"the weights in {str(source)!r} must have one position table or the original's two, got {TABLE}.weight beside "
        "those; remove it"
    ):
        PPLlavaForConditionalGeneration.from_pretrained(source)


@pytest.mark.parametrize(
    ("key", "shape", "got"),
    [
        (TABLE, [77, 24], "model.guide.text_model.embeddings.position_embedding.weight [77, 24] instead of [248, 24]"),
        (
            f"{TABLE}_res",
            [77, 24],
            "model.guide.text_model.embeddings.position_embedding.weight [77, 24] instead of [248, 24]",
        ),
        (TABLE, [], "model.guide.text_model.embeddings.position_embedding.weight [] instead of [248, 24]"),
        ("multi_modal_projector.logit_scale", [2], "model.guide.logit_scale [2] instead of []"),
    ],
)
def test_wrong_shapes_loaded_as_they_are(source, key, shape, got):
    write(source, weights_of() | {key: torch.ones(shape)})
    with error(source, f"1 mis-shaped: {got}", remedy=RANDOM):
        PPLlavaForConditionalGeneration.from_pretrained(source)


@pytest.mark.parametrize(
    "file", ["non_lora_trainables.bin", "adapter_model.safetensors", "adapter_config.json", "model_more.safetensors"]
)
@pytest.mark.parametrize("cls", [PPLlavaForConditionalGeneration, PPLlavaModel])
def test_files_that_a_direct_load_would_leave_out(source, file, cls):
    if file.endswith(".json"):
        (source / file).write_text("{}")
    else:
        write(source, {"image_newline": torch.zeros(40)}, file=file)
    with refused(
        f"{str(source)!r} must hold its weights in model.safetensors or pytorch_model.bin alone to be loaded directly, "
        f"got also {file}; use ppllava convert, and load what it wrote"
    ):
        cls.from_pretrained(source)


# Files


class Other:
    """Not a tensor."""


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        *(
            (
                "pytorch_model.bin",
                lambda path, tensor=tensor: torch.save({"a": tensor}, path),
                f"{{path!r}} must hold plain tensors by name, got a {kind} tensor for a; nothing else is unpickled, "
                "save it as safetensors where you trust it",
            )
            for kind, tensor in (("meta", torch.ones(3, device="meta")), ("torch.sparse_coo", torch.eye(3).to_sparse()))
        ),
        (
            "pytorch_model.bin",
            lambda path: torch.save({"a": Other()}, path),
            "{path!r} must hold plain tensors by name, got test_checkpoints.Other; nothing else is unpickled, save it "
            "as safetensors where you trust it",
        ),
        (
            "pytorch_model.bin",
            lambda path: torch.save([torch.ones(1)], path),
            "{path!r} must hold plain tensors by name, got list; nothing else is unpickled, save it as safetensors "
            "where you trust it",
        ),
        (
            "model.safetensors",
            lambda path: path.write_bytes(b"123"),
            "{path!r} must be a whole safetensors file, got Error while deserializing header: header too small; "
            "download it again",
        ),
    ],
)
def test_broken_files(tmp_path, name, write, message):
    tiny()[0].config.save_pretrained(tmp_path)
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(path=str(tmp_path / name)))}$"):
        PPLlavaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files(tmp_path, zipped):
    file, draw, messages = tmp_path / "model.bin", random.Random(0), []
    torch.save({"a": torch.ones(10), "b": torch.zeros(3, 3)}, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    for i in range(150):
        content = bytearray(whole if i % 3 else whole[: draw.randrange(len(whole))])
        for _ in range(10 if i % 3 else 0):
            content[draw.randrange(min(2000, len(content)))] = draw.randrange(256)
        file.write_bytes(content)
        try:
            read_files([file])
        except ValueError as error:
            messages.append(str(error))
    kinds = "be a whole file of torch.save|hold plain tensors by name"
    pattern = re.compile(rf"{re.escape(repr(str(file)))} must ({kinds}), got .*; .*")
    assert len(messages) > 100
    assert not [message for message in messages if not pattern.fullmatch(message)]
