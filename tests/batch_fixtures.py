"""Clips, images and a model for test_batch*.py, and what plain `generate` answers."""

import clips
import pytest
import torch
from PIL import Image

from ppllava import presets, video

NEW = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    for n in range(4):
        clips.encode(folder / f"{n}.mp4", 20 + 10 * n)
    Image.fromarray(clips.draw(3, 80, 60)).save(folder / "i.png")
    Image.fromarray(clips.draw(9, 40, 90)).save(folder / "j.jpg")
    (folder / "text.mp4").write_text("not a video")
    return folder


@pytest.fixture
def made():
    """(model, processor) of their own, in float64: an answer does not hang on the rounding of its batch."""
    return presets.build("tiny", dtype=torch.float64)


def ask(medium, prompt="What is it?", **more):
    kind = "images" if isinstance(medium, list) else "video" if str(medium).endswith("mp4") else "image"
    return {"id": f"{medium} {prompt}", kind: medium, "prompt": prompt, "max_new_tokens": NEW, **more}


def alone(made, request):
    """The answer of plain `generate`."""
    model, processor = made
    kind = "video" if "video" in request else "image"
    if kind == "video":
        rate = {name: request[name] for name in ("fps", "start", "end") if name in request}
        count = None if "fps" in rate else request.get("frames", processor.num_frames)
        media = [video.read_video(request["video"], num_frames=count, **rate)]
    else:
        media = request.get("images", [request.get("image")])
    blocks = [*({"type": kind, kind: medium} for medium in media), {"type": "text", "text": request["prompt"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": blocks}], add_generation_prompt=True, tokenize=True, return_dict=True
    ).to(torch.float64)
    ids = model.generate(**inputs, max_new_tokens=request["max_new_tokens"], do_sample=False)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def watch(patch, model):
    """(batch, padded length, new tokens) of every call of `generate`."""
    calls, generate = [], model.generate

    def watched(input_ids, max_new_tokens, **kwargs):
        calls.append((*input_ids.shape, max_new_tokens))
        return generate(input_ids=input_ids, max_new_tokens=max_new_tokens, **kwargs)

    patch.setattr(model, "generate", watched)
    return calls
