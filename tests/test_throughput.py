"""The end-to-end benchmark: all variants get the same frames, and no wrong model, no lack of memory or time, a time."""

import sys
from pathlib import Path

import pytest
import torch
from benching import (  # noqa: F401
    MODELS,
    NEW_TOKENS,
    TOKENS,
    alone,
    command,
    once,
    one_thread,
    rows_of,
    short_clip,
    sweep,
)

from ppllava_kernels import modules, pooled_size

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed
from benchmarks import report, throughput, video_models, video_runs, video_sweep
from benchmarks.video_report import OPS_OFF, PEER, PEER_TUNED, PPLLAVA, VARIANTS
from benchmarks.video_time import Pace

FRAMES, BATCH, REPEATS = (2, 7), 2, 2


def change_models(patch, change):
    """Let the benchmark build models that `change` has touched."""
    build = video_sweep.build_models

    def changed(*args):
        models, processor = build(*args)
        change(models)
        return models, processor

    patch.setattr(video_sweep, "build_models", changed)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(exit code, folder, frames that each model's tower saw) of a whole run."""
    folder, seen = tmp_path_factory.mktemp("throughput"), {PPLLAVA: [], PEER: []}

    def watch(models):
        for name, model in models.items():
            embeddings = model.model.vision_tower.embeddings  # in both, in chunks or not
            embeddings.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].clone()))

    with pytest.MonkeyPatch.context() as patch:
        change_models(patch, watch)
        arguments = ["--batch", str(BATCH), "--repeats", str(REPEATS), "--frames", *map(str, FRAMES)]
        code = command(folder, *arguments, "--tokens", str(TOKENS))
    return code, folder, seen


def test_every_variant_has_consistent_numbers(ran):
    code, folder, _ = ran
    assert code == 0
    rows = rows_of(folder)
    assert list(rows) == [(n, name) for n in FRAMES for name in VARIANTS]
    for (frames, name), row in rows.items():
        assert row["status"] == "ok", row["reason"]
        ours = min(torch.Size(pooled_size((frames, 6, 6), (2, 3, 3))).numel(), TOKENS)
        assert row["visual_tokens"] == (ours - ours % 4 if MODELS[name] == PPLLAVA else frames * 9)
        for key in ("decode", "preprocess", "vision", "projector", "prefill", "first_token", "token", "generate"):
            spread = row[f"{key}_ms"]
            assert 0 < spread["best"] <= spread["p20"] <= spread["p50"] <= spread["p80"]
        assert row["first_token_ms"]["p20"] < row["generate_ms"]["p20"]
        assert row["samples"] == REPEATS
        assert row["videos_s"] == pytest.approx(1e3 * BATCH / row["generate_ms"]["best"], rel=1e-3)
        file = BATCH * (row["decode_ms"]["best"] + row["preprocess_ms"]["best"])
        assert row["videos_s_file"] == pytest.approx(1e3 * BATCH / (file + row["generate_ms"]["best"]), rel=1e-3)
        assert row["weight_bytes"] > 0
        if row["peak_bytes"] is not None:
            assert row["peak_bytes"] >= row["weight_bytes"] + BATCH * frames * 3 * 42 * 42 * 4


def test_the_parts_add_up_to_the_first_token(tmp_path):
    assert once(tmp_path) == 0  # one sample, which is its own median
    for row in rows_of(tmp_path).values():
        parts = sum(row[f"{key}_ms"]["p50"] for key in ("vision", "projector", "prefill"))
        assert parts == pytest.approx(row["first_token_ms"]["p50"], rel=1e-3)
        tokens = (NEW_TOKENS - 1) * row["token_ms"]["p50"]
        assert parts + tokens == pytest.approx(row["generate_ms"]["p50"], rel=1e-3)


def test_all_variants_see_the_same_frames(ran):
    for frames in FRAMES:
        first = None
        for name, chunks in ran[2].items():
            clips = torch.cat(chunks)  # of all calls, one after the other
            size = BATCH * frames
            # The two clips of a call are equal, and so are those of all models: look for one call of this length.
            calls = [x for x in clips.unfold(0, size, 1).movedim(-1, 1) if torch.equal(x[:frames], x[frames:])]
            calls = [x[:frames] for x in calls if (x[0] != x[1]).any()]
            assert calls, (name, frames)
            first = calls[-1] if first is None else first
            assert any(torch.equal(call, first) for call in calls), (name, frames)


