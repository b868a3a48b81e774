"""Time PPLLaVA against LLaVA-NeXT-Video of transformers, from a video file to the last generated token.

    python -m benchmarks.throughput --quick
    python -m benchmarks.throughput --video CLIP.mp4 --model FOLDER --frames 16 32
    python -m benchmarks.throughput --preset vicuna-7b --dtype bfloat16 --batch 4

Random weights, the same sizes of vision tower and language model, the same decoded frames, as many generated tokens.
Nothing is timed before it is correct; what does not fit into memory or time says so. The last lines say how many times
faster, or why that cannot be told. Rows go to benchmarks/results/<device>/throughput.json, with a chart beside it, and
where anything but --device or a limit was chosen, or others disturbed the run, to the folder `unofficial` there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from ppllava import PPLlavaConfig, presets
from ppllava.video import VideoError, open_video

from . import chart, gate, report
from .load import LIMIT
from .machine import check_device, machine_info
from .results import Results, chosen
from .video_memory import memory_limit
from .video_models import CLIP_FPS, CLIP_FRAMES, CLIP_SIZE, KEPT, PIXELS, PROMPT, SETTINGS, peer_of
from .video_report import PEER, VARIANTS, Longest, VideoRow, answers, throughput_tables
from .video_sweep import DTYPES, OP_FRAMES, Sweep
from .video_time import FIRST, SAMPLES, SAMPLES_S, in_order

# By default what says most in the time that `make benchmark` and `make gpu` have for it.
DEFAULTS = {
    "cpu": {
        "preset": "small",
        "dtype": "float32",
        "frames": [8, 16, 32, 64, 128, 256, 1024],
        "tokens": 1024,
        "batch": 1,
        "new_tokens": 16,
        "repeats": 3,
        "time_limit": 380.0,
        "row_limit": 240.0,
    },
    "cuda": {
        "preset": "vicuna-7b",
        "dtype": "bfloat16",
        "frames": [8, 32, 64, 128, 512, 3600],
        "tokens": 1024,
        "new_tokens": 64,
        "repeats": 5,
        "time_limit": 1200.0,
        "row_limit": 120.0,
    },
}
QUICK = {"preset": "small", "frames": [4], "repeats": 2, "new_tokens": 4, "batch": 1}


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


def usable() -> list[str]:
    """The presets that have a peer."""
    names = []
    for name in presets.NAMES:
        with suppress(ValueError):
            presets.peer_config(name)
            names.append(name)
    return names


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    cpu, cuda = (" ".join(map(str, kind["frames"])) for kind in DEFAULTS.values())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=usable(), help="random weights; default: small, on a GPU vicuna-7b")
    parser.add_argument("--model", metavar="FOLDER", help=f"weights of a PPLLaVA; {PEER} keeps random ones")
    parser.add_argument("--video", type=Path, metavar="FILE", help="frames of all of it; default: a clip made here")
    parser.add_argument("--frames", nargs="+", type=int, metavar="N", help=f"default: {cpu}, on a GPU {cuda}")
    parser.add_argument("--tokens", type=int, metavar="N", help="that PPLLaVA has at most; default: 1024")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="that every model makes; default: 16, on a GPU 64")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="videos in one call; default: 1, on a GPU then the best that fits"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, on a GPU bfloat16")
    parser.add_argument("--device", default="auto", help="default: auto, the GPU if there is one")
    parser.add_argument("--repeats", type=int, metavar="N", help="samples of a row, at most; default: 3, on a GPU 5")
    parser.add_argument("--quick", action="store_true", help="the small preset, few frames and tokens, batch 1")
    first = " and ".join(map(str, FIRST))
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="S",
        help=f"start nothing that would pass it, but for {first} frames; default: 380, on a GPU 1200",
    )
    parser.add_argument(
        "--row-limit", type=float, metavar="S", help="as --time-limit, for each row; default: 240, on a GPU 120"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    args = parser.parse_args(arguments)
    if args.model is not None and (args.preset or args.quick):
        parser.error("--model has sizes of its own; leave out --preset and --quick")
    choices = ("preset", "model", "video", "frames", "tokens", "new_tokens", "batch", "dtype", "repeats", "quick")
    args.chosen = chosen(args, choices)
    complete(parser, args, DEFAULTS, QUICK, ("tokens", "new_tokens", "batch", "repeats"))
    if args.model is not None:
        args.preset = None
    args.frames = in_order(args.frames)
    if min(args.frames) < 2:
        parser.error(f"--frames must be at least 2, what one window pools, got {min(args.frames)}")
    for option, check in (("model", check_model), ("video", check_video)):
        try:
            check(getattr(args, option))
        except (ValueError, OSError) as error:
            parser.error(f"--{option} {str(error).splitlines()[0]}")
    return args


def check_model(folder: str | None) -> None:
    """ValueError or OSError where it holds no PPLLaVA that has a peer."""
    if folder is None:
        return
    if not os.path.isdir(folder):
        raise ValueError(f"must be the folder of a model, got {folder!r}, which is none")
    peer_of(PPLlavaConfig.from_pretrained(folder, trust_remote_code=False))


def check_video(path: Path | None) -> None:
    """ValueError where it is no file that can be read."""
    if path is not None:
        try:
            open_video(path).close()
        except VideoError as error:
            raise ValueError(f"must be a video file: {error}") from error


def protocol(args: argparse.Namespace) -> dict[str, object]:
    width, height = CLIP_SIZE
    names = ("preset", "dtype", "tokens", "batch", "new_tokens", "repeats", "time_limit", "row_limit")
    made = f"H.264, {width}x{height}, {CLIP_FPS} fps; n frames of the first max({CLIP_FRAMES}, n), for all models"
    weights = "random"
    if args.model:
        weights = f"of {Path(args.model).resolve().name}; of {PEER} random, in the same sizes"
    return {
        **{name: getattr(args, name) for name in names},
        "preset": args.preset or Path(args.model).resolve().name,
        "weights": weights,
        "prompt": PROMPT,
        "clip": f"{args.video.name}; n frames of all of it, for all models" if args.video else made,
        "long": f"PPLLaVA gets more than {PIXELS} frames in chunks, the peer as one tensor of pixels. All of them are "
        f"decoded, and the first {KEPT} then stand for the others; preprocessing is timed on these",
        "settings": "attention sdpa, logits of the last position, greedy; of ours beyond the defaults: the "
        f"vision tower in chunks of frames, {SETTINGS[torch.device(args.device).type] or 'nothing of generate'}",
        "gate": "length of the answer, visual tokens, finite logits",
        "op_gate": f"of prompt_guided_project inside PPLLaVA, up to {OP_FRAMES} frames: "
        f"{gate.RULE.partition('. Peers')[0]}",
        "times": "milliseconds: the best of the samples, which rates and ratios are of, and their 20th, 50th and 80th "
        f"percentile; models take turns at batch 1. Of each row `repeats` samples, or as many as fit into "
        f"{SAMPLES_S:.0f} s, but at least {SAMPLES}; on a CPU the first of them checked the result. On a GPU vision, "
        "projector and prefill are those of one sample more, which waits for each",
        "load": "of other processes in the samples: their CPU seconds, and those that the host took, in wall_s seconds",
        "doubts": f"why times are not to be believed: others used more than {LIMIT} cores, one sample, or a ratio of "
        "the first tokens outside of {} to {} % of its bound".format(*report.BOUND_PERCENT),
        "flops": "matrix products up to the first token of one video; attention counts the pairs of positions that see "
        "each other",
        "ratios": "peer over PPLLaVA in FLOPs, time to first token and peak memory, PPLLaVA over peer in videos/s; "
        "ratios: the same batch, best: each at its best one, where both are known",
        "peak_bytes": "weights of one model, pixels, and the most beyond them during generate: what PyTorch holds on a "
        "GPU, resident memory of the process on a CPU",
    }


def run(args: argparse.Namespace, machine: dict, save: Callable[[list[VideoRow], list[Longest]], object]) -> Sweep:
    """The sweep, with everything saved as it comes."""
    with report.progress() as progress, tempfile.TemporaryDirectory() as folder, memory_limit(args.device):
        # Of a batch the plain PyTorch says least, so it comes when all others are known.
        batches = (
            () if args.batch else [(v, n) for some in (VARIANTS[:-1], VARIANTS[-1:]) for n in args.frames for v in some]
        )
        task = progress.add_task("encode the clip, build the models", total=len(args.frames) + len(batches) + 1)
        what = f"{Path(args.model).name if args.model else args.preset} {args.dtype}"

        def tell(line: str, style: str | None = None) -> None:
            progress.console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)

        def stages() -> Iterator[str]:
            for frames in args.frames:
                yield f"{frames} frames"
                sweep.measure(frames)
                for line in answers([row for row in sweep.rows if row.frames == frames], ""):
                    tell(line, "bold")
            for variant, frames in batches:
                yield f"{frames} frames, best batch"
                sweep.find_batch(frames, variant)

        try:
            sweep = Sweep(args, Path(folder), machine, lambda row: tell(row.line()), lambda rows: save(rows, []))
        except (torch.OutOfMemoryError, MemoryError) as error:
            both = f"both models of {args.model or args.preset} in {args.dtype}"
            raise SystemExit(f"{both} do not fit on {args.device} side by side; pass a smaller --preset") from error
        sweep.warm_up()
        for stage in stages():
            progress.update(task, description=f"{what}, {stage}", advance=1)
        progress.update(task, description=f"{what}, longest video")
        save(sweep.rows, [sweep.longest(variant) for variant in VARIANTS])
    return sweep


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    words = list(sys.argv[1:] if arguments is None else arguments)
    machine = machine_info(args.device, ["python", "-m", "benchmarks.throughput", *words])
    ends = []

    with Results("throughput", machine, args.out, args.chosen) as results:

        def save(rows: list[VideoRow], longest: list[Longest]) -> None:
            ends[:] = [each.sentence() for each in longest]
            last = {"longest": [vars(each) for each in longest]}
            results.save(protocol(args), [row for row in rows if row.status != "ok" or row.samples], last)

        rows = run(args, machine, save).rows
        path, wrote = results.close(rows)
    lines = ["Longest video that ran:", *ends, wrote, chart.draw_throughput(path), report.machine_line(machine)]
    if args.model:
        lines.append(f"{PEER} has random weights in the sizes of {args.model}: its speed is that of trained ones.")
    return report.finish(rows, throughput_tables(rows), [*lines, *answers(rows)])


if __name__ == "__main__":
    sys.exit(main())
