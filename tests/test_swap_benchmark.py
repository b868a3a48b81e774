"""What `ppllava.compress` buys: nothing is timed before it is right, and each number is what it says."""

import itertools
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from benching import alone  # noqa: F401
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed
from benchmarks import report, swap, swap_gate, table
from benchmarks.swap_models import KERNEL, SUBJECTS, LlavaNextVideo, QwenVL
from benchmarks.swap_report import COLUMNS, GUIDED, MEAN, STOCK, VARIANTS
from ppllava.swap import windows

CASES = [(family.name, variant) for family in SUBJECTS for variant in VARIANTS]


def command(folder, *arguments):
    return swap.main(["--preset", "tiny", "--device", "cpu", "--quick", "--out", str(folder), *arguments])


def rows_of(folder):
    return {(row["family"], row["variant"]): row for row in report.read(folder / "swap.json", "swap")["rows"]}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swap")
    assert command(folder) == 0
    return folder


@pytest.fixture(scope="module")
def subjects():
    return {family: family("tiny", torch.float32, "cpu") for family in SUBJECTS}


def test_every_variant_has_times_and_ratios(ran):
    rows = rows_of(ran)
    assert list(rows) == CASES
    for (family, variant), row in rows.items():
        assert row["status"] == "ok", row["reason"]
        stock = rows[family, STOCK]
        assert row["samples"] == 1
        assert row["first_token_ms"] == pytest.approx(row["vision_ms"] + row["prefill_ms"], rel=1e-3)
        assert row["generate_ms"] == pytest.approx(row["first_token_ms"] + row["token_ms"], rel=1e-3)
        assert row["videos_s"] == pytest.approx(1e3 / row["generate_ms"], rel=1e-3)
        assert row["peak_bytes"] is None or row["peak_bytes"] == row["weight_bytes"] + row["extra_bytes"]
        assert row["ratios"]["visual_tokens"] == pytest.approx(stock["visual_tokens"] / row["visual_tokens"], rel=1e-3)
        for name, (_, key, _) in COLUMNS.items():
            if row[key] and stock[key]:
                ratio = row[key] / stock[key] if name == "videos_s" else stock[key] / row[key]
                assert row["ratios"][name] == pytest.approx(ratio, rel=1e-3)
        assert (row["error"] is None) == (variant == STOCK)
        assert row["error"] is None or row["error"] <= row["limit"]
    assert [row["visual_tokens"] for row in rows.values()] == [4 * 9, 2, 2, 2 * 18, 2, 2]
    assert rows["LLaVA-NeXT-Video", GUIDED]["weight_bytes"] > rows["LLaVA-NeXT-Video", MEAN]["weight_bytes"]


def test_inputs_are_those_of_the_models(subjects):
    llava, qwen = subjects[LlavaNextVideo], subjects[QwenVL]
    assert llava.guide.tower is None  # its own tower runs once
    assert qwen.guide.tower is not None
    frames = torch.randn(6, 3, *qwen.pixels)
    media = qwen.media(frames, True)
    twin = qwen.twin(KERNEL, guided=False)
    assert media["video_grid_thw"].tolist() == [[3, 6, 12]]
    assert torch.equal(twin.model.first_frames(media["pixel_values_videos"], [3, 6, 12]), frames[::2])
    for subject in (llava, qwen):
        plain, packed = (subject.inputs(4, 5, packed, guided=packed) for packed in (False, True))
        assert torch.equal(plain["input_ids"], packed["input_ids"])
        assert torch.equal(plain["pixel_values_videos"].flatten(), packed["pixel_values_videos"].flatten())
        assert int((plain["input_ids"] == subject.model.config.video_token_id).sum()) == 5
        assert {*packed} - {*plain} >= {"guide_input_ids", "guide_attention_mask"}


def test_the_question_changes_what_is_measured(subjects):
    for subject in subjects.values():
        guided, mean = (subject.twin(KERNEL, guided) for guided in (True, False))
        given = subject.inputs(4, subject.tokens(4, KERNEL), packed=True, guided=True)
        with torch.no_grad():
            assert not torch.equal(guided(**given).logits, mean(**given).logits)


def drop_last(monkeypatch):
    pool = windows.Windows.pool

    def wrong(self, values, relevance, sizes):
        clips = pool(self, values, relevance, sizes)
        last = clips[-1].clone()
        last[-1, -1, -1] = 0
        return [*clips[:-1], last]

    monkeypatch.setattr(windows.Windows, "pool", wrong)
    return "logits with windows of one token: error"


def weigh_wrong(monkeypatch):
    op = windows.weighted_pool3d

    def wrong(values, relevance, **options):
        return op(values, relevance, **options) * (1 if options["kernel_size"] == (1, 1, 1) else 1.00001)

    monkeypatch.setattr(windows, "weighted_pool3d", wrong)
    return "pooling: error"


def leave_out(monkeypatch):
    pool = windows.Windows.pool

    def wrong(*args):
        return [clip[:, :, 1:] if clip.shape[2] > 1 else clip for clip in pool(*args)]

    monkeypatch.setattr(windows.Windows, "pool", wrong)
    return "visual tokens, where"


@pytest.mark.parametrize("break_it", [drop_last, weigh_wrong, leave_out])
def test_a_wrong_result_has_no_time(tmp_path, monkeypatch, capsys, break_it):
    monkeypatch.setattr(swap, "SUBJECTS", SUBJECTS[:1])
    reason = break_it(monkeypatch)
    assert command(tmp_path) == 1
    for (_, variant), row in rows_of(tmp_path).items():
        assert row["status"] == ("ok" if variant == STOCK else "wrong")
        if variant != STOCK:
            assert reason in row["reason"]
            assert row["videos_s"] is None
            assert row["ratios"] == {}
    assert "WRONG: LLaVA-NeXT-Video, compressed" in capsys.readouterr().out


