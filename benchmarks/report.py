"""What becomes of measurements: JSON files, tables on the terminal. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from .timing import Timing

ORIGINAL, COMPILED_ORIGINAL, COMPILED_REFERENCE = "original", "compile(original)", "compile(reference)"
PEERS = (ORIGINAL, COMPILED_ORIGINAL, COMPILED_REFERENCE)
REORDERED, COMPILED_REORDERED = "reordered", "compile(reordered)"
PROJECTOR_PEERS = (ORIGINAL, COMPILED_ORIGINAL, REORDERED, COMPILED_REORDERED)


class Outcome:
    """What rows of every kind have: a status other than "ok" comes with a reason and without times."""

    status: str
    reason: str | None

    def fail(self, reason: str, status: str = "failed") -> None:
        self.status, self.reason = status, reason

    def wrong(self, reason: str) -> None:
        self.fail(reason, "wrong")

    def as_dict(self) -> dict[str, object]:
        """For JSON: an infinite error becomes a string."""
        return {k: repr(v) if v == float("inf") else _short(v) for k, v in asdict(self).items()}


@dataclass(kw_only=True)
class Measured(Outcome):
    """One variant of one op on one shape in one dtype and direction. Without times unless status is "ok"."""

    op: str
    shape: str
    dtype: str
    direction: str
    variant: str  # a backend or a peer
    flops: int
    default: bool = False  # the backend that backend=None takes
    status: str = "ok"  # or "wrong", "failed"
    reason: str | None = None
    us_p20: float | None = None
    us_p50: float | None = None
    us_p80: float | None = None
    samples: int = 0
    ratios: dict[str, float] = field(default_factory=dict)  # peer -> its time over this time
    first_call_s: float | None = None
    extra_bytes: int | None = None
    host_us: float | None = None  # until the call returns, of our backends on a GPU
    error: float | None = None
    limit: float | None = None

    @property
    def case(self) -> tuple[str, str, str, str]:
        return self.op, self.shape, self.dtype, self.direction

    def set_timing(self, timing: Timing, rates: dict[str, float]) -> None:
        """`rates`: amount per second of the ceilings that were timed, by their name."""
        self.us_p20, self.us_p50, self.us_p80 = (1e6 * t for t in (timing.p20, timing.p50, timing.p80))
        self.samples = timing.samples
        self.set_rates(timing.p50, rates)

    def set_rates(self, seconds: float, rates: dict[str, float]) -> None: ...

    def rate(self) -> str:
        """For people: against the ceiling of its kind."""
        return ""

    def line(self) -> str:
        head = f"{self.op} {self.shape} {self.dtype} {self.direction} {self.variant}:"
        if self.status != "ok":
            return f"{head} {self.status}, {self.reason}"
        return f"{head} {self.us_p50:,.1f} us, {self.rate()}"


@dataclass(kw_only=True)
class Row(Measured):
    """Of an op that is bound by memory."""

    bytes: int
    gb_s: float | None = None
    copy_percent: float | None = None
    read_percent: float | None = None  # of `sum()` over the inputs, on a CPU

    def set_rates(self, seconds: float, rates: dict[str, float]) -> None:
        """`rates`: bytes per second of "copy" and "read"."""
        rate = self.bytes / seconds
        self.gb_s = rate / 1e9
        self.copy_percent = 100 * rate / rates["copy"] if "copy" in rates else None
        self.read_percent = 100 * rate / rates["read"] if "read" in rates else None

    def rate(self) -> str:
        return f"{show(self.copy_percent)} % of a copy"


@dataclass(kw_only=True)
class ProjectorRow(Measured):
    """Of the projector, which is bound by its matrix products; `flops` are of those that nobody avoids."""

    original_flops: int
    tflop_s: float | None = None  # of `flops`: what a variant does beyond them is lost
    products_percent: float | None = None  # time of these products alone over its time
    memory_percent: float | None = None  # extra_bytes over those of the original

    def set_rates(self, seconds: float, rates: dict[str, float]) -> None:
        """`rates`: "products" per second, all of them once being one."""
        self.tflop_s = self.flops / seconds / 1e12
        self.products_percent = 100 / seconds / rates["products"] if "products" in rates else None

    def rate(self) -> str:
        return f"{show(self.products_percent)} % of its products"


def set_ratios(rows: Iterable[Measured], peers: Sequence[str] = PEERS) -> None:
    """Ratios among the rows of one case."""
    timed = {row.variant: row for row in rows if row.status == "ok"}
    for row in timed.values():
        row.ratios = {peer: timed[peer].us_p50 / row.us_p50 for peer in peers if peer in timed}


def set_memory(rows: Iterable[ProjectorRow]) -> None:
    """Against the original, among the rows of one case."""
    known = {row.variant: row for row in rows if row.extra_bytes is not None}
    for row in known.values() if ORIGINAL in known else ():
        row.memory_percent = 100 * row.extra_bytes / known[ORIGINAL].extra_bytes


def _short(value: object) -> object:
    """Floats with five digits; nobody measures more."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return {k: _short(v) for k, v in value.items()} if isinstance(value, dict) else value


def show(number: float | None) -> str:
    """Two digits below 10, none after the point above, one of the very small; "-" for what was not measured."""
    if number is None:
        return "-"
    if 0 < number < 0.095:
        return f"{number:.1g}" if number >= 0.001 else "< 0.001"
    return f"{number:.1f}" if number < 9.95 else f"{number:,.0f}"


