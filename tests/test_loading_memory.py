"""Loading keeps no second copy of the weights in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ppllava import PPLlavaConfig, PPLlavaForConditionalGeneration, presets

PRESET = os.environ.get("PPLLAVA_TEST_LOADING", "")


def wide():
    """`small` with a wider language model: 160 MB in bfloat16, in a second."""
    config = presets.preset_config("small").to_dict()
    config["text_config"].update(hidden_size=1024, intermediate_size=2816, num_hidden_layers=5)
    return PPLlavaForConditionalGeneration._from_config(PPLlavaConfig(**config), dtype=torch.bfloat16)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; run on Linux")
@pytest.mark.timeout(1200)
def test_no_second_copy(tmp_path):
    """PPLLAVA_TEST_LOADING=vicuna-7b runs it with that preset, with 15 GB of disk and of memory."""
    model = presets.build(PRESET, dtype=torch.bfloat16)[0] if PRESET else wide()
    model.save_pretrained(tmp_path)
    del model
    script = Path(__file__).parent / "load_and_measure.py"
    out = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=True)
    measured = json.loads(out.stdout.splitlines()[-1])
    assert measured["samples"] > 10
    assert measured["weights"] > 100e6
    assert measured["anonymous"] < 0.2 * measured["weights"], measured
