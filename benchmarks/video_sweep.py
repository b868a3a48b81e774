"""The rows of the end-to-end benchmark: every variant for each number of frames, as far as memory and time reach."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from . import timing
from .load import Load
from .video_gate import check_op
from .video_memory import peak_memory
from .video_models import (
    CLIP_FRAMES,
    Clip,
    Footage,
    Job,
    TooShort,
    Videos,
    build_models,
    encode_clip,
    entrants,
    make_job,
    read_footage,
)
from .video_report import PPLLAVA, VARIANTS, Longest, VideoRow, set_video_ratios
from .video_runs import Sample, generate
from .video_time import SAMPLES, Pacing, best_flop, shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OP_FRAMES = 32  # the op is compared with the reference up to here: it costs more than it tells beyond
GAIN = 1.03  # of videos/s, for which the batch is doubled again
REFINED = ("cuda",)  # where the longest video is searched between two numbers of frames
BISECTIONS = 4


class Sweep:
    """tell: hears each row that is finished. keep: is called when there is more to save than before."""

    def __init__(
        self,
        args: argparse.Namespace,
        folder: Path,
        machine: dict,
        tell: Callable[[VideoRow], object] = lambda row: None,
        keep: Callable[[list[VideoRow]], object] = lambda rows: None,
    ):
        self.args, self.device, self.dtype = args, args.device, DTYPES[args.dtype]
        self.machine, self.tell, self.keep = machine, tell, keep
        self.cuda = torch.device(args.device).type == "cuda"
        self.pacing = Pacing(args, machine, best_flop(args.device, self.dtype))
        if args.video:
            self.clip = Clip(args.video, own=True)
        else:
            self.clip = Clip(encode_clip(folder / "clip.mp4", max(CLIP_FRAMES, *args.frames)))
        self.models, self.processor = build_models(args.preset, self.dtype, args.device, args.tokens, args.model)
        self.entrants = entrants(self.models, args.device)
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
        except TooShort as error:
            trouble = str(error), "left out"
        except Exception as error:
            trouble = (timing.reason(error),)
        self.footage[frames] = footage
        videos = self._videos(footage, batch)
        jobs = {variant: self._job(variant, videos) for variant in VARIANTS}
        rows = {variant: self._row(job) for variant, job in jobs.items()}
        self.found |= {(frames, variant, batch): row for variant, row in rows.items()}
        parts, owed = {}, 0.0
        for variant, job in jobs.items():
            if trouble:
                rows[variant].fail(*trouble)
            elif why := self.pacing.too_late(job, owed):
                rows[variant].fail(why, "left out")
            elif sample := self._gate(job, rows[variant]):
                parts[variant] = sample
                owed += (self.pacing.samples(sample.generate) - (not self.cuda)) * sample.generate
        samples = self._time(jobs, rows, parts)
        self._finish(frames, jobs, rows, samples)

    def find_batch(self, frames: int, variant: str) -> None:
        """Double the batch as long as it pays; of the larger ones the best is kept."""
        first = self.found[frames, variant, 1]
        if first.status != "ok":
            return
        best, batch = first, 2
        while True:
            job = self._job(variant, self._videos(self.footage[frames], batch))
            row = self._row(job)
            if why := self.pacing.too_late(job):
                first.search = f"batch {batch} left out, it {why}"
                break
            samples = self._time({variant: job}, {variant: row}, {variant: self._gate(job, row)})
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
            row.judge(self.machine)
            self.pacing.learn(job, row, samples[variant])
        if best is not first:
            best.searched, best.search = first.searched, first.search
            self.found[frames, variant, best.batch] = best
            self._finish(frames, {}, {variant: best}, {})

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
                if self.pacing.too_late(job):
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

    def _finish(
        self, frames: int, jobs: Mapping[str, Job], rows: Mapping[str, VideoRow], samples: Mapping[str, list[Sample]]
    ) -> None:
        """Compare, judge and learn, when all rows of a number of frames are there."""
        of_frames = [row for row in self.rows if row.frames == frames]
        set_video_ratios(of_frames)
        for row in of_frames:
            row.judge(self.machine)
        off = any("bound" in row.doubts and row.unsteady(self.machine) for row in of_frames)
        for variant, job in jobs.items():
            if variant != PPLLAVA or not off:  # which of the two is wrong, the ratio does not tell
                self.pacing.learn(job, rows[variant], samples.get(variant, []))
        for row in rows.values():
            self.tell(row)
        self.keep(self.rows)
        with suppress(RuntimeError):
            timing.release(self.device)

    def _attempt(self, row: VideoRow, what: Callable[[], object]) -> None:
        try:
            what()
        except Exception as error:
            row.fail(timing.reason(error))
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
                if shape(job) not in self.pacing.compiled:
                    sample.start = max(first - sample.generate, 0.0)
                    self.pacing.compiled.add(shape(job))
            samples.append(sample)

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

    def _time(
        self, jobs: Mapping[str, Job], rows: Mapping[str, VideoRow], parts: Mapping[str, Sample | None]
    ) -> dict[str, list[Sample]]:
        """Round robin, so that noise hits all: SAMPLES of each, and more while there is time. The samples by variant.

        parts: of each variant the sample with the time of vision and projector, which on a GPU waits for both
        """
        first = {v: sample for v, sample in parts.items() if sample is not None}
        wanted = {v: self.pacing.samples(sample.generate) for v, sample in first.items()}
        samples: dict[str, list[Sample]] = {v: [] if self.cuda else [sample] for v, sample in first.items()}
        for v in () if self.cuda else first:
            self._settle(rows[v], first[v], samples[v])
        took, turns = 0.0, 0 if self.cuda else 1
        while turn := [v for v, some in samples.items() if rows[v].status == "ok" and len(some) < wanted[v]]:
            if all(len(samples[v]) >= min(SAMPLES, wanted[v]) for v in turn) and self.pacing.late(took):
                break
            start = time.monotonic()
            for v in (*turn[turns % len(turn) :], *turn[: turns % len(turn)]):  # nobody always runs after the same one
                self._attempt(rows[v], lambda v=v: samples[v].append(self._sample(jobs[v])))
                if rows[v].status == "ok":
                    self._settle(rows[v], first[v], samples[v])
                    self.keep(self.rows)
            took, turns = time.monotonic() - start, turns + 1
        return {v: [first[v], *some] for v, some in samples.items()}

    def _settle(self, row: VideoRow, first: Sample, samples: Sequence[Sample]) -> None:
        """The times of a row from its samples so far."""
        inner = [first] if self.cuda else samples
        seconds = {key: [getattr(x, key) for x in inner] for key in ("vision", "projector", "prefill")}
        seconds |= {key: [getattr(x, key) for x in samples] for key in ("first_token", "token", "generate")}
        set_times(row, seconds)
        row.samples, row.load = len(samples), Load.total(x.load for x in samples)
        row.set_rates()

    def _sample(self, job: Job) -> Sample:
        sample = self._generate(job, job.load(), parts=not self.cuda)
        sample.output = None
        return sample

    def _generate(self, job: Job, inputs: dict[str, torch.Tensor], **options: bool) -> Sample:
        return generate(job, inputs, self.args.new_tokens, **options)


def set_times(row: VideoRow, seconds: Mapping[str, Sequence[float | None]]) -> None:
    for name, some in seconds.items():
        if some and None not in some:
            t = timing.Timing.of(some)
            spread = {"best": min(some), "p20": t.p20, "p50": t.p50, "p80": t.p80}
            setattr(row, f"{name}_ms", {key: 1e3 * value for key, value in spread.items()})
