"""The command line: `ppllava ask`, `ppllava convert`, `ppllava presets`. Answers go to stdout, all else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import logging as transformers_logging

from . import PPLlavaForConditionalGeneration, presets
from .asking import (
    MAX_NEW_TOKENS,
    Dtype,
    Exit,
    Failure,
    Stream,
    draw_relevance,
    encode,
    fit,
    is_memory,
    kind_of,
    load_model,
    load_processor,
    prompt,
    read,
    room,
    sentence,
    visual_tokens,
)

try:
    import typer
    from typer import Argument, Option
except ModuleNotFoundError:
    typer = None

MEANINGS = {
    Exit.OK: "ok",
    Exit.BUG: "a bug, worth a report",
    Exit.USAGE: "wrong usage",
    Exit.MEDIA: "a file is missing, unreadable, or none of its frames can be decoded",
    Exit.MODEL: "the model cannot be loaded or converted",
    Exit.PROMPT: "the prompt does not fit into the context of the model",
    Exit.MEMORY: "out of memory",
    Exit.INTERRUPTED: "interrupted with Ctrl-C",
    Exit.PIPE: "nobody reads the answer any more",
}
EPILOG = "Exit codes: " + "; ".join(f"{code.value} {meaning}" for code, meaning in MEANINGS.items()) + "."


def ask(
    arguments: Annotated[list[str], Argument(metavar="MEDIA... QUESTION", help="Videos, images; then the question.")],
    model: Annotated[str | None, Option(metavar="PATH", help="Folder of a model.")] = None,
    preset: Annotated[str | None, Option(help="A model with random weights: see `ppllava presets`.")] = None,
    frames: Annotated[int | None, Option(min=1, help="Frames of each video; default: the model's number.")] = None,
    fps: Annotated[float | None, Option(help="Frames a second of each video, instead of --frames.")] = None,
    tokens: Annotated[int | None, Option(min=1, help="At most so many visual tokens for each video.")] = None,
    start: Annotated[float | None, Option(min=0, help="Second where videos start.")] = None,
    end: Annotated[float | None, Option(min=0, help="Second where videos end.")] = None,
    max_new_tokens: Annotated[
        int | None, Option(min=1, help=f"Longest answer; default: {MAX_NEW_TOKENS}, or what the context leaves.")
    ] = None,
    temperature: Annotated[float, Option(min=0, help="Of the sampling; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, Option(min=0, help="Of the sampling.")] = 0,
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
    _check_question(paths, question)
    _check_options(model, preset, frames, fps, start, end)
    place = _device(device)
    kinds = [kind_of(path) for path in paths]
    of_videos = {"frames": frames, "fps": fps, "start": start, "end": end, "tokens": tokens}
    if "video" not in kinds and (given := [name for name, value in of_videos.items() if value is not None]):
        raise Failure(Exit.USAGE, f"--{given[0]} is for videos, got images only; leave it out")
    if relevance is not None:
        _check_relevance(relevance, paths, kinds)
    clock: dict[str, float] = {}
    with _quiet(), _timed(clock, "total"):
        with _timed(clock, "load"):
            config, processor = load_processor(model, preset)
        if relevance is not None and not config.visual_pooling.guided:
            raise Failure(
                Exit.USAGE,
                f"--relevance needs the pooling 'prompt_guided', this model has {config.pooling!r}; leave it out",
            )
        with _timed(clock, "read", f"reading {', '.join(paths)}"):
            count = processor.num_frames if frames is None and fps is None else frames
            sampling = {"num_frames": count, "fps": fps, "start": start, "end": end}
            media = [read(path, kind, **sampling) for path, kind in zip(paths, kinds)]
        if tokens is not None:
            fit(config, processor, tokens, max(len(medium.frames) for medium in media if medium.kind == "video"))
        groups = [[medium] for medium in media] if each else [media]
        inputs = prompt(processor, groups, question)
        options = {"max_new_tokens": room(config, inputs, max_new_tokens), "num_beams": 1, "do_sample": temperature > 0}
        if temperature:
            options["temperature"] = temperature
        with _timed(clock, "load", "loading the model"):
            network = load_model(model, preset, config, place, dtype)
        with torch.inference_mode():
            with _timed(clock, "encode", "looking"):
                features = encode(network, inputs.to(place))
            stream = Stream(processor.tokenizer, echo=not as_json and len(groups) == 1)
            torch.manual_seed(seed)
            began = time.perf_counter()
            with _timed(clock, "generate", None if stream.echo else "answering"):
                network.generate(**inputs, mm_encoder_outputs=features, streamer=stream, **options)
        clock["first_token"] = (stream.first or began) - began
        answers = stream.answers(network.generation_config.eos_token_id)
        if not as_json and len(groups) > 1:
            for path, (text, _) in zip(paths, answers):
                print(f"{path}: {' '.join(text.splitlines())}", flush=True)
        drawn = [] if relevance is None else draw_relevance(relevance, groups, features, processor, question)
    if as_json:
        counts, drawings = iter(visual_tokens(media, features)), iter(drawn)
        prompt_tokens = inputs["attention_mask"].sum(dim=1).tolist()
        for group, length, (text, new_tokens) in zip(groups, prompt_tokens, answers):
            answer = {
                "answer": text,
                "model": preset if model is None else model,
                "media": [{**medium.summary(), "visual_tokens": next(counts)} for medium in group],
                "prompt_tokens": length,
                "new_tokens": new_tokens,
                "timings": {name: round(seconds, 4) for name, seconds in clock.items()},
                "relevance": list(islice(drawings, len(group))),
            }
            print(json.dumps(answer, ensure_ascii=False))
    for path in drawn:
        _note(f"wrote {path}")


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
    from .convert import convert_checkpoint

    folders = {"base": base, "clip": clip, "adapter": adapter, "tokenizer": tokenizer}
    with _quiet(), _status("converting"):
        try:
            report = convert_checkpoint(
                source, destination, **folders, guide_tokenizer=guide_tokenizer, dtype=dtype.torch
            )
        except (ValueError, OSError, ImportError) as error:
            raise Failure(Exit.MODEL, sentence(error)) from error
    print(report)


def show_presets() -> None:
    """List the models with random weights, which need no download."""
    rows = [("preset", "parameters", "vision tower", "language model", "tokens of 32 frames")]
    for name in presets.NAMES:
        with _quiet(), torch.device("meta"):
            network = PPLlavaForConditionalGeneration(presets.preset_config(name))
        config, vision = network.config, network.config.vision_config
        tower = f"{vision.model_type.removesuffix('_vision_model')}, {vision.image_size} pixels"
        count = f"{sum(parameter.numel() for parameter in network.parameters()):,}"
        rows.append((name, count, tower, config.text_config.model_type, f"{config.visual_pooling.video_tokens(32):,}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:{'<><<>'[i]}{width}}" for i, (cell, width) in enumerate(zip(row, widths))))


# What the user gave


def _check_question(paths: list[str], question: str) -> None:
    if not paths or os.path.isfile(question):
        raise Failure(
            Exit.USAGE,
            f"ask needs one or more files and then the question, got {question!r} as the last argument; write for "
            "example: ppllava ask clip.mp4 'What happens?'",
        )
    if not question.strip():
        raise Failure(Exit.USAGE, "QUESTION must ask something, got an empty text; it guides the compression, too")


def _check_options(model, preset, frames, fps, start, end) -> None:
    if (model is None) == (preset is None):
        got = "neither" if model is None else "both"
        raise Failure(
            Exit.USAGE, f"exactly one of --model and --preset must be given, got {got}; --model takes a folder"
        )
    if preset is not None and preset not in presets.NAMES:
        raise Failure(Exit.USAGE, f"--preset must be one of {', '.join(presets.NAMES)}, got {preset!r}")
    if frames is not None and fps is not None:
        raise Failure(Exit.USAGE, f"--frames and --fps exclude each other, got {frames} and {fps:g}; leave one out")
    if fps is not None and not 0 < fps < float("inf"):
        raise Failure(Exit.USAGE, f"--fps must be a positive number of frames a second, got {fps:g}; try 1")
    if start is not None and end is not None and end < start:
        raise Failure(Exit.USAGE, f"--end must not be before --start, got {end:g} and {start:g}; swap them")


def _check_relevance(path: Path, media: list[str], kinds: list[str]) -> None:
    if path.suffix.lower() not in (".png", ".mp4"):
        raise Failure(Exit.USAGE, f"--relevance must end in .png or .mp4, got '{path}'; the ending says what is drawn")
    if not path.parent.is_dir():
        raise Failure(Exit.USAGE, f"--relevance must be in a folder that exists, got '{path}'; make '{path.parent}'")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise Failure(Exit.USAGE, f"--relevance must be a file that can be written, got '{path}'; choose another place")
    if path.suffix.lower() == ".mp4" and "image" in kinds:
        image = media[kinds.index("image")]
        raise Failure(Exit.USAGE, f"--relevance draws images as .png only, got '{path}' for '{image}'; write .png")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise Failure(Exit.USAGE, "--relevance needs matplotlib, which is missing; pip install matplotlib") from None


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:
        if is_memory(error):
            raise
        raise Failure(Exit.USAGE, f"--device must be one of this machine, got {name!r}; try cpu") from error
    return device


# Around the commands


def run(command: Callable[[], Any]) -> int:
    """The exit code of a command; where it failed, one sentence on stderr, with PPLLAVA_DEBUG=1 after the traceback."""
    try:
        code = command()
        sys.stdout.flush()
        return code if isinstance(code, int) else Exit.OK
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("PPLLAVA_DEBUG") == "1":
            traceback.print_exc()
        code, text = _explain(error)
    if code == Exit.PIPE:
        # What is still buffered goes nowhere, or Python would fail once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        _note(text)
    return code


def _explain(error: BaseException) -> tuple[Exit, str]:
    if isinstance(error, Failure):
        return error.code, str(error)
    if is_memory(error):
        remedy = "pass fewer files, --frames or --tokens, --dtype bfloat16, or another --device"
        return Exit.MEMORY, f"out of memory ({sentence(error, 100)}); {remedy}"
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return Exit.INTERRUPTED, "interrupted"
    if isinstance(error, BrokenPipeError):
        return Exit.PIPE, MEANINGS[Exit.PIPE]
    if hasattr(error, "format_message"):  # typer's own
        return Exit.USAGE, f"{error.format_message().rstrip('.')}; --help lists what there is"
    name = f"{type(error).__name__}: {sentence(error)}"
    return Exit.BUG, f"this should not happen, please report it: {name}; PPLLAVA_DEBUG=1 shows where"


def _note(text: str) -> None:
    print(f"ppllava: {text}", file=sys.stderr)


def _status(text: str) -> AbstractContextManager:
    """Says what goes on, where someone watches."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(text)


@contextmanager
def _timed(clock: dict[str, float], name: str, status: str | None = None) -> Iterator[None]:
    began = time.perf_counter()
    with _status(status) if status else nullcontext():
        yield
    clock[name] = clock.get(name, 0.0) + time.perf_counter() - began


@contextmanager
def _quiet() -> Iterator[None]:
    """Of all warnings only those about the user's files and question, as notes."""
    from .video import VideoWarning

    if os.environ.get("PPLLAVA_DEBUG") == "1":
        yield
        return
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=VideoWarning)
            warnings.filterwarnings("default", message="guide_text of")  # one note for all files
            warnings.showwarning = lambda message, *_, **__: _note(str(message))
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


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

    app = typer.Typer(cls=Group, add_completion=False, help="PPLLaVA: ask videos and images.")
    app.command(epilog=EPILOG)(ask)
    app.command()(convert)
    app.command("presets")(show_presets)
    return app


app = None if typer is None else _app()


def main() -> None:
    if app is None:
        _note("the command line needs typer, which is missing; pip install 'ppllava-kernels[cli]'")
        sys.exit(int(Exit.USAGE))
    app()


__all__ = ["Exit", "app", "main"]
