"""What becomes of what fp8 costs and gains: rows, the tables on the terminal, the markdown. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import report
from .report import Grid, Outcome, show

ERRORS = {
    "visual_error": "visual tokens, %",
    "logits_error": "logits after the prompt, %",
    "kl": "KL, nats",
    "equal_tokens": "equal tokens, %",
}
AGAINST = {"fp8": "fp8 against bf16", "bf16": "bf16 against float32"}
PARTS = {"vision": "vision tower", "prefill": "prefill", "token": "each further token"}
Spread = dict[str, float]  # p20, p50, p80


@dataclass(kw_only=True)
class Fp8Row(Outcome):
    """One model on clips of so many frames."""

    frames: int
    visual_tokens: int  # of one clip
    samples: int  # clips times questions
    weight_bytes: dict[str, int]  # dtype -> of all parameters
    errors: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # of AGAINST -> ERRORS -> mean, worst
    ms: dict[str, dict[str, Spread]] = field(default_factory=dict)  # of PARTS -> variant -> percentiles
    failed: dict[str, dict[str, str]] = field(default_factory=dict)  # of PARTS -> variant -> why it has no time

    def head(self) -> str:
        return f"{self.frames} frames, {self.visual_tokens:,} visual tokens"

    def result(self) -> str:
        return f"logits off by {show(100 * self.errors['fp8']['logits_error']['mean'])} %"


def failures(rows: Sequence[Fp8Row]) -> list[str]:
    """A line for each part that a model has no time for."""
    return [
        f"FAILED: {row.head()}, {PARTS[part]}, {name}: {why}"
        for row in rows
        for part, failed in row.failed.items()
        for name, why in failed.items()
    ]


def fp8_tables(rows: Sequence[Fp8Row]) -> list[Grid]:
    """Mean errors, and on a GPU the times; the worst ones are in the JSON."""
    errors = [
        [str(row.frames), AGAINST[name], *(text.partition(" (")[0] for text in cells(found))]
        for row in rows
        for name, found in row.errors.items()
    ]
    heads = ["frames", "", *ERRORS.values()]
    tables = [Grid("Mean errors", heads, errors, left=2)] if errors else []
    times = [[str(row.frames), PARTS[part], *_times(row.ms[part])] for row in rows for part in row.ms]
    heads = ["frames", "part", "bf16, ms", "fp8, ms", "x", "bf16 compiled, ms", "fp8 compiled, ms", "x"]
    return [*tables, *([Grid("Times", heads, times, left=2)] if times else [])]


def _times(taken: dict[str, Spread]) -> list[str]:
    """bf16, fp8 and how many times faster that is, as they are and compiled."""
    ms = {name: time["p50"] for name, time in taken.items()}
    pairs = [[ms.get(form.format(dtype)) for dtype in ("bf16", "fp8")] for form in ("{}", "compile({})")]
    return [show(n) for bf16, fp8 in pairs for n in (bf16, fp8, bf16 / fp8 if bf16 and fp8 else None)]


def fp8_block(results: Path, folder: Path) -> str:
    """The tables of each device that has a fp8.json, and its chart if there is one; GPUs first."""
    from .table import device_tables  # which imports this module

    return device_tables(results, folder, "fp8", fp8_device)


def fp8_device(result: dict) -> str:
    machine, setup, rows = result["machine"], result["protocol"], result["rows"]
    errors = [["frames", "visual tokens", "", *ERRORS.values()], ["---:", "---:", "---", *["---:"] * len(ERRORS)]]
    times = [["frames", "part", "bf16, ms", "fp8, ms", "x", "bf16 compiled, ms", "fp8 compiled, ms", "x"]]
    times.append(["---:", "---", *["---:"] * 6])
    notes = [f"Left out for lack of time: {', '.join(setup['left_out'])}."] if setup["left_out"] else []
    for row in rows:
        first = [str(row["frames"]), f"{row['visual_tokens']:,}"]
        errors += [[*first, AGAINST[name], *cells(found)] for name, found in row["errors"].items()]
        if row["status"] != "ok":
            notes.append(f"{row['frames']} frames: {row['status']} ({row['reason']}).")
        for part, taken in row["ms"].items():
            times.append([str(row["frames"]), PARTS[part], *_times(taken)])
            notes += [f"{PARTS[part]}, {name}: failed ({why})." for name, why in row["failed"][part].items()]
    sizes = "".join(f", {show(n / 1e6)} MB in {name}" for row in rows[:1] for name, n in row["weight_bytes"].items())
    clips = f"{setup['clips']} clips with {len(setup['questions'])} questions each"
    note = [
        f"Mean (worst) of {clips}; {setup['model']}{sizes}.",
        *(["fp8 is emulated here, so nothing is timed."] if setup["emulated"] else []),
        *(["x: how many times faster fp8 is, below 1 is slower."] if len(times) > 2 else []),
        *report.doubts_of(rows, lambda row: f"{row['frames']} frames"),
        *notes,
    ]
    tables = ["\n".join(f"| {' | '.join(line)} |" for line in t) for t in (errors, times) if len(t) > 2]
    source = f"`{machine['command']}`; {report.machine_line(machine)}, torchao {setup['torchao']}"
    return "\n\n".join([f"**{machine['device']}**", *tables, " ".join(note), source])


def cells(found: dict[str, dict[str, float]]) -> list[str]:
    """Mean (worst) of each of ERRORS, for people."""
    form = {name: (lambda x: f"{x:.1e}") if name == "kl" else (lambda x: show(100 * x)) for name in ERRORS}
    return [f"{form[name](found[name]['mean'])} ({form[name](found[name]['worst'])})" for name in ERRORS]
