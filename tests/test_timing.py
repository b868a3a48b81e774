"""The parts of the benchmarks: shapes are valid and count their bytes, statistics are right, the gate rejects."""

import sys
from pathlib import Path

import close
import pytest
import torch

import ppllava_kernels

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed
from benchmarks import gate, report, shapes, timing

TINY = [name for name in shapes.SHAPES if name.startswith("tiny_")]


# ---- shapes


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shape_is_valid(name):
    shape = shapes.SHAPES[name]
    assert all(min(size) >= 1 for size in shape.pooled_sizes)
    assert 0 < shape.pooled_tokens <= shape.covered_tokens <= shape.tokens
    for op in shapes.OPS:
        for direction in shapes.DIRECTIONS:
            assert shapes.flops(op, shape, direction) > 0
            assert shapes.moved_bytes(op, shape, torch.bfloat16, direction) > 0


def test_bytes_of_the_main_shape():
    """The numbers of the design, in MB: values 151, embeddings 28, pooled 8.4."""
    shape = shapes.SHAPES["vicuna7b_video"]
    pool, guided = (
        shapes.moved_bytes(op, shape, torch.bfloat16, "forward") / 1e6
        for op in ("weighted_pool3d", "prompt_guided_pool3d")
    )
    assert pool == pytest.approx(151 + 8.4, abs=0.2)
    assert guided == pytest.approx(151 + 28.3 + 8.4, abs=0.2)
    assert shape.pooled_tokens == 1024


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("op", shapes.OPS)
@pytest.mark.parametrize("direction", shapes.DIRECTIONS)
def test_traffic_is_the_tensors(name, op, direction):
    """Counted on the tensors themselves; these shapes leave patches out of the windows or not."""
    shape = shapes.SHAPES[name]
    inputs = dict(zip(shapes.OPS[op], shapes.make_inputs(shape, torch.bfloat16).of(op)))
    output = torch.empty(shape.output_shape(op), dtype=torch.float32 if op == "prompt_relevance" else torch.bfloat16)
    read, written = shapes.traffic(op, shape, torch.bfloat16, direction)
    if op != "prompt_relevance":
        share = shape.covered_tokens / shape.tokens
        inputs = {key: x.nbytes * (share if key in ("values", "weights") else 1) for key, x in inputs.items()}
    else:
        inputs = {key: x.nbytes for key, x in inputs.items()}
    if direction == "forward":
        assert read == inputs
        assert list(written.values()) == [output.nbytes]
    else:
        assert {key: n for key, n in read.items() if key in inputs} == inputs
        assert read[f"gradient of {'relevance' if op == 'prompt_relevance' else 'pooled'}"] == output.nbytes
        whole = [x.nbytes for x in shapes.make_inputs(shape, torch.bfloat16).of(op)]
        assert list(written.values()) == whole


@pytest.mark.parametrize("name", TINY)
def test_inputs_are_valid_and_guide(name):
    shape = shapes.SHAPES[name]
    inputs = shapes.make_inputs(shape, torch.float32)
    for op in shapes.OPS:
        window = {} if op == "prompt_relevance" else shape.window
        output = getattr(ppllava_kernels, op)(*inputs.of(op), **window, cu_frames=inputs.cu_frames)
        assert output.shape == shape.output_shape(op)
    relevance = ppllava_kernels.prompt_relevance(*inputs.of("prompt_relevance"), cu_frames=inputs.cu_frames)
    torch.testing.assert_close(relevance, inputs.weights, rtol=1e-3, atol=1e-6)
    pooled, plain = (
        ppllava_kernels.weighted_pool3d(inputs.values, w, **shape.window, cu_frames=inputs.cu_frames)
        for w in (relevance, None)
    )
    assert (pooled - plain).norm() / plain.norm() > 0.05


def test_cosines_spread_like_those_of_clip():
    inputs = shapes.make_inputs(shapes.SHAPES["small_video"], torch.float32)
    cosine = torch.cosine_similarity(inputs.image_embeds, inputs.text_embeds[0], dim=-1)
    assert cosine.mean().item() == pytest.approx(0.2, abs=0.005)
    assert cosine.std().item() == pytest.approx(0.02, abs=0.002)


# ---- timing


class FakeClock:
    """Every variant takes the seconds of its name; each call is written down."""

    def __init__(self, seconds, overhead=0.0):
        self.seconds, self.overhead, self.time, self.order = seconds, overhead, 0.0, []

    def sample(self, variant):
        variant.run(variant.prepare())
        self.order.append(variant.name)
        taken = self.seconds[variant.name]
        self.time += taken + self.overhead
        return lambda: taken

    def wait(self):
        pass

    def now(self):
        return self.time


