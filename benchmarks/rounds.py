"""Steps of a round, one after the other, each in a process group and with a time limit of its own."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .machine import ROOT

TAIL = 6000  # characters of a step's output that are kept
MARGIN_S = 40  # between {limit}, after which a benchmark starts nothing new, and the limit of its step


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]  # {limit} becomes its seconds less MARGIN_S
    limit_s: float
    least_s: float = 5.0  # with less time left it is not started
    why_not: str | None = None  # why it cannot run on this machine
    refusal: str | None = None  # what it prints where a tool cannot work on this machine, a regular expression
    always: bool = False  # also where it passed before
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Record:
    name: str
    command: str
    status: str  # passed, failed, timed out, interrupted, skipped, left out
    reason: str | None = None
    seconds: float = 0.0
    tail: str = ""
    resumed: bool = False  # passed in an earlier round


def run_step(step: Step, limit_s: float) -> Record:
    """Run it in a process group of its own, nothing of which outlives it."""
    command = [word.replace("{limit}", str(max(1, int(limit_s - MARGIN_S)))) for word in step.command]
    record, start = Record(step.name, shlex.join(command), "passed"), time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | dict(step.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,
            )
        except OSError as error:
            record.status, record.reason = "failed", str(error)
            return record
        try:
            if code := process.wait(limit_s):
                record.status, record.reason = "failed", f"exit code {code}"
        except subprocess.TimeoutExpired:
            record.status, record.reason = "timed out", f"stopped after {limit_s:.0f} s"
        except KeyboardInterrupt:
            record.status, record.reason = "interrupted", "stopped from outside"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    record.seconds, record.tail = round(time.monotonic() - start, 1), text[-TAIL:]
    if record.status == "failed" and step.refusal and (match := re.search(step.refusal, text)):
        record.status, record.reason = "skipped", match.group().strip()
    return record


def run_round(
    plan: Sequence[Step],
    time_limit: float,
    passed: dict[str, Record],
    save: Callable[[list[Record]], object],
    tell: Callable[[str], object] = print,
) -> list[Record]:
    """The records of all steps, saved after each. `passed`: those of an earlier round, which need not run again."""
    records: list[Record] = []
    start = time.monotonic()
    for n, step in enumerate(plan):
        left = time_limit - (time.monotonic() - start)
        later = sum(s.least_s + 1 for s in plan[n + 1 :] if not s.why_not and (s.always or s.name not in passed))
        allowed = min(step.limit_s, max(left - later, step.least_s))
        record = Record(step.name, shlex.join(step.command), "left out")
        if any(earlier.status == "interrupted" for earlier in records):
            record.reason = "the round was interrupted"
        elif step.name in passed and not step.always:
            record = passed[step.name]
            record.resumed = True
        elif step.why_not:
            record.status, record.reason = "skipped", step.why_not
        elif left < step.least_s:
            record.reason = f"{max(left, 0):.0f} s were left, it needs {step.least_s:.0f}"
        else:
            tell(f"{step.name}, at most {allowed:.0f} s")
            record = run_step(step, allowed)
        records.append(record)
        save(records)
        about = [record.status + " in an earlier round" * record.resumed, f"{record.seconds:.0f} s", record.reason]
        tell(f"{step.name}: {', '.join(filter(None, about))}")
    return records
