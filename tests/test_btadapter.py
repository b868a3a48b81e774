"""The BT-Adapter tower against the original's numbers (tests/golden/README.md), and what the original has not: clips of
several lengths in one call, frames in chunks."""

import re

import pytest
import torch
from golden_data import golden, meta
from transformers import AutoConfig, AutoModel

from ppllava import btadapter
from ppllava.btadapter import BTAdapterVisionConfig, BTAdapterVisionModel

RENAMED = {
    "vision_model.btadapter_S_layers.": "adapter.spatial_layers.",
    "vision_model.btadapter_T_layers.": "adapter.temporal_layers.",
    "vision_model.btadapter_time_embed.": "adapter.time_embedding.",
    "vision_model.btadapter_cls_token": "adapter.class_token",
    "vision_model.": "",
}


def renamed(name):
    old = next(old for old in RENAMED if name.startswith(old))
    return RENAMED[old] + name.removeprefix(old)


def tower(case="btadapter", layers=None):
    """The original's weights, truncated to hidden state `layers`."""
    config = dict(meta(case)["config"])
    depth, frames = config.pop("depth"), config.pop("max_T")
    model = BTAdapterVisionModel(BTAdapterVisionConfig(**config, adapter_depth=depth, adapter_max_frames=frames))
    model.load_state_dict({renamed(name): x for name, x in golden(case, "weights").items()})
    if layers is not None:
        model.truncate(layers)
    return model.eval()


@torch.no_grad()
def check(case, name, clips, expected="{}", **kwargs):
    """hidden_m2, pooler and, where there are, all hidden states of clips [B, T, 3, S, S]."""
    outputs, prefix = golden(case, "outputs"), f"{name}/" if name else ""
    pixels, frames = clips.flatten(0, 1), [clips.shape[1]] * len(clips)
    n = tower(case).config.num_hidden_layers
    wanted = {n - 1: outputs[prefix + expected.format("hidden_m2")]}
    wanted |= dict(enumerate(outputs.get(f"{prefix}hidden_all", ())))
    for layers, hidden in wanted.items():
        close(tower(case, layers)(pixels, frames).last_hidden_state, hidden)
    close(tower(case)(pixels, frames).pooler_output, outputs[prefix + expected.format("pooler")])


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def frames_of(*lengths):
    return torch.randn(sum(lengths), 3, 20, 20, generator=torch.Generator().manual_seed(0))


def outputs_of(model, *args, **kwargs):
    with torch.no_grad():
        return tuple(model(*args, **kwargs).values())  # [F, 1 + P, D], [F, D]


@pytest.mark.parametrize("name", ["video_T4", "video_b2", "video_T1", "maxT"])
def test_video(name):
    check("btadapter", name, golden("btadapter", "inputs")[f"{name}/pixel_values"])


def test_channels_first():
    clips = golden("btadapter", "inputs")["channels_first/pixel_values"].transpose(1, 2)
    assert torch.equal(clips, golden("btadapter", "inputs")["video_T4/pixel_values"])
    check("btadapter", "channels_first", clips)


def test_images():
    images = golden("btadapter", "inputs")["images_4d/pixel_values"]
    check("btadapter", "images_4d", images[:, None])
    assert all(map(torch.equal, outputs_of(tower(), images), outputs_of(tower(), images, [1, 1])))


def test_three_frames_are_three_frames():
    clips = golden("btadapter", "inputs")["T3_quirk/pixel_values"]
    check("btadapter", "T3_quirk", clips, expected="{}_if_read_correctly")
    swapped = golden("btadapter", "outputs")["T3_quirk/hidden_m2"]
    assert (outputs_of(tower(layers=3), clips[0], [3])[0] - swapped).abs().max() > 1


def test_copy_spatial_layers():
    pixels = golden("btadapter", "inputs")["video_T4/pixel_values"][0]
    for layers, output, name in ((3, 0, "hidden_m2"), (4, 1, "pooler")):
        model = tower(layers=layers)
        model.copy_spatial_layers()
        close(outputs_of(model, pixels, [4])[output], golden("btadapter", "outputs")[f"after_init_weights/{name}"])


@pytest.mark.parametrize("case", ["btadapter_full", "btadapter_d1"])
def test_depths(case):
    check(case, "", golden(case, "inputs")["pixel_values"])


def test_truncated_tower_has_only_what_it_needs():
    unneeded = ("encoder.layers.3.", "adapter.spatial_layers.1.", "adapter.temporal_layers.1.")
    assert list(tower(layers=3).state_dict()) == [x for x in tower().state_dict() if not x.startswith(unneeded)]
    assert not any(name.startswith("adapter.") for name in tower("btadapter_d1", 2).state_dict())


