"""The rows of the end-to-end benchmark: every variant for each number of frames, as far as memory and time reach."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from . import timing
from .video_gate import check_op
from .video_memory import peak_memory
from .video_models import (
    CLIP_FRAMES,
    Footage,
    Job,
    Videos,
    build_models,
    encode_clip,
    entrants,
    make_job,
    read_footage,
)
from .video_report import OPS_OFF, PPLLAVA, VARIANTS, Longest, VideoRow, set_video_ratios
from .video_runs import Sample, generate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLES_S = 8.0  # of one row: a `generate` that takes longer is timed once
OP_FRAMES = 32  # the op is compared with the reference up to here: it costs more than it tells beyond
GAIN = 1.03  # of videos/s, for which the batch is doubled again
MARGIN = 1.5  # of the time that is kept for PPLLaVA's rows
CHEAP = 0.03  # of the time limit: rows that take less do not wait for that
BATCHES = 0.15  # of the time limit, that plain PyTorch, which says least, leaves to the best batches
REFINED = ("cuda",)  # where the longest video is searched between two numbers of frames
BISECTIONS = 4


Shape = tuple[str, tuple[str, ...], int, int]


@dataclass
class Pace:
    """What the rows of a variant took."""

    flop: float = 0.0  # seconds for each, up to the first token
    token: float = 0.0  # seconds for each further token of a batch
    start: float = 0.0  # seconds of the first call beyond those of a second one


class Sweep:
    def __init__(self, args: argparse.Namespace, folder: Path, tell: Callable[[VideoRow], object]):
        self.args, self.device, self.dtype, self.tell = args, args.device, DTYPES[args.dtype], tell
        self.cuda = torch.device(args.device).type == "cuda"
        self.start = time.monotonic()
        self.clip = encode_clip(folder / "clip.mp4", max(CLIP_FRAMES, *args.frames))
        self.models, self.processor = build_models(args.preset, self.dtype, args.device, args.tokens)
        self.entrants = entrants(self.models, args.device)
        self.paces: dict[str, Pace] = {}
        self.compiled: set[Shape] = set()
        self.footage: dict[int, Footage] = {}
        self.found: dict[tuple[int, str, int], VideoRow] = {}

    @property
    def rows(self) -> list[VideoRow]:
        return [self.found[key] for key in sorted(self.found, key=lambda key: (key[0], VARIANTS.index(key[1]), key[2]))]

    def warm_up(self) -> None:
        """What a process does once would stand in the memory and the time of its first row. A GPU's first rows compile
        for their own shapes."""
        if self.cuda:
            return
        blank = torch.zeros(2, 3, self.processor.image_size, self.processor.image_size, dtype=torch.uint8)
        videos = self._videos(Footage(2, blank, [], []), 1)
        for variant in VARIANTS:
            job = self._job(variant, videos)
            self._attempt(self._row(job), lambda job=job: generate(job, job.load(), 2))

    def measure(self, frames: int) -> None:
        """All variants at batch 1, or at the batch that was asked for."""
        batch = self.args.batch or 1
        footage, trouble = Footage(frames, torch.empty(0), [], []), None
        try:
            repeats = self.args.repeats
            footage = read_footage(self.clip, frames, self.processor, self.device, self.dtype, repeats)
        except Exception as error:
            trouble = timing.reason(error)
        self.footage[frames] = footage
        videos = self._videos(footage, batch)
        jobs = {variant: self._job(variant, videos) for variant in VARIANTS}
        rows = {variant: self._row(job) for variant, job in jobs.items()}
        self.found |= {(frames, variant, batch): row for variant, row in rows.items()}
        parts = {}
        for variant, job in jobs.items():
            if trouble:
                rows[variant].fail(*_status(trouble))
            elif why := self._too_late(job, self._reserved(frames, variant)):
                rows[variant].fail(why, "left out")
            else:
                parts[variant] = self._gate(job, rows[variant])
        self._time(jobs, rows, parts)
        self._finish(frames, *rows.values())

    def find_batch(self, frames: int, variant: str) -> None:
        """Double the batch as long as it pays; of the larger ones the best is kept."""
        first = self.found[frames, variant, 1]
        if first.status != "ok":
            return
        best, batch = first, 2
        while True:
            job = self._job(variant, self._videos(self.footage[frames], batch))
            row = self._row(job)
            if why := self._too_late(job):
                first.search = f"batch {batch} left out, it {why}"
                break
            self._time({variant: job}, {variant: row}, {variant: self._gate(job, row)})
            first.searched = row.status in ("ok", "does not fit")
            if row.status != "ok":
                first.search = f"batch {batch}: {row.status}, {row.reason}"
                if not first.searched:  # shown, and a wrong one fails the command
                    self.found[frames, variant, batch] = row
                break
            if row.videos_s < GAIN * best.videos_s:
                first.search = f"batch {batch} has {100 * (row.videos_s / best.videos_s - 1):+.0f} % videos/s"
                break
            best, batch, first.searched = row, 2 * batch, False
        if best is not first:
            best.searched, best.search = first.searched, first.search
            self.found[frames, variant, best.batch] = best
            self._finish(frames, best)

    def longest(self, variant: str) -> Longest:
        """The longest video that ran, on a GPU narrowed down with one new token."""
        rows = [row for row in self.rows if row.variant == variant]
        best = max((row for row in rows if row.status == "ok"), key=lambda row: row.frames, default=None)
        low = best.frames if best else 0
        after = next((row for row in rows if row.frames > low and row.status != "ok"), None)
        if after is None:
            return Longest(variant, low, best.visual_tokens, None, "end of the sweep")
        high, why, reason = after.frames, after.status, after.reason
        if why == "does not fit" and torch.device(self.device).type in REFINED:
            for _ in range(BISECTIONS):
                middle = (low + high) // 2
                if middle < 2 or middle in (low, high):
                    break
                job = self._job(variant, self._videos(Footage(middle, self._longest_footage(), [], []), 1))
                row = self._row(job)
                if self._too_late(job):
                    break
                self._attempt(row, lambda job=job: generate(job, job.load(), 1, parts=False))
                if row.status == "ok":
                    low, best = middle, row
                elif row.status == "does not fit":
                    high = middle
                else:
                    break
        return Longest(variant, best and best.frames, best and best.visual_tokens, high, why, reason)

    # ---- one row

    def _videos(self, footage: Footage, batch: int) -> Videos:
        return Videos(footage, batch, self.processor, self.device, self.dtype)

    def _job(self, variant: str, videos: Videos) -> Job:
        return make_job(self.models, variant, self.entrants[variant], videos)

    def _longest_footage(self) -> torch.Tensor:
        return max((footage.frames for footage in self.footage.values()), key=len)

    def _row(self, job: Job) -> VideoRow:
        row = VideoRow(
            frames=job.videos.footage.count,
            variant=job.variant,
            batch=job.videos.batch,
            visual_tokens=job.visual_tokens,
            text_tokens=job.text_tokens,
            flops=job.flops,
            weight_bytes=sum(x.nbytes for x in job.model.parameters()),
            streamed=job.streamed,
            past_context=job.past_context,
        )
        set_times(row, {"decode": job.videos.footage.decode, "preprocess": job.videos.footage.preprocess})
        return row

    def _finish(self, frames: int, *rows: VideoRow) -> None:
        set_video_ratios([row for row in self.rows if row.frames == frames])
        for row in rows:
            self.tell(row)
        with suppress(RuntimeError):
            timing.release(self.device)

    def _attempt(self, row: VideoRow, what: Callable[[], object]) -> None:
        try:
            what()
        except Exception as error:
            row.fail(*_status(timing.reason(error)))
        if row.status != "ok":
            with suppress(RuntimeError):  # of a GPU that is lost: the rows after this one say so
                timing.release(self.device)

    def _gate(self, job: Job, row: VideoRow) -> Sample | None:
        """Whether the result is right, the peak of memory, and the first sample."""
        samples: list[Sample] = []

        def check() -> None:
            asked = job.variant == PPLLAVA and row.batch == (self.args.batch or 1)
            if asked and row.frames <= OP_FRAMES and not job.streamed:
                verdict = check_op(job)
                row.error, row.limit = verdict.error, verdict.limit
                if not verdict.passed:
                    row.wrong(f"prompt_guided_project against the reference: {verdict}")
                    return
            inputs, options = job.load(), {"output_logits": True, "return_dict_in_generate": True}
            with peak_memory(self.device) as peak:
                sample = self._generate(job, inputs, **options)
            if peak.extra_bytes is not None:
                pixels = inputs["pixel_values_videos"].nbytes if "pixel_values_videos" in inputs else 0
                row.peak_bytes = row.weight_bytes + pixels + peak.extra_bytes
            if trouble := self._trouble(job, sample):
                row.wrong(trouble)
                return
            sample.output, first = None, sample.generate
            if self.cuda:  # the first one compiled
                sample = self._generate(job, inputs)
                sample.output = None
            samples.append(sample)
            start = self.paces.get(job.variant, Pace()).start
            if _shape(job) not in self.compiled:
                start = max(first - sample.generate, 0.0)
                self.compiled.add(_shape(job))
            self._learn(job, [sample], start)

        self._attempt(row, check)
        return samples[0] if samples and row.status == "ok" else None

    def _trouble(self, job: Job, sample: Sample) -> str | None:
        """What is wrong with the answer."""
        n, batch = self.args.new_tokens, job.videos.batch
        expected = {
            "visual tokens": batch * job.visual_tokens,
            "sequences": (batch, job.length + n),
            "logits": n,
        }
        got = {
            "visual tokens": sample.visual_tokens,
            "sequences": tuple(sample.output.sequences.shape),
            "logits": sum(bool(x.isfinite().all()) for x in sample.output.logits),
        }
        return None if got == expected else "; ".join(f"{x}: {got[x]}, expected {expected[x]}" for x in got)

    def _time(self, jobs: Mapping[str, Job], rows: Mapping[str, VideoRow], parts: Mapping[str, Sample | None]) -> None:
        """Round robin, so that noise hits all; fewer rounds where another one would pass the time limit.

        parts: of each variant the sample with the time of vision and projector, which on a GPU waits for both
        """
        first = {v: sample for v, sample in parts.items() if sample is not None}
        more = {v: self._more(sample.generate) for v, sample in first.items()}
        samples = {v: [] if self.cuda and more[v] else [sample] for v, sample in first.items()}
        took = 0.0
        for i in range(max(more.values(), default=0)):
            if i and self._late(took):
                break
            start = time.monotonic()
            turn = [v for v in more if more[v] > i]
            for v in (*turn[i % len(turn) :], *turn[: i % len(turn)]):  # nobody always runs after the same one
                if rows[v].status == "ok":
                    self._attempt(rows[v], lambda v=v: samples[v].append(self._sample(jobs[v])))
            took = time.monotonic() - start
        for v, some in samples.items():
            if rows[v].status == "ok":
                inner = [first[v]] if self.cuda else some
                seconds = {key: [getattr(x, key) for x in inner] for key in ("vision", "projector", "prefill")}
                seconds |= {key: [getattr(x, key) for x in some] for key in ("first_token", "token", "generate")}
                set_times(rows[v], seconds)
                rows[v].samples = len(some)
                rows[v].set_rates()
                self._learn(jobs[v], [first[v], *some], self.paces[v].start)

    def _more(self, seconds: float) -> int:
        """Samples after the first one, of so many seconds."""
        return max(min(self.args.repeats, int(SAMPLES_S / max(seconds, 1e-9))) - (0 if self.cuda else 1), 0)

    def _sample(self, job: Job) -> Sample:
        sample = self._generate(job, job.load(), parts=not self.cuda)
        sample.output = None
        return sample

    def _generate(self, job: Job, inputs: dict[str, torch.Tensor], **options: bool) -> Sample:
        return generate(job, inputs, self.args.new_tokens, **options)

    # ---- time

    def _late(self, more: float) -> bool:
        return time.monotonic() - self.start + more > (self.args.time_limit or float("inf"))

    def _learn(self, job: Job, samples: Sequence[Sample], start: float) -> None:
        """From the fastest so far, since what disturbs a sample makes it slower."""
        flop = min(x.first_token for x in samples) / job.videos.batch / sum(job.flops.values())
        if job.variant in self.paces:
            flop = min(flop, self.paces[job.variant].flop)
        self.paces[job.variant] = Pace(flop, min(x.token or 0.0 for x in samples), start)

    def _seconds(self, job: Job, compiled: Set[Shape]) -> float:
        """That a row will take, as far as the rows before it tell."""
        ours = self.paces.get(PPLLAVA) or Pace()
        pace = self.paces.get(job.variant) or ours
        flop = max(pace.flop, ours.flop)
        one = flop * job.videos.batch * sum(job.flops.values()) + pace.token * (self.args.new_tokens - 1)
        calls = (2 if self.cuda else 1) + self._more(one)
        return calls * one + (0.0 if _shape(job) in compiled else pace.start)

    def _reserved(self, frames: int, variant: str) -> float:
        """Seconds that a row leaves to others: those of PPLLaVA with more frames."""
        if variant == PPLLAVA:
            return 0.0
        compiled, seconds = set(self.compiled), 0.0
        for n in self.args.frames:
            if n > frames:
                videos = self._videos(Footage(n, torch.empty(0), [], []), self.args.batch or 1)
                job = self._job(PPLLAVA, videos)
                seconds += self._seconds(job, compiled)
                compiled.add(_shape(job))
        batches = BATCHES * (self.args.time_limit or 0.0) if variant == OPS_OFF and not self.args.batch else 0.0
        return MARGIN * seconds + batches

    def _too_late(self, job: Job, reserved: float = 0.0) -> str | None:
        seconds, limit = self._seconds(job, self.compiled), self.args.row_limit
        if limit is not None and seconds > limit:
            return f"would take about {seconds:.0f} s, --row-limit is {limit:.0f}"
        if seconds < CHEAP * (self.args.time_limit or 0.0):
            reserved = 0.0
        if self._late(seconds + reserved):
            return f"would take about {seconds:.0f} s, which --time-limit {self.args.time_limit:.0f} does not leave"
        return None


def set_times(row: VideoRow, seconds: Mapping[str, Sequence[float | None]]) -> None:
    for name, some in seconds.items():
        if some and None not in some:
            t = timing.Timing.of(some)
            setattr(row, f"{name}_ms", {"p20": 1e3 * t.p20, "p50": 1e3 * t.p50, "p80": 1e3 * t.p80})


def _shape(job: Job) -> Shape:
    """For which a model compiles its step."""
    return job.entrant.model, tuple(job.entrant.settings), job.videos.batch, job.length


def _status(reason: str) -> tuple[str, str]:
    return reason, "does not fit" if reason == "out of memory" else "failed"
