"""What each step of the fast path buys: the same requests answered with it and without it, in turns.

    python -m benchmarks.steps --quick
    python -m benchmarks.steps --preset vicuna-7b --dtype bfloat16

The steps build on each other, from transformers' plain way, one request after the other, to `ppllava.batch`. One whose
compilation takes longer than it saves on this device is measured, and then left out of what follows. Rows go to
benchmarks/results/<device>/steps.json, with a chart beside it, and where anything but --device or a limit was chosen,
or others disturbed the run, to the folder `unofficial` there.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig

import ppllava
from ppllava import presets
from ppllava.video import read_video

from . import chart, report, timing
from .load import Load, watch
from .machine import machine_info
from .results import Results, chosen
from .steps_report import StepRow, steps_tables
from .throughput import DTYPES, complete
from .video_models import CLIP_FPS, encode_clip

QUESTIONS = ("What happens in this video, and in which order?", "Who is in it, and what do they do to each other?")
DEFAULTS = {
    "cpu": {"preset": "small", "dtype": "float32", "clips": 1, "frames": 16, "new_tokens": 8, "repeats": 2},
    "cuda": {"preset": "vicuna-7b", "dtype": "bfloat16", "clips": 8, "frames": 32, "new_tokens": 32, "repeats": 3},
}
QUICK = {"clips": 1, "frames": 4, "new_tokens": 2, "repeats": 1}


@dataclass(frozen=True)
class Way:
    """How the requests are answered."""

    sdpa: bool = False
    all_layers: bool = True  # of the vision tower, also those above the one that is read
    ops: bool = False
    chunks: bool = False
    compiled_tower: bool = False
    static_cache: bool = False  # which transformers compiles the decoding step for, on a GPU by itself
    prefetch: bool = False
    batch: bool = False


@dataclass(frozen=True)
class Step:
    name: str
    switch: str  # how a user turns it on
    change: dict[str, bool]
    devices: tuple[str, ...] = ("cpu", "cuda")  # where it stays on


STEPS = (
    Step("attention by SDPA", "transformers' default", {"sdpa": True}),
    Step("no unused layers in the vision tower", "always", {"all_layers": False}),
    Step("the ops of ppllava_kernels", "always", {"ops": True}),
    Step("vision tower in chunks", "`vision_chunk`, by default what suits the device", {"chunks": True}),
    Step("vision tower compiled", "`model.model.vision_tower.compile()`", {"compiled_tower": True}, ("cuda",)),
    Step(
        "static cache, decoding compiled",
        '`model.generation_config.cache_implementation = "static"`',
        {"static_cache": True},
        ("cuda",),
    ),
    Step("frames decoded while the tower runs", "`ppllava.encode_video`", {"prefetch": True}),
    Step("batches, each clip encoded once", "`ppllava.batch`, `ppllava run`", {"batch": True}),
)


def ways(device: str) -> Iterator[tuple[Step, Way, Way]]:
    """(step, the way before it, the way with it)."""
    way = Way()
    for step in STEPS:
        changed = replace(way, **step.change)
        yield step, way, changed
        way = changed if torch.device(device).type in step.devices else way


class Job:
    """Two questions about each of some clips of different length, and the model that answers them."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.device = args, args.device
        model, self.processor = presets.build(args.preset, dtype=DTYPES[args.dtype], device=args.device)
        self.model = model
        self.requests = [
            {"id": f"{n}, {question}", "video": str(path), "prompt": question, "frames": frames}
            for n in range(args.clips)
            for frames in [max(2, args.frames - 2 * (n % 3))]
            for path in [encode_clip(folder / f"{n}.mp4", CLIP_FPS * (4 + n % 3))]
            for question in QUESTIONS
        ]

    @contextmanager
    def _set(self, way: Way) -> Iterator[None]:
        inner = self.model.model
        layers, projector, config = inner.vision_tower.encoder.layers, inner.multi_modal_projector, self.model.config
        with ExitStack() as stack:
            self.model.set_attn_implementation("sdpa" if way.sdpa else "eager")
            if way.all_layers:
                layers.append(copy.deepcopy(layers[-1]))
                stack.callback(lambda: layers.__delitem__(-1))
            projector.backend = None if way.ops else "reference"
            config.vision_chunk = None if way.chunks else 1 << 20
            if way.compiled_tower:
                inner.vision_tower.compile()
                stack.callback(setattr, inner.vision_tower, "_compiled_call_impl", None)
            yield

    def answers(self, way: Way) -> list[str]:
        with self._set(way):
            options: dict[str, Any] = {"min_new_tokens": self.args.new_tokens}
            if way.static_cache:
                compiling = CompileConfig()
                compiling._compile_all_devices = True
                options |= {"cache_implementation": "static", "compile_config": compiling}
            if way.batch:
                answers = ppllava.batch(
                    self.model, self.processor, self.requests, max_new_tokens=self.args.new_tokens, **options
                )
                return [answer["answer"] for answer in answers]  # a KeyError where one failed
            return [self._answer(request, way, options) for request in self.requests]

    def _answer(self, request: dict[str, Any], way: Way, options: dict[str, Any]) -> str:
        path, frames = request["video"], request["frames"]
        if way.prefetch:
            video = ppllava.encode_video(self.model, self.processor, path, num_frames=frames)
        else:
            video = read_video(path, num_frames=frames)
        blocks = [{"type": "video", "video": video}, {"type": "text", "text": request["prompt"]}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": blocks}], add_generation_prompt=True, tokenize=True, return_dict=True
        ).to(self.device, self.model.dtype)
        ids = self.model.generate(**inputs, max_new_tokens=self.args.new_tokens, do_sample=False, **options)
        [text] = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.strip()


