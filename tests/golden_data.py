"""The golden data, and models that carry its weights."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from ppllava import PPLlavaConfig, PPLlavaModel, presets

GOLDEN = Path(__file__).parent / "golden"
RENAMED = {
    "clip_text_model.": "guide.text_model.",
    "clip_text_projection.": "guide.text_projection.",
    "clip_visual_ln.": "guide.norm.",
    "clip_visual_projection.": "guide.visual_projection.",
    "clip_visual_head.": "guide.head.",
    "logit_scale": "guide.logit_scale",
    "linear_": "multi_modal_projector.linear_",
}


@cache
def golden(case, name):
    """inputs, outputs or weights of a case."""
    return load_file(GOLDEN / case / f"{name}.safetensors")


@cache
def meta(case):
    return json.loads((GOLDEN / case / "meta.json").read_text())


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def fold(state, prefix=""):
    """The original's two position tables as one: rows 0 ... 19 of the first, the rest of the second."""
    state, name = dict(state), f"{prefix}embeddings.position_embedding"
    if name in state:
        table, rest = state.pop(name), state.pop(f"{name}_res")
        state[f"{name}.weight"] = torch.cat([table[:20], rest[20:]])
    return state


def tower_config(case_meta):
    """guide_config and the parts of vision_config that a projector case describes."""
    siglip = "siglip_config" in case_meta
    towers = case_meta["siglip_config" if siglip else "clip_config"]
    extended = 196 if siglip else 248
    text = {
        **towers["text"],
        "model_type": "siglip_text_model" if siglip else "clip_text_model",
        "max_position_embeddings": extended if case_meta["config"]["extend_clip"] else 77,
    }
    if siglip:
        vision = {**towers["vision"], "model_type": "siglip_vision_model", "num_hidden_layers": 1}
        return {"vision_config": vision, "guide_config": text, "projection_dim": text["hidden_size"]}
    vision = {**presets.preset_config("tiny").vision_config.to_dict(), "hidden_size": towers["vision_hidden"]}
    return {"vision_config": vision, "guide_config": text, "projection_dim": towers["projection_dim"]}


def projector_model(case, weights=None, **changes):
    """A model with the guide and the projector of a projector case; its tower and language model are random."""
    given, config = meta(case), meta(case)["config"]
    tiny = presets.preset_config("tiny")
    options = {
        "text_config": {**tiny.text_config.to_dict(), "hidden_size": config["llm_hidden"]},
        "pooling_kernel_size": config["pooling_kernel"],
        "pooling_stride": config["pooling_stride"],
        "valuew_plus": config["valuew_plus"],
        "vision_feature_layer": -1,
        "image_token_index": tiny.image_token_id,
        "video_token_index": tiny.video_token_id,
        **tower_config(given),
    }
    model = PPLlavaModel(PPLlavaConfig(**{**options, **changes})).eval()
    state = fold(golden(weights or case, "weights"), "clip_text_model.")
    for old, new in RENAMED.items():
        state = {new + name.removeprefix(old) if name.startswith(old) else name: x for name, x in state.items()}
    state["guide.logit_scale"] = state["guide.logit_scale"].reshape(())
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(unexpected) <= {"logit_bias"}  # before a softmax it changes nothing
    assert all(name.startswith(("vision_tower.", "language_model.", "image_newline")) for name in missing)
    return model
