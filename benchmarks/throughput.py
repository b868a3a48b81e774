"""Time PPLLaVA against LLaVA-NeXT-Video of transformers, from a video file to the last generated token.

    python -m benchmarks.throughput --quick
    python -m benchmarks.throughput --preset vicuna-7b --dtype bfloat16 --frames 16 32 64 --batch 4

Random weights, the same sizes of vision tower and language model, the same decoded frames, as many generated tokens.
Nothing is timed before it is correct. Rows go to benchmarks/results/<device>/throughput.json, with a chart beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ppllava import presets
from ppllava.video import read_video

from . import chart, gate, report, timing
from .machine import machine_info, results_folder
from .report import PPLLAVA, VideoRow
from .video_models import (
    CLIP_FPS,
    CLIP_FRAMES,
    CLIP_SIZE,
    PROMPT,
    SETTINGS,
    Job,
    Sample,
    build_models,
    check_op,
    encode_clip,
    generate,
    make_jobs,
    prepare,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# By default what says most in a few minutes, and no longer than that on a CPU.
DEFAULTS = {
    "cpu": {"preset": "small", "dtype": "float32", "frames": [8, 16, 32], "repeats": 3, "time_limit": 170.0},
    "cuda": {"preset": "vicuna-7b", "dtype": "bfloat16", "frames": [8, 16, 32, 64, 128], "repeats": 10},
}
QUICK = {"preset": "small", "frames": [4], "repeats": 1, "new_tokens": 4}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=presets.NAMES, help="default: small, on a GPU vicuna-7b")
    parser.add_argument("--frames", nargs="+", type=int, metavar="N", help="default: 8 16 32, on a GPU up to 128")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="that every model generates; default: 16")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="videos in one call")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, on a GPU bfloat16")
    parser.add_argument("--device", default="auto", help="default: auto, the GPU if there is one")
    parser.add_argument("--repeats", type=int, metavar="N", help="default: 3, on a GPU 10")
    parser.add_argument("--quick", action="store_true", help="the small preset, few frames and tokens, once")
    parser.add_argument("--time-limit", type=float, metavar="S", help="start nothing that would pass it; on a CPU 170")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    args = parser.parse_args(arguments)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = DEFAULTS["cuda" if torch.device(args.device).type == "cuda" else "cpu"]
    for name, value in {"new_tokens": 16, "time_limit": None, **kind, **(QUICK if args.quick else {})}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    for name in ("new_tokens", "batch", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    args.frames = sorted(set(args.frames))
    if args.frames[0] < 2:
        parser.error(f"--frames must be at least 2, what one window pools, got {args.frames[0]}")
    return args


class Benchmark:
    """Measures both models for one number of frames after the other."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.device, self.dtype = args, args.device, DTYPES[args.dtype]
        self.start = time.monotonic()
        self.seconds_per_flop: dict[str, float] = {}
        self.clip = encode_clip(folder / "clip.mp4", max(CLIP_FRAMES, *args.frames))
        self.models, self.processor = build_models(args.preset, self.dtype, args.device)

    def now(self) -> float:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def late(self, more: float) -> bool:
        return time.monotonic() - self.start + more > (self.args.time_limit or float("inf"))

    def rows(self, frames: int) -> list[VideoRow]:
        one, decode, preprocess = self._prepare(frames)
        jobs = {job.name: job for job in make_jobs(self.models, one, self.args.batch, self.device)}
        rows = {name: self._row(frames, job, decode, preprocess) for name, job in jobs.items()}
        for name, job in jobs.items():
            # Twice, the warm-up and one sample; a row without a sample is worth nothing.
            expected = 2 * sum(job.flops.values()) * self.seconds_per_flop.get(name, 0.0)
            if self.late(expected):
                limit = f"--time-limit {self.args.time_limit:.0f}"
                rows[name].fail(f"would take about {expected:.0f} s more and pass {limit}", "left out")
                continue
            self._attempt(rows[name], lambda job=job, row=rows[name]: self._warm_up(job, row))
        self._time({name: job for name, job in jobs.items() if rows[name].status == "ok"}, rows)
        report.set_video_ratios(list(rows.values()))
        timing.release(self.device)
        return list(rows.values())

    def _prepare(self, frames: int) -> tuple[dict[str, Tensor], list[float], list[float]]:
        """(inputs of one video, seconds of decoding and of preprocessing); the first time only warms up."""
        decode, preprocess = [], []
        for _ in range(1 + self.args.repeats):
            times = [self.now()]
            clip = read_video(self.clip, num_frames=frames)
            times.append(self.now())
            one = prepare(self.processor, clip, self.device, self.dtype)
            times.append(self.now())
            decode.append(times[1] - times[0])
            preprocess.append(times[2] - times[1])
        return one, decode[1:], preprocess[1:]

    def _row(self, frames: int, job: Job, decode: list[float], preprocess: list[float]) -> VideoRow:
        row = VideoRow(
            frames=frames,
            variant=job.name,
            visual_tokens=job.visual_tokens,
            text_tokens=job.text_tokens,
            flops=job.flops,
            weight_bytes=sum(x.nbytes for x in job.model.parameters()),
        )
        set_times(row, {"decode": decode, "preprocess": preprocess})
        return row

    def _attempt(self, row: VideoRow, what: Callable[[], object]) -> None:
        try:
            what()
        except Exception as error:
            why = timing.reason(error)
            row.fail(why, "does not fit" if why == "out of memory" else "failed")
        if row.status != "ok":
            timing.release(self.device)

    def _warm_up(self, job: Job, row: VideoRow) -> None:
        """The gate, the peak of memory, and how long a sample takes."""
        if job.name == PPLLAVA:
            verdict = check_op(job)
            row.error, row.limit = verdict.error, verdict.limit
            if not verdict.passed:
                row.wrong(f"prompt_guided_project against the reference: {verdict}")
                return
        n, samples = self.args.new_tokens, []

        def run(_: None) -> None:
            samples.append(self._generate(job, output_logits=True, return_dict_in_generate=True))

        row.peak_bytes = row.weight_bytes + timing.peak_extra_bytes(timing.Variant(job.name, run), self.device)
        [sample] = samples
        batch, length = job.inputs["input_ids"].shape
        expected = {"visual tokens": batch * job.visual_tokens, "sequences": (batch, length + n), "logits": n}
        output = sample.output
        got = {
            "visual tokens": sample.visual_tokens,
            "sequences": tuple(output.sequences.shape),
            "logits": sum(bool(x.isfinite().all()) for x in output.logits),
        }
        if got != expected:
            row.wrong("; ".join(f"{name}: {got[name]}, expected {expected[name]}" for name in got))
            return
        if torch.device(self.device).type == "cuda":  # the first one compiled
            sample = self._generate(job)
        self.seconds_per_flop[job.name] = sample.generate / sum(job.flops.values())

    def _time(self, jobs: Mapping[str, Job], rows: Mapping[str, VideoRow]) -> None:
        """Round robin, so that noise hits all; fewer rounds where another one would pass the time limit."""
        samples: dict[str, list[Sample]] = {name: [] for name in jobs}
        names, took = list(jobs), 0.0
        for i in range(self.args.repeats if jobs else 0):
            if i and self.late(took):
                break
            start, first = time.monotonic(), i % len(names)  # nobody always runs after the same one
            for name in (*names[first:], *names[:first]):
                if rows[name].status == "ok":
                    self._attempt(rows[name], lambda name=name: samples[name].append(self._generate(jobs[name])))
            took = time.monotonic() - start
        for name, some in samples.items():
            if rows[name].status == "ok":
                keys = ("vision", "first_token", "token", "generate")
                set_times(rows[name], {key: [getattr(sample, key) for sample in some] for key in keys})
                rows[name].samples = len(some)
                rows[name].set_rates(self.args.batch)
                self.seconds_per_flop[name] = rows[name].generate_ms["p50"] / 1e3 / sum(jobs[name].flops.values())

    def _generate(self, job: Job, **kwargs: bool) -> Sample:
        return generate(job, self.args.new_tokens, self.now, **kwargs)


