"""`pytest benchmarks`: it checks before it times, and its tests can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed
from benchmarks import conftest, shapes, stage
from benchmarks.machine import ROOT
from benchmarks.runner import Case

# A plugin of pytest: the op without the patch that matters most.
BROKEN = """
import torch
import ppllava_kernels

whole = ppllava_kernels.weighted_pool3d

def weighted_pool3d(values, weights, **options):
    mask = torch.zeros_like(weights)
    mask.view(-1)[weights.argmax()] = -torch.inf
    return whole(values, weights + mask, **options)

ppllava_kernels.weighted_pool3d = weighted_pool3d
"""


class Item:
    """Of pytest, as far as it is looked at."""

    def __init__(self, like):
        vars(self).update(vars(like))


def pytest_benchmarks(folder, *arguments, **environment):
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "-rA", *arguments]
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    some = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS"):
        some.pop(name, None)
    done = subprocess.run(command, cwd=ROOT, env=some, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_wrong_op_is_rejected_and_a_right_one_is_timed(tmp_path):
    (tmp_path / "broken_op.py").write_text(BROKEN)
    chosen = "tiny_image and fp32 and forward and (reference or original) and not compile and not guided"
    fast = ["--benchmark-min-rounds=1", "--benchmark-max-time=0", f"--benchmark-json={tmp_path / 'times.json'}"]
    code, said = pytest_benchmarks(tmp_path, "-p", "broken_op", "-k", chosen, *fast)
    assert code == 1, said
    assert "1 failed, 3 passed" in said
    assert "FAILED benchmarks/test_ops.py::test_op[weighted_pool3d-tiny_image-fp32-forward-reference]" in said
    assert "Failed: wrong: error" in said
    times = json.loads((tmp_path / "times.json").read_text())["benchmarks"]
    # Ours beside its peer; nothing was timed that is wrong.
    assert sorted((x["group"], x["params"]["variant"]) for x in times) == [
        ("prompt_relevance tiny_image fp32 forward", "original"),
        ("prompt_relevance tiny_image fp32 forward", "reference"),
        ("weighted_pool3d tiny_image fp32 forward", "original"),
    ]
    assert all(0 < x["stats"]["min"] < 1 for x in times)


@pytest.mark.parametrize("asked", [None, "all_shapes", "keyword", "id"])
def test_what_takes_long_is_left_out_with_a_word(asked):
    """Unless it is asked for; a test of another folder is not touched."""
    cases = [Case("weighted_pool3d", shapes.SHAPES[name], "fp32") for name in ("tiny_video", "long_video")]
    module, lines, deselected = SimpleNamespace(DEVICE="cpu"), [], []
    variants = ("cpp", "compile(original)")
    given = [{"case": case, "variant": variant} for case in cases for variant in variants]
    benchmarks = [SimpleNamespace(callspec=SimpleNamespace(params=x), module=module) for x in given]
    items = [*map(Item, benchmarks), Item(SimpleNamespace(module=module))]
    config = SimpleNamespace(
        args=["benchmarks/test_ops.py::test_op[x]" if asked == "id" else "benchmarks"],
        option=SimpleNamespace(keyword="long_video" if asked == "keyword" else ""),
        getoption=lambda name: asked == "all_shapes",
        stash={},
        hook=SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items)),
    )
    kept = list(items)
    conftest.pytest_collection_modifyitems(config, kept)
    conftest.pytest_terminal_summary(SimpleNamespace(write_line=lines.append), config)
    if asked:
        assert (kept, deselected, lines) == (items, [], [])
        return
    assert (kept, deselected) == ([items[0], items[4]], items[1:4])
    assert lines == [
        "Left out: 3 benchmarks that take over some seconds each on a CPU, those of large shapes and the compiled "
        "peers of tiny ones. Pass -k long_video for those of one shape, or --all-shapes. "
        "They are of tiny_video, long_video."
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cases_are_those_of_the_registry(device):
    cases = list(stage.cases(device))
    pooled = {(case.op, case.shape.name) for case in cases if case.op != shapes.PROJECT}
    assert pooled == {(op, name) for op in shapes.OPS for name in shapes.SHAPES}
    assert {case.shape.name for case in cases if case.op == shapes.PROJECT} == set(shapes.PROJECTORS)
    assert {case.dtype for case in cases} == ({"fp32", "bf16"} | ({"fp16"} if device == "cuda" else set()))
    long = {case.shape.name for case in cases if stage.takes_long(case, device)}
    assert ("long_video" in long) == (device == "cpu")
    assert not any(name.startswith(("tiny", "small")) for name in long)


def test_the_originals_compiled_backward_is_not_run_where_frames_are_left_over():
    def left_over(op, registry, name):
        return stage.leaves_frames_over(Case(op, registry[name], "fp32"))

    assert left_over("weighted_pool3d", shapes.SHAPES, "tiny_ragged")
    assert left_over(shapes.PROJECT, shapes.PROJECTORS, "tiny_clip")
    assert not left_over("weighted_pool3d", shapes.SHAPES, "tiny_video")
    assert not left_over("weighted_pool3d", shapes.SHAPES, "tiny_adaptive")


def test_the_time_of_a_call_is_that_of_the_clock():
    """On a GPU events stand around the call; what pytest-benchmark sees is the difference of their sum."""
    from benchmarks import test_ops

    class Clock:
        waited = 0

        def sample(self, variant):
            variant.run(variant.prepare())
            return lambda: 0.25 if self.waited else pytest.fail("read before it was there")

        def wait(self):
            self.waited += 1

    bench = stage.Stage.__new__(stage.Stage)
    bench.clock = Clock()
    assert bench.seconds(stage.timing.Variant("x", lambda prepared: None)) == 0.25
    before = test_ops.clock()
    test_ops.Total.seconds += 0.25
    assert test_ops.clock() - before == pytest.approx(0.25)
