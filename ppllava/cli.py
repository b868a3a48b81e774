"""The command line: `ppllava ask`, `run`, `convert`, `presets`. Answers go to stdout or a file, all else to stderr."""

from __future__ import annotations

import platform
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from ppllava_command import importing, version

from .console import MEANINGS, Exit, Failure, note, print_json, quiet, run, say, sentence, timed
from .options import Dtype, Engine, check_job, check_options, check_question, random_weights
from .quiet_imports import hush
from .request import COUNT, MAX_NEW_TOKENS

# Modules that need PyTorch or transformers are imported where a command runs: --help and wrong options need none.
EPILOG = "Exit codes: " + "; ".join(f"{code.value} {meaning}" for code, meaning in MEANINGS.items()) + "."


def ask(
    arguments: Annotated[list[str], Argument(metavar="MEDIA... QUESTION", help="Videos, images; then the question.")],
    model: Annotated[str | None, Option(metavar="PATH", help="Folder of a model.")] = None,
    preset: Annotated[str | None, Option(help="A model with random weights: see `ppllava presets`.")] = None,
    frames: Annotated[
        int | None, Option(min=1, max=COUNT, help="Frames of each video; default: the model's number.")
    ] = None,
    fps: Annotated[float | None, Option(help="Frames a second of each video, instead of --frames.")] = None,
    tokens: Annotated[
        int | None,
        Option(min=1, max=COUNT, help="At most so many visual tokens for each video."),
    ] = None,
    start: Annotated[float | None, Option(min=0, help="Second where videos start.")] = None,
    end: Annotated[float | None, Option(min=0, help="Second where videos end.")] = None,
    max_new_tokens: Annotated[
        int | None,
        Option(min=1, max=COUNT, help=f"Longest answer; default: {MAX_NEW_TOKENS}, or what the context leaves."),
    ] = None,
    temperature: Annotated[float, Option(min=0, help="Of the sampling; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, Option(min=0, max=2**64 - 1, help="Of the sampling.")] = 0,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1, ...; default: cuda where there is one.")] = None,
    dtype: Annotated[Dtype, Option(help="Of the weights; auto is that of the files.")] = Dtype.AUTO,
    each: Annotated[
        bool,
        Option("--each", help="Ask about each file by itself, in one batch; of several, print lines PATH: ANSWER."),
    ] = False,
    as_json: Annotated[
        bool,
        Option("--json", help="One JSON object, not the answer as it is written; with --each a line for each file."),
    ] = False,
    relevance: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Draw what in the files the question is about: .png is a sheet of the frames, .mp4 a clip that plays "
            "as sampled, at 1 to 30 frames a second. For several MEDIA: FILE-1, FILE-2, ...",
        ),
    ] = None,
) -> None:
    """Ask one question about videos and images: about all of them together, or with --each about each by itself."""
    *paths, question = arguments
    check_question(paths, question)
    check_options(model, preset, frames, fps, start, end, temperature)
    clock: dict[str, float] = {}
    with quiet():
        with importing():
            import torch

            from .asking import (
                Stream,
                answering,
                device_of,
                encode,
                kind_of,
                load_model,
                load_processor,
                plan,
                prompt,
                read,
                render,
                room,
                visual_tokens,
            )
            from .drawing import draw_relevance, drawings
        began = time.perf_counter()
        place = device_of(device)
        kinds = [kind_of(path) for path in paths]
        of_videos = {"frames": frames, "fps": fps, "start": start, "end": end, "tokens": tokens}
        if "video" not in kinds and (given := [option for option, value in of_videos.items() if value is not None]):
            raise Failure(Exit.USAGE, f"--{given[0]} is for videos, got images only; leave it out")
        targets = [] if relevance is None else drawings(relevance, paths, kinds)
        with timed(clock, "load"):
            config, processor = load_processor(model, preset)
        if targets and not config.visual_pooling.guided:
            raise Failure(
                Exit.USAGE,
                f"--relevance needs the pooling 'prompt_guided', this model has {config.pooling!r}; leave it out",
            )

        def grouped(files: list) -> list[list]:
            return [[file] for file in files] if each else [files]

        name = preset if model is None else model
        texts = render(processor, name, grouped(kinds), question)
        count = processor.num_frames if frames is None and fps is None else frames
        if fps is None:  # so nothing is decoded in vain
            plan(config, processor, grouped([(kind, count) for kind in kinds]), tokens)
        with timed(clock, "read", f"reading {', '.join(paths)}"):
            sampling = {"num_frames": count, "fps": fps, "start": start, "end": end}
            media = [read(path, kind, **sampling) for path, kind in zip(paths, kinds)]
        if fps is not None:
            plan(config, processor, grouped([(medium.kind, len(medium.frames)) for medium in media]), tokens)
        groups = grouped(media)
        inputs = prompt(processor, texts, groups, question)
        options = {"max_new_tokens": room(config, inputs, max_new_tokens), "do_sample": temperature > 0}
        if temperature:
            options["temperature"] = temperature
        with timed(clock, "load", "loading the model"):
            network = load_model(model, preset, config, place, dtype)
        with torch.inference_mode():
            with timed(clock, "encode", "looking"):
                features = encode(network, inputs.to(place))
            stream = Stream(processor.tokenizer, echo=not as_json and len(groups) == 1)
            torch.manual_seed(seed)
            if preset is not None:
                note(random_weights(preset))
            asked = time.perf_counter()
            with timed(clock, "generate", None if stream.echo else "answering"), answering(model):
                options.update(num_beams=1, num_return_sequences=1)  # whatever the model's own configuration says
                options.update(tokenizer=processor.tokenizer, streamer=stream)
                network.generate(**inputs, mm_encoder_outputs=features, **options)
        clock["first_token"] = (stream.first or asked) - asked
        clock["total"] = time.perf_counter() - began
        answers = stream.answers(network.generation_config.eos_token_id)
        if as_json:
            counts, places = iter(visual_tokens(media, features)), map(str, targets)
            prompt_tokens = inputs["attention_mask"].sum(dim=1).tolist()
            for group, length, (text, new_tokens) in zip(groups, prompt_tokens, answers):
                answer = {
                    "answer": text,
                    "model": name,
                    "media": [{**medium.summary(), "visual_tokens": next(counts)} for medium in group],
                    "prompt_tokens": length,
                    "new_tokens": new_tokens,
                    "timings": {step: round(seconds, 4) for step, seconds in clock.items()},
                    "relevance": list(islice(places, len(group))),
                }
                print_json(answer)
        elif len(groups) > 1:
            for path, (text, _) in zip(paths, answers):
                say(f"{path}: {' '.join(text.splitlines())}")
        if targets:  # after the answer, which no full disk may cost
            for path in draw_relevance(targets, groups, features, processor, question, preset):
                note(f"wrote {path}")


