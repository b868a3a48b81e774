"""What fp8 costs in accuracy beside what bfloat16 costs, and on a GPU what it gains in time.

    python -m benchmarks.fp8 --quick
    python -m benchmarks.fp8 --model FOLDER

One model in float32, bfloat16 and fp8 sees the same clips, questions and answer. On a CPU fp8 is emulated, and nothing
is timed. Rows go to benchmarks/results/<device>/fp8.json, and where anything but --device or a limit was chosen, or
others disturbed the run, to the folder `unofficial` there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from . import chart, report, timing
from .fp8_report import ERRORS, Fp8Row, Spread, failures, fp8_tables
from .load import watch
from .machine import check_device, machine_info, version
from .results import Results, chosen

if TYPE_CHECKING:
    from ppllava import PPLlavaForConditionalGeneration, PPLlavaProcessor

POSITIONS = 64  # the last one of the prompt, and those of the answer after it
QUESTIONS = ("What happens in this video, and in which order?", "Is anyone in sight?", "Which colours move, and where?")
ANSWER = (
    "First a bright pattern drifts slowly to the left while a darker one follows behind it, then both of them stop for "
    "a moment before they turn around, and at the end of the video the camera moves up and nothing is left in view but "
    "a wall of grey stones, a narrow window in the middle of it, and the shadow of a tree that somebody planted there."
)
DEFAULTS = {
    "cpu": {"preset": "small", "frames": [8], "clips": 1, "time_limit": 60.0},
    "cuda": {"preset": "vicuna-7b", "frames": [8, 32], "clips": 3, "time_limit": None},
}
QUICK = {"preset": "small", "frames": [4], "clips": 1}
NEW_TOKENS, ROUNDS = 16, 5
Sample = tuple[Tensor, Tensor]  # visual tokens [tokens, D]; logits [POSITIONS, vocabulary]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from ppllava import presets

    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=presets.NAMES, help="random weights; default: small, on a GPU vicuna-7b")
    parser.add_argument("--model", metavar="FOLDER", help="these weights instead")
    parser.add_argument("--frames", nargs="+", type=int, metavar="N", help="default: 8, on a GPU 8 32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the small preset, one short clip, nothing compiled")
    parser.add_argument("--time-limit", type=float, metavar="S", help="start nothing that would pass it; on a CPU 60")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    args = parser.parse_args(arguments)
    check_device(parser, args.device)
    args.chosen = chosen(args, ("preset", "model", "frames", "quick"))
    if args.model is not None and not os.path.isdir(args.model):
        parser.error(f"--model must be the folder of a model, got {args.model!r}, which is none")
    for name, value in {**DEFAULTS[kind(args.device)], **(QUICK if args.quick else {})}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.frames = sorted(set(args.frames))
    if args.frames[0] < 2:
        parser.error(f"--frames must be at least 2, what one window pools, got {args.frames[0]}")
    return args


def kind(device: str) -> str:
    return "cuda" if torch.device(device).type == "cuda" else "cpu"


def build(args: argparse.Namespace) -> tuple[dict[str, PPLlavaForConditionalGeneration], PPLlavaProcessor]:
    """({dtype: model}, processor): one set of weights, those of bfloat16."""
    from ppllava import PPLlavaForConditionalGeneration, PPLlavaProcessor, presets
    from ppllava.quantization import fp8

    if args.model:
        model = PPLlavaForConditionalGeneration.from_pretrained(
            args.model, dtype=torch.bfloat16, trust_remote_code=False
        )
        model = model.to(args.device).eval()
        processor = PPLlavaProcessor.from_pretrained(args.model, trust_remote_code=False)
    else:
        model, processor = presets.build(args.preset, dtype=torch.bfloat16, device=args.device)
    change = fp8 if kind(args.device) == "cuda" else emulate
    return {"float32": deepcopy(model).float(), "bf16": model, "fp8": change(deepcopy(model))}, processor


def emulate(model: PPLlavaForConditionalGeneration) -> PPLlavaForConditionalGeneration:
    """`fp8` for a CPU: torchao's own tensors, and PyTorch's products of them, which are right there but not fast."""
    from torchao.quantization import quant_api

    from ppllava import quantization

    yes = {"_check_hardware_support": lambda granularity: None, "is_sm_at_least_89": lambda: True}
    with mock.patch.object(quantization, "why_not_fp8", return_value=None), mock.patch.multiple(quant_api, **yes):
        return quantization.fp8(model)


def weight_bytes(model: PPLlavaForConditionalGeneration) -> int:
    """Of all parameters; one in fp8 is its numbers and its scales."""
    return sum(x.qdata.nbytes + x.scale.nbytes if hasattr(x, "qdata") else x.nbytes for x in model.parameters())


def inputs(processor: PPLlavaProcessor, frames: int, clips: int, device: str) -> Iterator[dict[str, Tensor]]:
    """Prompt and pixels of each clip, a texture that drifts, with each question."""
    from ppllava.video import VideoClip

    indices = np.arange(frames)
    for seed, question in product(range(clips), QUESTIONS):
        ground = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8).repeat(14, 0).repeat(14, 1)
        moved = np.stack([np.roll(ground, ((seed + 1) * i, 2 * i), axis=(0, 1)) for i in indices])  # [T, H, W, 3]
        video, prompt = VideoClip(moved, indices / 2.0, indices, 2.0), f"USER: <video>\n{question} ASSISTANT:"
        yield dict(processor(text=prompt, videos=video).to(device=device, dtype=torch.bfloat16))


def look(model: PPLlavaForConditionalGeneration, given: dict[str, Tensor], answer: Tensor) -> Sample:
    """What the model makes of `inputs` with all of answer [POSITIONS] but the last token after the prompt."""
    text = ("input_ids", "attention_mask")
    media = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in given.items() if name not in text}
    features = model.get_video_features(**media)
    ids = torch.cat([given["input_ids"], answer[None, :-1]], dim=1)
    seen = {"mm_encoder_outputs": {"video": features}, "logits_to_keep": POSITIONS}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **seen).logits
    return features.pooler_output[0].float(), logits[0, -POSITIONS:].float()


def compare(actual: Sample, expected: Sample) -> dict[str, float]:
    """ERRORS: |a - e| / |e| of all visual tokens, and of the logits after the prompt; mean of KL(e || a) over the
    positions; share of the positions where the most likely token is the same."""
    (visual, logits), (visual_expected, logits_expected) = actual, expected
    p, q = logits_expected.log_softmax(-1), logits.log_softmax(-1)
    return {
        "visual_error": float((visual - visual_expected).norm() / visual_expected.norm()),
        "logits_error": float((logits[0] - logits_expected[0]).norm() / logits_expected[0].norm()),
        "kl": max(0.0, float((p.exp() * (p - q)).sum(-1).mean())),  # of two alike, rounding can make it negative
        "equal_tokens": float((logits.argmax(-1) == logits_expected.argmax(-1)).float().mean()),
    }


@torch.no_grad()
def measure_row(models: dict, processor: PPLlavaProcessor, frames: int, args: argparse.Namespace) -> Fp8Row:
    answer = processor.tokenizer(ANSWER, add_special_tokens=False, return_tensors="pt").input_ids[0]
    answer = answer[:POSITIONS].to(args.device)
    found: dict[str, list[dict[str, float]]] = {"fp8": [], "bf16": []}
    finite, same = True, False
    for given in inputs(processor, frames, args.clips, args.device):
        seen = {name: look(model, given, answer) for name, model in models.items()}
        found["fp8"].append(compare(seen["fp8"], seen["bf16"]))
        found["bf16"].append(compare(seen["bf16"], seen["float32"]))
        finite &= all(bool(x.isfinite().all()) for sample in seen.values() for x in sample)
        same |= any(torch.equal(a, b) for a, b in zip(seen["fp8"], seen["bf16"]))
    row = Fp8Row(
        frames=frames,
        visual_tokens=len(seen["bf16"][0]),
        samples=len(found["fp8"]),
        weight_bytes={name: weight_bytes(models[name]) for name in ("bf16", "fp8")},
    )
    if not finite:
        row.wrong("visual tokens or logits are not all finite")
    elif same:
        row.wrong("fp8 gave the bits of bfloat16, so a part of the model was not in it")
    else:
        row.errors = {name: spread(samples) for name, samples in found.items()}
    return row


def spread(samples: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and worst of each of ERRORS."""
    values = {name: [sample[name] for sample in samples] for name in ERRORS}
    worst = {name: (min if name == "equal_tokens" else max)(some) for name, some in values.items()}
    return {name: {"mean": sum(some) / len(some), "worst": worst[name]} for name, some in values.items()}


