"""What becomes of the steps of the fast path: rows, the table on the terminal, the markdown. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .report import MARK, Grid, Outcome, doubts_of, show


@dataclass(kw_only=True)
class StepRow(Outcome):
    """One step: all requests answered without it and with it."""

    step: str
    switch: str
    kept: bool  # on this device, in what follows
    samples: int = 0  # of each of both
    before_s: float | None = None
    after_s: float | None = None
    videos_s: float | None = None  # requests per second with it
    ratio: float | None = None
    same_answers: float | None = None

    def set_times(self, requests: int, before: float, after: float, same_answers: float) -> None:
        self.before_s, self.after_s = before, after
        self.videos_s, self.ratio, self.same_answers = requests / after, before / after, same_answers

    def head(self) -> str:
        return self.step

    def result(self) -> str:
        return f"x {self.ratio:.2f}"


def steps_tables(rows: Sequence[StepRow]) -> list[Grid]:
    lines = []
    for row in rows:
        numbers = [row.status, "-", "-", "-"]
        if row.status == "ok":
            ratio = f"{row.ratio:.2f}{MARK * bool(row.doubts)}"
            numbers = [show(row.before_s), show(row.after_s), ratio, f"{row.same_answers:.0%}"]
        lines.append([row.step, "yes" if row.kept else "no", *numbers])
    heads = ["step", "kept", "s without", "s with", "x faster", "same answers"]
    return [Grid("All requests without a step and with it", heads, lines, left=2)]


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
                f"{row['ratio']:.2f}{MARK * bool(row.get('doubts'))}" if ok else row["status"],
                f"{whole:.2f}" if ok and row["kept"] else "",
                "yes" if row["kept"] else "no",
            ]
        )
    note = [
        f"{2 * setup['clips']} requests about {setup['clips']} H.264 clips of up to {setup['frames']} frames, from the "
        f"files to the last of {setup['new_tokens']} new tokens; sizes of `{setup['preset']}` with random weights, "
        f"{setup['dtype']}. x faster: time without the step over time with it, in turns in one run, with everything "
        "above that is kept.",
        *doubts_of(rows, lambda row: row["step"]),
        *(f"{row['step']}: {row['status']} ({row['reason']})." for row in rows if row["status"] != "ok"),
    ]
    return lines, note
