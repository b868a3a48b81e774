"""Timing of variants of one computation against each other: round robin, cold caches, medians."""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .report import OUT_OF_MEMORY

TURN_S, MAX_CALLS = 0.02, 4  # a turn: calls for so long, or for half a call of the slowest, but not more than so many
SLOW_S = 0.2  # needs no second warm-up
HOST_CALLS = 50
COPY_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # read, and as many written
BACKLOG_CYCLES = 1_000_000  # about 0.5 ms, in which the host runs ahead, so that its launches are not what is timed


@dataclass(frozen=True)
class Variant:
    """One way to compute something: `prepare` is not timed, its result goes to `run`, which is."""

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Percentiles in seconds."""

    p20: float
    p50: float
    p80: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        if len(seconds) == 1:
            return cls(*seconds * 3, samples=1)
        tenths = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(tenths[1], tenths[4], tenths[7], len(seconds))


class Clock(Protocol):
    def sample(self, variant: Variant) -> Callable[[], float]:
        """Run `variant` once; the result gives the seconds, after `wait`."""

    def wait(self) -> None: ...

    def now(self) -> float: ...


class HostClock:
    def __init__(self, device: torch.device | str = "cpu", cache_bytes: int | None = None):
        self.scrub = torch.zeros(2 * (last_level_cache() if cache_bytes is None else cache_bytes), dtype=torch.uint8)

    def sample(self, variant: Variant) -> Callable[[], float]:
        prepared = variant.prepare()
        self.scrub.add_(1)
        start = time.perf_counter()
        result = variant.run(prepared)
        seconds = time.perf_counter() - start
        del result
        return lambda: seconds

    def wait(self) -> None:
        pass

    def now(self) -> float:
        return time.perf_counter()


class CudaClock:
    def __init__(self, device: torch.device | str = "cuda"):
        self.device = torch.device(device)
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.scrub = torch.zeros(4 * cache, dtype=torch.uint8, device=self.device)

    def sample(self, variant: Variant) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        prepared = variant.prepare()
        self.scrub.zero_()
        torch.cuda._sleep(BACKLOG_CYCLES)
        start.record()
        variant.run(prepared)
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def now(self) -> float:
        return time.perf_counter()


def clock_for(device: torch.device | str) -> Clock:
    return (CudaClock if torch.device(device).type == "cuda" else HostClock)(device)


def last_level_cache() -> int:
    """Bytes; 32 MiB where Linux does not tell."""
    try:
        sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        return max(int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes)
    except (OSError, ValueError):
        return 32 << 20


def measure(
    variants: Sequence[Variant],
    clock: Clock,
    *,
    budget_s: float = 1.5,
    min_rounds: int = 3,
    max_rounds: int = 100,
    warm: Mapping[str, float] | None = None,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time the variants in turns, so that noise hits all of them: (timings, reasons of those that failed) by name.

    warm: about how many seconds those take that need no further call to warm up
    """
    failed: dict[str, str] = {}
    once: dict[str, float] = dict(warm or {})
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}

    def turn(variant: Variant, times: int) -> list[Callable[[], float]]:
        try:
            return [clock.sample(variant) for _ in range(times)]
        except Exception as error:
            failed[variant.name] = reason(error)
            return []

    for variant in variants:  # to warm up, twice unless it is slow; the last one says how long it takes
        for _ in range(0 if variant.name in once else 2):
            for sample in turn(variant, 1):
                clock.wait()
                once[variant.name] = max(sample(), 1e-9)
            if variant.name in failed or once[variant.name] > SLOW_S:
                break
    length = max([TURN_S, *(took / 2 for took in once.values())])
    calls = {name: min(MAX_CALLS, max(1, int(length / took))) for name, took in once.items()}
    start, rounds = clock.now(), 0
    while rounds < min_rounds or (rounds < max_rounds and clock.now() - start < budget_s):
        first = rounds % len(variants)  # nobody always runs after the same one
        order = [v for v in (*variants[first:], *variants[:first]) if v.name not in failed]
        pending = [(variant.name, sample) for variant in order for sample in turn(variant, calls[variant.name])]
        clock.wait()
        for name, sample in pending:
            seconds[name].append(sample())
        rounds += 1
    return {name: Timing.of(times) for name, times in seconds.items() if times and name not in failed}, failed


def first_call(function: Callable[[], Any], device: torch.device | str) -> tuple[Any, float]:
    """The result of `function` and the seconds until it is there, compilation included."""
    start = time.perf_counter()
    result = function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def host_seconds(variant: Variant, device: torch.device | str) -> float:
    """Median time until a call returns, its kernels perhaps still running, on a GPU that was idle before it."""
    seconds = []
    for _ in range(HOST_CALLS):
        prepared = variant.prepare()
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        result = variant.run(prepared)
        seconds.append(time.perf_counter() - start)
        del result
    return statistics.median(seconds)


def copy_variant(device: torch.device | str) -> tuple[Variant, int]:
    """The ceiling: a large copy, and the bytes that it reads and writes."""
    size = COPY_BYTES[torch.device(device).type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return Variant("copy", lambda _: target.copy_(source)), 2 * size


def read_variant(tensors: Sequence[Tensor]) -> tuple[Variant, int]:
    """`sum()` over these inputs, and their bytes: how fast a CPU reads them."""
    return Variant("read", lambda _: [x.sum() for x in tensors]), sum(x.nbytes for x in tensors)


def peak_extra_bytes(variant: Variant, device: torch.device | str) -> int:
    """Largest memory that PyTorch holds during the call beyond what it held before, the result included."""
    prepared = variant.prepare()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = variant.run(prepared)
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = variant.run(prepared)
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with _silent_stderr():
            profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr():
    """PyTorch's profiler reports its start, its end and each block that is older than itself there."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def release(device: torch.device | str) -> None:
    """Give back the memory of a finished case."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """One line on why a variant did not run."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words):
        return OUT_OF_MEMORY
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]
