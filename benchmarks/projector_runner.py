"""One case of the projector benchmark: what is run, the gate for it, and its ceiling. The Runner is that of the ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ppllava_kernels.backends import BACKENDS, PROJECTOR

from . import gate, projector_baselines, timing
from .baselines import compiled
from .projector_baselines import PART, Peer, original, plain_reference, reordered
from .report import (
    COMPILED_ORIGINAL,
    COMPILED_REORDERED,
    ORIGINAL,
    PROJECTOR_PEERS,
    REORDERED,
    ProjectorRow,
    set_memory,
    set_ratios,
)
from .runner import Case, Contender, Judges, results
from .shapes import BOTH, DTYPES

Tensors = dict[str, Tensor]
# Of so many on a CPU the reference's gradients would take most of the time, and are not timed unless it is named.
SLOW_TOKENS = 4096
FRAMES = 128  # at a time


class ProjectorWork:
    """As runner.Work."""

    peers = PROJECTOR_PEERS

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device, self.shape = case, device, case.shape
        self.tensors = projector_baselines.make_projector(case.shape, DTYPES[case.dtype], device)
        generator = torch.Generator(device).manual_seed(1)
        grad = torch.randn(case.shape.output_shape(case.op), generator=generator, device=device)
        self.grad = grad.to(DTYPES[case.dtype])

    def contenders(self, backends: Sequence[str] | None) -> list[Contender]:
        able = chosen = timed_backends(self.device)
        if self.device.type == "cpu" and BOTH in self.case.directions and self.shape.tokens >= SLOW_TOKENS:
            chosen = [name for name in able if name != "reference"]
        plain = [(ORIGINAL, original(self.shape), True), (REORDERED, reordered(self.shape), False)]
        return [
            *(
                Contender(name, projector_baselines.ours(self.shape, name), default=name == able[0])
                for name in (chosen if backends is None else backends)
            ),
            *(Contender(name, function, original=first) for name, function, first in plain),
            *(
                Contender(name, compiled(function), original=first)
                for name, (_, function, first) in zip((COMPILED_ORIGINAL, COMPILED_REORDERED), plain)
            ),
        ]

    def variant(self, direction: str, contender: Contender) -> timing.Variant:
        return variant(direction, contender.name, contender.function, self.tensors, self.grad)

    def row(self, direction: str, contender: Contender) -> ProjectorRow:
        return ProjectorRow(
            op=self.case.op,
            shape=self.shape.name,
            dtype=self.case.dtype,
            direction=direction,
            variant=contender.name,
            default=contender.default,
            flops=self.shape.project_flops(direction),
            original_flops=self.shape.project_flops(direction, original=True),
        )

    def judges(self, direction: str) -> ProjectorJudges:
        return ProjectorJudges(self, direction)

    def ceilings(self, direction: str) -> list[tuple[timing.Variant, int]]:
        try:
            return [(projector_baselines.products_variant(self.shape, self.tensors, direction), 1)]
        except torch.cuda.OutOfMemoryError:
            return []

    def compare(self, rows: Sequence[ProjectorRow]) -> None:
        set_ratios(rows, self.peers)
        set_memory(rows)


def timed_backends(device: torch.device) -> list[str]:
    """Those that can run, best first for this op, without Triton's interpreter on a CPU."""
    able = [name for name in PROJECTOR if BACKENDS[name].why_not(torch.empty(1, device=device)) is None]
    return [name for name in able if name != "triton" or device.type != "cpu"]


class ProjectorJudges(Judges):
    """Each exact result is computed once: in float64, which is slow on a CPU, most of the run is this."""

    def __init__(self, work: ProjectorWork, direction: str):
        self.shape, self.direction, self.tensors, self.grad = work.shape, direction, work.tensors, work.grad
        exactly = {name: x.double() for name, x in self.tensors.items()}
        self.exact = self._results(plain_reference(self.shape), exactly)
        exactly["features"] = exactly["features"][:, : self.shape.first_windows().frames[0]].clone()
        self.runs = gate.runs(max(self.shape.tokens * self.shape.hidden_channels, gate.LARGE - 1))
        moved = self._moved()
        self.dtypes, self.unavoidable = self._unavoidable(plain_reference(self.shape), moved)
        self.unable: str | None = None
        try:
            self.same = self._same(exactly)
            self.original_dtypes, self.original_unavoidable = self._unavoidable(original(self.shape), moved)
        except Exception as error:
            self.unable = timing.reason(error)

    def _results(self, function: Peer, tensors: Tensors, grad: Tensor | None = None) -> list[Tensor]:
        return results(variant(self.direction, "", function, tensors, self.grad if grad is None else grad))

    def _moved(self) -> list[list[float]]:
        """Errors of exact results for nudged inputs, by the order with fewer products where its memory is there."""
        function = (reordered if self.shape.tokens <= PART else plain_reference)(self.shape)
        errors = []
        for seed in range(self.runs):
            tensors = {name: gate.nudged(x, seed) for name, x in self.tensors.items() if name != "features"}
            # Of an hour of video, noise in float64 would need as much memory as everything else.
            parts = enumerate(self.tensors["features"].split(FRAMES, 1))
            tensors["features"] = torch.cat([gate.nudged(x, (seed << 16) + n) for n, x in parts], 1)
            errors.append(gate.relative_errors(self._results(function, tensors), self.exact))
        return errors

    def _same(self, exactly: Tensors) -> gate.Verdict:
        """Of the original and the reference in float64, on the frames of one window."""
        shape = self.shape.first_windows()
        grad = self.grad[:, : shape.pooled_sizes[0][0]]
        mine, theirs = (self._results(make(shape), exactly, grad) for make in (plain_reference, original))
        return gate.same_function(theirs, mine)

    def _shuffled(self, function: Callable, seed: int) -> list[Tensor]:
        """All channels that products sum over in another order; the first order is their own."""
        generator = torch.Generator().manual_seed(seed)
        sizes = {axis: n for axis, n in self.shape.axis_sizes.items() if axis != "D"}
        orders = {axis: torch.randperm(n, generator=generator) for axis, n in sizes.items()} if seed else {}
        orders = {axis: order.to(self.grad.device) for axis, order in orders.items()}

        def shuffle(name: str, x: Tensor, back: bool = False) -> Tensor:
            for place, axis in enumerate(reversed(self.shape.axes[name]), start=1):
                if axis in orders:
                    x = x.index_select(-place, orders[axis].argsort() if back else orders[axis])
            return x

        shuffled = {name: shuffle(name, x) for name, x in self.tensors.items()}
        pooled, *grads = self._results(function, shuffled)
        return [pooled, *(shuffle(name, x, back=True) for name, x in zip(self.tensors, grads))]


def variant(direction: str, name: str, function: Peer, tensors: Tensors, grad: Tensor) -> timing.Variant:
    """Forward as in inference, or with the gradients of all tensors in one call: [pooled, *gradients]."""
    if direction == "forward":
        return timing.Variant(name, lambda _: _no_grad(function, tensors))
    leaves = {key: x.detach().requires_grad_() for key, x in tensors.items()}

    def both(_: object) -> tuple[Tensor, ...]:
        pooled = function(leaves)
        return pooled.detach(), *torch.autograd.grad(pooled, list(leaves.values()), grad.to(pooled.dtype))

    return timing.Variant(name, both)


def _no_grad(function: Peer, tensors: Tensors) -> tuple[Tensor]:
    with torch.no_grad():
        return (function(tensors),)