@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize("lengths", [(4, 1, 7), (3, 2, 3, 1), (2, 2, 5)], ids=str)
def test_clips_of_several_lengths(lengths, layers):
    pixels, model = frames_of(*lengths), tower(layers=layers)
    alone = [outputs_of(model, part, [len(part)]) for part in pixels.split(lengths)]
    for actual, expected in zip(outputs_of(model, pixels, lengths), map(torch.cat, zip(*alone))):
        close(actual, expected, 1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunk(chunk, monkeypatch):
    pixels, model, seen = frames_of(4, 1, 7), tower(), []
    expected = outputs_of(model, pixels, [4, 1, 7])
    for module in (model.embeddings, model.encoder.layers[0].mlp.fc1, model.adapter.spatial_layers[1].layer_norm1):
        module.register_forward_hook(lambda _, args, output: seen.append(len(output)))
    monkeypatch.setattr(btadapter, "MAX_SEQUENCES", 5)
    for actual, whole in zip(outputs_of(model, pixels, [4, 1, 7], chunk=chunk), expected):
        close(actual, whole, 1e-5)
    assert max(seen) == min(chunk, 12)


def gradients_of(model, **kwargs):
    out = model.train()(frames_of(4, 1), [4, 1], **kwargs)
    torch.manual_seed(1)
    sum((x * torch.randn_like(x)).sum() for x in out.values()).backward()
    return {name: x.grad for name, x in model.named_parameters()}


def test_gradients_reach_every_parameter():
    for name, gradient in gradients_of(tower()).items():
        # The bias of the keys moves all scores of a softmax alike: its gradient is rounding.
        assert name.endswith("k_proj.bias") or gradient.abs().max() > 1e-3, name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing():
    expected, model, runs = gradients_of(tower()), tower(), []
    model.gradient_checkpointing_enable()
    for layer in (model.encoder.layers[0], model.adapter.spatial_layers[0], model.adapter.temporal_layers[0]):
        layer.layer_norm1.register_forward_hook(lambda module, *_: runs.append(module))
    for name, gradient in gradients_of(model, chunk=2).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-4, name
    # Forward and backward: 3 chunks in the encoder and spatial layers, 2 clip lengths in the temporal one.
    assert len(runs) == 2 * (3 + 3 + 2)


def test_fresh_weights():
    model = BTAdapterVisionModel(tower().config)
    assert not model.adapter.class_token.any()
    assert not any(x.any() for layer in model.adapter.temporal_layers for x in layer.temporal_fc.parameters())
    assert abs(model.adapter.time_embedding.weight.std() - 1) < 0.2


def test_save_and_load(tmp_path):
    model, pixels = tower(), frames_of(4, 1)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, BTAdapterVisionModel)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BTAdapterVisionConfig)
    assert not any(info.values())
    assert all(map(torch.equal, outputs_of(loaded, pixels, [4, 1]), outputs_of(model, pixels, [4, 1])))


def test_bfloat16():
    pixels, model = frames_of(4, 1), tower()
    expected = outputs_of(model, pixels, [4, 1])
    for actual, exact in zip(outputs_of(model.bfloat16(), pixels, [4, 1]), expected):
        assert actual.dtype == torch.bfloat16
        assert (actual - exact).norm() < 0.02 * exact.norm()


def error(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_errors():
    model = tower()
    with error(
        "a clip must have at most adapter_max_frames = 16 frames, got 17; sample fewer frames, e.g. num_frames=16"
    ):
        model(frames_of(17), [17])
    for frames in ([4, 2], [5, 0], []):
        with error(
            f"frames must be positive and sum to the 5 frames of pixel_values, got {frames}; name the frames of each "
            "clip"
        ):
            model(frames_of(5), frames)
    with error(
        "pixel_values must be [F, 3, S, S], got [1, 4, 3, 20, 20]; put the frames of all clips one after the other and "
        "say in frames how many each has"
    ):
        model(torch.zeros(1, 4, 3, 20, 20))
    with error("layers must be 0 ... 4, the layers that the tower has, got 5; truncate a tower that is whole"):
        model.truncate(5)
    with error(
        "adapter_depth must be 1 ... num_hidden_layers = 12, got 13; use a CLIPVisionModel for a tower without adapter"
    ):
        BTAdapterVisionConfig(adapter_depth=13)
