"""What `pytest benchmarks` and `make regress` run: cases of the registry, each with its inputs, gate and clock.

Inputs, contenders and gate are those of `python -m benchmarks.kernels` and `python -m benchmarks.projector`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ppllava_kernels.backends import BACKENDS, PROJECTOR

from . import timing
from .report import PEERS, PROJECTOR_PEERS, Measured
from .runner import Case, Contender, Judges, Work
from .shapes import BOTH, DIRECTIONS, LONG, OPS, PROJECT, PROJECTORS, SHAPES

MAIN_SHAPES = ("vicuna7b_video", "vicuna7b_32frames")  # on a GPU in every dtype, others in bf16
MAX_ROUNDS = 100
# Elements of the values, or of the projector's features times its outputs: on a CPU more take over some seconds each,
# most of them for the exact result in float64.
MOST_ELEMENTS, MOST_PRODUCTS = 3_000_000, 5e9


def backends(device: torch.device | str, op: str) -> list[str]:
    """Those that can run here, best first, without Triton's interpreter on a CPU."""
    device = torch.device(device)
    names = PROJECTOR if op == PROJECT else BACKENDS
    able = [name for name in names if BACKENDS[name].why_not(torch.empty(1, device=device)) is None]
    return [name for name in able if name != "triton" or device.type != "cpu"]


def cases(device: torch.device | str) -> Iterator[Case]:
    """Every op on every shape of its registry, in the dtypes that matter on this device."""
    cuda = torch.device(device).type == "cuda"
    for op in (*OPS, PROJECT):
        for name, shape in (PROJECTORS if op == PROJECT else SHAPES).items():
            dtypes = ("fp32", "bf16")
            if cuda:
                dtypes = ("bf16", "fp32", "fp16") if name in MAIN_SHAPES else ("bf16",)
            directions = DIRECTIONS
            if op == PROJECT:  # all gradients of the longest clips need more memory than there is
                directions = ("forward",) if shape.frames[0] in LONG else ("forward", BOTH)
            for dtype in dtypes:
                yield Case(op, shape, dtype, directions)


def peers(case: Case) -> Sequence[str]:
    return PROJECTOR_PEERS if case.op == PROJECT else PEERS


def leaves_frames_over(case: Case) -> bool:
    """Whether some frames lie in no window."""
    shape = case.shape
    return shape.kernel_size is not None and any(n % shape.kernel_size[0] for n in shape.frames)


def takes_long(case: Case, device: torch.device | str, variant: str | None = None) -> bool:
    """Whether gate and timing, or for a tiny shape the compilation, take over some seconds; on a CPU alone."""
    if torch.device(device).type != "cpu":
        return False
    if case.shape.name.startswith("tiny_"):
        return variant is not None and variant.startswith("compile")
    if case.op == PROJECT:
        return case.shape.project_flops("forward", original=True) > MOST_PRODUCTS
    return case.shape.tokens * case.shape.channels > MOST_ELEMENTS


class Stage:
    """One case at a time: its inputs, its contenders, and the exact result of one direction."""

    def __init__(self, device: torch.device | str):
        self.device, self.clock = torch.device(device), timing.clock_for(device)
        self.case: Case | None = None
        self.direction: str | None = None
        self.judges: Judges | None = None

    def enter(self, case: Case) -> None:
        """Make its inputs, unless they are there; those of the case before are freed."""
        if case == self.case:
            return
        if self.case is not None:
            self.work = self.judges = None
            self.contenders = {}
            torch.compiler.reset()  # or its recompile limit turns later cases into eager ones
            timing.release(self.device)
        self.work, self.case, self.direction = self._work(case), case, None
        self.contenders = {c.name: c for c in self.work.contenders(backends(self.device, case.op))}

    def _work(self, case: Case) -> Work:
        if case.op != PROJECT:
            return Work(case, self.device)
        from .projector_runner import ProjectorWork  # imports the model, which takes seconds

        return ProjectorWork(case, self.device)

    def variant(self, direction: str, name: str) -> timing.Variant:
        return self.work.variant(direction, self.contenders[name])

    def check(self, direction: str, name: str) -> Measured:
        """The first call of a contender, judged by the gate: a row whose status is "ok", or says why not."""
        if self.judges is None or direction != self.direction:
            self.judges = None
            self.judges, self.direction = self.work.judges(direction), direction
        contender = self.contenders[name]
        row = self.work.row(direction, contender)
        self.judges.judge(contender, self.variant(direction, name), row)
        return row

    def unable(self, contender: Contender) -> bool:
        """Whether the original itself has no such windows: a row without times that is nobody's fault."""
        return contender.original and self.judges is not None and self.judges.unable is not None

    def seconds(self, variant: timing.Variant) -> float:
        """Of one call, with cold caches; its preparation is not counted. On a GPU between two events."""
        sample = self.clock.sample(variant)
        self.clock.wait()
        return sample()
