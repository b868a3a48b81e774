"""Write every block of README.md and docs/*.md that holds measured numbers, from benchmarks/results/<device>/*.json.

    python -m benchmarks.table           # after a benchmark
    python -m benchmarks.table --check   # exit code 1, and the file's name, where a block is not what it would write

A block stands between <!-- begin: NAME --> and <!-- end: NAME -->; BLOCKS has a function for each NAME.
Charts that are missing, or of other results, are drawn again.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import chart, fp8_report, report, shapes, steps_report, swap_report, video_table
from .report import COMPILED_REFERENCE, ORIGINAL, PEERS, PROJECTOR_PEERS, show

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- begin: (?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- end: (?P=name) -->", re.DOTALL)
# What the README shows of a full run; a device that measured none of them is shown whole.
SHOWN = {
    "shape": (
        "vicuna7b_video",
        "vicuna7b_16frames",
        "vicuna7b_8frames",
        "vicuna7b_image",
        "qwen2_7b_video",
        "long_video",
        "batch4_ragged",
    ),
    "dtype": ("bf16", "fp32"),
}
CPU_PERCENTS = (
    "% of a copy, % of a read: bytes per second against those of a large copy, and of `sum()` over the inputs of the "
    "op, in the same run. More than 100 % of a copy: most bytes are read, and a CPU reads faster than it copies."
)


def device_tables(results: Path, folder: Path, kind: str, device: Callable[[dict], str]) -> str:
    """A table, and the chart if there is one, for each device that has a <kind>.json; GPUs first."""
    found = [(path, report.read(path, kind)) for path in sorted(results.glob(f"*/{kind}.json"))]
    found.sort(key=lambda item: item[1]["machine"]["type"] != "cuda")
    parts = []
    for path, result in found:
        parts.append(device(result))
        picture = chart.picture(path)
        if picture.exists():
            link = Path(os.path.relpath(picture, folder)).as_posix()
            parts.append(f"![{picture.stem} on {result['machine']['device']}]({link})")
    for type_, name in (("cuda", "CUDA GPU"), ("cpu", "CPU")):
        if not any(result["machine"]["type"] == type_ for _, result in found):
            parts.append(f"**{name}**: not measured yet.")
    return "\n\n".join(parts)


def kernels_block(results: Path, folder: Path) -> str:
    return device_tables(results, folder, "kernels", kernels_device)


def roofline_block(results: Path, folder: Path) -> str:
    return device_tables(results, folder, "kernels", roofline_device)


def throughput_block(results: Path, folder: Path) -> str:
    return device_tables(results, folder, "throughput", throughput_device)


def throughput_rows_block(results: Path, folder: Path) -> str:
    return device_tables(results, folder, "throughput", throughput_rows_device)


def steps_block(results: Path, folder: Path) -> str:
    return device_tables(results, folder, "steps", steps_device)


def swap_block(results: Path, folder: Path) -> str:
    return device_tables(results, folder, "swap", swap_device)


def projector_block(results: Path, folder: Path) -> str:
    return device_tables(results, folder, "projector", projector_device)


def bytes_block(results: Path, folder: Path) -> str:
    """Arithmetic on the registry: nothing here was measured."""
    shape, dtype = shapes.SHAPES["vicuna7b_video"], shapes.DTYPES["bf16"]
    lines = [["op", "direction", "read, MB", "written, MB", "in all", "FLOP per byte"], [*["---"] * 4, "---:", "---:"]]
    for op in shapes.OPS:
        for direction in shapes.DIRECTIONS:
            both = shapes.traffic(op, shape, dtype, direction)
            moved = sum(sum(tensors.values()) for tensors in both)
            cells = (", ".join(f"{name} {show(n / 1e6)}" for name, n in tensors.items()) for tensors in both)
            intensity = shapes.flops(op, shape, direction) / moved
            lines.append([f"`{op}`", direction, *cells, show(moved / 1e6), f"{intensity:.2f}"])
    return _rows(lines)


def kernels_device(result: dict) -> str:
    machine, rows = result["machine"], result["rows"]
    cuda = machine["type"] == "cuda"
    chosen = [row for row in rows if row["default"]]
    for key, names in SHOWN.items():
        chosen = [row for row in chosen if row[key] in names] or chosen
    columns = {
        **({"us": lambda row: row["us_p50"]} if cuda else {}),
        **{f"x {_code(peer)}": lambda row, peer=peer: row["ratios"].get(peer) for peer in PEERS},
        "% of a copy": lambda row: row["copy_percent"],
        **({} if cuda else {"% of a read": lambda row: row["read_percent"]}),
    }
    note = [
        "Forward / backward. x: how many times faster than the peer, below 1 is slower; "
        "both timed in turns in one run, after the result was checked.",
        *([] if cuda else [CPU_PERCENTS]),
        *_warnings(result, {_case(row) for row in chosen}),
    ]
    return _device(machine, _case_lines(chosen, columns), note)


def roofline_device(result: dict) -> str:
    """Every backend that was measured, on every shape."""
    machine, rows = result["machine"], result["rows"]
    cuda = machine["type"] == "cuda"
    peer = {_case(row): row for row in rows if row["variant"] == COMPILED_REFERENCE}

    def first_call(row: dict, of: dict | None) -> float | None:
        if of is None or of["first_call_s"] is None:
            return None
        return of["first_call_s"] * 1e3 if cuda else of["first_call_s"] * 1e6 / row["us_p50"]

    unit = "ms" if cuda else "calls"
    columns = {
        **({"us": lambda row: row["us_p50"], "GB/s": lambda row: row["gb_s"]} if cuda else {}),
        "% of a copy": lambda row: row["copy_percent"],
        **({} if cuda else {"% of a read": lambda row: row["read_percent"]}),
        **{f"x {_code(p)}": lambda row, p=p: row["ratios"].get(p) for p in (COMPILED_REFERENCE, ORIGINAL)},
        "extra MB": lambda row: row["extra_bytes"] and row["extra_bytes"] / 1e6,
        f"first call, {unit}": lambda row: first_call(row, row),
        f"first call of {_code(COMPILED_REFERENCE)}, {unit}": lambda row: first_call(row, peer.get(_case(row))),
        "host us": lambda row: row.get("host_us"),
    }
    ours = [row for row in rows if row["variant"] not in PEERS]
    note = [
        "Forward / backward, every backend that can run there. x: how many times faster than the peer, below 1 is "
        "slower. Extra: the most that PyTorch holds during the call beyond its inputs, the result included. First "
        f"call: with a new shape{'' if cuda else ', in later calls of the backend of that row'}; "
        "the peer compiles for each new number of frames. Host: until the call returns, on a GPU that was idle before.",
        *([] if cuda else [CPU_PERCENTS]),
        *_warnings(result, {_case(row) for row in ours}),
    ]
    return _device(machine, _case_lines(ours, columns), note)


def projector_device(result: dict) -> str:
    """Every backend that was measured, on every shape."""
    machine, rows = result["machine"], result["rows"]
    cuda = machine["type"] == "cuda"
    columns = {
        "FLOPs, x fewer": lambda row: row["original_flops"] / row["flops"],
        **({"ms": lambda row: row["us_p50"] / 1e3, "TFLOP/s": lambda row: row["tflop_s"]} if cuda else {}),
        "% of its products": lambda row: row["products_percent"],
        **{f"x {_code(peer)}": lambda row, peer=peer: row["ratios"].get(peer) for peer in PROJECTOR_PEERS},
        "extra MB": lambda row: row["extra_bytes"] and row["extra_bytes"] / 1e6,
        "% of the original's": lambda row: row["memory_percent"],
        **({"host us": lambda row: row["host_us"]} if cuda else {}),
    }
    ours = [row for row in rows if row["variant"] not in PROJECTOR_PEERS]
    note = [
        "Forward / forward and all gradients in one call, every backend that was run; - was not measured. FLOPs: how "
        "many times fewer than in the original's order. % of its products: the time of the matrix products that nobody "
        "avoids, alone, over the time. x: how many times faster than the peer, below 1 is slower. Extra: the most that "
        "PyTorch holds during the call beyond its inputs, the results included; the original's is that of its eager "
        "PyTorch.",
        *_warnings(result, {_case(row) for row in rows}),
    ]
    lines = _case_lines(ours, columns, ("shape", "dtype"), ("forward", shapes.BOTH))
    return _device(machine, lines, note)


def throughput_device(result: dict) -> str:
    return _video_device(result, video_table.short)


def steps_device(result: dict) -> str:
    return _device(result["machine"], *steps_report.steps_markdown(result))


def swap_device(result: dict) -> str:
    return _device(result["machine"], *swap_report.swap_markdown(result))


def throughput_rows_device(result: dict) -> str:
    return _video_device(result, video_table.full)


def _video_device(result: dict, lines: Callable[[dict], tuple[list[list[str]], list[str]]]) -> str:
    if "longest" not in result:
        command = "python -m benchmarks.throughput"
        return f"**{result['machine']['device']}**: measured by an older version of `{command}`; run it again."
    return _device(result["machine"], *lines(result))


def _device(machine: dict, lines: Sequence[Sequence[str]], note: Sequence[str]) -> str:
    source = f"`{machine['command']}`; {report.machine_line(machine)}"
    return "\n\n".join((f"**{machine['device']}**", _rows(lines), " ".join(note), source))


def _rows(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _case(row: dict) -> tuple[str, ...]:
    return row["op"], row["shape"], row["dtype"], row["direction"]


def _warnings(result: dict, cases: set[tuple[str, ...]]) -> list[str]:
    """What a reader must know of a run: what it left out, and what was disturbed or went wrong in `cases`."""
    left_out = result["protocol"]["left_out"]
    lines = [f"Left out for lack of time: {', '.join(left_out)}."] if left_out else []
    of_cases = [row for row in result["rows"] if _case(row) in cases]
    lines += report.doubts_of(
        of_cases, lambda row: f"`{row['op']}` {row['direction']} on `{row['shape']}` {row['dtype']}"
    )
    troubles: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["status"] != "ok" and _case(row) in cases:
            trouble = f"{_code(row['variant'])} {row['status']} ({row['reason']})"
            place = f"`{row['op']}` {row['direction']} on `{row['shape']}` {row['dtype']}"
            troubles.setdefault(trouble, []).append(place)
    return lines + [f"{trouble}: {', '.join(places)}." for trouble, places in troubles.items()]


def _case_lines(
    rows: Sequence[dict],
    columns: dict[str, Callable[[dict], float | None]],
    keys: Sequence[str] = ("op", "shape", "dtype"),
    directions: Sequence[str] = shapes.DIRECTIONS,
) -> list[list[str]]:
    """A line for each case by `keys` and backend; each of `columns` holds the numbers of both directions."""
    cases: dict[tuple[str, ...], dict[str, dict]] = {}
    for row in rows:
        case = *(row[key] if key == "dtype" else f"`{row[key]}`" for key in keys), row["variant"]
        cases.setdefault(case, {})[row["direction"]] = row
    head = [*keys, "backend"]
    body = [[*case, *(_pair(both, number, directions) for number in columns.values())] for case, both in cases.items()]
    return [[*head, *columns], ["---"] * len(head) + ["---:"] * len(columns), *body]


def _pair(both: dict[str, dict], number: Callable[[dict], float | None], directions: Sequence[str]) -> str:
    """Both directions in one cell; a variant without times says why instead."""
    cells = []
    for direction in directions:
        row = both.get(direction)
        ok = row is not None and row["status"] == "ok"
        cells.append(
            show(number(row)) + report.MARK * bool(row.get("doubts")) if ok else "-" if row is None else row["status"]
        )
    return " / ".join(cells)


def _code(peer: str) -> str:
    return peer if "(" not in peer else "`torch.compile` of the " + peer.partition("(")[2].removesuffix(")")


BLOCKS: dict[str, Callable[[Path, Path], str]] = {
    "kernels": kernels_block,
    "throughput": throughput_block,
    "throughput-rows": throughput_rows_block,
    "steps": steps_block,
    "swap": swap_block,
    "fp8": fp8_report.fp8_block,
    "roofline": roofline_block,
    "projector": projector_block,
    "bytes": bytes_block,
}


def render(text: str, results: Path, path: Path) -> str:
    """`text`, of the file `path`, with all its blocks written anew."""
    for word in ("begin", "end"):
        marks = re.findall(rf"<!-- {word}: ([\w-]+) -->", text)
        if marks != [match["name"] for match in BLOCK.finditer(text)]:
            raise ValueError(
                f"{path.name}: every block needs <!-- begin: NAME --> on a line and <!-- end: NAME --> after it"
            )

    def block(match: re.Match) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(
                f"{path.name}: block {name!r} must be one of {', '.join(BLOCKS)}; add it to benchmarks/table.py"
            )
        return f"<!-- begin: {name} -->\n{BLOCKS[name](results, path.parent)}\n<!-- end: {name} -->"

    return BLOCK.sub(block, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something would change")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md, docs and benchmarks/results")
    args = parser.parse_args(arguments)
    if not args.check:
        chart.refresh(args.root / "benchmarks" / "results")
    stale = 0
    for path in [args.root / "README.md", *sorted((args.root / "docs").glob("*.md"))]:
        if not path.exists():
            continue
        before = path.read_text()
        after = render(before, args.root / "benchmarks" / "results", path)
        if before == after:
            continue
        stale += 1
        if args.check:
            print(f"{path} differs from the results; run python -m benchmarks.table", file=sys.stderr)
        else:
            path.write_text(after)
            print(f"wrote {path}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