def set_times(row: VideoRow, seconds: Mapping[str, Sequence[float]]) -> None:
    for name, some in seconds.items():
        if None not in some:
            t = timing.Timing.of(some)
            setattr(row, f"{name}_ms", {"p20": 1e3 * t.p20, "p50": 1e3 * t.p50, "p80": 1e3 * t.p80})


def protocol(args: argparse.Namespace) -> dict[str, object]:
    width, height = CLIP_SIZE
    settings = SETTINGS[torch.device(args.device).type]
    return {
        **{name: getattr(args, name) for name in ("preset", "dtype", "batch", "new_tokens", "repeats", "time_limit")},
        "prompt": PROMPT,
        "clip": f"H.264, {width}x{height}, {CLIP_FPS} fps, at least {CLIP_FRAMES} frames; all models get the same ones",
        "settings": f"attention sdpa, logits of the last position, greedy; of ours beyond the defaults: {settings}"
        if settings
        else "ours are transformers' defaults on this device, so one row of the peer is both",
        "gate": "length of the answer, visual tokens, finite logits",
        "op_gate": f"of prompt_guided_project inside PPLLaVA: {gate.RULE.partition('. Peers')[0]}",
        "times": "milliseconds, 20th, 50th and 80th percentile of the samples; models take turns",
        "flops": "matrix products up to the first token of one video; attention counts all pairs of positions",
        "ratios": "peer over PPLLaVA in FLOPs, time to first token and peak memory, PPLLaVA over peer in videos/s",
        "peak_bytes": "weights of one model and the most that PyTorch holds beyond them during generate",
    }


def run(args: argparse.Namespace, save: Callable[[list[VideoRow]], object]) -> list[VideoRow]:
    """Rows of all numbers of frames, saved as they come."""
    rows: list[VideoRow] = []
    with report.progress() as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("encode the clip, build the models", total=len(args.frames))
        try:
            benchmark = Benchmark(args, Path(folder))
        except (torch.OutOfMemoryError, MemoryError) as error:
            both = f"both models of {args.preset} in {args.dtype}"
            raise SystemExit(f"{both} do not fit on {args.device} side by side; pass a smaller --preset") from error
        for frames in args.frames:
            progress.update(task, description=f"{args.preset} {args.dtype}, {frames} frames")
            some = benchmark.rows(frames)
            for row in some:
                progress.console.print(row.line(), highlight=False, soft_wrap=True)
            rows += some
            save(rows)
            progress.advance(task)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    words = list(sys.argv[1:] if arguments is None else arguments)
    machine = machine_info(args.device, ["python", "-m", "benchmarks.throughput", *words])
    path = (args.out or results_folder(machine)) / "throughput.json"

    def save(rows: list[VideoRow]) -> None:
        report.write(path, "throughput", machine, protocol(args), [row.as_dict() for row in rows])

    rows = run(args, save)
    lines = [f"wrote {path}", chart.draw_throughput(path)]
    return report.finish(rows, report.throughput_table(rows, machine), lines, machine)


if __name__ == "__main__":
    sys.exit(main())
