"""Time the whole projector, vision features to tokens, against the original, plain PyTorch and its matrix products.

    python -m benchmarks.projector --quick
    python -m benchmarks.projector --shapes vicuna7b_128frames --dtypes bf16 --directions forward

No result is timed before it is correct. Rows go to benchmarks/results/<device>/projector.json, with a chart beside it,
and where anything but --device, --budget or a limit was chosen, or others disturbed the run, to `unofficial` there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ppllava_kernels.backends import BACKENDS

from . import chart, gate, report
from .isolation import Settings
from .kernels import fresh_compile_cache, run
from .machine import machine_info
from .projector_runner import ProjectorWork
from .report import ProjectorRow
from .results import Results, chosen
from .runner import Case
from .shapes import BOTH, DTYPES, LONG, PROJECT, PROJECTORS, SHORT

FAMILIES = ("vicuna7b", "qwen2_7b")
DIRECTIONS = ("forward", BOTH)
COMPILATION = {"cpu": 2e11, "cuda": 1e14}  # in floating point operations, of which a GPU does so many more meanwhile
TIME_LIMIT = {"cpu": 45.0, "cuda": None}  # of what is measured by default


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.projector", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=PROJECTORS, metavar="NAME", help=f"of {', '.join(PROJECTORS)}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: those that matter for each shape")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, help="default: those that matter")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="default: all that can run here")
    parser.add_argument("--quick", action="store_true", help="small shapes of both families in one dtype")
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
    args.chosen = chosen(args, ("shapes", "dtypes", "directions", "backends", "quick"))
    if args.time_limit is None and not args.shapes:
        args.time_limit = TIME_LIMIT[torch.device(args.device).type]
    return args


def plan(args: argparse.Namespace) -> list[Case]:
    """What is asked for; by default what says most first, as a time limit may leave out the rest."""
    short, long = ([f"{family}_{n}frames" for n in some for family in FAMILIES] for some in (SHORT, LONG))
    if args.quick:
        triples = [(name, "bf16", d) for name in ("small_clip", "small_siglip") for d in DIRECTIONS]
    elif torch.device(args.device).type == "cuda":
        main = [f"{family}_32frames" for family in FAMILIES]
        triples = [(name, "bf16", d) for d in DIRECTIONS for name in main] + [(long[-2], "bf16", "forward")]
        triples += [(name, "bf16", "forward") for name in (*short, *long)] + [(name, "bf16", BOTH) for name in short]
    else:
        (clip, siglip, clip_32, siglip_32, *both_128), forward = short, "forward"
        triples = [(clip, "bf16", forward), (clip, "fp32", forward), (clip, "bf16", BOTH), (siglip, "bf16", forward)]
        triples += [(siglip, "fp32", forward), (clip, "fp32", BOTH), (clip_32, "bf16", forward)]
        triples += [(siglip, "bf16", BOTH), (siglip, "fp32", BOTH)]
        triples += [(name, "bf16", forward) for name in (siglip_32, *both_128)]
    if args.shapes or args.dtypes:
        shapes = args.shapes or dict.fromkeys(name for name, _, _ in triples)
        dtypes = args.dtypes or dict.fromkeys(dtype for _, dtype, _ in triples)
        triples = [(name, dtype, d) for name in shapes for dtype in dtypes for d in args.directions or DIRECTIONS]
    triples = dict.fromkeys(t for t in triples if not args.directions or t[2] in args.directions)
    return [Case(PROJECT, PROJECTORS[name], dtype, (direction,)) for name, dtype, direction in triples]


def cost(case: Case, device: str) -> float:
    """What a case takes: compilation, and the original's products, in their unit."""
    products = sum(case.shape.project_flops(direction, original=True) for direction in case.directions)
    # The gate in float64 is the same for every dtype.
    return COMPILATION[torch.device(device).type] + products * (1.5 if case.dtype == "fp32" else 1)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    words = list(sys.argv[1:] if arguments is None else arguments)
    machine = machine_info(args.device, ["python", "-m", "benchmarks.projector", *words])
    cases, settings = plan(args), Settings(args.device, args.budget, args.backends, ProjectorWork)

    def left_out(rows: list[ProjectorRow]) -> list[str]:
        ran = {row.case for row in rows}
        return [str(case) for case in cases if (case.op, case.shape.name, case.dtype, *case.directions) not in ran]

    protocol = {
        "gate": gate.RULE,
        "times": "microseconds, 20th, 50th and 80th percentile; variants take turns; caches are cold",
        "both": "forward and the gradients of features, text_embeds and all weights, in one timed call",
        "flops": "of the products that nobody avoids; original_flops: with the second layer on all patches",
        "products_percent": "time of these products alone, in the same run, over the time; both: two more for "
        "each, its gradients; what an op computes again is not among them",
        "memory_percent": "extra_bytes over those of the original",
        "ratios": "time of the peer over time of the variant",
        "first_call_s": "compilation for this shape included, caches empty",
        "host_us": "median time until a call returns, not synchronised, on a GPU that was idle before it",
    }
    with Results("projector", machine, args.out, args.chosen) as results:

        def save(rows: list[ProjectorRow]) -> None:
            results.save({**protocol, "left_out": left_out(rows)}, rows)

        save([])
        with fresh_compile_cache():
            rows = run(cases, settings, save, not args.no_isolation, args.time_limit, partial(cost, device=args.device))
        path, wrote = results.close(rows)
    lines = [f"left out after --time-limit: {name}" for name in left_out(rows)]
    lines += [wrote, chart.draw_projector(path), report.machine_line(machine)]
    return report.finish(rows, report.projector_tables(rows), lines)


if __name__ == "__main__":
    sys.exit(main())
