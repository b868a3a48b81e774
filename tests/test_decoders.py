"""Any decoder that AutoModelForCausalLM builds from a configuration is a language model of PPLLaVA."""

import pytest
import torch
from tiny import CHUNKS, attended, batch, close, generate
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ppllava import PPLlavaConfig, PPLlavaForConditionalGeneration, presets

SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
KV = {"num_key_value_heads": 2}
DECODERS = {
    "llama": KV,
    "mistral": {**KV, "sliding_window": 16},
    "mixtral": {**KV, "num_local_experts": 4},
    "qwen2": KV,
    "qwen3": {**KV, "head_dim": 16},
    "gemma2": {**KV, "head_dim": 16, "final_logit_softcapping": 5.0, "sliding_window": 16},  # caps the logits
    "gemma3_text": {**KV, "head_dim": 16, "sliding_window": 16},
    "phi": {},  # a head with a bias
    "phi3": KV,
    "cohere": {**KV, "logit_scale": 0.5},  # scales the logits
    "granite": {**KV, "logits_scaling": 3.0},
    "olmo2": KV,
    "gpt_neox": {},
    "falcon": {"multi_query": True},
    "bloom": {"n_head": 4, "n_layer": 2},  # no positions: ALiBi
    "gpt2": {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 256, "n_inner": 96},  # learned positions
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 24},
}
TOLERANCE = 1e-4


def build(name):
    torch.manual_seed(0)
    text = CONFIG_MAPPING[name](**{**SIZES, **DECODERS[name]}).to_dict()
    tiny = presets.preset_config("tiny").to_dict()
    return PPLlavaForConditionalGeneration(PPLlavaConfig(**{**tiny, "text_config": text})).eval()


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name, tmp_path):
    model, processor = build(name), presets.build_processor(presets.preset_config("tiny"))
    alone = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    alone.load_state_dict(model.model.language_model.state_dict())
    text = processor(text="Hello there")
    with torch.no_grad():
        close(model(**text).logits, alone(**text).logits, 1e-5)
        for side in ("left", "right"):
            inputs = batch(4, 9, 0, processor=processor, padding_side=side)
            rows = attended(inputs, model(**inputs).logits)
            for i, (row, length) in enumerate(zip(rows, (4, 9, 0))):
                single = batch(*[length if j == i else None for j in range(3)], processor=processor)
                close(row, model(**single).logits[0], TOLERANCE)
    inputs = batch(4, 9, 0, processor=processor)
    ids = generate(model, inputs)
    for i, length in enumerate((4, 9, 0)):
        single = batch(*[length if j == i else None for j in range(3)], processor=processor)
        assert generate(model, single)[0] == ids[i]
    model.save_pretrained(tmp_path)
    again = PPLlavaForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**text).logits, model(**text).logits)


def test_longer_than_the_context():
    model = build("llama")
    inputs = batch(200, processor=presets.build_processor(presets.preset_config("tiny")))
    tokens = inputs["input_ids"].shape[1]
    message = (
        f"a prompt must fit into the 256 positions of the language model, got {tokens} tokens, up to 400 of them "
        "visual; sample fewer frames, set pooling_output_size, or shorten the text"
    )
    for options in ({}, {"prefill_chunk_size": 32} if CHUNKS else {"num_beams": 2}):
        with pytest.raises(ValueError, match=f"^{message}$"):
            generate(model, inputs, **options)
    with pytest.raises(ValueError, match=f"^{message}$"):
        model(**inputs)
    with pytest.raises(ValueError, match=r"got 300 tokens; sample fewer frames"):
        model(inputs_embeds=torch.zeros(1, 300, 48))


@pytest.mark.parametrize("name", ["bart", "pegasus"])
def test_decoders_that_count_padding(name):
    sizes = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "d_model": 48}
    DECODERS[name] = {**sizes, "is_decoder": True, "is_encoder_decoder": False}
    model, processor = build(name), presets.build_processor(presets.preset_config("tiny"))
    with torch.no_grad():
        for i in range(2):
            single = batch(*[(4, 9)[i] if j == i else None for j in range(2)], processor=processor)
            right = batch(4, 9, processor=processor, padding_side="right")
            close(attended(right, model(**right).logits)[i], model(**single).logits[0], TOLERANCE)
    message = (
        f"attention_mask must have no padding on the left for {type(model.model.language_model).__name__}, which takes "
        "no position_ids, got some; pass prompts one by one"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        model(**batch(4, 9, processor=processor))
