"""The projector's benchmark: peers compute the projector, no wrong result gets a time, the floor is the products."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from benching import alone, one_thread  # noqa: F401
from PIL import Image

import ppllava_kernels

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed
from benchmarks import (
    chart,
    isolation,
    kernels,
    projector,
    projector_baselines,
    projector_runner,
    report,
    runner,
    shapes,
    table,
)

TINY = [name for name in shapes.PROJECTORS if name.startswith("tiny_")]
FULL = [name for name in shapes.PROJECTORS if not name.startswith(("tiny_", "small_"))]


@pytest.fixture
def eager_peers(monkeypatch):
    """No torch.compile, which takes seconds for each peer."""
    monkeypatch.setattr(projector_runner, "compiled", lambda function: function)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setattr("benchmarks.timing.last_level_cache", lambda: 1 << 20)


# ---- shapes and inputs


@pytest.mark.parametrize("name", shapes.PROJECTORS)
def test_shape_is_valid(name):
    shape = shapes.PROJECTORS[name]
    assert all(min(size) >= 1 for size in shape.pooled_sizes)
    assert all(n > 0 for n in shape.axis_sizes.values() if n != shape.mlp_channels)
    for direction in projector.DIRECTIONS:
        assert 0 < shape.project_flops(direction) < shape.project_flops(direction, original=True)
    first = shape.first_windows()
    assert first.pooled_sizes == [(1, *shape.pooled_sizes[0][1:])]
    assert first.window_tokens == first.tokens  # the windows of the original, which neither overlap nor leave gaps


def test_flops_of_the_main_shapes():
    """The numbers of the design for 32 frames, in GFLOP: 29 + 155 + 34, and 802 in the original's order."""
    shape = shapes.PROJECTORS["vicuna7b_32frames"]
    assert [round(product.flops / 1e9) for product in shape.products()] == [29, 155, 34]
    assert shape.project_flops("forward", original=True) / 1e9 == pytest.approx(802, abs=1)
    for original in (False, True):  # what is computed again does not count
        forward, both = (shape.project_flops(direction, original) for direction in projector.DIRECTIONS)
        assert both == 3 * forward
    guide = shapes.PROJECTORS["qwen2_7b_32frames"].products()[:-2]
    assert [(product.inner, product.outer) for product in guide] == [(1152, 1152), (1152, 4304), (4304, 1152)]


@pytest.mark.parametrize("name", ["small_clip", "small_siglip"])
def test_cosines_spread_as_those_of_clip(name):
    shape = shapes.PROJECTORS[name]
    tensors = projector_baselines.make_projector(shape, torch.float32)
    embeds = projector_baselines.embed_patches(tensors["features"], tensors)
    cosine = torch.cosine_similarity(embeds, tensors["text_embeds"][:, None, None, None], dim=-1)
    assert cosine.shape == shape.grid
    assert cosine.mean().item() == pytest.approx(0.2, abs=0.005)
    assert cosine.std().item() == pytest.approx(0.02, abs=0.003)
    assert tensors["features"].std().item() == pytest.approx(1, abs=0.1)


# ---- what is compared


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("part", [projector_baselines.PART, 72])
def test_all_ways_are_one_function(name, part, monkeypatch):
    """Values and gradients in float64; with a small part the reference is the one for more than fits at once."""
    monkeypatch.setattr(projector_baselines, "PART", part)
    shape = shapes.PROJECTORS[name]
    tensors = {key: x.double() for key, x in projector_baselines.make_projector(shape, torch.float32).items()}
    grad = torch.randn(shape.output_shape(shapes.PROJECT), dtype=torch.float64)

    def results(function):
        return runner.results(projector_runner.variant(shapes.BOTH, "", function, tensors, grad))

    expected = results(projector_baselines.ours(shape, "reference"))
    assert len(expected) == 1 + len(shape.axes)
    for make in ("original", "reordered", "plain_reference"):
        for actual, exact in zip(results(getattr(projector_baselines, make)(shape)), expected, strict=True):
            torch.testing.assert_close(actual, exact, rtol=1e-8, atol=1e-10 * exact.abs().max().item())


