"""The presets: sizes, FLOPs, reproducible weights, and no network."""

import math
import re
import socket
from functools import cache

import pytest
import torch
from tiny import masked_flops
from torch.utils.flop_counter import FlopCounterMode

from ppllava import presets
from ppllava_kernels import library


def test_small_spends_its_flops_as_the_7b_model():
    small, large = (presets.flops(presets.preset_config(name), 32, 64) for name in ("small", "vicuna-7b"))
    assert 100e9 <= sum(small.values()) <= 300e9
    for part in ("vision_tower", "projector", "language_model"):
        share, expected = small[part] / sum(small.values()), large[part] / sum(large.values())
        assert expected / 2 <= share <= 2 * expected, part


def test_small_has_the_tokens_of_the_7b_model():
    for name in ("small", "vicuna-7b"):
        config = presets.preset_config(name)
        pooling = config.visual_pooling
        assert pooling.pooled_size(32, pooling.video_window(32)) == (16, 8, 8)
        assert presets.build_processor(config).num_video_tokens(32) == 1024


def test_small_widths_suit_the_kernels():
    config = presets.preset_config("small")
    widths = (config.vision_config.hidden_size, config.projection_dim, config.text_config.hidden_size)
    assert all(width % 64 == 0 for width in widths)


@cache
def eager(name):
    model, processor = presets.build(name)
    model.set_attn_implementation("eager")
    return model, processor


@pytest.mark.parametrize("frames", [2, 7])
@pytest.mark.parametrize("name", ["tiny", "tiny-btadapter", "tiny-qwen2"])
def test_flops_are_what_torch_counts(name, frames):
    model, processor = eager(name)
    video = torch.zeros(frames, 42, 42, 3, dtype=torch.uint8)
    inputs = processor(text="USER: <video>\nWhat? ASSISTANT:", videos=video)
    # The products inside of the projector's ops: features [F, H, W, V] and a weight [out, V].
    formulas = {
        library.ops.guide_relevance: lambda features, *rest, **_: 2 * math.prod(features) * rest[6][0],
        library.ops.hidden_pool3d: lambda features, weights, linear_1, *_, **__: 2 * math.prod(features) * linear_1[0],
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(**inputs, logits_to_keep=1)
    visual = processor.num_video_tokens(frames)
    text, guide = inputs["input_ids"].shape[1] - visual, inputs["guide_input_ids"].shape[1]
    expected = presets.flops(model.config, frames, text, guide)
    masked = masked_flops(model.config.text_config, visual + text)
    assert counter.get_total_flops() == sum(expected.values()) + masked
    tower = counter.get_flop_counts()["PPLlavaForConditionalGeneration.model.vision_tower"]
    assert sum(tower.values()) == expected["vision_tower"]


@pytest.mark.parametrize("what", [presets.build, presets.build_peer])
def test_weights_depend_on_the_seed_only(what):
    def build(seed):
        built = what("tiny", seed=seed)
        return built[0] if isinstance(built, tuple) else built

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = build(0).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    second, other = build(0).state_dict(), build(1).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    head = next(name for name in first if name.endswith("lm_head.weight"))
    assert not torch.equal(first[head], other[head])


def test_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a preset used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, processor = presets.build("tiny")
    inputs = processor(text="USER: <video> What? ASSISTANT:", videos=torch.zeros(4, 42, 42, 3, dtype=torch.uint8))
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_the_7b_model_has_7b_parameters():
    model, _ = presets.build("vicuna-7b", dtype=torch.bfloat16, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 7.1e9 < count < 7.3e9
    model, _ = presets.build("qwen2-7b", dtype=torch.bfloat16, device="meta")
    assert 8.3e9 < sum(parameter.numel() for parameter in model.parameters()) < 8.6e9
    peer = presets.build_peer("vicuna-7b", device="meta")
    assert 7.0e9 < sum(parameter.numel() for parameter in peer.parameters()) < 7.1e9


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_peer_has_the_same_towers(name):
    model, peer = presets.build(name, device="meta")[0], presets.build_peer(name, device="meta")
    assert peer.model.language_model.config.to_dict() == model.model.language_model.config.to_dict()
    assert peer.model.vision_tower.config.to_dict() == model.model.vision_tower.config.to_dict()
    assert peer.config.video_token_id == model.config.video_token_id


def test_peer_sees_144_tokens_a_frame():
    config = presets.peer_config("small")
    grid = config.vision_config.image_size // config.vision_config.patch_size
    assert (grid // config.spatial_pool_stride) ** 2 == 144
    peer = presets.build_peer("tiny")
    frames = torch.zeros(1, 4, 3, 42, 42)
    assert peer.get_video_features(frames).pooler_output[0].flatten(0, -2).shape == (4 * 9, 48)
    ids = torch.tensor([[1, *[3] * 36, 9]])
    assert peer.generate(input_ids=ids, pixel_values_videos=frames, max_new_tokens=2, min_new_tokens=2).shape == (1, 40)


@pytest.mark.parametrize("call", [presets.build, presets.build_peer, presets.preset_config, presets.peer_config])
def test_unknown_name(call):
    message = "name must be one of tiny, tiny-btadapter, tiny-qwen2, small, vicuna-7b, qwen2-7b, got 'huge'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call("huge")
