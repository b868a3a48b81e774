"""The same job on a Ray cluster, through Ray Data: every worker has a model, and answers requests in groups."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from .batching import WINDOW, Item, Outcome, windows
from .console import Exit, Failure, sentence
from .request import Request
from .running import JobSpec

GROUPS = 4  # for each worker at least, so that none waits long for the others


class RayEngine:
    """An engine of `run_job` with so many workers, on the cluster of RAY_ADDRESS, or one that it starts here."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __call__(self, spec: JobSpec, requests: list[Request], done: set[int]) -> Iterator[Outcome]:
        """The outcomes in the order of groups of requests; those about one source are in one group."""
        try:
            import ray
        except ImportError as error:
            remedy = "pip install 'ppllava-kernels[ray]', or leave it out"
            raise Failure(Exit.USAGE, f"--engine ray needs Ray, which is missing; {remedy}") from error
        rows = list(self._groups(requests, done))
        ours = not ray.is_initialized()
        if ours:
            start(ray, self.workers)
        try:
            context = ray.data.DataContext.get_current()
            context.execution_options.preserve_order = True
            context.enable_progress_bars = False
            gpu = spec.device.startswith("cuda") or (
                spec.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
            )
            answers = ray.data.from_items(rows, override_num_blocks=len(rows)).flat_map(
                Worker,
                fn_constructor_args=(replace(spec, model=spec.model and os.path.realpath(spec.model)),),
                compute=ray.data.ActorPoolStrategy(size=self.workers),
                num_cpus=1,
                num_gpus=1 if gpu else 0,
            )
            for row in answers.iter_rows():
                yield Outcome(**json.loads(row["outcome"]))
        finally:
            if ours:
                ray.shutdown()

    def _groups(self, requests: list[Request], done: set[int]) -> Iterator[dict[str, Any]]:
        """A row for each group with something to do; alike whatever is done."""
        size = max(1, min(WINDOW, len(requests) // (GROUPS * self.workers)))
        for units in windows([Item(index, request) for index, request in enumerate(requests)], size):
            items = [item for unit in units for item in unit.items]
            places = [item.index for item in items]
            if not done.issuperset(places):
                given = [_plain(item.request) for item in items]
                yield {
                    "places": json.dumps(places),
                    "requests": json.dumps(given),
                    "done": json.dumps(sorted(done & {*places})),
                }


class Worker:
    """One model on one worker of the cluster."""

    def __init__(self, spec: JobSpec) -> None:
        device = spec.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.job = replace(spec, device=device).build()

    def __call__(self, row: dict[str, Any]) -> list[dict[str, str]]:
        places, done = json.loads(row["places"]), {*json.loads(row["done"])}
        requests = [Request.of(given) for given in json.loads(row["requests"])]
        missing = {n: request for n, request in enumerate(requests) if places[n] not in done}
        outcomes = []
        try:
            for outcome in self.job.run(requests, {*range(len(requests))} - {*missing}):
                del missing[outcome.index]
                outcomes.append(replace(outcome, index=places[outcome.index]))
        except Exception as error:  # so that the other groups are answered
            text = f"the worker failed: {sentence(error)}"
            outcomes += [Outcome(places[n], request.id, error=text) for n, request in missing.items()]
        return [{"outcome": json.dumps(asdict(outcome))} for outcome in outcomes]


def start(ray: Any, workers: int) -> None:
    """Join the cluster of RAY_ADDRESS, or start one here with a core for each worker and one for reading."""
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if not os.environ.get("RAY_ADDRESS"):
        options.update(num_cpus=workers + 1, include_dashboard=False)
    ray.init(**options)


def _plain(request: Request) -> dict[str, Any]:
    """As JSON, with absolute paths: workers start in other folders."""
    frames, fps, begin, end = request.source.sampling
    paths = [os.path.abspath(item) for item in request.source.items]
    media = {"video": paths[0]} if request.source.kind == "video" else {"images": paths}
    given = {"id": request.id, "prompt": request.prompt, "frames": frames, "fps": fps, "start": begin, "end": end}
    return {**given, **media, "max_new_tokens": request.max_new_tokens}


__all__ = ["RayEngine"]
