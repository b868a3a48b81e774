"""PPLLaVA's projector: what is allocated on the way from pixels to tokens, and modules that are not plain."""

import pytest
import torch
from tiny import batch, close, fresh
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ppllava import PPLlavaConfig, PPLlavaModel, guide, presets
from ppllava.media import pack_videos
from ppllava_kernels import PromptGuidedPool3d, modules
from ppllava_kernels.backends import products


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an op gives back; inside of the ops, the profiler sees."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def largest_allocation(function):
    function()  # what is made once
    with Largest() as seen, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    return seen.bytes, max(event.nbytes() for event in events if event.name() == "[memory]")


FRAMES, WIDE = 32, 768


def wide_model(preset, **changes):
    """A preset whose T*H*W x D is the largest tensor there could be."""
    sizes = presets.preset_config(preset).to_dict()
    text = {**sizes["text_config"], "hidden_size": WIDE}
    sizes |= {"text_config": text, "vision_chunk": 4, **changes}
    return PPLlavaModel(PPLlavaConfig(**sizes)).eval()


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setitem(products.TILE, "cpu", (72, 256))
    monkeypatch.setattr(guide, "FRAMES", 4)


def step(model, train):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(FRAMES, 3, 42, 42, generator=generator).to(model.dtype)
    question = torch.tensor([[256, 5, 6, 257]]) if model.config.pooling == "prompt_guided" else None
    with torch.set_grad_enabled(train):
        [tokens] = model.get_video_features(pixels, torch.tensor([FRAMES]), question).pooler_output
        if train:
            tokens.square().sum().backward()
    return tokens.detach()


@pytest.mark.parametrize("train", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("tiny", {}),
        ("tiny", {"pooling_output_size": (2, 2, 2)}),
        ("tiny", {"pooling": "temporal_mean"}),
        ("tiny-qwen2", {}),
        ("tiny-qwen2", {"valuew_plus": True}),
    ],
)
def test_nothing_of_all_patches_times_the_width_is_allocated(preset, changes, train, small_tiles):
    model = wide_model(preset, **changes)
    limit = FRAMES * 36 * WIDE * 4
    assert max(x.nbytes for x in model.multi_modal_projector.parameters()) < limit
    assert max(largest_allocation(lambda: step(model, train))) < limit
    expected = step(model, train)
    model.multi_modal_projector.linear_1.register_forward_hook(lambda *_: None)
    assert min(largest_allocation(lambda: step(model, train))) >= limit
    close(step(model, train), expected, 1e-4)


def wide_siglip(**changes):
    vision = {**presets.preset_config("tiny-qwen2").vision_config.to_dict(), "intermediate_size": WIDE}
    return wide_model("tiny-qwen2", vision_config=vision, **changes)


@pytest.mark.parametrize("train", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("valuew_plus", [False, True])
def test_siglips_mlp_of_all_patches_is_not_allocated(valuew_plus, train, small_tiles, monkeypatch):
    model, limit = wide_siglip(valuew_plus=valuew_plus), FRAMES * 36 * WIDE * 4
    assert max(largest_allocation(lambda: step(model, train))) < limit
    monkeypatch.setattr(guide, "FRAMES", FRAMES)
    assert min(largest_allocation(lambda: step(model, train))) >= limit


@pytest.mark.parametrize("valuew_plus", [False, True])
def test_gradients_of_siglip_a_few_frames_at_a_time(valuew_plus, monkeypatch):
    model = wide_siglip(valuew_plus=valuew_plus).double()

    def grads(frames):
        monkeypatch.setattr(guide, "FRAMES", frames)
        model.zero_grad()
        step(model, True)
        return {name: x.grad.clone() for name, x in model.guide.named_parameters() if x.grad is not None}

    few, all_at_once = grads(5), grads(FRAMES)
    assert {"norm.weight", "head.mlp.fc1.weight", "head.mlp.fc2.bias", "logit_scale"} <= set(few)
    assert ("head.probe" in few) == valuew_plus
    for name, grad in all_at_once.items():
        torch.testing.assert_close(few[name], grad, rtol=1e-9, atol=1e-9 * grad.abs().max().item())


# Modules that are not plain, as in test_projector.py


def test_lora():
    """As once it is merged into the weights."""
    peft = pytest.importorskip("peft", reason="needs PEFT; pip install peft")
    torch.manual_seed(0)
    # In float64: merging rounds in another way, which the temperature of 0.01 amplifies.
    model, names = fresh().double(), ("multi_modal_projector.linear_1", "guide.visual_projection")
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch(4, 5).items()}
    before = model.get_video_features(**inputs)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=8, target_modules=[*names]), model.model)
    model.double()
    for name in names:
        nn.init.normal_(model.model.get_submodule(name).lora_B["default"].weight)
    adapted = model.get_video_features(**inputs)
    for name in names:
        layer = model.model.get_submodule(name)
        layer.merge()
        model.model.set_submodule(name, layer.get_base_layer())
    merged = model.get_video_features(**inputs)
    for first, one, other in zip(before.pooler_output, adapted.pooler_output, merged.pooler_output):
        close(one, other, 1e-9)
        assert (one - first).abs().max() > 1e-2
    close(torch.cat(adapted.relevance), torch.cat(merged.relevance), 1e-9)
    assert not torch.allclose(torch.cat(adapted.relevance), torch.cat(before.relevance), rtol=0.1)


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "relu"])
def test_another_activation(act, monkeypatch):
    model = fresh(projector_hidden_act=act).model
    inputs = batch(4)
    features = model.encode_frames(inputs["pixel_values_videos"], [4])
    pool = PromptGuidedPool3d((2, 3, 3), logit_scale=model.guide.scale.detach())
    layers = model.multi_modal_projector
    values = layers.linear_2(layers.act(layers.linear_1(features)))[None]
    text = model.guide.embed_text(inputs["guide_input_ids"], inputs["guide_attention_mask"])
    expected = pool(values, model.guide.embed_patches(features)[None], text)
    monkeypatch.delattr(modules, "prompt_guided_project")
    monkeypatch.delattr(modules, "weighted_project")
    actual = model.get_video_features(**inputs).pooler_output[0]
    close(actual, expected.flatten(0, -2), 1e-5)


def test_siglip_compiles_in_training():
    model = presets.build("tiny-qwen2")[0].model
    torch.manual_seed(0)
    pixels = torch.randn(1, 20, 3, 42, 42)  # several chunks
    question = torch.tensor([[256, 5, 6, 257]])
    features = model.encode_frames(pixels[0], [20]).detach()
    text = model.guide.embed_text(question).detach()
    _, clips = pack_videos("pixel_values_videos", pixels, None, model.config.visual_pooling)

    def run(features, text):
        return model.multi_modal_projector(features, clips, model.guide, text)[0][0]

    def grads(run):
        model.zero_grad()
        run(features, text).square().sum().backward()
        return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}

    expected = grads(run)
    actual = grads(torch.compile(run, fullgraph=True, backend="aot_eager"))
    assert set(actual) == set(expected)
    for name, grad in actual.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-4)
