"""The steps of the fast path: each is measured with and without, gives the same answers, and leaves no trace."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from benching import alone  # noqa: F401
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed
from benchmarks import report, steps, table
from benchmarks.steps import STEPS, Job, Way, ways


def command(folder, *arguments):
    fixed = ["--preset", "tiny", "--dtype", "float32", "--device", "cpu", "--quick", "--out", str(folder)]
    with torch.compiler.set_stance("force_eager"):  # the compiler is not what is tested
        return steps.main([*fixed, *arguments])


def rows_of(folder):
    return {row["step"]: row for row in report.read(folder / "steps.json", "steps")["rows"]}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    assert command(folder) == 0
    return folder


def test_every_step_has_a_ratio_and_the_same_answers(ran):
    rows = rows_of(ran)
    assert list(rows) == [step.name for step in STEPS]
    for step, row in zip(STEPS, rows.values()):
        assert row["status"] == "ok", row["reason"]
        assert row["ratio"] == pytest.approx(row["before_s"] / row["after_s"], rel=1e-3)
        assert row["videos_s"] == pytest.approx(2 / row["after_s"], rel=1e-3)
        assert row["same_answers"] == 1
        assert row["kept"] == ("cpu" in step.devices)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steps_build_on_each_other(device):
    plan = list(ways(device))
    assert plan[0][1] == Way()
    for step, before, after in plan:
        changed = {name for name in vars(before) if getattr(before, name) != getattr(after, name)}
        assert changed == set(step.change)
    for (step, before, after), (_, following, _) in itertools.pairwise(plan):
        assert following == (after if device in step.devices else before)
    if device == "cuda":
        assert plan[-1][2] == Way(True, False, *[True] * 6)


def test_each_way_is_what_it_says_and_leaves_no_trace(tmp_path, monkeypatch):
    args = steps.parse(["--preset", "tiny", "--device", "cpu", "--quick"])
    job = Job(args, tmp_path)
    inner, seen = job.model.model, {}

    def look(tower, inputs):
        seen.update(
            layers=len(tower.encoder.layers),
            frames=len(inputs[0]),
            attention=tower.config._attn_implementation,
            backend=inner.multi_modal_projector.backend,
            compiled=tower._compiled_call_impl is not None,
        )

    inner.vision_tower.register_forward_pre_hook(look)
    monkeypatch.setattr(type(inner), "vision_chunk_frames", lambda self, device: self.config.vision_chunk or 2)
    expected = job.answers(Way())
    plain = {"layers": 3, "frames": 4, "attention": "eager", "backend": "reference", "compiled": False}
    assert seen == plain
    changes = {
        "sdpa": (True, {"attention": "sdpa"}),
        "all_layers": (False, {"layers": 2}),
        "ops": (True, {"backend": None}),
        "chunks": (True, {"frames": 2}),
        "compiled_tower": (True, {"compiled": True}),
        "static_cache": (True, {}),
        "prefetch": (True, {}),
        "batch": (True, {}),
    }
    assert changes.keys() == vars(Way()).keys()
    for name, (value, change) in changes.items():
        with torch.compiler.set_stance("force_eager"):
            assert job.answers(Way(**{name: value})) == expected
        if name != "compiled_tower":  # whose hooks are inside of what was traced
            assert seen == {**plain, **change}, name
    assert len(inner.vision_tower.encoder.layers) == 2
    assert inner.vision_tower._compiled_call_impl is None
    assert job.answers(Way()) == expected


def test_a_step_that_fails_stops_no_other(tmp_path, monkeypatch):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(steps.ppllava, "encode_video", too_large)
    assert command(tmp_path) == 0  # which is a result
    rows = rows_of(tmp_path)
    assert {name for name, row in rows.items() if row["status"] != "ok"} == {STEPS[-2].name, STEPS[-1].name}
    assert rows[STEPS[-2].name]["reason"] == "out of memory"
    assert rows[STEPS[-2].name]["ratio"] is None


def test_a_failure_fails_the_command_and_says_why(tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise ValueError("a video must be a path")

    monkeypatch.setattr(steps.ppllava, "encode_video", broken)
    assert command(tmp_path) == 1
    out = capsys.readouterr().out
    assert f"FAILED: {STEPS[-2].name}: ValueError: a video must be a path" in out


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps.ppllava, "batch", stopped)
    with pytest.raises(SystemExit) as error:
        command(tmp_path)
    assert error.value.code == 130
    assert not (tmp_path / "steps.json").exists()
    assert capsys.readouterr().out.splitlines()[-1].startswith("interrupted; its 7 rows are in ")
    assert len(report.read(tmp_path / "steps.partial.json", "steps")["rows"]) == len(STEPS) - 1


def test_the_time_limit_leaves_steps_out_and_says_so(tmp_path):
    assert command(tmp_path, "--time-limit", "1e-9") == 0
    assert {(row["status"], row["reason"]) for row in rows_of(tmp_path).values()} == {
        ("left out", "--time-limit 0 came before its turn")
    }
    assert not (tmp_path / "steps.png").exists()


def test_the_chart_and_the_table_show_this_file(ran, tmp_path):
    with Image.open(ran / "steps.png") as image:
        assert min(image.size) > 200
    folder = tmp_path / "benchmarks" / "results" / "cpu-test"
    folder.mkdir(parents=True)
    result = json.loads((ran / "steps.json").read_text())
    for row, ratio in zip(result["rows"], (2.0, 1.5, 1.0, 1.2, 0.9, 1.1, 1.0, 2.0)):
        row["ratio"], row["doubts"] = ratio, {}
    result["rows"][1]["doubts"] = {"samples": "one sample"}
    result["rows"][6].update(status="failed", reason="out of memory", ratio=None)
    (folder / "steps.json").write_text(json.dumps(result))
    (tmp_path / "README.md").write_text("<!-- begin: steps -->\n<!-- end: steps -->\n")
    assert table.main(["--root", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| attention by SDPA | transformers' default | 2.00 | 2.00 | yes |" in text
    assert "| vision tower compiled | `model.model.vision_tower.compile()` | 0.90 |  | no |" in text
    assert "| batches, each clip encoded once | `ppllava.batch`, `ppllava run` | 2.00 | 7.20 | yes |" in text
    assert "| no unused layers in the vision tower | always | 1.50? | 3.00 | yes |" in text
    assert "?: not to be believed (one sample): no unused layers in the vision tower." in text
    assert "frames decoded while the tower runs: failed (out of memory)." in text
    assert (folder / "steps.png").exists()


@pytest.mark.parametrize("name", ["clips", "frames", "new-tokens", "repeats"])
def test_counts_are_at_least_one(name, capsys):
    with pytest.raises(SystemExit):
        steps.parse([f"--{name}", "0"])
    assert f"--{name} must be at least 1, got 0" in capsys.readouterr().err


def test_the_presets_with_another_tower_can_be_measured(tmp_path):
    args = steps.parse(["--preset", "tiny-qwen2", "--device", "cpu", "--quick"])
    job = Job(args, tmp_path)
    assert len(job.answers(Way())) == 2
