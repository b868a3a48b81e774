"""One case of the kernel benchmark: gate, then time, every variant of an op on one shape in one dtype."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import ppllava_kernels
from ppllava_kernels.backends import BACKENDS

from . import baselines, gate, timing
from .load import Load, watch
from .report import COMPILED_ORIGINAL, COMPILED_REFERENCE, ORIGINAL, PEERS, Measured, Row, set_ratios
from .shapes import DIRECTIONS, DTYPES, OPS, Inputs, Shape, flops, make_inputs, moved_bytes

Function = Callable[..., Tensor]
TIMING = "timing"


@dataclass(frozen=True)
class Case:
    op: str
    shape: Shape
    dtype: str
    directions: tuple[str, ...] = DIRECTIONS

    def __str__(self) -> str:
        only = () if self.directions == DIRECTIONS else self.directions
        return " ".join((self.op, self.shape.name, self.dtype, *only))


@dataclass(frozen=True)
class Contender:
    name: str
    function: Function
    default: bool = False  # what backend=None takes
    original: bool = False  # judged by the rule for peers that round more


def backend_function(case: Case, inputs: Inputs, backend: str) -> Function:
    """The public op, as users call it."""
    op = getattr(ppllava_kernels, case.op)
    window = {} if case.op == "prompt_relevance" else case.shape.window
    return lambda *tensors: op(*tensors, **window, cu_frames=inputs.cu_frames, backend=backend)


def timed_backends(tensors: Sequence[Tensor]) -> list[str]:
    """Those that can run, best first, without Triton's interpreter: CPU tensors reach only that."""
    names = ppllava_kernels.compatible_backends(*tensors)
    return [name for name in names if name != "triton" or tensors[0].device.type != "cpu"]


def contenders(case: Case, inputs: Inputs, backends: Sequence[str] | None) -> list[Contender]:
    able = timed_backends(inputs.of(case.op))
    original, plain = (make(case.op, case.shape) for make in (baselines.original, baselines.plain_reference))
    return [
        *(
            Contender(name, backend_function(case, inputs, name), default=name == able[0])
            for name in (able if backends is None else backends)
        ),
        Contender(ORIGINAL, original, original=True),
        Contender(COMPILED_ORIGINAL, baselines.compiled(original), original=True),
        Contender(COMPILED_REFERENCE, baselines.compiled(plain)),
    ]


class Work:
    """What a Runner runs: one case of the pooling ops."""

    peers = PEERS

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        self.inputs = make_inputs(case.shape, DTYPES[case.dtype], device)
        self.tensors, self.grad = self.inputs.of(case.op), output_grad(case, device)

    def contenders(self, backends: Sequence[str] | None) -> list[Contender]:
        return contenders(self.case, self.inputs, backends)

    def variant(self, direction: str, contender: Contender) -> timing.Variant:
        return variant(direction, contender.name, contender.function, self.tensors, self.grad)

    def row(self, direction: str, contender: Contender) -> Measured:
        return new_row(self.case, direction, contender)

    def judges(self, direction: str) -> Judges:
        return Judges(self.case, direction, self.tensors, self.grad)

    def ceilings(self, direction: str) -> list[tuple[timing.Variant, int]]:
        """What is timed beside the contenders, and how much it does: the bytes that a row counts, too."""
        copy = timing.copy_variant(self.device)
        return [copy, timing.read_variant(self.tensors)] if self.device.type == "cpu" else [copy]

    def compare(self, rows: Sequence[Measured]) -> None:
        set_ratios(rows, self.peers)