@pytest.mark.parametrize("name", ["tiny_clip", "tiny_siglip"])
def test_shuffled_channels_change_the_order_of_sums_alone(name):
    case = runner.Case(shapes.PROJECT, shapes.PROJECTORS[name], "fp32", (shapes.BOTH,))
    work = projector_runner.ProjectorWork(case, torch.device("cpu"))
    work.tensors = {key: x.double() for key, x in work.tensors.items()}
    work.grad = work.grad.double()
    judges = object.__new__(projector_runner.ProjectorJudges)
    judges.shape, judges.direction, judges.tensors, judges.grad = work.shape, shapes.BOTH, work.tensors, work.grad
    function = projector_baselines.plain_reference(work.shape)
    for own, other in zip(judges._shuffled(function, 0), judges._shuffled(function, 1), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-10 * own.abs().max().item())
        assert not torch.equal(own, other)


@pytest.mark.parametrize("direction", projector.DIRECTIONS)
@pytest.mark.parametrize("name", TINY)
def test_the_products_are_those_that_are_counted(name, direction, monkeypatch):
    monkeypatch.setattr(projector_baselines, "PIECE", 100)  # rows at a time
    shape, counted = shapes.PROJECTORS[name], []
    tensors = projector_baselines.make_projector(shape, torch.float32)
    run = projector_baselines.products_variant(shape, tensors, direction).run
    mm = torch.mm

    def counting(a, b, out):
        counted.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counting)
    run(None)
    assert sum(counted) == shape.project_flops(direction)


def test_the_default_backend_is_the_projectors():
    field = projector_runner.timed_backends(torch.device("cpu"))
    assert field[0] == ppllava_kernels.backends.best_backend(torch.ones(1), order=ppllava_kernels.backends.PROJECTOR)
    assert "triton" not in field


# ---- the command


def quick(folder, *arguments, shape="tiny_clip"):
    fixed = ["--device", "cpu", "--no-isolation", "--budget", "0", "--out", str(folder)]
    return projector.main([*fixed, "--shapes", shape, *arguments])


def rows_of(folder):
    return report.read(folder / "projector.json", "projector")["rows"]


@pytest.mark.parametrize("name", ["tiny_clip", "tiny_siglip"])
def test_the_command_writes_json_and_chart_that_agree(name, eager_peers, tmp_path, capsys):
    assert quick(tmp_path, "--dtypes", "fp32", shape=name) == 0
    result = report.read(tmp_path / "projector.json", "projector")
    rows, shape = result["rows"], shapes.PROJECTORS[name]
    backends = projector_runner.timed_backends(torch.device("cpu"))
    assert [row["variant"] for row in rows] == 2 * [
        *backends,
        *(report.ORIGINAL, report.REORDERED, report.COMPILED_ORIGINAL, report.COMPILED_REORDERED),
    ]
    assert [row for row in rows if row["status"] != "ok"] == []
    for row in rows:
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        assert row["default"] == (row["variant"] == backends[0])
        assert row["products_percent"] > 0
        assert row["flops"] == shape.project_flops(row["direction"])
        assert row["original_flops"] == shape.project_flops(row["direction"], original=True)
        assert row["tflop_s"] == pytest.approx(row["flops"] / row["us_p50"] / 1e6, rel=1e-3)
        assert row["ratios"].get(row["variant"], 1) == 1
        assert (row["memory_percent"] == 100) or row["variant"] != report.ORIGINAL
    # Their common unit is the time of the products.
    forward = [row for row in rows if row["direction"] == "forward"]
    assert len({round(row["products_percent"] * row["us_p50"] / forward[0]["us_p50"], 0) for row in forward}) == 1
    digest = hashlib.sha256((tmp_path / "projector.json").read_bytes()).hexdigest()
    with Image.open(tmp_path / "projector.png") as image:
        assert image.info["Source"].endswith(digest)
    assert f"{name}, fp32, forward / both" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_projector_gets_no_time_and_fails_the_command(dtype, eager_peers, monkeypatch, tmp_path, capsys):
    original = ppllava_kernels.prompt_guided_project

    def one_bias_short(features, text_embeds, *, linear_1_bias, **options):
        return original(features, text_embeds, linear_1_bias=linear_1_bias * 0, **options)

    monkeypatch.setattr(ppllava_kernels, "prompt_guided_project", one_bias_short)
    assert quick(tmp_path, "--dtypes", dtype, "--backends", "reference") == 1
    assert "WRONG" in capsys.readouterr().out
    for row in rows_of(tmp_path):
        assert row["status"] == ("wrong" if row["variant"] == "reference" else "ok")
        assert (row["us_p50"] is None) == (row["variant"] == "reference")


