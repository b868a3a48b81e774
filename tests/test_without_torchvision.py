"""Images, videos and pipelines work where torchvision is not installed."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys

sys.modules["torchvision"] = None  # importing it raises ImportError

import numpy as np
from PIL import Image
from transformers import AutoProcessor, pipeline

from ppllava import presets

model, processor = presets.build("tiny")
processor.save_pretrained(sys.argv[1])
model.config.save_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
content = [
    {"type": "image", "image": Image.new("RGB", (90, 40))},
    {"type": "video", "video": np.zeros((4, 30, 40, 3), np.uint8)},
    {"type": "text", "text": "What is it?"},
]
talk = pipeline("image-text-to-text", model=model, processor=processor)
talk(text=[{"role": "user", "content": content}], max_new_tokens=2)
print("worked")
"""


def test_without_torchvision(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.stdout.splitlines()[-1:] == ["worked"], run.stderr