def write(
    path: Path, kind: str, machine: dict, protocol: dict, rows: Sequence[dict], sections: dict | None = None
) -> Path:
    """One JSON file of results; every row on a line of its own, so that a diff shows what moved."""
    head = {"kind": kind, "machine": machine, "protocol": protocol, **(sections or {})}
    lines = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head, indent=1, allow_nan=False)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')
    return path


def read(path: Path, kind: str) -> dict:
    result = json.loads(path.read_text())
    if result.get("kind") != kind:
        raise ValueError(f"{path} must hold results of kind {kind!r}, got {result.get('kind')!r}")
    return result


def console() -> Console:
    from rich.console import Console

    plain = Console()
    return plain if plain.is_terminal else Console(width=230)


def progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console(), transient=True)


def machine_line(machine: dict) -> str:
    """Device, versions, commit and date, for people."""
    versions = [f"torch {machine['torch']}", f"Python {machine['python']}"]
    if machine.get("triton"):
        versions.insert(1, f"triton {machine['triton']}")
    commit = "unknown" if machine["commit"] is None else machine["commit"] + (" + changes" if machine["dirty"] else "")
    where = machine["device"] if machine["type"] == "cuda" else f"{machine['device']}, {machine['cores']} cores"
    return f"{where}; {', '.join(versions)}; commit {commit}; {machine['date']}"


def busy(machine: dict) -> str | None:
    """A warning where others use this CPU: OpenMP's threads then wait whole time slices for each other."""
    busy, cores = machine.get("cores_busy"), machine["cores"]
    if machine["type"] != "cpu" or busy is None or busy < cores / 4:
        return None
    return f"Others used {busy} of the {cores} cores right before the run: no ratio here is reliable."


def finish(rows: Sequence[Outcome], table: Table, lines: Sequence[str | None], machine: dict) -> int:
    """Print the table, then `lines`, then what the reader must not miss; the exit code of the command."""
    out = console()
    out.print(table)
    for line in filter(None, lines):
        out.print(line, highlight=False, soft_wrap=True)
    if warning := busy(machine):
        out.print(warning, style="bold yellow", highlight=False, soft_wrap=True)
    wrong = [row for row in rows if row.status == "wrong"]
    for row in wrong:
        out.print(f"WRONG: {row.line()}", style="bold red", highlight=False, soft_wrap=True)
    return 1 if wrong else 0


def kernels_table(rows: Sequence[Row], machine: dict) -> Table:
    from rich.table import Table

    table = Table(title=machine_line(machine), title_justify="left")
    for name in ("op", "shape", "dtype", "direction", "variant"):
        table.add_column(name, no_wrap=True)
    for name in ("us", "p20-p80", "GB/s", "% copy", "% read", *(f"x {peer}" for peer in PEERS)):
        table.add_column(name, justify="right")
    for name in ("first s", "extra MB", "host us", "error"):
        table.add_column(name, justify="right")
    for row, following in zip(rows, [*rows[1:], None]):
        name = f"[bold]{row.variant}[/bold]" if row.default else row.variant
        error = "-" if row.error is None else f"{row.error:.0e}"
        numbers = [
            show(row.us_p50),
            f"{show(row.us_p20)}-{show(row.us_p80)}",
            show(row.gb_s),
            show(row.copy_percent),
            show(row.read_percent),
            *(show(row.ratios.get(peer)) for peer in PEERS),
            show(row.first_call_s),
            show(None if row.extra_bytes is None else row.extra_bytes / 1e6),
            show(row.host_us),
        ]
        if row.status != "ok":
            numbers = [f"[red]{row.status}[/red]", *["-"] * (len(numbers) - 1)]
        table.add_row(*row.case, name, *numbers, error, end_section=following is None or following.case != row.case)
    return table


def projector_table(rows: Sequence[ProjectorRow], machine: dict) -> Table:
    from rich.table import Table

    cuda = machine["type"] == "cuda"
    table = Table(title=machine_line(machine), title_justify="left")
    for name in ("shape", "dtype", "direction", "variant"):
        table.add_column(name, no_wrap=True)
    names = ("ms, p20-p80", "GFLOP, original's, x", "% products", *(f"x {p}" for p in PROJECTOR_PEERS))
    for name in (*names, "extra MB, % original's", "first s", *(["host us"] if cuda else []), "error"):
        table.add_column(name, justify="right")
    for row, following in zip(rows, [*rows[1:], None]):
        name = f"[bold]{row.variant}[/bold]" if row.default else row.variant
        time = f"[red]{row.status}[/red]"
        if row.status == "ok":
            time = "{}, {}-{}".format(*(show(us / 1e3) for us in (row.us_p50, row.us_p20, row.us_p80)))
        counts = (row.flops / 1e9, row.original_flops / 1e9, row.original_flops / row.flops)
        numbers = [
            show(row.products_percent),
            *(show(row.ratios.get(peer)) for peer in PROJECTOR_PEERS),
            "-" if row.extra_bytes is None else f"{show(row.extra_bytes / 1e6)}, {show(row.memory_percent)}",
            show(row.first_call_s),
            *([show(row.host_us)] if cuda else []),
            "-" if row.error is None else f"{row.error:.0e}",
        ]
        last = following is None or following.case != row.case
        table.add_row(*row.case[1:], name, time, ", ".join(map(show, counts)), *numbers, end_section=last)
    return table