def test_out_of_memory_is_a_row(eager_peers, monkeypatch, tmp_path):
    def full(shape):
        def run(tensors):
            if tensors["features"].dtype == torch.float32:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return projector_baselines.original(shape)(tensors)

        return run

    monkeypatch.setattr(projector_runner, "original", full)
    assert quick(tmp_path, "--dtypes", "fp32", "--directions", "forward") == 0
    rows = {row["variant"]: row for row in rows_of(tmp_path)}
    for name in (report.ORIGINAL, report.COMPILED_ORIGINAL):
        assert (rows[name]["status"], rows[name]["reason"]) == ("does not fit", "out of memory")
    assert rows[report.REORDERED]["status"] == "ok"
    assert rows[report.REORDERED]["memory_percent"] is None
    assert (tmp_path / "projector.png").exists()


def test_a_failure_fails_the_command_and_says_why(eager_peers, monkeypatch, tmp_path, capsys):
    def broken(shape):
        def run(tensors):
            if tensors["features"].dtype == torch.float32:
                raise ValueError("no such layer")
            return projector_baselines.original(shape)(tensors)

        return run

    monkeypatch.setattr(projector_runner, "original", broken)
    assert quick(tmp_path, "--dtypes", "fp32", "--directions", "forward") == 1
    assert "FAILED: prompt_guided_project tiny_clip fp32 forward original: ValueError: no" in capsys.readouterr().out


def test_the_time_limit_starts_nothing_that_would_pass_it(monkeypatch, tmp_path):
    cases = [runner.Case(shapes.PROJECT, shapes.PROJECTORS[name], "fp32", ("forward",)) for name in TINY]
    now, ran = [0.0], []

    def rows(cases, settings, enough):
        for case in cases:
            if not enough(case):
                now[0] += 10
                ran.append(case)
                yield []

    monkeypatch.setattr(kernels, "local_rows", rows)
    monkeypatch.setattr(kernels.time, "monotonic", lambda: now[0])
    settings = isolation.Settings("cpu", 0)
    kernels.run(cases, settings, lambda rows: None, False, 35, lambda case: 3 if case is cases[1] else 1)
    assert ran == cases[::2]  # the second would take 30 s
    ran.clear()
    marked = report.ProjectorRow(op="", shape="", dtype="", direction="", variant="", flops=1, original_flops=1)
    marked.us_p50, marked.doubts = 1.0, {"load": "others used 1.0 of the 2 cores"}
    monkeypatch.setattr(kernels, "local_rows", lambda *args: ([marked] for _ in rows(*args)))
    kernels.run(cases, settings, lambda rows: None, False, 35, lambda case: 3 if case is cases[1] else 1)
    assert ran == cases  # which tells nothing of what the second takes
    assert quick(tmp_path, "--dtypes", "fp32", "--time-limit", "-1") == 0
    left_out = json.loads((tmp_path / "projector.json").read_text())["protocol"]["left_out"]
    assert left_out == [f"{shapes.PROJECT} tiny_clip fp32 {direction}" for direction in projector.DIRECTIONS]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_hour_of_video_is_expected_to_take_longer(device):
    clips = (shapes.PROJECTORS[f"vicuna7b_{n}frames"] for n in (32, 3600))
    short, hour = (projector.cost(runner.Case(shapes.PROJECT, clip, "bf16", ("forward",)), device) for clip in clips)
    assert hour > 1.5 * short


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_starts_with_what_says_most(device):
    cases = projector.plan(projector.parse(["--device", device]))
    assert len(set(map(str, cases))) == len(cases)
    names = {case.shape.name for case in cases}
    assert {str(case).split(" ", 1)[1] for case in cases} >= (
        {f"{n}_8frames {d} forward" for n in projector.FAMILIES for d in ("fp32", "bf16")}
        if device == "cpu"
        else {f"{name} bf16 forward" for name in FULL}
    )
    assert names <= set(FULL)
    assert cases[0].directions == ("forward",)
    assert projector.parse(["--device", device]).time_limit == (45 if device == "cpu" else None)
    assert projector.parse(["--device", device, "--shapes", "tiny_clip"]).time_limit is None
    few = projector.plan(projector.parse(["--device", device, "--shapes", "tiny_clip", "--directions", "both"]))
    assert {(case.shape.name, case.directions) for case in few} == {("tiny_clip", ("both",))}