def test_variants_take_turns():
    """After a warm-up, of one call where that was slow."""
    clock = FakeClock({"a": 0.1, "b": 0.2, "c": 0.3})
    variants = [timing.Variant(name, lambda _: None) for name in clock.seconds]
    timings, failed = timing.measure(variants, clock, budget_s=0, min_rounds=3)
    assert "".join(clock.order) == "aabbc" + "abc" + "bca" + "cab"
    assert failed == {}
    assert {name: t.p50 for name, t in timings.items()} == clock.seconds
    assert all(t.samples == 3 for t in timings.values())


def test_fast_variants_get_more_calls_and_the_budget_ends_it():
    clock = FakeClock({"fast": 0.006, "middle": 0.1, "slow": 0.5})
    variants = [timing.Variant(name, lambda _: None) for name in clock.seconds]
    timings, _ = timing.measure(variants, clock, budget_s=5, min_rounds=2)
    assert {name: t.samples for name, t in timings.items()} == {"fast": 4 * 7, "middle": 2 * 7, "slow": 7}


def test_a_variant_that_fails_leaves_the_others():
    calls = []

    def fail_later(_):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("broke\nhere")

    clock = FakeClock({"bad": 0.1, "good": 0.1})
    variants = [timing.Variant("bad", fail_later), timing.Variant("good", lambda _: None)]
    timings, failed = timing.measure(variants, clock, budget_s=0)
    assert failed == {"bad": "RuntimeError: broke"}
    assert list(timings) == ["good"]


def test_percentiles():
    assert timing.Timing.of([3.0]) == timing.Timing(3.0, 3.0, 3.0, 1)
    assert timing.Timing.of([float(n) for n in range(11)]) == timing.Timing(2.0, 5.0, 8.0, 11)


def test_preparation_is_not_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    clock = timing.HostClock(cache_bytes=1)

    def takes(seconds):
        now[0] += seconds
        return seconds

    assert clock.sample(timing.Variant("x", lambda _: takes(2), lambda: takes(5)))() == 2


def test_peak_extra_memory_on_the_cpu():
    x = torch.ones(1 << 18)  # 1 MiB
    for run, expected in ((lambda _: x * 2, 1), (lambda _: (x * 2 + 1).sum(), 2)):
        assert timing.peak_extra_bytes(timing.Variant("x", run), "cpu") / x.nbytes == pytest.approx(expected, abs=0.01)


def test_host_time_ends_when_the_call_returns(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("idle"))

    def takes(seconds):
        now[0] += seconds
        order.append("call" if seconds < 1 else "prepare")

    variant = timing.Variant("x", lambda _: takes(0.25), lambda: takes(5))
    assert timing.host_seconds(variant, "cuda") == 0.25
    assert order[:4] == ["prepare", "idle", "call", "prepare"]  # idle right before, not waited for after


def test_numbers_as_shown():
    shown = {
        None: "-",
        0.0: "0.0",
        0.018: "0.02",
        0.0001: "< 0.001",
        0.7: "0.7",
        9.94: "9.9",
        9.97: "10",
        1234: "1,234",
    }
    assert {number: report.show(number) for number in shown} == shown


# ---- gate


def test_large_inputs_are_judged_by_fewer_runs():
    assert gate.runs(1 << 20) == gate.RUNS > gate.runs(1 << 24) >= 2


def test_gate_allows_twice_what_is_unavoidable():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(100, dtype=torch.float64, generator=generator)
    others = [exact.float() * (1 + 1e-6), exact * (1 + 2e-7)]
    for factor, passes in ((1e-7, True), (1.9e-6, True), (2.3e-6, False), (1e-4, False)):
        actual = exact.float() * (1 + factor)
        if passes:
            close.assert_close("x", actual, others, exact)
        else:
            with pytest.raises(AssertionError, match=r"x: error .* is not <= "):
                close.assert_close("x", actual, others, exact)


@pytest.mark.parametrize("spoil", [lambda x: x * torch.nan, lambda x: x[:1], lambda x: x * torch.inf])
def test_gate_rejects(spoil):
    exact = torch.ones(2, 3, dtype=torch.float64)
    assert not gate.judge(gate.relative_errors([spoil(exact.float())], [exact]), [0.0], [torch.float32]).passed