def test_what_fails_stops_nothing_else(tmp_path, monkeypatch):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlavaNextVideo, "__init__", too_large)
    assert command(tmp_path) == 0
    for (family, _), row in rows_of(tmp_path).items():
        assert (row["status"], row["reason"]) == (
            ("ok", None) if family == QwenVL.name else ("does not fit", "out of memory")
        )


@pytest.mark.parametrize(("seconds", "measured"), [(5, 0), (8, 1)])
def test_the_time_limit_may_come_at_any_turn(tmp_path, monkeypatch, seconds, measured):
    clock = itertools.count()  # three checks, three measurements of memory, three turns: a second each
    monkeypatch.setattr(swap, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    assert command(tmp_path, "--time-limit", str(seconds)) == 0
    status = [row["status"] for row in rows_of(tmp_path).values()]
    assert status == ["ok"] * measured + ["left out"] * (len(CASES) - measured)


def test_a_check_that_cannot_run_fails_its_row(tmp_path, monkeypatch):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(swap_gate, "logits", too_large)
    assert command(tmp_path) == 0
    for (_, variant), row in rows_of(tmp_path).items():
        assert row["status"] == ("ok" if variant == STOCK else "does not fit")


def test_a_failure_fails_the_command_and_says_why(tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise ValueError("no such layer")

    monkeypatch.setattr(swap, "SUBJECTS", SUBJECTS[:1])
    monkeypatch.setattr(swap_gate, "logits", broken)
    assert command(tmp_path) == 1
    assert "FAILED: LLaVA-NeXT-Video, compressed, 2 visual tokens: ValueError: no such layer" in capsys.readouterr().out


def test_the_time_limit_leaves_rows_out_and_says_so(tmp_path, capsys):
    assert command(tmp_path, "--time-limit", "1e-9") == 0
    rows = rows_of(tmp_path)
    assert list(rows) == CASES
    reason = "--time-limit 0 came before its turn"
    assert {(row["status"], row["reason"]) for row in rows.values()} == {("left out", reason)}
    assert not (tmp_path / "swap.png").exists()
    assert "left out the chart" in capsys.readouterr().out


def written(folder, result):
    """The block of this result in a page."""
    results = folder / "benchmarks" / "results" / "test"
    results.mkdir(parents=True)
    (results / "swap.json").write_text(json.dumps(result))
    (folder / "README.md").write_text("<!-- begin: swap -->\n<!-- end: swap -->\n")
    assert table.main(["--root", str(folder)]) == 0
    with Image.open(results / "swap.png") as image:
        assert min(image.size) > 200
    return (folder / "README.md").read_text()


def test_the_chart_and_the_table_show_this_file(ran, tmp_path):
    result = json.loads((ran / "swap.json").read_text())
    assert {row["doubts"]["samples"] for row in result["rows"]} == {"one sample"}
    for row in result["rows"][2:]:
        row["doubts"] = {}
    second, third = result["rows"][1:3]
    ratios = {"visual_tokens": 18.0, "vision": 0.9, "prefill": 2.5, "first_token": 1.5, "videos_s": 1.25, "peak": 1.125}
    second["ratios"] = ratios
    second.update(vision_ms=12.3, videos_s=4.2, peak_bytes=15_600_000_000, past_context=True)
    third.update(status="failed", reason="out of memory", ratios={})
    text = written(tmp_path / "cpu", result)
    assert "| LLaVA-NeXT-Video | stock | 36 | 1? | 1? | 1? | 1? | 1? | 1? |" in text
    assert "| LLaVA-NeXT-Video | compressed | 2 (18) | 0.90? | 2.50? | 1.50? | 1.25? | 1.12? | - |" in text
    assert "| Qwen2.5-VL | stock | 36 | 1 | 1 | 1 | 1 | 1 | 1 |" in text
    names = "LLaVA-NeXT-Video, stock; LLaVA-NeXT-Video, compressed"
    assert f"?: not to be believed (one sample): {names}." in text
    assert "| LLaVA-NeXT-Video | compressed, plain mean | failed | - | - | - | - | - | - |" in text
    assert "LLaVA-NeXT-Video, compressed, plain mean: failed (out of memory)." in text
    assert "Longer than the positions of the language model: LLaVA-NeXT-Video, compressed." in text
    assert "windows of (2, 3, 3)" in text
    assert " ms" not in text
    result["machine"].update(type="cuda", device="NVIDIA Test")
    text = written(tmp_path / "cuda", result)
    assert "| vision, ms (x) | prefill, ms (x) | first token, ms (x) | videos/s (x) | peak memory, GB (x) |" in text
    assert "| LLaVA-NeXT-Video | compressed | 2 (18) | 12 (0.90?) |" in text
    assert "| 4.2 (1.25?) | 16 (1.12?) |" in text


def test_frames_are_even(capsys):
    for frames in ("2", "5"):
        with pytest.raises(SystemExit):
            swap.parse(["--frames", frames])
        assert (
            "--frames must be even, as Qwen2.5-VL takes two at a time, and at least 4, got" in capsys.readouterr().err
        )


@pytest.mark.parametrize("name", ["frames", "new-tokens", "repeats"])
def test_counts_are_at_least_one(name, capsys):
    with pytest.raises(SystemExit):
        swap.parse([f"--{name}", "0"])
    assert f"--{name} must be at least 1, got 0" in capsys.readouterr().err
