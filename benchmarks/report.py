"""What becomes of measurements: JSON files, tables on the terminal. Needs no torch."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .load import Load

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.progress import Progress
    from rich.table import Table

    from .timing import Timing

ORIGINAL, COMPILED_ORIGINAL, COMPILED_REFERENCE = "original", "compile(original)", "compile(reference)"
PEERS = (ORIGINAL, COMPILED_ORIGINAL, COMPILED_REFERENCE)
REORDERED, COMPILED_REORDERED = "reordered", "compile(reordered)"
PROJECTOR_PEERS = (ORIGINAL, COMPILED_ORIGINAL, REORDERED, COMPILED_REORDERED)

BOUND_PERCENT = (70, 130)  # of a bound: a time outside of it is more likely disturbed than true
MOST_DOUBTED = 0.1  # of the rows: with more of them a run is not to be believed
MARK = "?"
OUT_OF_MEMORY = "out of memory"


@dataclass(kw_only=True)
class Outcome:
    """What rows of every kind have: a status other than "ok" comes with a reason and without times."""

    status: str = "ok"  # or "wrong", "failed", "does not fit", "left out"
    reason: str | None = None
    load: Load = field(default_factory=Load)  # of other processes while it was timed
    doubts: dict[str, str] = field(default_factory=dict)  # why its times are not to be believed: load, samples, bound

    def fail(self, reason: str, status: str | None = None) -> None:
        """What does not fit into memory is a result, and no failure."""
        self.status, self.reason = status or ("does not fit" if reason == OUT_OF_MEMORY else "failed"), reason

    def wrong(self, reason: str) -> None:
        self.fail(reason, "wrong")

    def judge(self, machine: dict) -> None:
        """Set `doubts`."""
        self.doubts = {}
        if self.status != "ok":
            return
        if disturbed := self.load.disturbed(machine):
            self.doubts["load"] = disturbed
        if getattr(self, "samples", None) == 1:
            self.doubts["samples"] = "one sample"
        percent, (least, most) = self.percent_of_bound(), BOUND_PERCENT
        if percent is not None and not least <= percent <= most:
            self.doubts["bound"] = f"{percent:.0f} % of its bound"

    def unsteady(self, machine: dict) -> bool:
        """Whether its times are no basis for anything.

        On a GPU small inputs stay far below a bound of arithmetic, whoever measures them: that is marked, and no more.
        """
        below = "bound" in self.doubts and self.percent_of_bound() < BOUND_PERCENT[0]
        return bool(self.doubts.keys() - ({"bound"} if below and machine["type"] == "cuda" else set()))

    def percent_of_bound(self) -> float | None:
        """Where the row has a bound that it must come near to."""
        return None

    def head(self) -> str:
        """What was measured, for people."""
        raise NotImplementedError

    def result(self) -> str:
        """What came out, for people; asked for where status is "ok"."""
        raise NotImplementedError

    def line(self) -> str:
        what = self.result() if self.status == "ok" else f"{self.status}, {self.reason}"
        return f"{self.head()}: {what}{self.why()}"

    def why(self) -> str:
        return f" {MARK} ({', '.join(self.doubts.values())})" if self.doubts else ""

    def as_dict(self) -> dict[str, object]:
        """For JSON: an infinite error becomes a string. What rows of every kind have comes last."""
        values = {k: repr(v) if v == float("inf") else _short(v) for k, v in asdict(self).items()}
        last = ("status", "reason", "load", "doubts")
        return {k: v for k, v in values.items() if k not in last} | {k: values[k] for k in last}


def believable(rows: Sequence[Outcome], machine: dict) -> str | None:
    """None, or why a run is not: too many of its rows failed, are wrong, or are unsteady."""
    tried = [row for row in rows if row.status in ("ok", "failed", "wrong")]
    bad = [row for row in tried if row.status != "ok" or row.unsteady(machine)]
    if not any(row.status == "ok" for row in tried):
        return "no row has times"
    if len(bad) <= MOST_DOUBTED * len(tried):
        return None
    return f"{len(bad)} of its {len(tried)} rows failed, are wrong, or are marked with {MARK}"


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

    def head(self) -> str:
        return f"{self.op} {self.shape} {self.dtype} {self.direction} {self.variant}"

    def result(self) -> str:
        return f"{self.us_p50:,.1f} us, {self.rate()}"


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

    def percent_of_bound(self) -> float | None:
        """Nothing is faster than its products alone; how much slower a variant may be has no limit."""
        return self.products_percent and max(self.products_percent, 100.0)

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
    draft = path.with_name(f"{path.name}.tmp")  # a run that is stopped while it writes leaves the file as it was
    draft.write_text(json.dumps(head, indent=1, allow_nan=False)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')
    draft.replace(path)
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


def doubts_of(rows: Iterable[dict], name: Callable[[dict], str]) -> list[str]:
    """Sentences about the rows of a JSON that are marked, `name` for each; results of older versions have none."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for why in (row.get("doubts") or {}).values():
            found.setdefault(why, []).append(name(row))
    return [f"{MARK}: not to be believed ({why}): {'; '.join(names)}." for why, names in found.items()]


