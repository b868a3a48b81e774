"""Folders of strangers: none of their code runs, and nobody is asked to run it."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from checkpoints import refused
from tiny import tiny
from transformers import AutoProcessor, dynamic_module_utils
from typer.testing import CliRunner

from ppllava import PPLlavaConfig, PPLlavaForConditionalGeneration, PPLlavaProcessor, cli
from ppllava.convert import convert_checkpoint

ROOT = Path(__file__).parent.parent


def loading_calls():
    """(place, call) of each `from_pretrained` and of each `from_config` of an Auto class."""
    for path in sorted(path for name in ("ppllava", "benchmarks", "hub") for path in (ROOT / name).rglob("*.py")):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)) if re.search("from_(pretrained|config)", source) else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner, name = ast.unparse(node.func.value), node.func.attr
                if name == "from_pretrained" or (name == "from_config" and owner.startswith("Auto")):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", owner, node


def test_every_load_refuses_code():
    calls = [call for call in loading_calls() if call[1] not in ("super()", "LoraConfig")]  # the latter knows no code
    assert len(calls) >= 8
    for place, _, call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if place.startswith("ppllava/processing_ppllava.py"):  # which asks nobody, as the tests below show
            continue
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


def test_a_guide_without_its_tokenizer(mapped):
    """Transformers would take the tokenizer of the language model, and the guide would read other words."""
    folder, _ = mapped("guide_tokenizer/tokenizer_config.json")
    with pytest.raises(ValueError, match="custom code"):
        AutoProcessor.from_pretrained(folder)
    shutil.rmtree(folder / "guide_tokenizer")
    with refused(
        f"{str(folder)!r} must hold the guide's tokenizer in guide_tokenizer, got none; convert the model again with "
        "--guide-tokenizer",
        FileNotFoundError,
    ):
        AutoProcessor.from_pretrained(folder)


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
    (tmp_path / "config.json").write_text(json.dumps({**config, "attn_implementation": {"text_config": "some/kernel"}}))
    with pytest.raises(ValueError, match="must be one that transformers has"):
        PPLlavaConfig.from_pretrained(tmp_path)
    assert PPLlavaConfig.from_pretrained(whole, attn_implementation="eager")._attn_implementation == "eager"
