"""Cases in a process of their own: a variant that crashes it costs one row and not the run.

Seen: torch.compile of the original's backward writes out of bounds where windows leave frames over (torch 2.13, CPU).
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from ppllava_kernels.backends import BACKENDS

from . import baselines, timing
from .report import PEERS, Measured
from .runner import TIMING, Case, Runner, Work
from .shapes import DIRECTIONS

Enough = Callable[[Case], bool]
Known = dict[tuple[str, str], str]  # (direction, variant) -> why it is not run again


@dataclass(frozen=True)
class Settings:
    device: str
    budget_s: float
    backends: Sequence[str] | None = None
    work: type[Work] = Work

    def runner(self, *announce: Callable[[str, str], None]) -> Runner:
        return Runner(self.device, self.budget_s, self.backends, *announce, work=self.work)


def local_rows(cases: Sequence[Case], settings: Settings, enough: Enough) -> Iterator[list[Measured]]:
    runner = settings.runner()
    for case in cases:
        if enough(case):
            continue
        yield from runner.rows(case)


def isolated_rows(cases: Sequence[Case], settings: Settings, enough: Enough) -> Iterator[list[Measured]]:
    """The rows of each case and direction. A crashed process is replaced by one that leaves out what crashed it."""
    worker = None
    try:
        for case in cases:
            if enough(case):
                continue
            crashed: Known = {}
            done: list[str] = []
            while len(done) < len(case.directions):
                worker = worker or Worker(settings)
                try:
                    for direction, rows in worker.rows(case, crashed, done):
                        done.append(direction)
                        yield rows
                except EOFError:
                    blame(*worker.about, worker.end(), crashed, settings.work.peers)
                    worker = None
    except KeyboardInterrupt:
        if worker is not None:
            worker.process.terminate()
        raise
    finally:
        if worker is not None:
            worker.end()


def blame(direction: str, name: str, how: str, crashed: Known, peers: Sequence[str] = PEERS) -> None:
    """Leave out the variant that ran. Memory spoilt earlier shows late: then the compiled ones, at last the case."""
    compiled, everything = [p for p in peers if p.startswith("compile")], (*BACKENDS, *peers)
    if name != TIMING and (direction, name) not in crashed:
        crashed[direction, name] = f"crashed its process ({how})"
        return
    for suspects in (compiled, everything):
        if any((direction, suspect) not in crashed for suspect in suspects):
            for suspect in suspects:
                crashed.setdefault((direction, suspect), f"left out after a crash elsewhere in this case ({how})")
            return
    raise RuntimeError(f"{direction} crashes even without its variants ({how})")


class Worker:
    """A process that runs cases one after the other."""

    def __init__(self, settings: Settings):
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.about, self.error = (DIRECTIONS[0], TIMING), None

    def rows(self, case: Case, crashed: Known, done: list[str]) -> Iterator[tuple[str, list[Measured]]]:
        self.about = (next(d for d in case.directions if d not in done), TIMING)
        try:
            self.pipe.send((case, crashed, done))
        except BrokenPipeError as error:
            raise EOFError from error
        while True:
            kind, content = self.pipe.recv()
            if kind == "about":
                self.about = content
            elif kind == "rows":
                yield content[0].direction, content
            elif kind == "error":
                self.error = content
                raise EOFError
            else:
                return

    def end(self) -> str:
        """End the process; says how it went wrong."""
        self.pipe.close()
        self.process.join(timeout=20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        if self.error is not None:
            return self.error
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def work(pipe: Connection, settings: Settings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes, and the first one ends this one,
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # which leaves nothing behind then
    runner = settings.runner(lambda *about: pipe.send(("about", about)))
    warm_up_compiler(settings.device)
    while True:
        try:
            case, crashed, done = pipe.recv()
        except EOFError:
            return
        try:
            for rows in runner.rows(case, crashed, tuple(done)):
                for row in rows:
                    if row.status == "failed" and "CUDA error" in row.reason:
                        pipe.send(("about", (row.direction, row.variant)))
                        raise SystemExit(70)  # nothing runs on this GPU any more, in this process
                pipe.send(("rows", rows))
            pipe.send(("end", None))
        except Exception as error:
            pipe.send(("error", timing.reason(error)))


def warm_up_compiler(device: str) -> None:
    """Imports and precompiled headers, once: they belong to no case."""
    x = torch.ones(64, device=device, requires_grad=True)
    try:
        baselines.compiled(lambda x: x.exp().sum())(x).backward()
    except Exception:  # then each compiled peer says why it failed
        return
