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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

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
    Job,
    build_models,
    check_op,
    encode_clip,
    entrants,
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
    return args


@dataclass
class Sample:
    """Seconds of one `generate`, and what came out of it."""

    vision: float = 0.0
    first_token: float = 0.0
    token: float | None = None
    generate: float = 0.0
    visual_tokens: int = 0
    output: Any = field(default=None, repr=False)


class TokenTimes(StoppingCriteria):
    """Never stops; notes when each token is there."""

    def __init__(self, now: Callable[[], float]):
        self.now, self.times = now, []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.times.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def vision_times(job: Job, now: Callable[[], float], sample: Sample) -> Iterator[None]:
    """Note the seconds from the first frame into the tower to the last visual token out of the projector."""
    starts: list[float] = []

    def end(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        tokens = output[0] if isinstance(output, tuple) else output  # [.., D]
        sample.visual_tokens += tokens.shape[:-1].numel()
        sample.vision = now() - starts[0]

    inner = job.model.model
    hooks = [
        inner.vision_tower.register_forward_pre_hook(lambda module, inputs: starts.append(now())),
        inner.multi_modal_projector.register_forward_hook(end),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def generate(job: Job, new_tokens: int, now: Callable[[], float], **kwargs: Any) -> Sample:
    """One greedy `generate` of exactly `new_tokens`; vision, prefill and decoding are timed inside it."""
    sample, tokens = Sample(), TokenTimes(now)
    with vision_times(job, now, sample):
        start = now()
        sample.output = job.model.generate(
            **job.inputs,
            **job.settings,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([tokens]),
            **kwargs,
        )
        sample.generate = now() - start
    sample.first_token = tokens.times[0] - start
    if new_tokens > 1:
        sample.token = (tokens.times[-1] - tokens.times[0]) / (new_tokens - 1)
    return sample


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
                rows[name].fail(f"would take about {expected:.0f} s and pass --time-limit {self.args.time_limit:.0f}")
                rows[name].status = "left out"
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
        row.set_times(decode=decode, preprocess=preprocess)
        return row

    def _attempt(self, row: VideoRow, what: Callable[[], object]) -> None:
        try:
            what()
        except Exception as error:
            row.fail(timing.reason(error))
        if row.reason == "out of memory":
            row.status = "does not fit"
            timing.release(self.device)

    def _warm_up(self, job: Job, row: VideoRow) -> None:
        """The gate, the peak of memory, and how long a sample takes."""
        if job.name == PPLLAVA:
            verdict = check_op(job)
            row.error, row.limit = verdict.error, verdict.limit
            if not verdict.passed:
                row.wrong(f"prompt_guided_pool3d against the reference: {verdict}")
                return
        n, samples = self.args.new_tokens, []

        def run(_: None) -> None:
            samples.append(generate(job, n, self.now, output_logits=True, return_dict_in_generate=True))

        row.peak_bytes = row.weight_bytes + timing.peak_extra_bytes(timing.Variant(job.name, run), self.device)
        [sample] = samples
        batch, length = job.inputs["input_ids"].shape
        expected = {"visual tokens": batch * job.visual_tokens, "sequences": (batch, length + n), "logits": n}
        output = sample.output
        got = {
            "visual tokens": sample.visual_tokens,
            "sequences": tuple(output.sequences.shape),
            "logits": sum(bool(x.isfinite().any(-1).all() and not x.isnan().any()) for x in output.logits),
        }
        if got != expected:
            row.wrong("; ".join(f"{name}: {got[name]}, expected {expected[name]}" for name in got))
            return
        if torch.device(self.device).type == "cuda":  # the first one compiled
            sample = generate(job, n, self.now)
        self.seconds_per_flop[job.name] = sample.generate / sum(job.flops.values())

    def _time(self, jobs: dict[str, Job], rows: dict[str, VideoRow]) -> None:
        """Round robin, so that noise hits all; fewer rounds where another one would pass the time limit."""
        samples: dict[str, list[Sample]] = {name: [] for name in jobs}
        took = 0.0
        for i in range(self.args.repeats):
            if i and self.late(took):
                break
            start, names = time.monotonic(), list(jobs)
            for name in names[i % len(names) :] + names[: i % len(names)] if names else []:
                if rows[name].status == "ok":
                    run = lambda name=name: samples[name].append(generate(jobs[name], self.args.new_tokens, self.now))  # noqa: E731
                    self._attempt(rows[name], run)
            took = time.monotonic() - start
        for name, some in samples.items():
            if rows[name].status == "ok":
                times = {key: [getattr(s, key) for s in some] for key in ("vision", "first_token", "token", "generate")}
                rows[name].set_times(**times)
                rows[name].set_rates(self.args.batch)


def protocol(args: argparse.Namespace, rows: Sequence[VideoRow]) -> dict[str, object]:
    width, height = CLIP_SIZE
    settings = {name: {"attention": "sdpa", **given} for name, (_, given) in entrants(args.device).items()}
    return {
        "preset": args.preset,
        "dtype": args.dtype,
        "batch": args.batch,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "prompt": PROMPT,
        "settings": settings,
    }


def run(args: argparse.Namespace, save: Callable[[list[VideoRow]], object]) -> list[VideoRow]:
    """Rows of all numbers of frames, saved as they come."""
    rows: list[VideoRow] = []
    with report.progress() as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("encode the clip, build the models", total=len(args.frames))
        benchmark = Benchmark(args, Path(folder))
        for frames in args.frames:
            progress.update(task, description=f"{args.preset} {args.dtype}, {frames} frames")
            some = benchmark.rows(frames)
            for row in some:
                progress.console.print(row.line(), highlight=False, soft_wrap=True)
            rows += some
            save(rows)
            progress.advance(task)
    return rows
