"""The end-to-end benchmark: both models get the same frames, its numbers agree, and no wrong model gets a time."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import masked_flops
from torch.utils.flop_counter import FlopCounterMode

from ppllava import presets
from ppllava_kernels import modules, pooled_size

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed
from benchmarks import report, table, throughput, video_models
from benchmarks.report import PEER, PEER_TUNED, PPLLAVA

FRAMES, BATCH, NEW_TOKENS, REPEATS = (2, 7), 2, 3, 2


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are tiny, and threads that wait for each other on a busy machine take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def short_clip():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "CLIP_FRAMES", 20)
        yield


def command(folder, *arguments):
    fixed = {"--preset": "tiny", "--device": "cpu", "--new-tokens": str(NEW_TOKENS), "--out": str(folder)}
    return throughput.main([*(word for pair in fixed.items() for word in pair), *arguments])


def change_models(patch, change):
    """Let the benchmark build models that `change` has touched."""
    build = throughput.build_models

    def changed(*args):
        models, processor = build(*args)
        change(models)
        return models, processor

    patch.setattr(throughput, "build_models", changed)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(exit code, folder, frames that each model's tower saw) of a whole run."""
    folder, seen = tmp_path_factory.mktemp("throughput"), {PPLLAVA: [], PEER: []}

    def watch(models):
        for name, model in models.items():
            tower = model.model.vision_tower
            tower.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].clone()))

    with pytest.MonkeyPatch.context() as patch:
        change_models(patch, watch)
        arguments = ["--batch", str(BATCH), "--repeats", str(REPEATS), "--frames", *map(str, FRAMES)]
        code = command(folder, *arguments)
    return code, folder, seen


def rows_of(folder):
    result = report.read(folder / "throughput.json", "throughput")
    return {(row["frames"], row["variant"]): row for row in result["rows"]}


def test_the_command_writes_consistent_numbers(ran):
    code, folder, _ = ran
    assert code == 0
    rows = rows_of(folder)
    assert list(rows) == [(n, name) for n in FRAMES for name in (PPLLAVA, PEER)]
    for (frames, name), row in rows.items():
        assert row["status"] == "ok", row["reason"]
        ours = torch.Size(pooled_size((frames, 6, 6), (2, 3, 3))).numel()
        assert row["visual_tokens"] == (ours if name == PPLLAVA else frames * 9)
        spreads = {key: row[f"{key}_ms"] for key in ("decode", "preprocess", "vision", "first_token", "token")}
        for spread in (*spreads.values(), row["generate_ms"]):
            assert 0 < spread["p20"] <= spread["p50"] <= spread["p80"]
        assert row["vision_ms"]["p20"] < row["first_token_ms"]["p20"] < row["generate_ms"]["p20"]
        assert row["samples"] == REPEATS
        assert row["videos_s"] == pytest.approx(1e3 * BATCH / row["generate_ms"]["p50"], rel=1e-3)
        file = BATCH * (row["decode_ms"]["p50"] + row["preprocess_ms"]["p50"])
        assert row["videos_s_file"] == pytest.approx(1e3 * BATCH / (file + row["generate_ms"]["p50"]), rel=1e-3)
        assert row["peak_bytes"] > row["weight_bytes"] > 0


def test_ratios_are_those_of_the_medians(ran):
    rows = rows_of(ran[1])
    for frames in FRAMES:
        ours, theirs = rows[frames, PPLLAVA], rows[frames, PEER]
        assert theirs["ratios"] == {}
        assert ours["ratios"][PEER] == pytest.approx(
            {
                "first_token": theirs["first_token_ms"]["p50"] / ours["first_token_ms"]["p50"],
                "videos_s": ours["videos_s"] / theirs["videos_s"],
                "videos_s_file": ours["videos_s_file"] / theirs["videos_s_file"],
                "peak_bytes": theirs["peak_bytes"] / ours["peak_bytes"],
                "flops": sum(theirs["flops"].values()) / sum(ours["flops"].values()),
            },
            rel=1e-3,
        )


def test_the_chart_shows_this_file(ran):
    digest = hashlib.sha256((ran[1] / "throughput.json").read_bytes()).hexdigest()
    with Image.open(ran[1] / "throughput.png") as image:
        assert image.info["Source"].endswith(digest)
        assert min(image.size) > 300


def test_both_models_see_the_same_frames(ran):
    seen = ran[2]
    sizes = {name: {len(pixels) for pixels in calls} for name, calls in seen.items()}
    assert sizes == {name: {BATCH * n for n in FRAMES} for name in seen}
    for pixels in (*seen[PPLLAVA], *seen[PEER]):
        first = next(x for x in seen[PPLLAVA] if len(x) == len(pixels))
        assert torch.equal(pixels, first)
        clips = pixels.unflatten(0, (BATCH, -1))  # [B, T, 3, S, S]
        assert torch.equal(clips[0], clips[1])
        assert (clips[0, 0] != clips[0, 1]).any()


