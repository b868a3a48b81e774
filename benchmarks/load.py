"""What other processes took of the cores while something was measured, as Linux counts it in /proc. Needs no torch."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
LIMIT = 0.2  # cores that others may use; of many cores MANY of all, which is how exactly the kernel counts
MANY = 0.02
SHORT_S = 0.05  # CPU seconds that are not more than the kernel's ticks round


@dataclass
class Load:
    """CPU seconds of others in `wall_s` seconds, on the cores that this process may use; nothing where nobody says."""

    wall_s: float = 0.0
    others_s: float = 0.0  # of all processes but this one, the one that started it, and their children
    steal_s: float = 0.0  # that the host of a virtual machine gave to other machines

    @classmethod
    def total(cls, loads: Iterable[Load]) -> Load:
        whole = cls()
        for each in loads:
            whole.add(each)
        return whole

    def add(self, other: Load) -> None:
        self.wall_s += other.wall_s
        self.others_s += other.others_s
        self.steal_s += other.steal_s

    def disturbed(self, machine: dict) -> str | None:
        """A few words where others used more than LIMIT; on a GPU, where they left fewer than two cores."""
        taken, cores = self.others_s + self.steal_s, machine["cores"]
        limit = max(LIMIT, MANY * cores, cores - 2.0 if machine["type"] == "cuda" else 0.0)
        if taken <= SHORT_S or taken <= limit * self.wall_s:
            return None
        return f"others used {taken / self.wall_s:.1f} of the {cores} cores"


class Ticks(NamedTuple):
    """Seconds so far."""

    now: float
    busy: float  # of the cores that this process may use
    steal: float
    own: float  # CPU seconds of this process, the one that started it, and their children


@contextmanager
def watch(load: Load) -> Iterator[None]:
    """Add to `load` what others do meanwhile."""
    before = read_ticks()
    try:
        yield
    finally:
        after = read_ticks()
        if before is not None and after is not None:
            spent = Ticks(*(new - old for new, old in zip(after, before)))
            load.add(Load(spent.now, max(spent.busy - spent.own, 0.0), max(spent.steal, 0.0)))


def read_ticks() -> Ticks | None:
    """None where the system does not say."""
    try:
        parent = multiprocessing.parent_process()
        own = tree_seconds(os.getpid() if parent is None else parent.pid)
        busy, steal = core_seconds((PROC / "stat").read_text(), os.sched_getaffinity(0))
        return Ticks(time.monotonic(), busy, steal, own)
    except (OSError, AttributeError, ValueError, IndexError):
        return None


def core_seconds(stat: str, cores: set[int]) -> tuple[float, float]:
    """(busy, stolen) seconds of these cores so far, from the text of /proc/stat."""
    busy = steal = 0
    for line in stat.splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, _, _, irq, softirq, stolen = map(int, ticks[:8])
            busy, steal = busy + user + nice + system + irq + softirq, steal + stolen
    return busy / _rate(), steal / _rate()


def tree_seconds(root: int) -> float:
    """CPU seconds of a process and of all that come from it, those included that ended and were waited for."""
    seconds: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for path in PROC.glob("[0-9]*/stat"):
        try:  # "pid (any name) state ppid ..."
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        process = int(path.parent.name)
        seconds[process] = sum(map(int, fields[11:15]))  # utime stime cutime cstime
        children.setdefault(int(fields[1]), []).append(process)
    whole, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        whole += seconds.get(process, 0)
        waiting += children.get(process, [])
    return whole / _rate()


def _rate() -> int:
    return os.sysconf("SC_CLK_TCK")