class Runner:
    """Runs cases on one device. `announce` hears what is about to run, as (direction, variant or TIMING)."""

    def __init__(
        self,
        device: torch.device | str,
        budget_s: float,
        backends: Sequence[str] | None = None,
        announce: Callable[[str, str], None] = lambda direction, name: None,
        work: Callable[[Case, torch.device], Work] = Work,
    ):
        self.device, self.budget_s, self.backends, self.announce = torch.device(device), budget_s, backends, announce
        self.clock, self.work = timing.clock_for(device), work

    def rows(self, case: Case, crashed: Mapping[tuple[str, str], str] | None = None, done: Sequence[str] = ()):
        """Rows of each direction that is not `done`; what `crashed` knows of is not run again."""
        torch.compiler.reset()  # or its recompile limit turns later cases into eager ones
        work = self.work(case, self.device)
        field = work.contenders(self.backends)
        for direction in case.directions:
            if direction not in done:
                yield self._direction(work, direction, field, crashed or {})
                timing.release(self.device)

    def _direction(
        self, work: Work, direction: str, field: list[Contender], crashed: Mapping[tuple[str, str], str]
    ) -> list[Measured]:
        variants = {c.name: work.variant(direction, c) for c in field}
        rows = {c.name: work.row(direction, c) for c in field}
        for name, row in rows.items():
            if (direction, name) in crashed:
                row.fail(crashed[direction, name])
        field = [c for c in field if (direction, c.name) not in crashed]
        if not field:
            return list(rows.values())
        try:
            judges = work.judges(direction)
        except Exception as error:
            for c in field:
                rows[c.name].fail(f"no float64 reference to compare to: {timing.reason(error)}")
            return list(rows.values())
        for c in field:
            self.announce(direction, c.name)
            judges.judge(c, variants[c.name], rows[c.name])
        del judges
        passed = [variants[name] for name, row in rows.items() if row.status == "ok"]
        if passed:
            self.announce(direction, TIMING)
            self._time(work, direction, passed, rows)
        return list(rows.values())

    def _time(self, work: Work, direction: str, variants: list[timing.Variant], rows: dict[str, Measured]) -> None:
        took = {v.name: self._memory(v, rows[v.name]) for v in variants}
        # Both, as a first call compiles and the profiler takes its time, too.
        slow = {n: s for n, s in took.items() if min(s, rows[n].first_call_s) > timing.SLOW_S}
        timing.release(self.device)
        ceilings = work.ceilings(direction)
        everything = [*variants, *(v for v, _ in ceilings)]
        load = Load()
        with watch(load):
            timings, failed = timing.measure(everything, self.clock, budget_s=self.budget_s, warm=slow)
        rates = {v.name: amount / timings[v.name].p50 for v, amount in ceilings if v.name in timings}
        for v in variants:
            row = rows[v.name]
            row.load = load  # all of them take turns in it
            if v.name in failed:
                row.fail(failed[v.name])
                continue
            row.set_timing(timings[v.name], rates)
            if self.device.type == "cuda" and v.name in BACKENDS:
                row.host_us = 1e6 * timing.host_seconds(v, self.device)
        work.compare(list(rows.values()))

    def _memory(self, v: timing.Variant, row: Measured) -> float:
        """Fill in what the call needs; its seconds, which nobody reports."""
        start = time.perf_counter()
        try:
            row.extra_bytes = timing.peak_extra_bytes(v, self.device)
        except Exception as error:
            row.reason = f"memory not measured: {timing.reason(error)}"
            return 0.0
        return time.perf_counter() - start


