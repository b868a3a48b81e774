"""Text towers and position tables against the original's numbers (tests/golden/README.md)."""

import re

import pytest
import torch
from golden_data import close, fold, golden, projector_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, SiglipTextConfig, SiglipTextModel

from ppllava import stretch_position_embedding, stretch_text_model

SIZES = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}


def clip_config(**kwargs):
    return CLIPTextConfig(vocab_size=99, max_position_embeddings=248, projection_dim=20, **SIZES, **kwargs)


@pytest.mark.parametrize(("case", "rows"), [("clip_pos_extend", (77, 248)), ("siglip_pos_extend", (64, 196))])
def test_position_table(case, rows):
    table = golden(case, "inputs")[f"position_embedding_{rows[0]}"]
    expected = golden(case, "outputs")[f"position_embedding_{rows[1]}"]
    close(stretch_position_embedding(table), expected, 1e-5)


def test_position_table_error():
    message = (
        "table must be [L, D] with L at least keep + 2 = 22, got shape [21, 4]; pass the weight of a position embedding"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        stretch_position_embedding(torch.zeros(21, 4))


@pytest.mark.parametrize("length", [7, 20, 25, 248])
def test_two_position_tables_fold_into_one(length):
    state = fold({f"embeddings.{name}": value for name, value in golden("clip_pos_extend", "weights").items()})
    embeddings = CLIPTextModel(clip_config()).embeddings
    embeddings.load_state_dict({name.removeprefix("embeddings."): value for name, value in state.items()})
    ids = golden("clip_pos_extend", "inputs")[f"emb_L{length}/input_ids"]
    close(embeddings(ids), golden("clip_pos_extend", "outputs")[f"emb_L{length}/out"], 1e-5)


@pytest.mark.parametrize("name", ["L30", "L248", "noeos"])
@pytest.mark.parametrize("eos", ["eos2", "eosV1"])
def test_clip_text(eos, name):
    """eos2 pools at the largest id, eosV1 at the first EOS, and without one at position 0, as the original."""
    inputs, outputs = golden("clip_text", "inputs"), golden("clip_text", "outputs")
    tower = CLIPTextModel(clip_config(eos_token_id=2 if eos == "eos2" else 98)).eval()
    tower.load_state_dict(fold(golden("clip_text", "weights")))
    case = f"{eos}_{name}"
    for mask, suffix in ((inputs.get(f"{case}/attention_mask"), "pooled"), (None, "pooled_nomask")):
        if f"{case}/{suffix}" in outputs:
            out = tower(inputs[f"{case}/input_ids"], attention_mask=mask)
            close(out.pooler_output, outputs[f"{case}/{suffix}"], 2e-4)
    if name == "L30":
        mask = inputs[f"{case}/attention_mask"].bool()
        hidden = tower(inputs[f"{case}/input_ids"], attention_mask=mask).last_hidden_state
        close(hidden[mask], outputs[f"{case}/last_hidden_state"][mask], 2e-4)


@pytest.mark.parametrize("name", ["L17", "L196"])
def test_siglip_text(name):
    """Pads are attended, and the last of them is pooled, as SigLIP was trained; a mask that is given counts."""
    inputs, outputs = golden("siglip_text", "inputs"), golden("siglip_text", "outputs")
    tower = SiglipTextModel(SiglipTextConfig(vocab_size=101, max_position_embeddings=196, **SIZES)).eval()
    tower.load_state_dict(fold(golden("siglip_text", "weights")))
    out = tower(inputs[f"{name}/input_ids"])
    close(out.pooler_output, outputs[f"{name}/pooled"], 2e-4)
    if name == "L17":
        close(out.last_hidden_state, outputs["L17/last_hidden_state"], 2e-4)
    else:
        masked = tower(inputs["L196/input_ids"], attention_mask=inputs["L196/attention_mask"]).pooler_output
        close(masked, outputs["L196/pooled_masked"], 2e-4)


@pytest.mark.parametrize(("case", "limit"), [("proj_clip", 248), ("proj_clip_noextend", 77), ("proj_siglip", 196)])
def test_longer_than_the_table(case, limit):
    message = (
        f"guide_input_ids must be [B, L] with at most the {limit} positions of the guide, got shape [1, {limit + 1}]; "
        "let PPLlavaProcessor truncate the question"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        projector_model(case).guide.embed_text(torch.ones(1, limit + 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("model", "rows"),
    [(CLIPTextModel, (77, 248)), (SiglipTextModel, (64, 196))],
)
def test_stretch_text_model(model, rows):
    config = clip_config().to_dict() if model is CLIPTextModel else SiglipTextConfig(vocab_size=99, **SIZES).to_dict()
    stock = model(model.config_class.from_dict({**config, "max_position_embeddings": rows[0]})).eval()
    stretched = stretch_text_model(stock)
    assert stretched.config.max_position_embeddings == rows[1]
    assert stock.config.max_position_embeddings == rows[0]
    assert not stretched.training
    expected = stretch_position_embedding(stock.embeddings.position_embedding.weight)
    assert torch.equal(stretched.embeddings.position_embedding.weight, expected)
    ids = torch.randint(0, 99, (2, 21), generator=torch.Generator().manual_seed(0))
    before, after = stock(ids).last_hidden_state, stretched(ids).last_hidden_state  # [2, 21, 24]
    close(after, before, 1e-5)  # rows 0 ... 20 are those of the stock table
    assert isinstance(stretched.embeddings.token_embedding, nn.Embedding)
    tokens = (stretched.embeddings.token_embedding.weight, stock.embeddings.token_embedding.weight)
    assert torch.equal(*tokens)  # the original loses them here
