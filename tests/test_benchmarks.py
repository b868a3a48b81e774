"""The benchmarks: their baselines are the original, no wrong result gets a time, tables and charts show the results."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from benching import alone, one_thread  # noqa: F401
from PIL import Image
from safetensors.torch import load_file

import ppllava_kernels

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed
from benchmarks import baselines, chart, isolation, kernels, machine, report, runner, shapes, table, timing

POOL3D = Path(__file__).parent / "golden" / "pool3d"
META = json.loads((POOL3D / "meta.json").read_text())


@pytest.fixture
def eager_peers(monkeypatch):
    """No torch.compile, which takes seconds for each peer."""
    monkeypatch.setattr(baselines, "compiled", lambda function: function)


# ---- baselines


# Without outsize_kernel: 4 windows fit there where 3 are asked for, and the original's view cuts across windows.
@pytest.mark.parametrize("name", [name for name in META["cases"] if name != "outsize_kernel"])
def test_original_pool3d_is_the_original(name):
    inputs, outputs = (load_file(POOL3D / f"{kind}.safetensors") for kind in ("inputs", "outputs"))
    case, compared = META["cases"][name], 0
    kernel_size, stride = (tuple(case["resolved"][key]) for key in ("kernel", "stride"))
    for key, call in case["outputs"].items():
        if "error" in call or "dtype" in call:
            continue
        weights = None if call["weights"] == "none" else inputs[f"{name}/weights_{call['weights']}"]
        actual = baselines.original_pool3d(inputs[f"{name}/input"], weights, kernel_size, stride, call["temperature"])
        torch.testing.assert_close(actual, outputs[key], rtol=0, atol=1e-6)
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("op", shapes.OPS)
@pytest.mark.parametrize("name", ["tiny_video", "tiny_image", "tiny_ragged"])
def test_peers_compute_the_op(op, name):
    shape = shapes.SHAPES[name]
    inputs = shapes.make_inputs(shape, torch.float32)
    case = runner.Case(op, shape, "fp32")
    tensors = [x.double() for x in inputs.of(op)]
    expected = runner.backend_function(case, inputs, "reference")(*tensors)
    for peer in (baselines.original, baselines.plain_reference):
        torch.testing.assert_close(peer(op, shape)(*tensors), expected, rtol=1e-9, atol=1e-12)


def test_original_refuses_windows_that_are_not_ours():
    with pytest.raises(ValueError, match="the original has other windows"):
        baselines.original_window((5, 7, 6), None, (2, 3, 3))
    assert baselines.original_window((256, 24, 24), None, (16, 8, 8)) == ((16, 3, 3), (16, 3, 3))


# ---- the gate


def drop_one_patch(function):
    """The op without the first patch of its first window."""

    def mutated(values, weights, **options):
        mask = torch.zeros_like(weights)
        mask.view(-1)[0] = -torch.inf
        return function(values, weights + mask, **options)

    return mutated


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_op_gets_no_time_and_fails_the_command(
    dtype, eager_peers, small_ceilings, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(ppllava_kernels, "weighted_pool3d", drop_one_patch(ppllava_kernels.weighted_pool3d))
    code = quick(tmp_path, "--ops", "weighted_pool3d", "--dtypes", dtype, "--backends", "reference")
    rows = {
        (row["direction"], row["variant"]): row for row in json.loads((tmp_path / "kernels.json").read_text())["rows"]
    }
    assert code == 1
    assert "WRONG" in capsys.readouterr().out
    for direction in shapes.DIRECTIONS:
        row = rows[direction, "reference"]
        assert row["status"] == "wrong"
        assert row["us_p50"] is None
        assert rows[direction, report.ORIGINAL]["status"] == "ok"


# ---- the command


def quick(folder, *arguments):
    fixed = ["--device", "cpu", "--no-isolation", "--budget", "0", "--out", str(folder)]
    return kernels.main([*fixed, "--shapes", "tiny_video", *arguments])


@pytest.fixture
def small_ceilings(monkeypatch):
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(timing, "last_level_cache", lambda: 1 << 20)


def test_the_command_writes_json_and_chart_that_agree(eager_peers, small_ceilings, tmp_path, capsys):
    assert quick(tmp_path, "--dtypes", "bf16") == 0
    result = report.read(tmp_path / "kernels.json", "kernels")
    rows = result["rows"]
    backends = [*ppllava_kernels.compatible_backends(torch.ones(1))]
    timed = [name for name in backends if name != "triton"]  # on a CPU its interpreter, which is never timed
    assert {row["variant"] for row in rows} == {*timed, *report.PEERS}
    assert len(rows) == len(shapes.OPS) * 2 * (len(timed) + 3)
    assert [row for row in rows if row["status"] != "ok"] == []
    for row in rows:
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["us_p50"] / 1e3, rel=1e-3)
        assert row["ratios"].get(row["variant"], 1) == 1
        assert row["default"] == (row["variant"] == timed[0])
    assert result["machine"]["command"].startswith("python -m benchmarks.kernels --device cpu")
    digest = hashlib.sha256((tmp_path / "kernels.json").read_bytes()).hexdigest()
    with Image.open(tmp_path / "roofline.png") as image:
        assert image.info["Source"].endswith(digest)
    assert "prompt_guided_pool3d" in capsys.readouterr().out


def test_a_backend_that_cannot_run_is_a_row_with_the_reason(eager_peers, small_ceilings, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ppllava_kernels.backends.cpp, "missing", "there is no compiler")
    assert quick(tmp_path, "--ops", "prompt_relevance", "--dtypes", "fp32", "--backends", "cpp") == 1
    assert "FAILED: prompt_relevance tiny_video fp32 forward cpp: ValueError: backend='cpp'" in capsys.readouterr().out
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["reason"] for row in rows if row["variant"] == "cpp"} == {
        "ValueError: backend='cpp' cannot run: there is no compiler"
    }


def test_the_time_limit_names_what_it_leaves_out(eager_peers, small_ceilings, tmp_path):
    assert quick(tmp_path, "--dtypes", "fp32", "--time-limit", "1e-9") == 0
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert result["protocol"]["left_out"] == [f"{op} tiny_video fp32" for op in shapes.OPS]


def test_blame_leaves_out_more_at_each_crash():
    crashed = {}
    isolation.blame("forward", "cpp", "SIGABRT", crashed)
    assert list(crashed) == [("forward", "cpp")]
    isolation.blame("forward", runner.TIMING, "SIGABRT", crashed)
    assert {name for _, name in crashed} == {"cpp", report.COMPILED_ORIGINAL, report.COMPILED_REFERENCE}
    isolation.blame("forward", runner.TIMING, "SIGABRT", crashed)
    assert {name for _, name in crashed} >= {"cpp", "reference", *report.PEERS}
    with pytest.raises(RuntimeError, match="crashes even without"):
        isolation.blame("forward", runner.TIMING, "SIGABRT", crashed)


def test_a_crash_costs_one_row(monkeypatch):
    """Isolation without the process: a worker that dies at one variant."""
    case = runner.Case("weighted_pool3d", shapes.SHAPES["tiny_video"], "fp32")

    class Dies:
        def __init__(self, settings):
            self.about = None

        def rows(self, case, crashed, done):
            for direction in [d for d in shapes.DIRECTIONS if d not in done]:
                self.about = (direction, "cpp")
                if direction == "backward" and (direction, "cpp") not in crashed:
                    raise EOFError
                yield direction, [crashed.get((direction, "cpp"), "fine")]

        def end(self):
            return "SIGSEGV"

    monkeypatch.setattr(isolation, "Worker", Dies)
    rows = list(isolation.isolated_rows([case], isolation.Settings("cpu", 0), lambda case: False))
    assert rows == [["fine"], ["crashed its process (SIGSEGV)"]]


def test_device_folders():
    assert machine.device_slug({"type": "cuda", "device": "NVIDIA H200"}) == "nvidia-h200"
    assert machine.device_slug({"type": "cpu", "device": "AMD EPYC", "cores": 2}) == "cpu-amd-epyc-2-cores"


# ---- the blocks of README and docs


@pytest.fixture
def project(eager_peers, small_ceilings, tmp_path):
    quick(tmp_path / "benchmarks" / "results" / "cpu-test", "--dtypes", "fp32", "--ops", "weighted_pool3d")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("above\n\n<!-- begin: kernels -->\n<!-- end: kernels -->\n\nbelow\n")
    blocks = (f"<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in ("roofline", "bytes"))
    (tmp_path / "docs" / "performance.md").write_text("\n".join(blocks))
    (tmp_path / "docs" / "plain.md").write_text("no block\n")
    return tmp_path


def test_table_writes_is_idempotent_and_checks(project, capsys):
    readme = project / "README.md"
    assert table.main(["--root", str(project), "--check"]) == 1
    assert str(readme) in capsys.readouterr().err
    assert table.main(["--root", str(project)]) == 0
    text = readme.read_text()
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "| `weighted_pool3d` | `tiny_video` | fp32 |" in text
    assert "**CUDA GPU**: not measured yet." in text
    assert table.main(["--root", str(project)]) == 0
    assert readme.read_text() == text
    assert table.main(["--root", str(project), "--check"]) == 0
    readme.write_text(text.replace("not measured yet", "9000 times faster"))
    assert table.main(["--root", str(project), "--check"]) == 1


def test_table_shows_microseconds_of_a_gpu_and_its_wrong_results(project):
    path = next(project.glob("benchmarks/results/*/kernels.json"))
    result = json.loads(path.read_text())
    result["machine"] |= {"type": "cuda", "device": "NVIDIA Test"}
    for row in result["rows"]:
        row.update(us_p50=12.34, status="ok" if row["direction"] == "forward" else "wrong")
    path.write_text(json.dumps(result))
    block = table.kernels_block(project / "benchmarks" / "results", project)
    assert "NVIDIA Test" in block
    assert "| 12 / wrong |" in block
    assert "**CPU**: not measured yet." in block


def test_docs_show_all_backends_and_what_a_first_call_costs(project):
    path = next(project.glob("benchmarks/results/*/kernels.json"))
    result = json.loads(path.read_text())
    for row in result["rows"]:
        peer = row["variant"] in report.PEERS
        row.update(us_p50=100.0, first_call_s=2.0 if peer else 0.0005, copy_percent=70.0, read_percent=60.0)
        row.update(extra_bytes=3_000_000, ratios={report.COMPILED_REFERENCE: 2.0, report.ORIGINAL: 30.0})
    path.write_text(json.dumps(result))
    table.main(["--root", str(project)])
    text = (project / "docs" / "performance.md").read_text()
    for name in ("cpp", "reference"):
        numbers = "70 / 70 | 60 / 60 | 2.0 / 2.0 | 30 / 30 | 3.0 / 3.0 | 5.0 / 5.0 | 20,000 / 20,000 | - / - |"
        assert f"| `weighted_pool3d` | `tiny_video` | fp32 | {name} | {numbers}" in text
    assert "![roofline on " in text
    assert "](../benchmarks/results/cpu-test/roofline.png)" in text
    assert "values 151, weights 0.07 | pooled 8.4 | 159 |" in text
    result["machine"] |= {"type": "cuda", "device": "NVIDIA Test"}
    for row in result["rows"]:
        row.update(host_us=12.0 if row["variant"] == "cpp" else None, gb_s=4000.0)
    path.write_text(json.dumps(result))
    block = table.roofline_block(project / "benchmarks" / "results", project / "docs")
    assert "| cpp | 100 / 100 | 4,000 / 4,000 | 70 / 70 | 2.0 / 2.0 | 30 / 30 | 3.0 / 3.0 | 0.5 / 0.5 |" in block
    assert "| 2,000 / 2,000 | 12 / 12 |" in block


def test_roofline_of_a_gpu_and_without_rows(project):
    path = next(project.glob("benchmarks/results/*/kernels.json"))
    result = json.loads(path.read_text())
    result["machine"] |= {"type": "cuda", "device": "NVIDIA Test"}
    result["rows"][0].update(status="failed", reason="out of memory", copy_percent=None)
    path.write_text(json.dumps(result))
    assert chart.draw_roofline(path) == f"wrote {path.with_name('roofline.png')}"
    path.write_text(json.dumps(result | {"rows": result["rows"][:1]}))
    assert "no rows with times" in chart.draw_roofline(path)


def test_every_variant_has_a_colour():
    assert {*ppllava_kernels.backends.BACKENDS, *report.PEERS} <= chart.COLOURS.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin: kernels -->\n", "every block needs"),
        ("<!-- begin: nonsense -->\n<!-- end: nonsense -->\n", "must be one of kernels"),
    ],
)
def test_table_refuses_broken_blocks(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        table.render(text, tmp_path, tmp_path / "README.md")
