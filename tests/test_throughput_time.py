"""What the end-to-end benchmark has time for: the order of its rows, their samples, and what they tell of the next."""

import pytest
import torch
from benching import NEW_TOKENS, alone, one_thread, short_clip, sweep  # noqa: F401

from benchmarks import throughput, video_models, video_runs, video_sweep
from benchmarks.load import Load
from benchmarks.video_report import OPS_OFF, PEER, PEER_TUNED, PPLLAVA, VARIANTS
from benchmarks.video_time import Pace, Pacing, in_order


def test_32_and_64_frames_come_first():
    assert in_order([8, 128, 64, 8, 16, 32]) == [32, 64, 8, 16, 128]
    assert throughput.parse(["--device", "cpu"]).frames[:3] == [32, 64, 8]


def test_what_a_row_will_take_is_told_by_its_flops(tmp_path):
    some = sweep("--batch", "1", "--time-limit", "1000", "--repeats", "3")(tmp_path)

    def job(variant, frames):
        return some._job(variant, some._videos(video_models.Footage(frames, torch.empty(0), [], []), 1))

    pacing, flops = some.pacing, {v: sum(job(v, 16).flops.values()) for v in VARIANTS}
    assert pacing.seconds(job(PEER, 16)) == pytest.approx(3 * flops[PEER] * pacing.any.flop)  # nothing is known yet
    pacing.paces = {PPLLAVA: Pace(300 / flops[PPLLAVA]), PEER: Pace(500 / flops[PEER], token=2.0)}
    assert pacing.seconds(job(PEER, 16)) == pytest.approx(2 * (500 + 2.0 * 15))  # two samples at least
    assert pacing.seconds(job(PEER_TUNED, 16)) == pytest.approx(2 * 300 * flops[PEER] / flops[PPLLAVA])
    assert "would take about 1060 s, --row-limit is 240" in pacing.too_late(job(PEER, 16))
    pacing.args.row_limit = None
    assert "1060 s, which --time-limit 1000 does not leave" in pacing.too_late(job(PEER, 16))
    assert pacing.too_late(job(PPLLAVA, 16)) is None
    assert "600 s, which --time-limit 1000 does not leave" in pacing.too_late(job(PPLLAVA, 16), owed=401.0)
    pacing.start -= 401
    assert "600 s, which --time-limit 1000 does not leave" in pacing.too_late(job(PPLLAVA, 16))


def test_the_peer_is_never_left_out_at_32_and_64_frames(tmp_path):
    some = sweep("--time-limit", "1e-9", "--row-limit", "1e-9")(tmp_path)

    def left_out(frames):
        videos = some._videos(video_models.Footage(frames, torch.empty(0), [], []), 1)
        return [v for v in VARIANTS if some.pacing.too_late(some._job(v, videos))]

    assert [left_out(n) for n in (16, 32, 64)] == [[*VARIANTS], *[[PEER_TUNED, OPS_OFF]] * 2]


def test_the_samples_that_earlier_rows_still_need_are_kept_free(monkeypatch, tmp_path):
    some, owed = sweep("--repeats", "3")(tmp_path), {}
    monkeypatch.setattr(some, "_gate", lambda job, row: video_runs.Sample(generate=10.0, first_token=1.0))
    monkeypatch.setattr(some, "_time", lambda *args: {})
    monkeypatch.setattr(some, "_finish", lambda *args: None)
    monkeypatch.setattr(some.pacing, "too_late", lambda job, owed_: owed.setdefault(job.variant, owed_) and None)
    some.measure(4)
    assert owed == dict(zip(VARIANTS, (0.0, 10.0, 20.0, 30.0)))  # two samples of each, of which one is there


def test_a_row_that_was_disturbed_tells_nothing_of_the_next(tmp_path):
    some = sweep()(tmp_path)
    job = some._job(PPLLAVA, some._videos(video_models.Footage(4, torch.empty(0), [], []), 1))

    def learned(machine="cpu", samples=2, percent=None, others=0.0, status="ok"):
        machine = {"type": machine, "cores": 2}
        pacing = Pacing(some.args, machine, 1.0)
        row = some._row(job)
        row.samples, row.bound_percent, row.load, row.status = samples, percent, Load(1.0, others), status
        row.judge(machine)
        pacing.learn(job, row, [video_runs.Sample(first_token=3.0), video_runs.Sample(first_token=2.0)])
        return pacing.paces.get(PPLLAVA)

    assert learned().flop == 2.0 / sum(job.flops.values())
    assert learned(percent=129.0) == learned(others=0.19) == learned()
    for doubtful in ({"samples": 1}, {"percent": 131.0}, {"percent": 69.0}, {"others": 0.21}, {"status": "wrong"}):
        assert learned(**doubtful) is None
    assert learned("cuda", percent=50.0) == learned()  # small inputs cannot come near to a GPU's bound
    assert learned("cuda", percent=131.0) is None


def test_the_model_is_not_learned_from_where_a_ratio_cannot_be(monkeypatch, tmp_path):
    run = video_sweep.generate

    def slow(job, *args, **kwargs):
        sample = run(job, *args, **kwargs)
        sample.first_token = 1.0 if job.variant == PPLLAVA else 1e-3
        return sample

    monkeypatch.setattr(video_sweep, "generate", slow)
    some = sweep("--repeats", "2")(tmp_path)
    some.measure(4)
    rows = {row.variant: row for row in some.rows}
    assert {name: list(row.doubts) for name, row in rows.items()} == {
        PPLLAVA: [],
        PEER: ["bound"],
        PEER_TUNED: ["bound"],
        OPS_OFF: ["bound"],
    }
    assert rows[PEER].line().endswith(" % of its bound)")
    assert some.pacing.paces == {}


def test_the_variants_take_turns_and_the_best_counts(monkeypatch, tmp_path):
    run, order, seconds = video_sweep.generate, [], iter([9.0] * 4 + [5.0, 4.0, 3.0, 2.0, 9.0, 1.0, 9.0, 9.0])

    def watched(job, inputs, new_tokens, **kwargs):
        sample = run(job, inputs, new_tokens, **kwargs)
        if new_tokens == NEW_TOKENS:
            order.append(job.variant)
            sample.first_token = sample.generate = next(seconds)
            monkeypatch.setattr(some.pacing, "samples", lambda seconds: 3)
        return sample

    monkeypatch.setattr(video_sweep, "generate", watched)
    some = sweep("--new-tokens", str(NEW_TOKENS))(tmp_path)
    some.measure(4)
    assert order == [*VARIANTS, *VARIANTS[1:], VARIANTS[0], *VARIANTS[2:], *VARIANTS[:2]]
    best = {row.variant: row.first_token_ms["best"] for row in some.rows}
    assert best == {PPLLAVA: 2000.0, PEER: 5000.0, PEER_TUNED: 4000.0, OPS_OFF: 1000.0}
    assert {row.samples for row in some.rows} == {3}
