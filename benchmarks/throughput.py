"""Time PPLLaVA against LLaVA-NeXT-Video of transformers, from a video file to the last generated token.

    python -m benchmarks.throughput --quick
    python -m benchmarks.throughput --preset vicuna-7b --dtype bfloat16 --frames 16 32 64 --batch 4

Random weights, the same sizes of vision tower and language model, the same decoded frames, as many generated tokens.
Nothing is timed before it is correct; what does not fit into memory or time says so. Rows go to
benchmarks/results/<device>/throughput.json, with a chart beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ppllava import presets

from . import chart, gate, report
from .machine import check_device, machine_info, results_folder
from .video_memory import memory_limit
from .video_models import CLIP_FPS, CLIP_FRAMES, CLIP_SIZE, KEPT, PIXELS, PROMPT, SETTINGS
from .video_report import VARIANTS, Longest, VideoRow, throughput_table
from .video_sweep import DTYPES, OP_FRAMES, SAMPLES_S, Sweep

FRAMES = [8, 16, 32, 64, 128, 256, 1024, 3600]
# By default what says most in the time that `make benchmark` and `make gpu` have for it.
DEFAULTS = {
    "cpu": {
        "preset": "small",
        "dtype": "float32",
        "frames": FRAMES,
        "new_tokens": 16,
        "repeats": 3,
        "time_limit": 390.0,
        "row_limit": 240.0,
    },
    "cuda": {
        "preset": "vicuna-7b",
        "dtype": "bfloat16",
        "frames": FRAMES,
        "new_tokens": 64,
        "repeats": 5,
        "time_limit": 1200.0,
        "row_limit": 120.0,
    },
}
QUICK = {"preset": "small", "frames": [4], "repeats": 1, "new_tokens": 4, "batch": 1}


def complete(
    parser: argparse.ArgumentParser, args: argparse.Namespace, defaults: dict, quick: dict, counts: Sequence[str]
) -> None:
    """Fill in what was not given, for the device; an error for `counts` below 1, and for a device that is not there."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(parser, args.device)
    kind = defaults["cuda" if torch.device(args.device).type == "cuda" else "cpu"]
    for name, value in {**kind, **(quick if args.quick else {})}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    for name in counts:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=presets.NAMES, help="default: small, on a GPU vicuna-7b")
    parser.add_argument("--frames", nargs="+", type=int, metavar="N", help=f"default: {' '.join(map(str, FRAMES))}")
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="that PPLLaVA has at most; default: 1024")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="that every model makes; default: 16, on a GPU 64")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="videos in one call; default: 1, then the best that fits"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, on a GPU bfloat16")
    parser.add_argument("--device", default="auto", help="default: auto, the GPU if there is one")
    parser.add_argument("--repeats", type=int, metavar="N", help="samples of a row, at most; default: 3, on a GPU 5")
    parser.add_argument("--quick", action="store_true", help="the small preset, few frames and tokens, once, batch 1")
    parser.add_argument(
        "--time-limit", type=float, metavar="S", help="start nothing that would pass it; default: 390, on a GPU 1200"
    )
    parser.add_argument(
        "--row-limit", type=float, metavar="S", help="leave out rows that take longer; default: 240, on a GPU 120"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    args = parser.parse_args(arguments)
    complete(parser, args, DEFAULTS, QUICK, ("tokens", "new_tokens", "batch", "repeats"))
    args.frames = sorted(set(args.frames))
    if args.frames[0] < 2:
        parser.error(f"--frames must be at least 2, what one window pools, got {args.frames[0]}")
    try:
        presets.peer_config(args.preset)
    except ValueError as error:
        parser.error(f"--preset: {error}")
    return args


def protocol(args: argparse.Namespace) -> dict[str, object]:
    width, height = CLIP_SIZE
    names = ("preset", "dtype", "tokens", "batch", "new_tokens", "repeats", "time_limit", "row_limit")
    return {
        **{name: getattr(args, name) for name in names},
        "prompt": PROMPT,
        "clip": f"H.264, {width}x{height}, {CLIP_FPS} fps; n frames of the first max({CLIP_FRAMES}, n), for all models",
        "long": f"PPLLaVA gets more than {PIXELS} frames in chunks, the peer as one tensor of pixels. All of them are "
        f"decoded, and the first {KEPT} then stand for the others; preprocessing is timed on these",
        "settings": "attention sdpa, logits of the last position, greedy; of ours beyond the defaults: the "
        f"vision tower in chunks of frames, {SETTINGS[torch.device(args.device).type] or 'nothing of generate'}",
        "gate": "length of the answer, visual tokens, finite logits",
        "op_gate": f"of prompt_guided_project inside PPLLaVA, up to {OP_FRAMES} frames: "
        f"{gate.RULE.partition('. Peers')[0]}",
        "times": "milliseconds, 20th, 50th and 80th percentile of the samples; models take turns at batch 1. Of each "
        f"row `repeats` samples, or as many as fit into {SAMPLES_S:.0f} s, but one; on a CPU the first of them checked "
        "the result. On a GPU vision, projector and prefill are those of one sample more, which waits for each",
        "flops": "matrix products up to the first token of one video; attention counts the pairs of positions that see "
        "each other",
        "ratios": "peer over PPLLaVA in FLOPs, time to first token and peak memory, PPLLaVA over peer in videos/s; "
        "ratios: the same batch, best: each at its best one, where both are known",
        "peak_bytes": "weights of one model, pixels, and the most beyond them during generate: what PyTorch holds on a "
        "GPU, resident memory of the process on a CPU",
    }


def run(args: argparse.Namespace, save: Callable[[list[VideoRow], list[Longest]], object]) -> Sweep:
    """The sweep, with everything saved as it comes."""
    with report.progress() as progress, tempfile.TemporaryDirectory() as folder, memory_limit(args.device):
        # Of a batch the plain PyTorch says least, so it comes when all others are known.
        batches = (
            () if args.batch else [(v, n) for some in (VARIANTS[:-1], VARIANTS[-1:]) for n in args.frames for v in some]
        )
        stages = len(args.frames) + len(batches) + 1
        task = progress.add_task("encode the clip, build the models", total=stages)

        def tell(row: VideoRow) -> None:
            progress.console.print(row.line(), highlight=False, soft_wrap=True)

        def stage(what: str, step: Callable[[], object]) -> None:
            progress.update(task, description=f"{args.preset} {args.dtype}, {what}")
            step()
            save(sweep.rows, [])
            progress.advance(task)

        try:
            sweep = Sweep(args, Path(folder), tell)
        except (torch.OutOfMemoryError, MemoryError) as error:
            both = f"both models of {args.preset} in {args.dtype}"
            raise SystemExit(f"{both} do not fit on {args.device} side by side; pass a smaller --preset") from error
        sweep.warm_up()
        for frames in args.frames:
            stage(f"{frames} frames", lambda frames=frames: sweep.measure(frames))
        for variant, frames in batches:
            stage(f"{frames} frames, best batch", lambda v=variant, n=frames: sweep.find_batch(n, v))
        progress.update(task, description=f"{args.preset} {args.dtype}, longest video")
        save(sweep.rows, [sweep.longest(variant) for variant in VARIANTS])
    return sweep


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    words = list(sys.argv[1:] if arguments is None else arguments)
    machine = machine_info(args.device, ["python", "-m", "benchmarks.throughput", *words])
    path, ends = (args.out or results_folder(machine)) / "throughput.json", []

    def save(rows: list[VideoRow], longest: list[Longest]) -> None:
        ends[:] = [each.sentence() for each in longest]
        last = {"longest": [vars(each) for each in longest]}
        report.write(path, "throughput", machine, protocol(args), [row.as_dict() for row in rows], last)

    rows = run(args, save).rows
    lines = ["Longest video that ran:", *ends, f"wrote {path}", chart.draw_throughput(path)]
    return report.finish(rows, throughput_table(rows, machine), lines, machine)


if __name__ == "__main__":
    sys.exit(main())
