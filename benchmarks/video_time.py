"""How long rows of the end-to-end benchmark will take, and which of them the time is for."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .video_models import Job
from .video_report import PEER, PPLLAVA, VideoRow
from .video_runs import Sample, clock

FIRST = (32, 64)  # numbers of frames that come first, and whose rows of PPLLaVA and of the peer take what they take
SAMPLES = 2  # of a row at least: one alone says nothing of its own error
SAMPLES_S = 8.0  # of a row: more samples than these as long as they fit in it
PRODUCT = {"cpu": 1024, "cuda": 8192}  # edge of the matrices whose product says how fast the device is at best
OF_BEST = 0.5  # of that speed, that a row is taken to reach of which no row before it tells more

Shape = tuple[str, tuple[str, ...], int, int]


def in_order(frames: Iterable[int]) -> list[int]:
    """What says most first, as a time limit may leave out the rest."""
    return sorted(set(frames), key=lambda n: (n not in FIRST, n))


@dataclass
class Pace:
    """What the rows of a variant took."""

    flop: float  # seconds for each, up to the first token
    token: float = 0.0  # seconds for each further token of a batch
    start: float = 0.0  # seconds of the first call beyond those of a second one


class Pacing:
    """What undisturbed rows tell of the rows to come. best_flop: seconds of one where the device does nothing else."""

    def __init__(self, args: argparse.Namespace, machine: dict, best_flop: float):
        self.args, self.machine, self.cuda = args, machine, torch.device(args.device).type == "cuda"
        self.start = time.monotonic()
        self.any = Pace(best_flop / OF_BEST)
        self.paces: dict[str, Pace] = {}
        self.compiled: set[Shape] = set()

    def late(self, more: float = 0.0) -> bool:
        return time.monotonic() - self.start + more > (self.args.time_limit or float("inf"))

    def learn(self, job: Job, row: VideoRow, samples: Sequence[Sample]) -> None:
        """From the fastest so far of an undisturbed row, since what disturbs a sample makes it slower."""
        if row.status != "ok" or row.unsteady(self.machine):
            return
        flop = min(x.first_token for x in samples) / job.videos.batch / sum(job.flops.values())
        before = self.paces.get(job.variant)
        start = max((x.start for x in samples), default=0.0)
        if before is not None:
            flop, start = min(flop, before.flop), start or before.start
        self.paces[job.variant] = Pace(flop, min(x.token or 0.0 for x in samples), start)

    def seconds(self, job: Job) -> float:
        """That a row will take."""
        ours = self.paces.get(PPLLAVA) or self.any
        pace = self.paces.get(job.variant) or ours
        flop = max(pace.flop, ours.flop)
        one = flop * job.videos.batch * sum(job.flops.values()) + pace.token * (self.args.new_tokens - 1)
        return (2 * self.cuda + self.samples(one)) * one + (0.0 if shape(job) in self.compiled else pace.start)

    def samples(self, seconds: float) -> int:
        """Of a row, when one takes so many seconds."""
        return min(self.args.repeats, max(SAMPLES, int(SAMPLES_S / max(seconds, 1e-9))))

    def too_late(self, job: Job, owed: float = 0.0) -> str | None:
        """Why a row is left out. owed: seconds of the samples that rows before it have not had yet."""
        first = job.videos.footage.count in FIRST and job.variant in (PPLLAVA, PEER)
        if first and job.videos.batch == (self.args.batch or 1):
            return None
        seconds, limit = self.seconds(job), self.args.row_limit
        if limit is not None and seconds > limit:
            return f"would take about {seconds:.0f} s, --row-limit is {limit:.0f}"
        if self.late(seconds + owed):
            return f"would take about {seconds:.0f} s, which --time-limit {self.args.time_limit:.0f} does not leave"
        return None


def shape(job: Job) -> Shape:
    """For which a model compiles its step."""
    return job.entrant.model, tuple(job.entrant.settings), job.videos.batch, job.length


def best_flop(device: str, dtype: torch.dtype) -> float:
    """Seconds of one FLOP in a large matrix product, the fastest of some."""
    edge, now = PRODUCT[torch.device(device).type], clock(device)
    factor, seconds = torch.ones(edge, edge, dtype=dtype, device=device), []
    for _ in range(5):
        start = now()
        factor @ factor
        seconds.append(now() - start)
    return min(seconds) / (2 * edge**3)