def test_the_batch_is_doubled_as_long_as_it_pays(monkeypatch, tmp_path):
    run = video_runs.generate
    gains = {1: 1.0, 2: 1.5, 4: 1.6, 8: 1.61}

    def paced(job, inputs, new_tokens, parts=True, **kwargs):
        sample = run(job, inputs, new_tokens, parts, **kwargs)
        batch = job.videos.batch
        if job.variant == PEER and batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sample.generate, sample.first_token = 1e-3 * batch / gains[batch], 5e-4
        sample.vision = sample.projector = 1e-4
        return sample

    monkeypatch.setattr(video_sweep, "generate", paced)
    monkeypatch.delitem(throughput.DEFAULTS["cpu"], "batch")  # as on a GPU
    assert command(tmp_path, "--repeats", "1", "--frames", "4") == 0
    rows = report.read(tmp_path / "throughput.json", "throughput")["rows"]
    assert {v: [row["batch"] for row in rows if row["variant"] == v] for v in VARIANTS} == {
        PPLLAVA: [1, 4],
        PEER: [1, 2],
        PEER_TUNED: [1, 4],
        OPS_OFF: [1, 4],
    }
    ours, peer = (next(row for row in rows if row["variant"] == v) for v in (PPLLAVA, PEER))
    assert (ours["searched"], ours["search"]) == (True, "batch 8 has +1 % videos/s")
    assert peer["search"] == "batch 4: does not fit, out of memory"
    best = ours["best"][PEER]
    assert (best["batch"], best["peer_batch"]) == (4, 2)
    assert best["videos_s"] == pytest.approx(1.6 / 1.5, rel=1e-3)
    assert ours["ratios"][PEER]["videos_s"] == pytest.approx(1, rel=1e-3)


def test_long_rows_are_streamed_and_repeat_frames(monkeypatch, tmp_path):
    monkeypatch.setattr(video_models, "PIXELS", 6)
    monkeypatch.setattr(video_models, "KEPT", 4)
    assert once(tmp_path, "--tokens", str(TOKENS), frames=(6, 9, 41)) == 0
    rows = rows_of(tmp_path)
    assert {key: row["status"] for key, row in rows.items() if row["status"] != "ok"} == {}
    assert [key for key, row in rows.items() if row["streamed"]] == [
        (n, v) for n in (9, 41) for v in (PPLLAVA, OPS_OFF)
    ]


# ---- what goes wrong


def test_a_wrong_op_gets_no_time(monkeypatch, tmp_path, capsys):
    op = modules.prompt_guided_project

    def uniform(*args, **kwargs):
        return op(*args, **{**kwargs, "temperature": 1e3})

    monkeypatch.setattr(modules, "prompt_guided_project", uniform)
    assert once(tmp_path) == 1
    rows = rows_of(tmp_path)
    assert rows[4, PPLLAVA]["status"] == "wrong"
    assert "against the reference: error" in rows[4, PPLLAVA]["reason"]
    assert rows[4, PPLLAVA]["generate_ms"] is None
    assert rows[4, PEER]["status"] == "ok"
    assert rows[4, PPLLAVA]["ratios"][PEER].keys() == {"flops"}
    assert "WRONG" in capsys.readouterr().out


def test_a_larger_batch_that_is_wrong_fails_the_command(monkeypatch, tmp_path):
    trouble = video_sweep.Sweep._trouble
    monkeypatch.setattr(
        video_sweep.Sweep, "_trouble", lambda *args: "lost" if args[1].videos.batch > 1 else trouble(*args)
    )
    monkeypatch.delitem(throughput.DEFAULTS["cpu"], "batch")
    assert command(tmp_path, "--repeats", "1", "--frames", "4") == 1
    rows = report.read(tmp_path / "throughput.json", "throughput")["rows"]
    assert {row["batch"]: row["status"] for row in rows} == {1: "ok", 2: "wrong"}
    assert not any(row["searched"] for row in rows)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there(device, capsys):
    with pytest.raises(SystemExit):
        throughput.parse(["--device", device])
    assert f"--device must be one of this machine, got '{device}'" in capsys.readouterr().err


