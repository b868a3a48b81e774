"""What `ppllava.compress` buys: video LLMs of transformers as they are and compressed, in turns, on the same frames.

    python -m benchmarks.swap --quick
    python -m benchmarks.swap --preset 7b --dtype bfloat16

Random weights, as many generated tokens. Nothing is timed before it is correct. Rows go to
benchmarks/results/<device>/swap.json, with a chart beside it, and where anything but --device or a limit was chosen, or
others disturbed the run, to the folder `unofficial` there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList

from . import chart, load, report, timing
from .machine import machine_info
from .results import Results, chosen
from .swap_gate import RULE, Gate, Wrong, watch
from .swap_models import KERNEL, LLAVA, SUBJECTS, TEMPERATURE, TEXT, Subject
from .swap_report import GUIDED, STOCK, VARIANTS, SwapRow, set_ratios, swap_tables
from .throughput import DTYPES, complete
from .video_memory import peak_memory
from .video_models import SETTINGS
from .video_runs import FirstToken, Sample, clock

DEFAULTS = {
    "cpu": {"preset": "small", "dtype": "float32", "frames": 8, "new_tokens": 8, "repeats": 2},
    "cuda": {"preset": "7b", "dtype": "bfloat16", "frames": 32, "new_tokens": 32, "repeats": 3},
}
QUICK = {"frames": 4, "new_tokens": 2, "repeats": 1}
LIMIT = "--time-limit {:.0f} came before its turn"


class Entrant:
    """A variant of a video LLM, its inputs, and what it did."""

    def __init__(self, subject: Subject, variant: str, args: argparse.Namespace):
        compressed, guided = variant != STOCK, variant == GUIDED
        self.guided, self.now, self.new_tokens = guided, clock(args.device), args.new_tokens
        self.model = subject.twin(KERNEL, guided) if compressed else subject.model
        tokens = subject.tokens(args.frames, KERNEL if compressed else (1, 1, 1))
        self.inputs = subject.inputs(args.frames, tokens, packed=compressed, guided=guided)
        self.settings = SETTINGS[torch.device(args.device).type]
        self.samples: list[Sample] = []
        length, positions = self.inputs["input_ids"].shape[1], subject.model.config.text_config.max_position_embeddings
        self.row = SwapRow(
            family=subject.name,
            variant=variant,
            frames=args.frames,
            visual_tokens=tokens,
            text_tokens=length - tokens,
            weight_bytes=sum(x.nbytes for x in self.model.parameters()),
            past_context=length + args.new_tokens > positions,
        )

    def check(self, gate: Gate) -> None:
        """Against the stock model."""
        if self.row.variant == STOCK:
            return
        verdict, trouble = gate.check(self.guided)
        self.row.error, self.row.limit = verdict.error, verdict.limit
        if trouble:
            raise Wrong(trouble)

    def generate(self) -> Sample:
        """One greedy `generate` of exactly `new_tokens`."""
        sample, first = Sample(), FirstToken(self.now)
        self.model._previous_max_cache_length = -1  # or a static cache would be as long as the longest one before
        with load.watch(sample.load), watch(self.model, self.row.visual_tokens, self.now, sample):
            start = self.now()
            ids = self.model.generate(
                **self.inputs,
                **self.settings,
                max_new_tokens=self.new_tokens,
                min_new_tokens=self.new_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([first]),
            )
            sample.generate = self.now() - start
        sample.first_token = first.time - start
        if self.new_tokens > 1:
            sample.token = (sample.generate - sample.first_token) / (self.new_tokens - 1)
        if (got := ids.shape[1] - self.inputs["input_ids"].shape[1]) != self.new_tokens:
            raise Wrong(f"{got} new tokens, where {self.new_tokens} were asked for")
        return sample

    def measure_memory(self) -> None:
        """And warm up."""
        if self.settings:  # which compile
            self.generate()
        with peak_memory(self.model.device) as peak:
            self.generate()
        if peak.extra_bytes is not None:
            self.row.set_memory(self.inputs["pixel_values_videos"].nbytes + peak.extra_bytes)

    def finish(self) -> None:
        """The row of the samples."""
        for name in ("vision", "prefill", "first_token", "generate", *(["token"] if self.new_tokens > 1 else [])):
            setattr(self.row, f"{name}_ms", 1e3 * min(getattr(sample, name) for sample in self.samples))
        self.row.samples, self.row.videos_s = len(self.samples), 1e3 / self.row.generate_ms
        self.row.load = load.Load.total(sample.load for sample in self.samples)


def measure(args: argparse.Namespace, save: Callable[[list[SwapRow]], object]) -> list[SwapRow]:
    """Rows of all video LLMs, one after the other; the variants of one take turns."""
    start, rows = time.monotonic(), []

    def late() -> bool:
        return bool(args.time_limit) and time.monotonic() - start > args.time_limit

    with report.progress() as progress:
        turns = 2 + args.repeats  # two before they are timed: the results, the memory
        task = progress.add_task("", total=len(SUBJECTS) * turns * len(VARIANTS))
        for family in SUBJECTS:

            def step(what: str, family: type[Subject] = family) -> None:
                progress.update(task, description=f"{family.name}, {args.preset} {args.dtype}, {what}", advance=1)

            rows += measure_family(family, args, late, step)
            timing.release(args.device)
            save(rows)
            progress.update(task, completed=len(rows) * turns)
    return rows


def measure_family(
    family: type[Subject], args: argparse.Namespace, late: Callable[[], bool], step: Callable[[str], None]
) -> list[SwapRow]:
    """One video LLM, which goes when its rows are there."""

    def without(*reason: str) -> list[SwapRow]:
        shared = {"family": family.name, "frames": args.frames, "visual_tokens": 0, "text_tokens": 0}
        rows = [SwapRow(**shared, variant=variant) for variant in VARIANTS]
        for row in rows:
            row.fail(*reason)
        return rows

    if late():
        return without(LIMIT.format(args.time_limit), "left out")
    try:
        subject = family(args.preset, DTYPES[args.dtype], args.device)
        entrants = [Entrant(subject, variant, args) for variant in VARIANTS]
    except Exception as error:
        return without(timing.reason(error))
    gate = Gate(subject)

    def turn(entrant: Entrant, what: str, call: Callable[[], Any]) -> None:
        step(what)
        if entrant.row.status != "ok" or late():
            return
        try:
            call()
        except Wrong as error:
            entrant.row.wrong(str(error))
        except Exception as error:
            entrant.row.fail(timing.reason(error))
            timing.release(args.device)

    for entrant in entrants:
        turn(entrant, "checks", lambda e=entrant: e.check(gate))
    vars(gate).pop("stock", None)  # its logits
    for entrant in entrants:
        turn(entrant, "memory", entrant.measure_memory)
    for n in range(args.repeats):
        for entrant in entrants:
            turn(entrant, f"turn {n + 1}", lambda e=entrant: e.samples.append(e.generate()))
    for entrant in entrants:
        if entrant.row.status == "ok" and not entrant.samples:
            entrant.row.fail(LIMIT.format(args.time_limit), "left out")
        elif entrant.row.status == "ok":
            entrant.finish()
    rows = [entrant.row for entrant in entrants]
    set_ratios(rows)
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swap", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=LLAVA, help="sizes, with random weights; default: small, on a GPU 7b")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, on a GPU bfloat16")
    parser.add_argument("--device", default="auto", help="default: auto, the GPU if there is one")
    parser.add_argument("--frames", type=int, metavar="N", help="of the video; default: 8, on a GPU 32")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="of each answer; default: 8, on a GPU 32")
    parser.add_argument("--repeats", type=int, metavar="N", help="the best of which counts; default: 2, on a GPU 3")
    parser.add_argument("--time-limit", type=float, metavar="S", help="start nothing after it")
    parser.add_argument("--quick", action="store_true", help="few frames and tokens, once")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    args = parser.parse_args(arguments)
    args.chosen = chosen(args, ("preset", "dtype", "frames", "new_tokens", "repeats", "quick"))
    complete(parser, args, DEFAULTS, QUICK, ("frames", "new_tokens", "repeats"))
    if args.frames < 4 or args.frames % 2:
        parser.error(f"--frames must be even, as Qwen2.5-VL takes two at a time, and at least 4, got {args.frames}")
    return args


def protocol(args: argparse.Namespace) -> dict[str, object]:
    names = ("preset", "dtype", "frames", "new_tokens", "repeats", "time_limit")
    sizes = {"7b": "LLaVA-NeXT-Video-7B and Qwen2.5-VL-7B"}
    return {
        **{name: getattr(args, name) for name in names},
        "sizes": sizes.get(args.preset, f"LLaVA-NeXT-Video and Qwen2.5-VL in {args.preset} sizes"),
        "kernel_size": KERNEL,
        "temperature": TEMPERATURE,
        "guide": "LLaVA-NeXT-Video: CLIP with its own tower, which runs once; Qwen2.5-VL: another CLIP",
        "text": f"{sum(TEXT)} random tokens around the video, and those that the model puts there",
        "settings": "attention sdpa, logits of the last position, greedy; the same for all variants: "
        f"{SETTINGS[torch.device(args.device).type] or 'nothing of generate'}",
        "gate": RULE,
        "times": "milliseconds from pixels to the last token, of each part the best of the repeats; in turns",
        "ratios": "stock over variant in visual tokens, times and memory, variant over stock in videos/s",
        "peak_bytes": "weights of one model, pixels, and the most beyond them during generate, in a run of its own: "
        "what PyTorch holds on a GPU, resident memory of the process on a CPU",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    words = list(sys.argv[1:] if arguments is None else arguments)
    machine = machine_info(args.device, ["python", "-m", "benchmarks.swap", *words])
    setup = protocol(args)
    with Results("swap", machine, args.out, args.chosen) as results:
        rows = measure(args, lambda rows: results.save(setup, rows))
        path, wrote = results.close(rows)
    return report.finish(rows, swap_tables(rows), [wrote, chart.draw_swap(path), report.machine_line(machine)])


if __name__ == "__main__":
    sys.exit(main())