@torch.no_grad()
def time_row(row: Fp8Row, models: dict, given: dict[str, Tensor], device: str, compiled: bool) -> None:
    """Vision tower and prefill as they are, and compiled; tokens inside `generate`, which compiles its step itself."""
    pair, pixels = {name: models[name] for name in ("bf16", "fp8")}, given["pixel_values_videos"]
    embeds = pair["bf16"].model.embed(**{name: x for name, x in given.items() if name != "attention_mask"})
    last = {"inputs_embeds": embeds, "use_cache": False, "logits_to_keep": 1}
    variants: dict[str, list[timing.Variant]] = {"vision": [], "prefill": []}
    compiled_pair = {f"compile({name})": compile_layers(model) for name, model in pair.items()} if compiled else {}
    for name, model in {**pair, **compiled_pair}.items():
        tower, language = model.model.encode_frames, model.model.language_model
        variants["vision"].append(timing.Variant(name, lambda _, run=tower: run(pixels, [row.frames])))
        variants["prefill"].append(timing.Variant(name, lambda _, run=language: run(**last)))
    with watch(row.load):
        for part, some in variants.items():
            times, row.failed[part] = timing.measure(some, timing.clock_for(device))
            row.ms[part] = {name: milliseconds(taken) for name, taken in times.items()}
        row.failed["token"], taken = {}, {name: [] for name in pair}
        for _, (name, model) in product(range(1 + ROUNDS), pair.items()):  # in turns
            if name not in row.failed["token"]:
                try:
                    taken[name].append(token_seconds(model, given))
                except Exception as error:
                    row.failed["token"][name] = timing.reason(error)
    of = {name: some[1:] for name, some in taken.items() if name not in row.failed["token"]}  # the first compiled
    row.ms["token"] = {name: milliseconds(timing.Timing.of(some)) for name, some in of.items()}


