"""From the original's folders to answers, on the command line: convert, load, ask."""

import json
import os
import re

import pytest
import torch
from clips import encode
from golden_batches import batch
from golden_data import GOLDEN, close
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast
from typer.testing import CliRunner

from ppllava.cli import app
from ppllava.convert import convert_checkpoint

SIZES = {"model": (92, 90), "model_qwen": (84, 80)}  # words of the language model, the id of <image>
GUIDE_WORDS = {"model": 99, "model_qwen": 70}


def save_tokenizer(folder, words, image=None):
    """One token per word of a made-up language."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, words))]
    if image is not None:
        names[image] = "<image>"
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(name, special=True) for name in names[:4]])
    if image is not None:
        backend.add_special_tokens([AddedToken("<image>", special=True)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["model", "model_qwen"])
def converted(request, tmp_path_factory):
    """(case, folder) as `ppllava convert` writes it."""
    case, root = request.param, tmp_path_factory.mktemp("converted")
    words = save_tokenizer(root / "words", *SIZES[case])
    guide = save_tokenizer(root / "guide", GUIDE_WORDS[case])
    command = ["convert", GOLDEN / case / "hf", root / "model", "--tokenizer", words, "--guide-tokenizer", guide]
    run = CliRunner().invoke(app, list(map(str, command)))
    assert (run.exit_code, run.stderr) == (0, "")
    assert "written" in run.stdout
    return case, root / "model"


def test_the_converted_folder_needs_nothing_else(converted):
    case, folder = converted
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    made = batch(model, case, "video")
    with torch.no_grad():
        close(model(**made.inputs()).logits, made.outputs()["logits"], 1e-3)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.visual_pooling == model.config.visual_pooling
    assert (processor.image_token_id, processor.video_token_id) == (model.config.image_token_id, SIZES[case][0])


def test_it_answers(converted, tmp_path):
    _, folder = converted
    clips = [str(encode(tmp_path / f"{i}.mp4", frames=12 + 6 * i, fps=4)) for i in range(2)]
    Image.new("RGB", (60, 40)).save(tmp_path / "picture.png")
    options = ["--model", str(folder), "--frames", "4", "--max-new-tokens", "6", "--json"]

    def ask(*media):
        result = CliRunner().invoke(app, ["ask", *options, *media, "w7 w8 w9"])
        assert result.exit_code == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    alone = [ask(clip)[0] for clip in clips]
    assert all(one["new_tokens"] <= 6 and one["media"][0]["kind"] == "video" for one in alone)
    [both] = ask(*clips, str(tmp_path / "picture.png"))
    assert [medium["kind"] for medium in both["media"]] == ["video", "video", "image"]
    batched = ask("--each", *clips)
    assert [one["answer"] for one in batched] == [one["answer"] for one in alone]


def test_a_folder_without_a_processor(tmp_path):
    convert_checkpoint(GOLDEN / "model" / "hf", tmp_path / "model")
    clip = encode(tmp_path / "clip.mp4", frames=4)
    result = CliRunner().invoke(app, ["ask", "--model", str(tmp_path / "model"), str(clip), "What?"])
    assert result.exit_code == 4
    assert result.stderr == (
        f"ppllava: the model in {str(tmp_path / 'model')!r} cannot be loaded: it has no processor_config.json; convert "
        "it again, with --tokenizer and --guide-tokenizer\n"
    )


def test_tokenizers_of_another_model(tmp_path):
    words = save_tokenizer(tmp_path / "words", *SIZES["model_qwen"])
    guide = save_tokenizer(tmp_path / "guide", 71)
    message = (
        f"the vocabulary of guide_config must have a row for each token, got 70 rows and the id 70 from {guide!r}; "
        "pass the tokenizer of this model"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        convert_checkpoint(GOLDEN / "model_qwen" / "hf", tmp_path / "model", tokenizer=words, guide_tokenizer=guide)


def test_the_folder_has_the_mode_that_the_umask_leaves(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", None)  # it is the process's: between two calls another thread has no umask
        convert_checkpoint(GOLDEN / "model" / "hf", tmp_path / "model")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
