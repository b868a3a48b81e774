"""The same job on a Ray cluster, through Ray Data: every worker has a model, and answers requests in groups."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

import torch

from .compat import EXECUTOR
from .console import Exit, Failure, is_fatal, is_memory, note, quiet, sentence
from .packing import WINDOW, Item, Outcome, windows
from .request import Request
from .running import JobSpec

GROUPS = 4  # for each worker at least, so that none waits long for the others


class RayEngine:
    """An engine of `run_job` with so many workers, on the cluster of RAY_ADDRESS, or one that it starts here."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __call__(self, spec: JobSpec, requests: list[Request], done: set[int]) -> Iterator[Outcome]:
        """The outcomes in the order of groups of requests; those about one source are in one group. A group whose
        worker dies has none."""
        try:
            import ray
            import ray.data
        except ImportError as error:
            remedy = 'in the folder of the sources, pip install --no-build-isolation ".[ray]", or leave it out'
            raise Failure(Exit.USAGE, f"--engine ray needs Ray, which is missing; {remedy}") from error
        rows = list(self._groups(requests, done))
        ours = not ray.is_initialized()
        try:
            if ours:
                start(ray, self.workers)
            with closing(self._answers(ray, spec, rows)) as outcomes:  # before the cluster, or its threads would crash
                yield from outcomes
        except ray.exceptions.RayError as error:
            raise Failure(
                Exit.BUG, f"the Ray cluster failed ({sentence(error, 300)}); run the command again"
            ) from error
        finally:
            if ours:
                ray.shutdown()

    def _answers(self, ray: Any, spec: JobSpec, rows: list[dict[str, Any]]) -> Iterator[Outcome]:
        have = ray.cluster_resources()
        gpu = spec.device.startswith("cuda") or (spec.device == "auto" and have.get("GPU", 0) > 0)
        for name in ("CPU", "GPU") if gpu else ("CPU",):
            if have.get(name, 0) < self.workers:  # Ray would wait for more of them
                raise Failure(
                    Exit.USAGE,
                    f"--workers {self.workers} needs {self.workers} {name}s in the Ray cluster, which has "
                    f"{have.get(name, 0):g}; pass fewer, or add nodes",
                )
        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = -1  # those of dead workers; run_job reports what is missing
        with ray.data.DataContext.current(context):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what actors may be told has no other way yet in Ray 2.60
                answers = ray.data.from_items(rows, override_num_blocks=len(rows)).flat_map(
                    Worker,
                    fn_constructor_args=(spec, os.getcwd()),
                    compute=ray.data.ActorPoolStrategy(size=self.workers, max_tasks_in_flight_per_actor=1),
                    num_cpus=1,
                    num_gpus=1 if gpu else 0,
                    max_restarts=-1,
                    max_task_retries=0,  # or a file that kills its worker would kill the next one, without end
                )
            try:
                for row in answers.iter_rows():
                    kind, value = json.loads(row["json"])
                    if kind == "failure":
                        raise Failure(Exit(value[0]), value[1])
                    if kind == "note":
                        note(value)
                    else:
                        yield Outcome(**value)
            finally:
                executor = getattr(answers, EXECUTOR, None)
                if executor is not None:
                    executor.shutdown(force=True)

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
    """One model on one worker of the cluster. Ray would start one that raises again and again."""

    def __init__(self, spec: JobSpec, folder: str) -> None:
        self.job, self.failure = None, None
        with suppress(OSError):  # on another machine, where paths must be absolute ones
            os.chdir(folder)
        device = spec.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            with quiet():
                self.job = replace(spec, device=device).build()
        except Failure as error:
            self.failure = (int(error.code), str(error))
        except Exception as error:
            code = Exit.MEMORY if is_memory(error) else Exit.BUG
            self.failure = (int(code), f"a worker of Ray cannot start ({type(error).__name__}: {sentence(error)})")

    def __call__(self, row: dict[str, Any]) -> list[dict[str, str]]:
        if self.failure is not None:
            return [{"json": json.dumps(("failure", self.failure))}]
        with quiet(), warnings.catch_warnings(record=True) as said:
            outcomes = self._answer(json.loads(row["places"]), {*json.loads(row["done"])}, json.loads(row["requests"]))
        notes = [("note", str(warning.message)) for warning in said]
        return [{"json": json.dumps(given)} for given in [*notes, *(("outcome", asdict(x)) for x in outcomes)]]

    def _answer(self, places: list[int], done: set[int], given: list[dict[str, Any]]) -> list[Outcome]:
        requests = [Request.of(x) for x in given]
        missing = {n: request for n, request in enumerate(requests) if places[n] not in done}
        outcomes = []
        try:
            for outcome in self.job.run(requests, {*range(len(requests))} - {*missing}):
                del missing[outcome.index]
                outcomes.append(replace(outcome, index=places[outcome.index]))
        except Exception as error:  # so that the other groups are answered
            if is_fatal(error):
                os._exit(70)  # another worker takes its place; this one would fail all groups that are left
            text = f"the worker failed: {sentence(error)}"
            outcomes += [Outcome(places[n], request.id, error=text) for n, request in missing.items()]
        return outcomes


def start(ray: Any, workers: int) -> None:
    """Join the cluster of RAY_ADDRESS, or start one here with a core for each worker and one for reading."""
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        options.update(address="local", num_cpus=workers + 1, include_dashboard=False)
    else:
        _check_address(address)
    try:
        with _silent():
            ray.init(**options)
    except Exception as error:
        raise Failure(
            Exit.USAGE, f"--engine ray cannot start or join a cluster ({sentence(error, 300)}); check RAY_ADDRESS"
        ) from error


def _check_address(address: str) -> None:
    """Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():  # auto, or for Ray to judge
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise Failure(
            Exit.USAGE, f"no Ray cluster answers at RAY_ADDRESS {address!r} ({error}); start one there, or unset it"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Of what Ray writes to stderr only that it fails: an exception says why. PPLLAVA_DEBUG=1 shows all."""
    if os.environ.get("PPLLAVA_DEBUG") == "1":
        yield
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # or each restartable worker is an error of core_worker.cc
    logging.getLogger("ray").setLevel(logging.ERROR)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)  # Ray's C++ says there that it will say nothing
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _plain(request: Request) -> dict[str, Any]:
    """As JSON; the paths are absolute, as workers start in other folders."""
    frames, fps, begin, end = request.source.sampling
    paths = list(request.source.items)
    media = {"video": paths[0]} if request.source.kind == "video" else {"images": paths}
    given = {"id": request.id, "prompt": request.prompt, "frames": frames, "fps": fps, "start": begin, "end": end}
    return {**given, **media, "max_new_tokens": request.max_new_tokens}


__all__ = ["RayEngine"]