@pytest.mark.parametrize("frames", [2, 7])
def test_flops_of_the_peer_are_what_torch_counts(frames):
    model, processor = presets.build("tiny")
    peer = presets.build_peer("tiny")
    peer.set_attn_implementation("eager")
    clip = torch.zeros(frames, 42, 42, 3, dtype=torch.uint8)
    one = video_models.prepare(processor, clip, "cpu", torch.float32)
    job = video_models.make_jobs({PPLLAVA: model, PEER: peer}, one, 1, "cpu")[1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        peer(**job.inputs, logits_to_keep=1)
    length = job.inputs["input_ids"].shape[1]
    assert counter.get_total_flops() == sum(job.flops.values()) + masked_flops(peer.config.text_config, length)


def test_the_peer_runs_as_it_comes_and_with_all_settings_of_ours():
    assert list(video_models.entrants("cpu")) == [PPLLAVA, PEER]
    gpu = video_models.entrants("cuda")
    assert list(gpu) == [PPLLAVA, PEER, PEER_TUNED]
    assert gpu[PEER] == (PEER, {})
    assert gpu[PEER_TUNED] == (PEER, gpu[PPLLAVA][1])


# ---- what goes wrong


def test_a_wrong_op_gets_no_time(monkeypatch, tmp_path, capsys):
    op = modules.prompt_guided_project

    def uniform(*args, **kwargs):
        return op(*args, **{**kwargs, "temperature": 1e3})

    monkeypatch.setattr(modules, "prompt_guided_project", uniform)
    assert command(tmp_path, "--frames", "4", "--repeats", "1") == 1
    rows = rows_of(tmp_path)
    assert rows[4, PPLLAVA]["status"] == "wrong"
    assert "against the reference: error" in rows[4, PPLLAVA]["reason"]
    assert rows[4, PPLLAVA]["generate_ms"] is None
    assert rows[4, PEER]["status"] == "ok"
    assert rows[4, PPLLAVA]["ratios"][PEER].keys() == {"flops"}
    assert "WRONG" in capsys.readouterr().out


def test_nan_in_the_logits_gets_no_time(monkeypatch, tmp_path):
    change_models(monkeypatch, lambda models: models[PEER].lm_head.weight.data[5].fill_(torch.nan))
    assert command(tmp_path, "--frames", "4", "--repeats", "1") == 1
    row = rows_of(tmp_path)[4, PEER]
    assert row["status"] == "wrong"
    assert f"logits: 0, expected {NEW_TOKENS}" in row["reason"]
    assert row["generate_ms"] is None


def test_out_of_memory_is_a_result(monkeypatch, tmp_path):
    def too_large(**kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    change_models(monkeypatch, lambda models: setattr(models[PEER], "generate", too_large))
    assert command(tmp_path, "--frames", "4", "--repeats", "1") == 0
    rows = rows_of(tmp_path)
    assert rows[4, PEER]["status"] == "does not fit"
    assert rows[4, PPLLAVA]["status"] == "ok"
    assert "does not fit" in table.throughput_device(report.read(tmp_path / "throughput.json", "throughput"))


def test_the_time_limit_leaves_out_rows_and_says_so(tmp_path, capsys):
    assert command(tmp_path, "--frames", "4", "--time-limit", "1e-9") == 0
    assert {row["status"] for row in rows_of(tmp_path).values()} == {"left out"}
    assert "--time-limit" in capsys.readouterr().out


# ---- the block of README and docs


@pytest.fixture
def project(ran, tmp_path):
    folder = tmp_path / "benchmarks" / "results" / "cpu-test"
    folder.mkdir(parents=True)
    (folder / "throughput.json").write_bytes((ran[1] / "throughput.json").read_bytes())
    (tmp_path / "README.md").write_text("above\n\n<!-- begin: throughput -->\n<!-- end: throughput -->\n\nbelow\n")
    return tmp_path


def test_table_writes_and_checks(project):
    readme = project / "README.md"
    assert table.main(["--root", str(project), "--check"]) == 1
    assert table.main(["--root", str(project)]) == 0
    text = readme.read_text()
    ratios = rows_of(project / "benchmarks/results/cpu-test")[7, PPLLAVA]["ratios"][PEER]
    cells = " | ".join(report.show(ratios[key]) for key in ("first_token", "videos_s", "flops"))
    assert f"| 7 | 12 / 63 | {cells} |" in text
    assert "**CUDA GPU**: not measured yet." in text
    assert table.main(["--root", str(project), "--check"]) == 0
    readme.write_text(text.replace("| 7 | 12 / 63 |", "| 7 | 12 / 9000 |"))
    assert table.main(["--root", str(project), "--check"]) == 1


def test_table_shows_milliseconds_of_a_gpu_and_both_rows_of_the_peer(project):
    path = project / "benchmarks/results/cpu-test/throughput.json"
    result = json.loads(path.read_text())
    result["machine"] |= {"type": "cuda", "device": "NVIDIA Test"}
    rows = [row for row in result["rows"] if row["frames"] == 7]
    for row, ms in zip(rows, (10, 70)):
        row["first_token_ms"]["p50"], row["token_ms"]["p50"], row["videos_s"] = ms, 3, 1.5
    better = {"first_token": 7, "videos_s": 6, "flops": 5}
    rows[0]["ratios"] = {PEER: better, PEER_TUNED: {"flops": 5}}
    rows.append({**rows[1], "variant": PEER_TUNED, "status": "does not fit", "reason": "out of memory"})
    rows[2] |= {"first_token_ms": None, "token_ms": None, "videos_s": None}
    path.write_text(json.dumps({**result, "rows": rows}))
    block = table.throughput_block(project / "benchmarks" / "results", project)
    cells = "12 / 63 | 10 / 70 / - | 3.0 / 3.0 / - | 1.5 / 1.5 / - | 7.0 / - | 6.0 / - | 5.0 / 5.0"
    assert f"| 7 | {cells} |" in block
    assert f"7 frames, {PEER_TUNED}: does not fit (out of memory)." in block
    assert "**CPU**: not measured yet." in block