def test_nan_in_the_logits_gets_no_time(monkeypatch, tmp_path):
    change_models(monkeypatch, lambda models: models[PEER].lm_head.weight.data[5].fill_(torch.nan))
    assert once(tmp_path) == 1
    row = rows_of(tmp_path)[4, PEER]
    assert row["status"] == "wrong"
    assert f"logits: 0, expected {NEW_TOKENS}" in row["reason"]
    assert row["generate_ms"] is None


@pytest.mark.parametrize("where", ["pixels", "generate", "later"])
def test_out_of_memory_is_a_result(where, monkeypatch, tmp_path):
    calls = []

    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if where == "pixels":  # more frames than PPLLaVA gets as pixels
        monkeypatch.setattr(video_models, "PIXELS", 3)
        monkeypatch.setattr(video_models.Videos, "pixels", property(too_large))
    else:
        run = video_sweep.generate

        def sometimes(job, *args, **kwargs):
            calls.append(job.variant)
            if MODELS[job.variant] == PEER and (where == "generate" or calls.count(job.variant) > 2):
                too_large()
            return run(job, *args, **kwargs)

        monkeypatch.setattr(video_sweep, "generate", sometimes)
    assert once(tmp_path, "--repeats", "3") == 0
    rows = rows_of(tmp_path)
    for variant in VARIANTS:
        expected = ("ok", None) if MODELS[variant] == PPLLAVA else ("does not fit", "out of memory")
        assert (rows[4, variant]["status"], rows[4, variant]["reason"]) == expected
    longest = report.read(tmp_path / "throughput.json", "throughput")["longest"]
    assert [each["frames"] for each in longest] == [4, None, None, 4]


def test_a_decoder_that_fails_is_a_result(monkeypatch, tmp_path):
    def broken(*args):
        raise MemoryError

    monkeypatch.setattr(video_sweep, "read_footage", broken)
    assert once(tmp_path) == 0
    assert {row["status"] for row in rows_of(tmp_path).values()} == {"does not fit"}


def test_the_time_limit_leaves_out_rows_and_says_so(tmp_path, capsys):
    assert once(tmp_path, "--time-limit", "1e-9") == 0
    assert {row["status"] for row in rows_of(tmp_path).values()} == {"left out"}
    assert "--time-limit" in capsys.readouterr().out


def test_a_failure_fails_the_command_and_says_why(monkeypatch, tmp_path, capsys):
    run = video_sweep.generate

    def broken(job, *args, **kwargs):
        if job.variant == PEER:
            raise ValueError("no such layer")
        return run(job, *args, **kwargs)

    monkeypatch.setattr(video_sweep, "generate", broken)
    assert once(tmp_path) == 1
    row = rows_of(tmp_path)[4, PEER]
    assert (row["status"], row["reason"]) == ("failed", "ValueError: no such layer")
    assert "FAILED: 4 frames, LLaVA-NeXT-Video, 36 visual tokens: ValueError: no such layer" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    (tmp_path / "throughput.json").write_text("older results")
    measure = video_sweep.Sweep.measure

    def stopped(self, frames):
        if frames == 6:
            raise KeyboardInterrupt
        measure(self, frames)

    monkeypatch.setattr(video_sweep.Sweep, "measure", stopped)
    with pytest.raises(SystemExit) as error:
        once(tmp_path, frames=(4, 6))
    assert error.value.code == 130
    assert (tmp_path / "throughput.json").read_text() == "older results"
    rows = report.read(tmp_path / "throughput.partial.json", "throughput")["rows"]
    assert [(row["frames"], row["variant"]) for row in rows] == [(4, variant) for variant in VARIANTS]
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("interrupted; its 4 rows are in ")