# ---- the block of the docs


def test_the_block_shows_ratios_of_a_cpu_and_times_of_a_gpu(eager_peers, tmp_path):
    results = tmp_path / "benchmarks" / "results"
    quick(results / "cpu-test", "--dtypes", "fp32")
    path = results / "cpu-test" / "projector.json"
    result = json.loads(path.read_text())
    for row in result["rows"]:
        row.update(us_p50=2000.0, products_percent=90.0, extra_bytes=3_000_000, memory_percent=6.0, tflop_s=0.5)
        row.update(ratios=dict.fromkeys(report.PROJECTOR_PEERS, 3.0), flops=100, original_flops=400)
    path.write_text(json.dumps(result))
    block = table.projector_block(results, tmp_path / "docs")
    line = "90 / 90 | 3.0 / 3.0 | 3.0 / 3.0 | 3.0 / 3.0 | 3.0 / 3.0 | 3.0 / 3.0 | 6.0 / 6.0 |"
    assert f"| `tiny_clip` | fp32 | reference | 4.0 / 4.0 | {line}" in block
    assert "**CUDA GPU**: not measured yet." in block
    assert "](../benchmarks/results/cpu-test/projector.png)" in block
    result["machine"] |= {"type": "cuda", "device": "NVIDIA Test"}
    for row in result["rows"]:
        row.update(host_us=None, status="failed" if row["direction"] == "both" else "ok", reason="out of memory")
    path.write_text(json.dumps(result))
    block = table.projector_block(results, tmp_path / "docs")
    assert "| 4.0 / failed | 2.0 / failed | 0.5 / failed | 90 / failed |" in block
    assert "reference failed (out of memory): `prompt_guided_project` both on `tiny_clip` fp32." in block
    assert "**CPU**: not measured yet." in block


def test_the_chart_is_drawn_again_and_no_wider_than_a_page(eager_peers, tmp_path):
    quick(tmp_path / "cpu-test", "--dtypes", "fp32", "--directions", "forward", "--backends", "reference")
    path = tmp_path / "cpu-test" / "projector.json"
    result = json.loads(path.read_text())
    result["rows"] = [row | {"shape": name} for name in FULL for row in result["rows"]]  # a run that was stopped
    path.write_text(json.dumps(result))
    chart.refresh(tmp_path)
    with Image.open(path.with_name("projector.png")) as image:
        assert image.info["Source"] == chart.fingerprint(path)
        assert image.width <= 1600
    path.with_name("projector.png").unlink()
    assert table.main(["--root", str(tmp_path), "--check"]) == 0
    assert not path.with_name("projector.png").exists()


def test_a_file_without_times_has_no_chart(eager_peers, tmp_path):
    quick(tmp_path, "--dtypes", "fp32", "--directions", "forward", "--time-limit", "-1")
    assert not (tmp_path / "projector.png").exists()
    assert rows_of(tmp_path) == []
