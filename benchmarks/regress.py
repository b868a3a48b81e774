"""Whether the ops became slower since another commit: both are built, and timed in turns in one run.

    make regress BASE=main
    python -m benchmarks.regress v0.1.0 --head HEAD --ops weighted_pool3d --shapes vicuna7b_video --dtypes bf16

A round starts a process of each side, and they time item by item in turns, each the least of some samples: the ratio of
an item is the median over rounds. Items that look slower get more rounds before they are called so. Exit code 1: an op
takes over 10 % longer, or is wrong now; 2: it may, and the rounds disagree; 0: none does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from . import report
from .load import read_ticks
from .report import show

ROUNDS, MORE = 3, 6  # of every item; more of those that look slower
DISTURBED = 0.2  # cores that others used


class Item(NamedTuple):
    op: str
    shape: str
    dtype: str
    direction: str
    backend: str


class Answer(NamedTuple):
    """Of one side on one item."""

    seconds: float | None
    failed: str | None = None


class Side(Protocol):
    """One of the two that are compared. A round is `start`, `time` for each of its items, and `stop`."""

    name: str

    def start(self) -> None: ...

    def time(self, item: Item, check: bool) -> Answer:
        """`check`: judge the result by the gate, too."""

    def stop(self) -> None: ...


@dataclass
class Result:
    """Of one item: the seconds of each round of both sides."""

    item: Item
    base: list[float] = field(default_factory=list)
    head: list[float] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # "base" or "head" -> why it has no times

    @property
    def ratios(self) -> list[float]:
        """Time of head over that of base, of each round."""
        return [head / base for base, head in zip(self.base, self.head)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def verdict(self, limit: float) -> str:
        """ "same", "slower"; "unclear" where it seems slower, but was not in over a quarter of the rounds."""
        if self.failed:
            return "wrong" if "base" not in self.failed else "not compared"
        if self.ratio <= 1 + limit:
            return "same"
        return "slower" if sorted(self.ratios)[len(self.ratios) // 4] > 1 else "unclear"


class Load:
    """Cores that other processes used since it was made, those of steal included."""

    def __init__(self):
        self.start = read_ticks()

    def others(self) -> float | None:
        """None where the system does not say."""
        now = read_ticks()
        if now is None or self.start is None:
            return None
        wall, busy, steal, own = (after - before for after, before in zip(now, self.start))
        return (max(busy - own, 0.0) + max(steal, 0.0)) / max(wall, 1e-9)


def compare(
    base: Side,
    head: Side,
    items: Sequence[Item],
    limit: float,
    tell: Callable[[str], None] = print,
    load: Callable[[], Load] = Load,
) -> tuple[list[Result], list[float]]:
    """(results, cores that others used in each round)."""
    results, loads = [Result(item) for item in items], []
    for number in range(ROUNDS + MORE):
        some = [result for result in results if not result.failed]
        if number >= ROUNDS:
            some = [result for result in some if result.ratio > 1 + limit / 2]
        if not some:
            break
        if number == ROUNDS:
            tell(f"{MORE} more rounds of {len(some)} items that look slower")
        watch = load()
        _round(base, head, some, number)
        busy = watch.others()
        if busy is not None:
            loads.append(busy)
        disturbed = f", others used {busy:.1f} cores" if (busy or 0.0) > DISTURBED else ""
        tell(f"round {number + 1}: {len(some)} items{disturbed}")
    return results, loads


def _round(base: Side, head: Side, results: Iterable[Result], number: int) -> None:
    sides = {"base": base, "head": head}
    try:
        for side in sides.values():
            side.start()
        for place, result in enumerate(results):
            order = ["base", "head"] if (number + place) % 2 == 0 else ["head", "base"]  # nobody is always the first
            answers = {name: sides[name].time(result.item, check=number == 0) for name in order}
            result.failed = {name: answer.failed for name, answer in answers.items() if answer.failed}
            if not result.failed:
                result.base.append(answers["base"].seconds)
                result.head.append(answers["head"].seconds)
    finally:
        for side in sides.values():
            side.stop()


def conclude(
    results: Sequence[Result], loads: Sequence[float], limit: float, tell: Callable[[str], None] = print
) -> int:
    """Print the table and what follows from it; the exit code."""
    report.console().print(_table(results, limit), soft_wrap=True)
    verdicts = {result.item: result.verdict(limit) for result in results}
    for result in results:
        name, verdict = " ".join(result.item), verdicts[result.item]
        if verdict in ("wrong", "not compared"):
            reasons = "; ".join(f"{side}: {why}" for side, why in result.failed.items())
            tell(f"{verdict.upper() if verdict == 'wrong' else 'not compared'}: {name}: {reasons}")
        elif verdict != "same":
            low, high = min(result.ratios), max(result.ratios)
            tell(f"{verdict.upper()}: {name}: {result.ratio:.2f} times the time, {low:.2f} to {high:.2f} by round")
    if max(loads, default=0.0) > DISTURBED:
        share = sum(busy > DISTURBED for busy in loads)
        tell(f"Others used up to {max(loads):.1f} cores, over {DISTURBED} in {share} of {len(loads)} rounds: ")
        tell("the machine was disturbed. A result near the limit is worth a second run on an idle one.")
    found = set(verdicts.values())
    if found & {"slower", "wrong"}:
        return 1
    if "unclear" in found or not found & {"same"}:
        tell("It cannot be told whether these became slower: run again on an idle machine, on fewer items.")
        return 2
    tell(f"No op takes over {100 * limit:.0f} % longer.")
    return 0


def _table(results: Sequence[Result], limit: float):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("op", "shape", "dtype", "backend", "direction"):
        table.add_column(name, overflow="fold")
    for name in ("base us", "ratio", "by round"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for result in results:
        op, shape, dtype, direction, backend = result.item
        verdict = result.verdict(limit)
        numbers = ["-", "-", "-"]
        if not result.failed:
            low, high = min(result.ratios), max(result.ratios)
            numbers = [show(1e6 * min(result.base)), f"{result.ratio:.2f}", f"{low:.2f}-{high:.2f}"]
        table.add_row(op, shape, dtype, backend, direction, *numbers, "" if verdict == "same" else verdict)
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    import torch

    from .shapes import CPU_SHAPES, DTYPES, OPS, PROJECT, PROJECTORS, SHAPES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regress", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="a commit, a branch or a tag")
    parser.add_argument("--head", metavar="COMMIT", help="default: the files of this checkout as they are")
    parser.add_argument("--ops", nargs="+", choices=(*OPS, PROJECT), default=[*OPS, PROJECT])
    parser.add_argument("--shapes", nargs="+", choices={**SHAPES, **PROJECTORS}, metavar="NAME", help="of the registry")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: bf16, on a CPU fp32, too")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: all of head but the reference")
    parser.add_argument("--limit", type=float, default=10.0, metavar="%", help="slower by more than that fails: 10")
    parser.add_argument("--device", default=device)
    args = parser.parse_args(arguments)
    cuda = torch.device(args.device).type == "cuda"
    args.shapes = args.shapes or (("vicuna7b_video", "vicuna7b_32frames") if cuda else (*CPU_SHAPES, "small_clip"))
    args.dtypes = args.dtypes or (("bf16",) if cuda else ("fp32", "bf16"))
    return args


def plan(args: argparse.Namespace, backends: dict[str, list[str]]) -> list[Item]:
    """Items case by case, as each case needs its inputs; `backends` are those that head has for each op."""
    from .shapes import BOTH, DIRECTIONS, PROJECT, PROJECTORS, SHAPES

    items = []
    for op in args.ops:
        registry = PROJECTORS if op == PROJECT else SHAPES
        able = args.backends or [b for b in backends[op] if b != "reference"] or ["reference"]
        for shape in [name for name in args.shapes if name in registry]:
            for dtype in args.dtypes:
                for direction in ("forward", BOTH) if op == PROJECT else DIRECTIONS:
                    items += [Item(op, shape, dtype, direction, backend) for backend in able]
    return items


def main(arguments: Sequence[str] | None = None) -> int:
    from . import regress_build

    args = parse(arguments)
    try:
        base = regress_build.side(args.base, args.device)
        head = regress_build.side(args.head, args.device)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    head.start()
    items = plan(args, head.greet())
    head.stop()
    if not items:
        print(f"error: no op of {', '.join(args.ops)} has a shape of {', '.join(args.shapes)}", file=sys.stderr)
        return 3
    print(f"base: {base.name}; head: {head.name}; {len(items)} items on {args.device}", flush=True)
    results, loads = compare(base, head, items, args.limit / 100)
    return conclude(results, loads, args.limit / 100)


if __name__ == "__main__":
    sys.exit(main())