class TokenTimes:
    """A streamer for `generate`, which hands it the prompt, and each token when it is on the CPU."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def token_seconds(model: PPLlavaForConditionalGeneration, given: dict[str, Tensor]) -> float:
    """Of each token after the first, greedy, with a static cache."""
    streamer, count = TokenTimes(), {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    model.generate(**given, **count, do_sample=False, cache_implementation="static", streamer=streamer)
    return (streamer.times[-1] - streamer.times[1]) / (NEW_TOKENS - 1)


def compile_layers(model: PPLlavaForConditionalGeneration) -> PPLlavaForConditionalGeneration:
    """A twin with the same weights, whose layers are compiled one by one: those of a kind need it once."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    twin = deepcopy(model, {id(x): x for x in model.parameters()})
    for module in twin.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=False)
    return twin


def milliseconds(taken: timing.Timing) -> Spread:
    return {"p20": 1e3 * taken.p20, "p50": 1e3 * taken.p50, "p80": 1e3 * taken.p80}


def protocol(args: argparse.Namespace, left_out: Sequence[str]) -> dict[str, object]:
    emulated = kind(args.device) == "cpu"
    how = "emulated: torchao's tensors, and PyTorch's products of them, which are not fast on a CPU; nothing is timed"
    return {
        "model": Path(args.model).name if args.model else f"random weights in the sizes of {args.preset}",
        "clips": args.clips,
        "questions": QUESTIONS,
        "torchao": version("torchao"),
        "fp8": how if emulated else "ppllava.quantization.fp8",
        "emulated": emulated,
        "errors": "fp8 against bf16; bf16 against float32 with the same weights; mean and worst of clips and questions",
        "visual_error, logits_error": "|a - e| / |e| of all visual tokens; of the logits at the end of the prompt",
        "kl, equal_tokens": "mean of KL(e || a) in nats; share of equal most likely tokens; both over the "
        f"{POSITIONS} positions before the tokens of a given answer",
        "ms": "20th, 50th and 80th percentile; variants take turns; compile(): torch.compile of each layer; "
        f"token: of {NEW_TOKENS} in generate with a static cache, for which transformers compiles the step",
        "time_limit": args.time_limit,
        "left_out": left_out,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    from ppllava.quantization import why_not_fp8

    args = parse(arguments)
    words, start = list(sys.argv[1:] if arguments is None else arguments), time.monotonic()
    why = why_not_fp8(args.device)
    if why and (kind(args.device) == "cuda" or version("torchao") is None):
        raise SystemExit(why)
    machine = machine_info(args.device, ["python", "-m", "benchmarks.fp8", *words])
    rows, left_out, last = [], [], 0.0

    def late(seconds: float, what: str) -> bool:
        if args.time_limit is not None and time.monotonic() - start + seconds > args.time_limit:
            left_out.append(what)
        return what in left_out

    with Results("fp8", machine, args.out, args.chosen) as results:
        try:
            models, processor = build(args)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise SystemExit(
                f"float32, bf16 and fp8 do not fit on {args.device} side by side; pass --preset small"
            ) from error
        for i, frames in enumerate(args.frames):
            begin = time.monotonic()
            if late(last * frames / args.frames[i - 1], f"{frames} frames"):
                continue
            row = measure_row(models, processor, frames, args)
            last = time.monotonic() - begin
            if kind(args.device) == "cuda" and row.status == "ok" and not late(0, f"times of {frames} frames"):
                compiled = not args.quick and frames == args.frames[-1]
                time_row(row, models, next(inputs(processor, frames, 1, args.device)), args.device, compiled)
            rows.append(row)
            results.save(protocol(args, left_out), rows)
        results.save(protocol(args, left_out), rows)
        path, wrote = results.close(rows)
    untimed = failures(rows)
    lines = [*(f"left out after --time-limit: {what}" for what in left_out), *untimed, wrote, chart.draw_fp8(path)]
    if kind(args.device) == "cpu":
        lines.append("fp8 is emulated on a CPU, so nothing is timed.")
    return report.finish(rows, fp8_tables(rows), [*lines, report.machine_line(machine)]) or int(bool(untimed))


if __name__ == "__main__":
    sys.exit(main())
