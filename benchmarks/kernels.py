"""Time every op against the original, torch.compile of the original and torch.compile of the reference.

    python -m benchmarks.kernels --quick
    python -m benchmarks.kernels --shapes vicuna7b_video long_video --dtypes bf16 --ops prompt_guided_pool3d

No result is timed before it is correct. Rows go to benchmarks/results/<device>/kernels.json, with a chart beside it,
and where anything but --device, --budget or a limit was chosen, or others disturbed the run, to `unofficial` there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ppllava_kernels.backends import BACKENDS

from . import chart, gate, report, timing
from .isolation import Settings, isolated_rows, local_rows
from .machine import machine_info
from .report import Measured, Row
from .results import Results, chosen
from .runner import Case
from .shapes import CPU_SHAPES, DTYPES, FULL_SHAPES, OPS, SHAPES

MAIN_SHAPE = "vicuna7b_video"
TIME_LIMIT = {"cpu": 75.0, "cuda": None}  # of what is measured by default


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="NAME", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: those that matter for each shape")
    parser.add_argument("--ops", nargs="+", choices=OPS, help="default: all")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="default: all that can run here")
    parser.add_argument("--quick", action="store_true", help="one small shape in one dtype")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=1.5, metavar="S", help="seconds of timing for each direction")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="S",
        help="start nothing that would pass it; without --shapes on a CPU {cpu:.0f}; 0: none".format(**TIME_LIMIT),
    )
    parser.add_argument("--no-isolation", action="store_true", help="in this process, which a bad variant can crash")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    args = parser.parse_args(arguments)
    args.chosen = chosen(args, ("shapes", "dtypes", "ops", "backends", "quick"))
    if args.time_limit is None and not args.shapes:
        args.time_limit = TIME_LIMIT[torch.device(args.device).type]
    return args


def plan(args: argparse.Namespace) -> list[Case]:
    """What is asked for; by default what says most first, as a time limit may leave out the rest."""
    cuda = torch.device(args.device).type == "cuda"
    if args.quick:
        pairs = [(MAIN_SHAPE if cuda else "small_video", "bf16")]
    elif cuda:
        pairs = [*((name, "bf16") for name in FULL_SHAPES), (MAIN_SHAPE, "fp32"), (MAIN_SHAPE, "fp16")]
    else:
        pairs = [(name, dtype) for name in CPU_SHAPES for dtype in ("fp32", "bf16")]
    if args.shapes or args.dtypes:
        shapes = args.shapes or dict.fromkeys(name for name, _ in pairs)
        dtypes = args.dtypes or dict.fromkeys(dtype for _, dtype in pairs)
        pairs = [(name, dtype) for name in shapes for dtype in dtypes]
    if cuda or args.shapes or args.dtypes or args.quick:
        return [Case(op, SHAPES[name], dtype) for name, dtype in pairs for op in args.ops or OPS]
    return [Case(op, SHAPES[name], dtype) for op in args.ops or reversed(OPS) for name, dtype in pairs]


@contextmanager
def fresh_compile_cache() -> Iterator[None]:
    """So that a first call compiles. Directories that are set already are kept."""
    names = [name for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR") if name not in os.environ]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update({name: os.path.join(folder, name) for name in names})
        try:
            yield
        finally:
            for name in names:
                os.environ.pop(name, None)


def run(
    cases: Sequence[Case],
    settings: Settings,
    save: Callable[[list[Measured]], object],
    isolated: bool = True,
    time_limit: float | None = None,
    cost: Callable[[Case], float] = lambda case: 0.0,
) -> list[Measured]:
    """Rows of the cases, saved as they come. Nothing is started that by its cost would end after the time limit.

    cost: of a case, in a unit of its own; how long that takes, the cases before it tell
    """
    rows: list[Measured] = []
    start = time.monotonic()
    steady = costs = 0.0  # seconds of the cases that nobody disturbed, and their costs
    before: tuple[Case, float, int] | None = None  # the one that ran last, when it began, how many rows there were
    with report.progress() as progress:
        task = progress.add_task("", total=len(cases))

        def enough(case: Case) -> bool:
            progress.update(task, description=str(case))
            nonlocal steady, costs, before
            now = time.monotonic()
            if before is not None and not any(row.doubts for row in rows[before[2] :]):
                steady, costs = steady + now - before[1], costs + cost(before[0])
            expected = steady * cost(case) / costs if costs else 0.0
            late = now - start + expected > (time_limit or float("inf"))
            before = None if late else (case, now, len(rows))
            return late

        for some in (isolated_rows if isolated else local_rows)(cases, settings, enough):
            rows += some
            save(rows)
            for row in some:
                progress.console.print(row.line(), highlight=False, markup=False, soft_wrap=True)
            ran = {row.case for row in rows}
            finished = sum(all((c.op, c.shape.name, c.dtype, d) in ran for d in c.directions) for c in cases)
            progress.update(task, completed=finished)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    words = list(sys.argv[1:] if arguments is None else arguments)
    machine = machine_info(args.device, ["python", "-m", "benchmarks.kernels", *words])
    cases, settings = plan(args), Settings(args.device, args.budget, args.backends)

    def left_out(rows: list[Row]) -> list[str]:
        ran = {row.case[:-1] for row in rows}
        return [str(case) for case in cases if (case.op, case.shape.name, case.dtype) not in ran]

    protocol = {
        "gate": gate.RULE,
        "times": "microseconds, 20th, 50th and 80th percentile; variants take turns; caches are cold",
        "bytes": "each input read once, each output written once",
        "copy_percent": f"of the bytes/s, read and written, of a {timing.COPY_BYTES[machine['type']]} byte copy",
        "read_percent": "on a CPU, of the bytes/s of sum() over the inputs of the op",
        "ratios": "time of the peer over time of the variant",
        "first_call_s": "compilation for this shape included, caches empty; backward: with its forward",
        "host_us": "median time until a call returns, not synchronised, on a GPU that was idle before it",
    }
    with Results("kernels", machine, args.out, args.chosen) as results:

        def save(rows: list[Row]) -> None:
            results.save({**protocol, "left_out": left_out(rows)}, rows)

        save([])
        with fresh_compile_cache():
            rows = run(cases, settings, save, not args.no_isolation, args.time_limit, lambda case: 1.0)
        path, wrote = results.close(rows)
    lines = [f"left out after --time-limit: {name}" for name in left_out(rows)]
    lines += [wrote, chart.draw_roofline(path), report.machine_line(machine)]
    return report.finish(rows, report.kernels_tables(rows), lines)


if __name__ == "__main__":
    sys.exit(main())