WIDE = 10_000  # columns, in which any table finds room


@dataclass
class Grid:
    """A table for terminals of 80 columns or more, in which no number is cut: what does not fit is a block a row.

    heads: of the columns, the first `left` of which name a row
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table, free = self.table(), options.update(width=WIDE)
        yield from [table] if console.measure(table, options=free).maximum <= options.max_width else self.blocks()

    def table(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        # Two columns between cells: padding on the right, and the line between columns, which is a blank.
        style = {"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
        table = Table(title=f"\n{self.title}", title_justify="left", title_style="bold", **style)
        for place, (head, cells) in enumerate(zip(self.heads, zip(*self.rows))):
            # Words of a head stand below each other where it is wider than the cells.
            width = max(map(len, [*cells, *head.split()]))
            lines = "\n".join(textwrap.wrap(head, width))
            table.add_column(lines, justify="left" if place < self.left else "right", no_wrap=True, vertical="bottom")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def blocks(self) -> Iterator[RenderableType]:
        from rich.text import Text

        yield Text(f"\n{self.title}", "bold")
        for row in self.rows:
            names = [*row[: self.left]] or [f"{self.heads[0]} {row[0]}"]
            yield Text(", ".join(names), "bold")
            numbers = list(zip(self.heads, row))[max(self.left, 1) :]
            yield Text("; ".join(f"{head}: {cell}" for head, cell in numbers))


def finish(rows: Sequence[Outcome], tables: Iterable[Grid], lines: Iterable[str | None]) -> int:
    """Print the tables, which rows are not to be believed, what failed, then `lines`; the exit code of the command."""
    out = console()
    for table in tables:
        out.print(table)

    def tell(line: str, style: str | None = None) -> None:
        out.print(line, style=style, highlight=False, markup=False, soft_wrap=True)

    for kind in ("load", "samples", "bound"):
        doubted = [row for row in rows if kind in row.doubts]
        more = f" and {len(doubted) - 1} more of {len(rows)} rows" if len(doubted) > 2 else ""
        for row in doubted[: 1 if more else 2]:
            tell(f"{MARK} {row.head()}{more}: {row.doubts[kind]}", "yellow")
    bad = [row for row in rows if row.status in ("wrong", "failed")]
    for row in bad:
        tell(f"{row.status.upper()}: {row.head()}: {row.reason}", "bold red")
    for line in filter(None, lines):
        tell(line)
    return 1 if bad else 0


def kernels_tables(rows: Sequence[Row]) -> list[Grid]:
    """One for each shape and dtype: forward / backward of every backend against its peers."""
    heads = ("op", "backend", "x original", "x compile (original)", "x compile (reference)", "% of a copy")
    columns = [*(lambda row, peer=peer: row.ratios.get(peer) for peer in PEERS), lambda row: row.copy_percent]
    return _cases(rows, PEERS, heads, columns, lambda row: row.op, ("forward", "backward"))


def projector_tables(rows: Sequence[ProjectorRow]) -> list[Grid]:
    """One for each shape and dtype: forward / both of every backend against its peers."""
    heads = ("backend", "% of its products", "x original", "x compile (original)", "x reordered")
    heads += ("x compile (reordered)", "% of the original's memory")
    columns = [lambda row: row.products_percent]
    columns += [lambda row, peer=peer: row.ratios.get(peer) for peer in PROJECTOR_PEERS]
    return _cases(rows, PROJECTOR_PEERS, heads, [*columns, lambda row: row.memory_percent], None, ("forward", "both"))


def _cases(rows, peers, heads, columns, name, directions) -> list[Grid]:
    """A table for each shape and dtype, a line for each `name` and backend, both directions in a cell."""
    tables: dict[str, dict[tuple[str, ...], dict[str, Measured]]] = {}
    for row in rows:
        if row.variant not in peers:
            key = (*((name(row),) if name else ()), row.variant)
            tables.setdefault(f"{row.shape}, {row.dtype}", {}).setdefault(key, {})[row.direction] = row

    def cell(both: dict[str, Measured], number: Callable[[Measured], float | None]) -> str:
        found = [both.get(direction) for direction in directions]
        shown = ["-" if row is None else row.status if row.status != "ok" else show(number(row)) for row in found]
        return "/".join(text + MARK * bool(row and row.doubts) for text, row in zip(shown, found))

    left = len(heads) - len(columns)
    each = {
        title: [[*key, *(cell(both, number) for number in columns)] for key, both in lines.items()]
        for title, lines in tables.items()
    }
    return [Grid(f"{title}, {' / '.join(directions)}", heads, lines, left) for title, lines in each.items()]
