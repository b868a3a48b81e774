"""What becomes of the rows of the end-to-end benchmark: ratios, charts, and the blocks of README and docs."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed
from benchmarks import chart, report, table, video_report, video_table
from benchmarks.load import Load
from benchmarks.video_report import OPS_OFF, PEER, PEER_TUNED, PPLLAVA, VARIANTS, Longest, VideoRow

NEW_TOKENS = 16
MACHINE = {
    "device": "Test 1",
    "type": "cpu",
    "cores": 2,
    "torch": "2.13.0",
    "cuda": None,
    "triton": None,
    "python": "3.11",
    "commit": "abc",
    "dirty": False,
    "command": "python -m benchmarks.throughput",
    "date": "2026-01-01 00:00 UTC",
}
PROTOCOL = {"preset": "small", "dtype": "float32", "tokens": 1024, "new_tokens": NEW_TOKENS, "batch": None}
GFLOP = {PPLLAVA: 1, PEER: 6, PEER_TUNED: 6, OPS_OFF: 2}  # of a frame


def row(variant, frames, seconds, batch=1, **changes):
    """A row whose `generate` takes so long, half of it to the first token."""
    ms = 1e3 * seconds
    parts = {"vision": 0.3 * ms, "projector": 0.05 * ms, "prefill": 0.15 * ms, "first_token": 0.5 * ms}
    parts |= {"token": 0.5 * ms / (NEW_TOKENS - 1), "generate": ms, "decode": frames, "preprocess": 0.5 * frames}
    result = VideoRow(
        frames=frames,
        variant=variant,
        batch=batch,
        visual_tokens=frames * (32 if variant in (PPLLAVA, OPS_OFF) else 144),
        text_tokens=60,
        flops={"vision_tower": GFLOP[variant] * frames * 10**9},
        weight_bytes=10**8,
        samples=3,
        peak_bytes=10**8 + GFLOP[variant] * frames * 10**7,
    )
    for name, value in parts.items():
        setattr(result, f"{name}_ms", {"best": value, "p20": 1.1 * value, "p50": 1.2 * value, "p80": 1.3 * value})
    for name, value in changes.items():
        setattr(result, name, value)
    result.set_rates()
    return result


def failed(variant, frames, reason="out of memory", status="does not fit"):
    empty = row(variant, frames, 1.0)
    for name in ("vision", "projector", "prefill", "first_token", "token", "generate"):
        setattr(empty, f"{name}_ms", None)
    empty.videos_s = empty.videos_s_file = empty.peak_bytes = None
    empty.samples = 0
    empty.fail(reason, status)
    return empty


@pytest.fixture
def rows():
    found = {"searched": True, "search": "batch 2 has +1 % videos/s"}
    eight = [
        row(PPLLAVA, 8, 1.0, **found),
        row(PPLLAVA, 8, 2.0, batch=4, **found),
        row(PEER, 8, 4.0, **found),
        row(PEER, 8, 7.0, batch=2, **found),
        row(PEER_TUNED, 8, 3.0),
        row(OPS_OFF, 8, 1.5),
    ]
    hour = [
        row(PPLLAVA, 3600, 100.0, streamed=True),
        failed(PEER, 3600),
        failed(PEER_TUNED, 3600, "would take about 900 s", "left out"),
        row(OPS_OFF, 3600, 150.0, streamed=True),
    ]
    hour[1].past_context = True
    for some in (eight, hour):
        video_report.set_video_ratios(some)
    return eight + hour


def save(folder, rows, **machine):
    longest = [
        Longest(PPLLAVA, 3600, 115_200, None, "end of the sweep"),
        Longest(PEER, 8, 1152, 3600, "does not fit", "out of memory"),
        Longest(PEER_TUNED, 8, 1152, 3600, "left out", "would take about 900 s"),
        Longest(OPS_OFF, None, None, 8, "failed", "ValueError: no"),
    ]
    sections = {"longest": [vars(each) for each in longest]}
    path = folder / "throughput.json"
    return report.write(path, "throughput", MACHINE | machine, PROTOCOL, [x.as_dict() for x in rows], sections)


def test_ratios_compare_one_batch_and_the_best_of_each(rows):
    ours = rows[0]
    assert ours.ratios[PEER] == pytest.approx(
        {
            "flops": 6,
            "videos_s": 4,
            "videos_s_file": (4 + 0.012) / (1 + 0.012),
            "first_token": 4,
            "bound_percent": 100 * 4 / 6,
            "peak_bytes": (0.1 + 0.48) / (0.1 + 0.08),
        }
    )
    best = ours.best[PEER]
    assert (best["batch"], best["peer_batch"]) == (4, 2)
    assert best["videos_s"] == pytest.approx((4 / 2) / (2 / 7))
    assert best.keys() == {"batch", "peer_batch", "videos_s", "videos_s_file"}  # the rest is of batches of two sizes
    assert PEER_TUNED not in ours.best  # whose best batch is not known
    assert all(row.ratios == {} for row in rows if row.variant != PPLLAVA)


def test_a_row_without_times_has_the_bound_alone(rows):
    ours = next(row for row in rows if (row.variant, row.frames) == (PPLLAVA, 3600))
    assert ours.ratios[PEER] == {"flops": 6}
    assert ours.ratios[OPS_OFF]["first_token"] == pytest.approx(1.5)


def test_memory_that_no_one_measured_has_no_ratio(rows):
    pair = [row(PPLLAVA, 8, 1.0, peak_bytes=None), row(PEER, 8, 2.0)]
    video_report.set_video_ratios(pair)
    assert "peak_bytes" not in pair[0].ratios[PEER]


def test_shares_are_of_the_time_from_the_file():
    share = video_report.shares(row(PPLLAVA, 100, 1.0, batch=2).as_dict())
    assert sum(share.values()) == pytest.approx(100)
    whole = 1.0 + 2 * 0.15
    expected = {"decode": 0.2, "preprocess": 0.1, "vision": 0.3, "projector": 0.05, "prefill": 0.15, "tokens": 0.5}
    assert share == pytest.approx({part: 100 * seconds / whole for part, seconds in expected.items()}, rel=1e-3)
    assert video_report.shares(failed(PEER, 8).as_dict()) is None


def test_a_sentence_says_why_a_video_is_not_longer():
    assert Longest(PPLLAVA, 3600, 1024, None, "end of the sweep").sentence() == (
        "PPLLaVA: 3,600 frames, 1,024 visual tokens, the end of the sweep."
    )
    assert Longest(PEER, 64, 9216, 1024, "does not fit", "out of memory").sentence() == (
        "LLaVA-NeXT-Video: 64 frames, 9,216 visual tokens; 1,024 frames: does not fit (out of memory)."
    )
    assert Longest(PEER, None, None, 8, "failed").sentence() == "LLaVA-NeXT-Video: none; 8 frames: failed."


def test_the_answer_is_one_line_for_each_number_of_frames(rows):
    assert video_report.answers(rows) == [
        "8 frames: 3.0 times the videos/s of LLaVA-NeXT-Video, first token 3.0 times sooner, 3.2 times less memory",
        "3,600 frames: LLaVA-NeXT-Video does not fit into memory",
    ]
    rows[4].fail("would take about 90 s", "left out")  # our settings
    video_report.set_video_ratios(rows[:6])
    assert video_report.answers(rows[:6]) == [
        "8 frames: 4.0 times the videos/s of LLaVA-NeXT-Video as users run it, first token 4.0 times sooner, "
        "3.2 times less memory"
    ]
    slower = [row(PPLLAVA, 8, 6.0, peak_bytes=2 * 10**9), row(PEER, 8, 4.0), row(PEER_TUNED, 8, 3.0)]
    video_report.set_video_ratios(slower)
    assert video_report.answers(slower) == [
        "8 frames: 0.5 times the videos/s of LLaVA-NeXT-Video, first token 2.0 times later, 3.4 times more memory"
    ]


def test_an_answer_says_that_it_cannot_tell_and_why(rows):
    eight = rows[:6]
    for each in eight:
        each.judge(MACHINE)
    assert list(eight[4].doubts.values()) == ["50 % of its bound"]
    assert video_report.answers(eight) == [
        "8 frames: could not tell, LLaVA-NeXT-Video, our settings: 50 % of its bound"
    ]
    eight[0].load, eight[4].bound_percent = Load(2.0, 1.2, 0.2), 100.0
    for each in eight:
        each.judge(MACHINE)
    assert video_report.answers(eight) == ["8 frames: could not tell, PPLLaVA: others used 0.7 of the 2 cores"]
    eight[0].wrong("logits: 0, expected 3")
    assert video_report.answers(eight) == ["8 frames: could not tell, PPLLaVA: wrong, logits: 0, expected 3"]
    for each in eight:
        each.fail("would take about 90 s", "left out")
    assert video_report.answers(eight) == ["Could not tell: nothing was compared."]


@pytest.mark.parametrize("cuda", [False, True])
def test_the_chart_shows_this_file(cuda, rows, tmp_path):
    path = save(tmp_path, rows, **({"type": "cuda", "memory_gb": 80, "cuda": "13.0"} if cuda else {}))
    assert chart.draw_throughput(path) == f"wrote {tmp_path / 'throughput.png'}"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with Image.open(tmp_path / "throughput.png") as image:
        assert image.info["Source"].endswith(digest)
        assert min(image.size) > 600


def test_a_run_without_times_has_no_chart(tmp_path):
    path = save(tmp_path, [failed(variant, 8) for variant in VARIANTS])
    assert chart.draw_throughput(path) == "left out the chart, there are no rows with times"


@pytest.fixture
def project(rows, tmp_path):
    folder = tmp_path / "benchmarks" / "results" / "cpu-test"
    folder.mkdir(parents=True)
    save(folder, rows)
    (tmp_path / "docs").mkdir()
    for path, name in ((tmp_path / "README.md", "throughput"), (tmp_path / "docs" / "a.md", "throughput-rows")):
        path.write_text(f"above\n\n<!-- begin: {name} -->\n<!-- end: {name} -->\n\nbelow\n")
    return tmp_path


def test_table_writes_and_checks(project):
    readme, docs = project / "README.md", project / "docs" / "a.md"
    assert table.main(["--root", str(project), "--check"]) == 1
    assert table.main(["--root", str(project)]) == 0
    text = readme.read_text()
    assert "| 8 | 256 / 1,152 | 4.5 | 6.0 | 3.0 / 4.0 | 50 / 67 | 3.0 / 4.0 | - / 7.0 | 3.2 / 3.2 |" in text
    cells = "4.5 | 6.0 | left out / does not fit | - | - | - | -"
    assert f"| 3,600 | 115,200 / 518,400\\* | {cells} |" in text
    assert "Left out for lack of time: LLaVA-NeXT-Video, our settings, at 3,600 frames." in text
    assert "Does not fit (out of memory): LLaVA-NeXT-Video, at 3,600 frames." in text
    assert "900 s" not in text  # of a CPU
    assert "LLaVA-NeXT-Video: 8 frames, 1,152 visual tokens; 3,600 frames: does not fit (out of memory)." in text
    assert "**CUDA GPU**: not measured yet." in text
    assert "](benchmarks/results/cpu-test/throughput.png)" in text
    full = docs.read_text()
    assert "](../benchmarks/results/cpu-test/throughput.png)" in full
    cells = "0.2 | 0.1 | 29.9 | 5.0 | 14.9 | 49.8 | 580 | - | - | - | 7.0 | 6.9 | -"
    assert f"| 8 | LLaVA-NeXT-Video | 2 | 1,152 | {cells} |" in full
    assert "8 frames, LLaVA-NeXT-Video: 2 (batch 2 has +1 % videos/s)" in full
    assert table.main(["--root", str(project), "--check"]) == 0
    readme.write_text(text.replace("| 8 | 256 / 1,152 |", "| 8 | 256 / 9,000 |"))
    assert table.main(["--root", str(project), "--check"]) == 1


def test_results_of_an_older_benchmark_say_so(project):
    path = project / "benchmarks" / "results" / "cpu-test" / "throughput.json"
    old = json.loads(path.read_text())
    del old["longest"]
    path.write_text(json.dumps(old))
    for block in (table.throughput_block, table.throughput_rows_block):
        text = block(project / "benchmarks" / "results", project)
        assert "**Test 1**: measured by an older version" in text
        assert "| 8 |" not in text


def test_absolute_times_are_those_of_a_gpu_alone(rows, tmp_path):
    result = json.loads(save(tmp_path, rows).read_text())
    for tables in (video_table.short, video_table.full):
        lines, _ = tables(result)
        assert not any("ms" in cell.split() or cell == "videos/s" for cell in lines[0])
    result["machine"] |= {"type": "cuda", "device": "NVIDIA Test"}
    lines, _ = video_table.short(result)
    assert dict(zip(lines[0], lines[2]))["first token, ms"] == "500"
    lines, _ = video_table.full(result)
    found = dict(zip(lines[0], lines[4]))
    assert (found["model"], found["first token, ms"], found["videos/s"]) == (PEER, "2,000", "0.25")
    assert dict(zip(lines[0], lines[9]))["first token, ms"] == "does not fit"


def test_the_tables_mark_what_is_not_to_be_believed(rows, tmp_path):
    rows[3].load = Load(10.0, 6.0)
    for each in rows:
        each.judge(MACHINE)
    rows[4].doubts = {}
    result = json.loads(save(tmp_path, rows).read_text())
    assert result["rows"][3]["load"] == {"wall_s": 10.0, "others_s": 6.0, "steal_s": 0.0}
    lines, notes = video_table.short(result)
    assert dict(zip(lines[0], lines[2]))["x first token"] == "3.0 / 4.0?"
    lines, more = video_table.full(result)
    assert [line[1] for line in lines[2:7]] == [PPLLAVA, PPLLAVA, f"{PEER} ?", f"{PEER} ?", PEER_TUNED]
    for each in (notes, more):
        assert "?: not to be believed (others used 0.6 of the 2 cores): LLaVA-NeXT-Video, 8 frames." in each


def test_the_column_of_best_batches_is_there_where_they_were_searched(rows, tmp_path):
    result = json.loads(save(tmp_path, rows).read_text())
    assert "x videos/s, best batches" in video_table.short(result)[0][0]
    for each in result["rows"]:
        each["best"] = {}
    lines, notes = video_table.short(result)
    assert lines[0][4:] == ["x first token", "% of the bound", "x videos/s", "x memory"]
    assert "most videos/s" not in notes[0]
