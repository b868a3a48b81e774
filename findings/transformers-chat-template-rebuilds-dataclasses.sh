#!/usr/bin/env bash
# transformers 5.24.0: `ProcessorMixin.apply_chat_template` rebuilds the messages that it is given. A dataclass in a block
# becomes a dict of its fields, a NamedTuple a plain tuple, before the processor gets the media; with 5.23.0 the processor
# got the very objects. A processor that takes an object of its own as a video, such as frames with their times, fails
# from 5.24 on: "must be a path, frames ..., got dict".
#
# Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/run.py" <<'PYTHON'
import dataclasses
import sys
from typing import NamedTuple

import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, ProcessorMixin


@dataclasses.dataclass
class Clip:
    frames: list


class Times(NamedTuple):
    first: float


class Processor(ProcessorMixin):
    def __init__(self, tokenizer, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, text=None, images=None, videos=None, **kwargs):
        self.given = videos[0] if not isinstance(videos[0], list) else videos[0][0]
        return {"input_ids": [[0]]}


tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
processor = Processor(tokenizer, chat_template="a")
seen = []
for video in (Clip([1]), Times(0.5)):
    message = {"role": "user", "content": [{"type": "video", "video": video}]}
    processor.apply_chat_template([message], tokenize=True, return_dict=True)
    seen.append(type(processor.given).__name__)
print("transformers", transformers.__version__, "gives", seen)
sys.exit(seen != sys.argv[1].split(","))
PYTHON
python3 -m venv "$folder/venv"
for case in "5.23.0 Clip,Times" "5.24.0 dict,tuple"; do
    read -r version expected <<< "$case"
    "$folder/venv/bin/pip" install --quiet "transformers==$version" torch==2.13.0 jinja2 pillow
    "$folder/venv/bin/python" "$folder/run.py" "$expected"
done
