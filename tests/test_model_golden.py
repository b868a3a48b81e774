"""The model against the original's numbers (tests/golden/README.md)."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from ppllava import PPLlavaConfig, PPLlavaModel, presets, stretch_position_embedding, stretch_text_model

GOLDEN = Path(__file__).parent / "golden"


def fresh(**changes):
    """A tiny model without a head."""
    return PPLlavaModel(PPLlavaConfig(**{**presets.preset_config("tiny").to_dict(), **changes})).eval()


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def golden(case, name):
    return load_file(GOLDEN / case / f"{name}.safetensors")


def fold(state, prefix=""):
    """The original's two position tables as one: rows 0 ... 19 of the first, the rest of the second."""
    table = state.pop(f"{prefix}embeddings.position_embedding")
    rest = state.pop(f"{prefix}embeddings.position_embedding_res")
    state[f"{prefix}embeddings.position_embedding.weight"] = torch.cat([table[:20], rest[20:]])
    return state


def golden_text_config(**kwargs):
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    return CLIPTextConfig(vocab_size=99, max_position_embeddings=248, projection_dim=20, **sizes, **kwargs)


def test_stretch_position_embedding():
    table, expected = golden("clip_pos_extend", "inputs"), golden("clip_pos_extend", "outputs")
    close(stretch_position_embedding(table["position_embedding_77"]), expected["position_embedding_248"], 1e-6)


def test_stretch_position_embedding_error():
    message = (
        "table must be [L, D] with L at least keep + 2 = 22, got shape [21, 4]; pass the weight of a position embedding"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        stretch_position_embedding(torch.zeros(21, 4))


@pytest.mark.parametrize("length", [7, 20, 25, 248])
def test_two_position_tables_fold_into_one(length):
    state = fold({f"embeddings.{name}": value for name, value in golden("clip_pos_extend", "weights").items()})
    embeddings = CLIPTextModel(golden_text_config()).embeddings
    embeddings.load_state_dict({name.removeprefix("embeddings."): value for name, value in state.items()})
    ids = golden("clip_pos_extend", "inputs")[f"emb_L{length}/input_ids"]
    close(embeddings(ids), golden("clip_pos_extend", "outputs")[f"emb_L{length}/out"], 1e-6)


@pytest.mark.parametrize("case", ["L30", "L248", "noeos"])
@pytest.mark.parametrize("eos_token_id", [2, 98], ids=["eos2", "eosV1"])
def test_guide_tower(eos_token_id, case):
    inputs, outputs = golden("clip_text", "inputs"), golden("clip_text", "outputs")
    model = fresh(guide_config=golden_text_config(eos_token_id=eos_token_id).to_dict(), projection_dim=24)
    model.guide_tower.load_state_dict(fold(golden("clip_text", "weights")))
    model.text_projection.weight.data = torch.eye(24)
    name = f"{'eos2' if eos_token_id == 2 else 'eosV1'}_{case}"
    mask = inputs.get(f"{name}/attention_mask")
    close(model.encode_guide(inputs[f"{name}/input_ids"], mask), outputs[f"{name}/pooled"], 2e-4)


def test_stretch_text_model():
    stock = CLIPTextModel(CLIPTextConfig(**{**golden_text_config().to_dict(), "max_position_embeddings": 77})).eval()
    stretched = stretch_text_model(stock)
    assert stretched.config.max_position_embeddings == 248
    assert stock.config.max_position_embeddings == 77
    assert not stretched.training
    expected = stretch_position_embedding(stock.embeddings.position_embedding.weight)
    assert torch.equal(stretched.embeddings.position_embedding.weight, expected)
    ids = torch.randint(0, 99, (2, 21), generator=torch.Generator().manual_seed(0))
    before, after = stock(ids).last_hidden_state, stretched(ids).last_hidden_state  # [2, 21, 24]
    close(after[:, :21], before[:, :21], 1e-5)  # rows 0 ... 20 are those of the stock table
    model = fresh(guide_config=stretched.config.to_dict())
    model.guide_tower = stretched
    assert model.encode_guide(ids.repeat(1, 12)[:, :248]).shape == (2, 16)


PROJECTOR_CASES = {
    "video_b1": {},
    "video_b2": {},
    "video_leftover": {},
    "nomask_short": {},
    "image": {"pooling_kernel_size": (1, 3, 3)},
    "variant_temp1": {"pooling_temperature": 1.0},
    "variant_overlap": {"pooling_kernel_size": (2, 4, 3), "pooling_stride": (1, 2, 2)},
    "variant_outsize": {"pooling_output_size": (2, 2, 3)},
}


@pytest.mark.parametrize("case", PROJECTOR_CASES)
def test_projector(case, monkeypatch):
    meta = json.loads((GOLDEN / "proj_clip" / "meta.json").read_text())
    inputs, outputs, weights = (golden("proj_clip", name) for name in ("inputs", "outputs", "weights"))
    source = meta["cases"][case].get("inputs_of", case)
    config = PPLlavaConfig(
        vision_config={**presets.preset_config("tiny").vision_config.to_dict(), "hidden_size": 32},
        guide_config=golden_text_config(eos_token_id=meta["clip_config"]["text"]["eos_token_id"]).to_dict(),
        text_config={**presets.preset_config("tiny").text_config.to_dict(), "hidden_size": 40},
        projection_dim=20,
        video_token_index=3,
        **PROJECTOR_CASES[case],
    )
    model = PPLlavaModel(config).eval()
    renamed = {
        "clip_text_model.": "guide_tower.",
        "clip_text_projection.": "text_projection.",
        "clip_visual_ln.": "vision_tower.post_layernorm.",
        "clip_visual_projection.": "visual_projection.",
        "linear_": "multi_modal_projector.linear_",
    }
    state = fold(weights, "clip_text_model.")
    for old, new in renamed.items():
        state = {new + name.removeprefix(old) if name.startswith(old) else name: x for name, x in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(("vision_tower.", "language_model.")) for name in missing)
    features = inputs[f"{source}/image_features"].unflatten(1, (6, 6))  # [F, 6, 6, 32]
    monkeypatch.setattr(model, "encode_frames", lambda _: features)
    frames = meta["cases"][source]["num_frames"]
    with torch.no_grad():
        video = model.get_video_features(
            torch.zeros(len(features), 3, 42, 42),
            torch.full((len(features) // frames,), frames),
            inputs[f"{source}/clip_ids"],
            inputs.get(f"{source}/clip_mask"),
        )
    close(torch.stack(video.pooler_output), outputs[f"{case}/out"], 2e-4)
    close(torch.stack(video.relevance), outputs[f"{source}/tv_softmax"], 1e-5)