@dataclass
class Found:
    """What a way to answer did."""

    seconds: list[float] = field(default_factory=list)  # of all requests, in each turn that counts
    load: Load = field(default_factory=Load)  # of other processes in these
    answers: list[str] = field(default_factory=list)
    failed: str | None = None


def measure(args: argparse.Namespace, save: Callable[[list[StepRow]], object]) -> list[StepRow]:
    """Rows of all steps; the ways take turns, after a call of some that is not timed."""
    start = time.monotonic()
    with report.progress() as progress, tempfile.TemporaryDirectory() as folder:
        plan = list(ways(args.device))
        found = {way: Found() for _, before, after in plan for way in (before, after)}
        task = progress.add_task("encode the clips, build the model", total=len(found) * (1 + args.repeats))
        job = Job(args, Path(folder))
        for turn in range(1 + args.repeats):
            for way, one in found.items():
                progress.update(task, description=f"{args.preset} {args.dtype}, turn {turn} of {args.repeats}")
                late = args.time_limit and time.monotonic() - start > args.time_limit
                if not (one.failed or late or (turn == 0 and not warms_up(way, args.device))):
                    _turn(job, way, one, timed=turn > 0)
                    save([row for row in make_rows(plan, found, job, args) if row.status != "left out"])
                progress.advance(task)
        rows = make_rows(plan, found, job, args)
        save(rows)
    return rows


def warms_up(way: Way, device: str) -> bool:
    """Whether its first call is not timed: where it compiles, and what a process does once. A GPU's first call of any
    way is slower than those after it."""
    return torch.device(device).type == "cuda" or way.compiled_tower or way.static_cache or way == Way()


def _turn(job: Job, way: Way, one: Found, timed: bool) -> None:
    """All requests answered once more."""
    load = Load()
    try:
        with watch(load):
            seconds = _timed(lambda: setattr(one, "answers", job.answers(way)), job.device)
        if timed:
            one.seconds.append(seconds)
            one.load.add(load)
    except Exception as error:
        one.failed = timing.reason(error)
    timing.release(job.device)


def make_rows(
    plan: Sequence[tuple[Step, Way, Way]], found: dict[Way, Found], job: Job, args: argparse.Namespace
) -> list[StepRow]:
    """From what was found so far."""
    rows = []
    for step, *pair in plan:
        row = StepRow(step=step.name, switch=step.switch, kept=torch.device(args.device).type in step.devices)
        both = [found[way] for way in pair]
        if reasons := [one.failed for one in both if one.failed]:
            row.fail(reasons[0])
        elif not all(one.seconds for one in both):
            row.fail(f"--time-limit {args.time_limit or 0:.0f} came before its turn", "left out")
        else:
            row.samples, row.load = min(len(one.seconds) for one in both), Load.total(one.load for one in both)
            times = (min(one.seconds) for one in both)
            row.set_times(len(job.requests), *times, same_answers=_share(*(one.answers for one in both)))
        rows.append(row)
    return rows


def _timed(what: Callable[[], object], device: str) -> float:
    cuda = torch.device(device).type == "cuda"
    start = time.perf_counter()
    what()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _share(some: Sequence[str], others: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(some, others, strict=True)) / len(some)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=presets.NAMES, help="default: small, on a GPU vicuna-7b")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, on a GPU bfloat16")
    parser.add_argument("--device", default="auto", help="default: auto, the GPU if there is one")
    parser.add_argument("--clips", type=int, metavar="N", help="each with two questions; default: 1, on a GPU 8")
    parser.add_argument("--frames", type=int, metavar="N", help="of the longest; default: 16, on a GPU 32")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="of each answer; default: 8, on a GPU 32")
    parser.add_argument("--repeats", type=int, metavar="N", help="the best of which counts; default: 2, on a GPU 3")
    parser.add_argument("--time-limit", type=float, metavar="S", help="start nothing after it")
    parser.add_argument("--quick", action="store_true", help="one clip, few frames and tokens, once")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    args = parser.parse_args(arguments)
    args.chosen = chosen(args, ("preset", "dtype", "clips", "frames", "new_tokens", "repeats", "quick"))
    complete(parser, args, DEFAULTS, QUICK, ("clips", "frames", "new_tokens", "repeats"))
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    words = list(sys.argv[1:] if arguments is None else arguments)
    machine = machine_info(args.device, ["python", "-m", "benchmarks.steps", *words])
    protocol = {
        **{name: getattr(args, name) for name in ("preset", "dtype", "clips", "frames", "new_tokens", "repeats")},
        "times": "seconds for all requests, from the files to the last token, the best of the repeats; ways take turns",
        "ratio": "time without the step over time with it, everything before it turned on where it is kept",
        "same_answers": "share of the answers that are the same text with the step and without it",
    }

    with Results("steps", machine, args.out, args.chosen) as results:
        rows = measure(args, lambda rows: results.save(protocol, rows))
        path, wrote = results.close(rows)
    return report.finish(rows, steps_tables(rows), [wrote, chart.draw_steps(path), report.machine_line(machine)])


if __name__ == "__main__":
    sys.exit(main())
