"""How much memory a call takes, and a limit that makes too much of it an error that Python sees."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

PROC = Path("/proc/self")
KEPT_FREE = 512 << 20  # of the memory that is available, for everybody else


@dataclass
class Peak:
    """The largest memory during a call beyond what was held before it, after it; None where the system does not say."""

    extra_bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[Peak]:
    """On a GPU of what PyTorch's allocator holds, on a CPU of the resident memory of the process."""
    peak = Peak()
    gc.collect()  # or what is let go of during the call would hide some of it
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.extra_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    before = _reset_peak()
    yield peak
    if before is not None:
        peak.extra_bytes = max(_status("VmHWM") - before, 0)


@contextmanager
def memory_limit(device: torch.device | str) -> Iterator[None]:
    """Let an allocation fail that the machine has no memory for, before the system ends a process that uses it."""
    if torch.device(device).type == "cuda" or (more := _available()) is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _status("VmData") + more
    if any(bound != resource.RLIM_INFINITY and bound < limit for bound in (soft, hard)):
        yield  # under a stricter one already
        return
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _reset_peak() -> int | None:
    """Let the peak of the resident memory start anew; bytes that are resident now. None where the system cannot."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # or blocks that are free would hide those of the call
    try:
        (PROC / "clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _available() -> int | None:
    """Bytes that this process may still take; None where the system does not say."""
    try:
        known = [int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1)) << 10]
        group = Path("/sys/fs/cgroup")
        if (group / "memory.max").exists() and (most := (group / "memory.max").read_text().strip()) != "max":
            known.append(int(most) - int((group / "memory.current").read_text()))
        _status("VmData")
    except (OSError, AttributeError, ValueError):
        return None
    return max(min(known) - KEPT_FREE, 0)


def _status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    return int(re.search(rf"^{name}:\s+(\d+)", (PROC / "status").read_text(), re.MULTILINE).group(1)) << 10
