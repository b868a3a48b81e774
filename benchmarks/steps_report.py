"""What becomes of the steps of the fast path: rows, the table on the terminal, the markdown. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .report import Outcome, machine_line, show

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class StepRow(Outcome):
    """One step: all requests answered without it and with it."""

    step: str
    switch: str
    kept: bool  # on this device, in what follows
    status: str = "ok"  # or "failed", "left out"
    reason: str | None = None
    before_s: float | None = None
    after_s: float | None = None
    videos_s: float | None = None  # requests per second with it
    ratio: float | None = None
    same_answers: float | None = None

    def set_times(self, requests: int, before: float, after: float, same_answers: float) -> None:
        self.before_s, self.after_s = before, after
        self.videos_s, self.ratio, self.same_answers = requests / after, before / after, same_answers

    def line(self) -> str:
        head = f"{self.step}:"
        return f"{head} x {self.ratio:.2f}" if self.status == "ok" else f"{head} {self.status}, {self.reason}"


def steps_table(rows: Sequence[StepRow], machine: dict) -> Table:
    from rich.table import Table

    table = Table(title=machine_line(machine), title_justify="left")
    for name in ("step", "switch", "kept"):
        table.add_column(name)
    for name in ("s before", "s after", "x faster", "same answers"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = [f"[red]{row.status}[/red]", "-", "-", "-"]
        if row.status == "ok":
            share = f"{row.same_answers:.0%}"
            numbers = [show(row.before_s), show(row.after_s), f"{row.ratio:.2f}", share]
        table.add_row(row.step, row.switch, "yes" if row.kept else "no", *numbers)
    return table


def steps_markdown(result: dict) -> tuple[list[list[str]], list[str]]:
    """(lines of the table, sentences below it)."""
    setup, rows = result["protocol"], result["rows"]
    cuda = result["machine"]["type"] == "cuda"
    lines = [["step", "switch", *(["requests/s with it"] if cuda else []), "x faster", "all so far", "kept"]]
    lines.append(["---", "---", *["---:"] * (len(lines[0]) - 3), "---"])
    whole = 1.0
    for row in rows:
        ok = row["status"] == "ok"
        whole *= row["ratio"] if ok and row["kept"] else 1.0
        lines.append(
            [
                row["step"],
                row["switch"],
                *([show(row["videos_s"])] if cuda else []),
                f"{row['ratio']:.2f}" if ok else row["status"],
                f"{whole:.2f}" if ok and row["kept"] else "",
                "yes" if row["kept"] else "no",
            ]
        )
    note = [
        f"{2 * setup['clips']} requests about {setup['clips']} H.264 clips of up to {setup['frames']} frames, from the "
        f"files to the last of {setup['new_tokens']} new tokens; sizes of `{setup['preset']}` with random weights, "
        f"{setup['dtype']}. x faster: time without the step over time with it, in turns in one run, with everything "
        "above that is kept.",
        *(f"{row['step']}: {row['status']} ({row['reason']})." for row in rows if row["status"] != "ok"),
    ]
    return lines, note