def run_requests(
    requests: Annotated[Path, Argument(metavar="REQUESTS", help="JSON lines: id, video or image or images, prompt.")],
    answers: Annotated[Path, Option("--out", "-o", metavar="FILE", help="JSON lines: id, answer or error.")],
    model: Annotated[str | None, Option(metavar="PATH", help="Folder of a model.")] = None,
    preset: Annotated[str | None, Option(help="A model with random weights: see `ppllava presets`.")] = None,
    frames: Annotated[
        int | None, Option(min=1, max=COUNT, help="Of videos whose request names none; default: the model's number.")
    ] = None,
    fps: Annotated[float | None, Option(help="Frames a second of such videos, instead of --frames.")] = None,
    tokens: Annotated[
        int | None, Option(min=1, max=COUNT, help="At most so many visual tokens for each video.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, Option(min=1, max=COUNT, help="Longest answer to requests that name none; default: 256.")
    ] = None,
    memory: Annotated[
        float | None,
        Option(help="GiB for the activations of a batch, or the features of a video; default: by what is free."),
    ] = None,
    threads: Annotated[int | None, Option(min=1, max=256, help="That decode files; default: by the cores.")] = None,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1, ...; default: cuda where there is one.")] = None,
    dtype: Annotated[Dtype, Option(help="Of the weights; auto is that of the files.")] = Dtype.AUTO,
    compiled: Annotated[
        bool, Option("--compile", help="Compile the vision tower and, on a GPU, the decoding step: for long jobs.")
    ] = False,
    fp8: Annotated[
        bool, Option("--fp8", help="Vision tower and language model in fp8, through torchao, on GPUs that multiply it.")
    ] = False,
    engine: Annotated[
        Engine, Option(help="local: this process. ray: a Ray cluster, or one started here.")
    ] = Engine.LOCAL,
    workers: Annotated[
        int | None, Option(min=1, max=COUNT, help="Of --engine ray, each with a model; default: 1.")
    ] = None,
) -> int:
    """Answer a file of requests in batches. Started again after an interruption, it goes on where it was.

    A request is one JSON object a line: "id", "prompt", one of "video", "image" and "images" (paths), and optionally
    "frames" or "fps", "start" and "end" of a video, "max_new_tokens". The file of answers has them in the same order.
    """
    check_options(model, preset, frames, fps)
    check_job(memory, workers, engine)
    with quiet():
        with importing():
            from .asking import device_of
            from .running import JobSpec, local_engine, run_job
        place = "auto" if device is None and engine is Engine.RAY else str(device_of(device))
        size = None if memory is None else int(memory * 2**30)
        spec = JobSpec(model, preset, dtype, frames, fps, tokens, max_new_tokens, place, compiled, fp8, size, threads)
        if engine is Engine.LOCAL:
            return run_job(requests, answers, spec, local_engine)
        with importing():
            from .ray_engine import RayEngine
        return run_job(requests, answers, spec, RayEngine(workers or 1))


def convert(
    source: Annotated[Path, Argument(metavar="SRC", help="Folder of the checkpoint.")],
    destination: Annotated[Path, Argument(metavar="DST", help="Folder to write, new or empty.")],
    base: Annotated[Path | None, Option(metavar="DIR", help="LLaVA, for weights that SRC lacks.")] = None,
    clip: Annotated[Path | None, Option(metavar="DIR", help="CLIP or SigLIP, for the guide.")] = None,
    adapter: Annotated[Path | None, Option(metavar="DIR", help="A LoRA adapter to merge.")] = None,
    tokenizer: Annotated[Path | None, Option(metavar="DIR", help="Of the language model; default: SRC's.")] = None,
    guide_tokenizer: Annotated[Path | None, Option(metavar="DIR", help="Of the guide; default: --clip's.")] = None,
    dtype: Annotated[Dtype, Option(help="Of the written weights; auto leaves them.")] = Dtype.AUTO,
) -> None:
    """Make one folder for --model of a checkpoint of the original PPLLaVA."""
    folders = {"base": base, "clip": clip, "adapter": adapter, "tokenizer": tokenizer}
    with quiet("converting"):
        with importing():
            from .convert import convert_checkpoint
        try:
            report = convert_checkpoint(
                source, destination, **folders, guide_tokenizer=guide_tokenizer, dtype=dtype.torch
            )
        except (ValueError, OSError, ImportError) as error:
            raise Failure(Exit.MODEL, sentence(error)) from error
    say(report)


def show_presets() -> None:
    """List the models with random weights, which need no download."""
    with quiet():
        with importing():
            import torch

            from . import presets
            from .modeling_ppllava import PPLlavaForConditionalGeneration
        rows = [("preset", "parameters", "vision tower", "language model", "tokens of 32 frames")]
        for name in presets.NAMES:
            with torch.device("meta"):
                network = PPLlavaForConditionalGeneration(presets.preset_config(name))
            config, vision = network.config, network.config.vision_config
            tower = f"{vision.model_type.removesuffix('_vision_model')}, {vision.image_size} pixels"
            count = f"{sum(parameter.numel() for parameter in network.parameters()):,}"
            tokens = f"{config.visual_pooling.video_tokens(32):,}"
            rows.append((name, count, tower, config.text_config.model_type, tokens))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:{'<><<>'[i]}{width}}" for i, (cell, width) in enumerate(zip(row, widths))))