class Judges:
    """The exact result of one case, and the errors that nobody can be blamed for."""

    def __init__(self, case: Case, direction: str, tensors: Sequence[Tensor], grad: Tensor):
        self.op, self.direction, self.tensors, self.grad = case.op, direction, tensors, grad
        plain, original = baselines.plain_reference(case.op, case.shape), baselines.original(case.op, case.shape)
        exactly = [x.double() for x in tensors]
        self.exact = self._results(plain, exactly)
        self.runs = gate.runs(max(x.numel() for x in tensors))
        moved = [
            gate.relative_errors(self._results(plain, [gate.nudged(x, seed) for x in tensors]), self.exact)
            for seed in range(self.runs)
        ]
        self.dtypes, self.unavoidable = self._unavoidable(plain, moved)
        self.unable: str | None = None
        try:
            # The original rounds more. It must be the same function in float64, then no worse than it is in eager.
            self.same = gate.same_function(self._results(original, exactly), self.exact)
            self.original_dtypes, self.original_unavoidable = self._unavoidable(original, moved)
        except Exception as error:
            self.unable = timing.reason(error)

    def _results(self, function: Function, tensors: Sequence[Tensor], grad: Tensor | None = None) -> list[Tensor]:
        return results(variant(self.direction, "", function, tensors, self.grad if grad is None else grad))

    def _unavoidable(self, function: Function, errors: Sequence[list[float]]) -> tuple[list[torch.dtype], list[float]]:
        """The dtypes of eager PyTorch's results, and the largest error of each, beside `errors`."""
        errors = list(errors)
        for seed in range(self.runs):
            eager = self._shuffled(function, seed)
            errors.append(gate.relative_errors(eager, self.exact))
        return [x.dtype for x in eager], [max(each) for each in zip(*errors)]

    def _shuffled(self, function: Function, seed: int) -> list[Tensor]:
        """Results with the channels, and so the sums over them, in another order; the first order is their own."""
        generator = torch.Generator().manual_seed(seed)
        orders = {}
        for name, x in zip(OPS[self.op], self.tensors):
            size = x.shape[-1]
            if name != "weights" and size not in orders:
                orders[size] = (torch.randperm(size, generator=generator) if seed else torch.arange(size)).to(x.device)

        def shuffle(name: str, x: Tensor, back: bool = False) -> Tensor:
            if name in ("weights", "prompt_relevance"):  # no channels
                return x
            order = orders[x.shape[-1]]
            return x[..., order.argsort() if back else order]

        names = OPS[self.op]
        tensors = [shuffle(name, x) for name, x in zip(names, self.tensors)]
        shuffled = self._results(function, tensors, shuffle(self.op, self.grad))
        outputs = (self.op,) if self.direction == "forward" else names
        return [shuffle(name, x, back=True) for name, x in zip(outputs, shuffled)]

    def judge(self, contender: Contender, v: timing.Variant, row: Measured) -> None:
        """The first call of `v`, and what to say of its result."""
        if contender.original and self.unable:
            row.fail(self.unable)
            return
        try:
            actual, row.first_call_s = timing.first_call(lambda: results(v), self.exact[0].device)
        except Exception as error:
            row.fail(timing.reason(error))
            return
        unavoidable = self.original_unavoidable if contender.original else self.unavoidable
        dtypes = self.original_dtypes if contender.original else self.dtypes
        slack = gate.PEER_SLACK if contender.name not in BACKENDS else 0.0
        verdict = gate.judge(gate.relative_errors(actual, self.exact), unavoidable, dtypes, slack)
        row.error, row.limit = verdict.error, verdict.limit
        if contender.original and not self.same.passed:
            row.wrong(f"another function than the reference: {self.same}")
        elif not verdict.passed:
            row.wrong(str(verdict))


def new_row(case: Case, direction: str, contender: Contender) -> Row:
    return Row(
        op=case.op,
        shape=case.shape.name,
        dtype=case.dtype,
        direction=direction,
        variant=contender.name,
        default=contender.default,
        bytes=moved_bytes(case.op, case.shape, DTYPES[case.dtype], direction),
        flops=flops(case.op, case.shape, direction),
    )


def output_grad(case: Case, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    grad = torch.randn(case.shape.output_shape(case.op), generator=generator, device=device)
    return grad.to(DTYPES[case.dtype])


def variant(direction: str, name: str, function: Function, tensors: Sequence[Tensor], grad: Tensor) -> timing.Variant:
    """Forward as in inference; backward with the forward that it belongs to as preparation."""
    if direction == "forward":
        return timing.Variant(name, lambda _: _no_grad(function, tensors))
    leaves = [x.detach().requires_grad_() for x in tensors]

    def forward() -> tuple[Tensor, Tensor]:
        output = function(*leaves)
        return output, grad.to(output.dtype)

    return timing.Variant(name, lambda prepared: torch.autograd.grad(prepared[0], leaves, prepared[1]), forward)


def _no_grad(function: Function, tensors: Sequence[Tensor]) -> tuple[Tensor]:
    with torch.no_grad():
        return (function(*tensors),)


def results(v: timing.Variant) -> list[Tensor]:
    return list(v.run(v.prepare()))
