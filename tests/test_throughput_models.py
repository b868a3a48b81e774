"""The variants of the end-to-end benchmark: what runs, on which inputs, with how many FLOPs and how much memory."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import masked_flops
from torch.utils.flop_counter import FlopCounterMode

from ppllava.video import read_video

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed
from benchmarks import video_memory, video_models, video_runs
from benchmarks.video_report import OPS_OFF, PEER, PEER_TUNED, PPLLAVA, VARIANTS

BATCH, NEW_TOKENS, TOKENS = 2, 3, 10
MODELS = {PPLLAVA: PPLLAVA, OPS_OFF: PPLLAVA, PEER: PEER, PEER_TUNED: PEER}


def build():
    return video_models.build_models("tiny", torch.float32, "cpu", TOKENS)


def make_videos(processor, frames, batch=1):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (frames, 3, 42, 42), dtype=torch.uint8, generator=generator)
    return video_models.Videos(video_models.Footage(frames, pixels, [], []), batch, processor, "cpu", torch.float32)


def test_streamed_videos_become_the_same_tokens(monkeypatch):
    models, processor = build()
    videos, entrants = make_videos(processor, 7, BATCH), video_models.entrants(models, "cpu")
    samples = []
    for most in (256, 3):
        monkeypatch.setattr(video_models, "PIXELS", most)
        job = video_models.make_job(models, PPLLAVA, entrants[PPLLAVA], videos)
        options = {"output_logits": True, "return_dict_in_generate": True}
        samples.append(video_runs.generate(job, job.load(), NEW_TOKENS, **options))
    assert job.streamed
    assert samples[0].visual_tokens == samples[1].visual_tokens == BATCH * job.visual_tokens
    assert torch.equal(samples[0].output.sequences, samples[1].output.sequences)
    torch.testing.assert_close(samples[0].output.logits, samples[1].output.logits, rtol=0, atol=1e-4)


def test_a_video_repeats_its_first_frames():
    _, processor = build()
    videos = make_videos(processor, 4, BATCH)
    videos.footage.count = 11
    parts = [videos.footage.part(start, start + 2) for start in range(0, 10, 2)]
    assert parts[1].data_ptr() == videos.footage.frames[2:].data_ptr()  # not copied
    parts.append(videos.footage.part(3, 8))
    expected = [*range(10), 3, 4, 5, 6, 7]
    assert torch.equal(torch.cat(parts), videos.footage.frames[torch.tensor(expected) % 4])
    whole = processor.normalize(videos.footage.frames[torch.arange(11) % 4])
    assert torch.equal(videos.pixels, torch.cat([whole, whole]))


def test_the_peer_runs_as_it_comes_and_with_all_settings_of_ours():
    models, _ = build()
    peer, ours = models[PEER], models[PPLLAVA].model.multi_modal_projector
    for device in ("cpu", "cuda"):
        entrants = video_models.entrants(models, device)
        assert {name: entrant.model for name, entrant in entrants.items()} == MODELS
        assert entrants[PEER].settings == {}
        assert entrants[PEER_TUNED].settings == entrants[OPS_OFF].settings == entrants[PPLLAVA].settings
    with entrants[OPS_OFF].change():
        assert ours.backend == "reference"
    assert ours.backend is None
    pixels, sizes = torch.randn(1, 7, 3, 42, 42), []
    peer.model.vision_tower.embeddings.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        whole = peer.get_video_features(pixels).pooler_output
        with video_models.vision_in_chunks(peer, 3):
            chunked = peer.get_video_features(pixels).pooler_output
    assert sizes == [7, 3, 3, 1]
    torch.testing.assert_close(torch.cat(list(chunked)), torch.cat(list(whole)), rtol=0, atol=1e-5)


def test_a_static_cache_is_as_long_as_its_own_video(monkeypatch):
    monkeypatch.setitem(video_models.SETTINGS, "cpu", {"cache_implementation": "static"})
    models, processor = build()
    entrants, lengths = video_models.entrants(models, "cpu"), {}
    for frames in (7, 2):
        videos = make_videos(processor, frames)
        for variant in VARIANTS:
            job = video_models.make_job(models, variant, entrants[variant], videos)
            output = video_runs.generate(job, job.load(), 3, return_dict_in_generate=True).output
            layer = output.past_key_values.layers[0]
            lengths[variant, frames] = getattr(layer, "max_cache_len", job.length) - job.length  # of a static one
    assert {lengths.pop((PEER, frames)) for frames in (7, 2)} == {0}  # which is dynamic
    assert len({*lengths.values()}) == 1, lengths
    assert 0 not in lengths.values()


@pytest.mark.parametrize("frames", [2, 7])
def test_flops_of_the_peer_are_what_torch_counts(frames):
    models, processor = build()
    peer = models[PEER]
    peer.set_attn_implementation("eager")
    entrant = video_models.entrants(models, "cpu")[PEER]
    job = video_models.make_job(models, PEER, entrant, make_videos(processor, frames))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        peer(**job.load(), logits_to_keep=1)
    assert counter.get_total_flops() == sum(job.flops.values()) + masked_flops(peer.config.text_config, job.length)


def test_the_original_order_has_the_second_layer_on_all_patches():
    models, processor = build()
    videos, entrants = make_videos(processor, 6), video_models.entrants(models, "cpu")
    ours, off = (video_models.make_job(models, name, entrants[name], videos) for name in (PPLLAVA, OPS_OFF))
    more = {part: off.flops[part] - ours.flops[part] for part in ours.flops}
    assert more == {"vision_tower": 0, "projector": 2 * (6 * 36 - ours.visual_tokens) * 48**2, "language_model": 0}


def test_a_clip_longer_than_its_period_repeats_it(monkeypatch, tmp_path):
    monkeypatch.setattr(video_models, "PERIOD", 20)
    lengths = {}
    for frames in (13, 20, 41):
        clip = read_video(video_models.encode_clip(tmp_path / "clip.mp4", frames), fps=video_models.CLIP_FPS)
        lengths[frames] = len(clip.frames)
    assert lengths == {13: 13, 20: 20, 41: 60}
    assert (clip.frames[0] == clip.frames[20]).all()
    assert (clip.frames[0] != clip.frames[19]).any()


def test_memory_is_measured_and_limited():
    with video_memory.peak_memory("cpu") as peak:
        x = torch.ones(40_000_000)
        del x
    assert peak.extra_bytes is None or 140e6 < peak.extra_bytes < 400e6