def _version(asked: bool) -> None:
    if asked:
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "av"))
        print(f"ppllava-kernels {version('ppllava-kernels')} ({packages}, Python {platform.python_version()})")
        raise typer.Exit


def options(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Of ppllava-kernels and what it runs on.")
    ] = False,
) -> None:
    """PPLLaVA: ask videos and images."""


# The program


def _app() -> typer.Typer:
    class Group(typer.core.TyperGroup):
        def main(self, *args, standalone_mode: bool = True, **kwargs) -> Any:
            call = super().main
            sys.exit(run(lambda: call(*args, standalone_mode=False, **kwargs)))

        def invoke(self, context) -> Any:
            try:
                return super().invoke(context)
            # Typer would end with codes of its own.
            except KeyboardInterrupt:
                raise Failure(Exit.INTERRUPTED, "interrupted") from None
            except BrokenPipeError:
                raise Failure(Exit.PIPE, MEANINGS[Exit.PIPE]) from None

    app = typer.Typer(cls=Group, add_completion=False)
    app.callback()(options)
    app.command(epilog=EPILOG)(ask)
    app.command("run", epilog=EPILOG)(run_requests)
    app.command()(convert)
    app.command("presets")(show_presets)
    return app


app = _app()


def main() -> None:
    hush()
    app()


__all__ = ["Exit", "app", "main"]