def test_an_own_video_and_own_weights(tmp_path, capsys):
    model, processor = video_models.presets.build("tiny", seed=5)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "weights")
    clip = video_models.encode_clip(tmp_path / "holiday.mp4", 20)
    args = ["--video", str(clip), "--model", str(tmp_path / "weights"), "--device", "cpu", "--new-tokens", "2"]
    args += ["--dtype", "float32", "--frames", "4", "21", "--repeats", "2", "--out", str(tmp_path)]
    assert throughput.main(args) == 0
    result = report.read(tmp_path / "throughput.json", "throughput")
    assert result["protocol"]["clip"] == "holiday.mp4; n frames of all of it, for all models"
    assert result["protocol"]["weights"] == "of weights; of LLaVA-NeXT-Video random, in the same sizes"
    rows = {(row["frames"], row["variant"]): row for row in result["rows"]}
    assert {rows[4, variant]["status"] for variant in VARIANTS} == {"ok"}
    assert {rows[21, v]["reason"] for v in VARIANTS} == {"holiday.mp4 has 20 frames"}
    assert {rows[21, v]["status"] for v in VARIANTS} == {"left out"}
    assert "LLaVA-NeXT-Video has random weights in the sizes of " in capsys.readouterr().out
    models, _ = video_models.build_models(None, torch.float32, "cpu", TOKENS, str(tmp_path / "weights"))
    assert all(map(torch.equal, models[PPLLAVA].parameters(), model.parameters()))
    like = video_models.presets.peer_config("tiny")
    peer = models[PEER].config
    assert peer.text_config.hidden_size == like.text_config.hidden_size
    assert peer.vision_config.num_hidden_layers == like.vision_config.num_hidden_layers
    assert peer.video_token_id == like.video_token_id
    picked = video_models.Clip(clip, own=True).pick(torch.arange(20).numpy() / 30, 4)  # of all of it
    assert picked[0] < 5
    assert picked[-1] >= 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video", "missing.mp4"], "--video must be a video file: "),
        (["--model", "missing"], "--model must be the folder of a model, got 'missing', which is none"),
        (["--model", ".", "--quick"], "--model has sizes of its own; leave out --preset and --quick"),
        (["--preset", "qwen2-7b"], "invalid choice: 'qwen2-7b' (choose from "),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        throughput.parse(["--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


def test_a_model_without_a_peer_is_refused(tmp_path, capsys):
    video_models.presets.preset_config("tiny-qwen2").save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        throughput.parse(["--model", str(tmp_path)])
    assert (
        "--model must have a plain CLIP tower, as LLaVA-NeXT-Video has no other, got siglip" in capsys.readouterr().err
    )


def test_on_a_gpu_no_timed_sample_waits_for_vision(monkeypatch, tmp_path):
    run, waits = video_sweep.generate, []

    def watched(job, inputs, new_tokens, parts=True, **kwargs):
        waits.append((job.variant, parts))
        return run(job, inputs, new_tokens, parts, **kwargs)

    monkeypatch.setattr(video_sweep, "generate", watched)
    some = sweep("--repeats", "2", "--batch", "1", "--new-tokens", "3")(tmp_path)
    some.cuda = some.pacing.cuda = True
    some.measure(4)
    for variant in VARIANTS:  # the check, which compiles, and one sample for the parts; then those that are timed
        assert [parts for name, parts in waits if name == variant] == [True, True, False, False]
    for row in some.rows:
        assert (row.status, row.samples) == ("ok", 2)
        assert row.vision_ms["p20"] == row.vision_ms["p80"]
    assert len(some.pacing.compiled) == 2  # settings are equal here, and so are the lengths of two variants each


def test_a_row_past_its_own_limit_is_left_out(tmp_path):
    some = sweep("--row-limit", "10", "--batch", "1")(tmp_path)
    some.pacing.paces = {PEER: Pace(1.0)}
    some.measure(4)
    rows = {row.variant: row for row in some.rows}
    assert rows[PEER].status == "left out"
    assert rows[PEER].reason.endswith("s, --row-limit is 10")
    assert rows[PPLLAVA].status == "ok"


def test_the_longest_video_is_narrowed_down(monkeypatch, tmp_path):
    run = video_sweep.generate

    def small(job, *args, **kwargs):
        if job.variant == PEER and job.videos.footage.count > 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(job, *args, **kwargs)

    monkeypatch.setattr(video_sweep, "generate", small)
    monkeypatch.setattr(video_sweep, "REFINED", ("cpu",))
    assert once(tmp_path, "--row-limit", "100", frames=(4, 16)) == 0
    longest = {x["variant"]: x for x in report.read(tmp_path / "throughput.json", "throughput")["longest"]}
    found = longest[PEER]
    assert (found["frames"], found["visual_tokens"], found["next"], found["why"]) == (9, 81, 10, "does not fit")
    assert (longest[PPLLAVA]["frames"], longest[PPLLAVA]["next"]) == (16, None)
