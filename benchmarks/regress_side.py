"""One side of `make regress`: a process whose ppllava_kernels is that of one commit, and which times what it is asked.

It starts in the folder of that commit, so that this is what it imports, and takes `benchmarks` from the checkout of
whoever started it: both sides are timed by the same code. A line of JSON comes in for each item, and one goes out.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ppllava_kernels

from . import timing
from .regress import Item
from .runner import Case
from .shapes import OPS, PROJECT, PROJECTORS, SHAPES
from .stage import Stage, backends

LEAST, MOST, TURN_S = 3, 20, 0.1  # samples of a turn: so many, more of them while they take less than so long


class Bench:
    """Times items on a stage; the case of the last one stays, so that its inputs are made once."""

    def __init__(self, device: str):
        self.stage = Stage(device)
        self.warm: set[Item] = set()

    def answer(self, item: Item, check: bool) -> dict[str, object]:
        """{"seconds": the least of some samples}, or {"failed": why there are none}."""
        try:
            return self._time(item, check)
        except Exception as error:
            return {"failed": timing.reason(error)}

    def _time(self, item: Item, check: bool) -> dict[str, object]:
        if item.backend not in backends(self.stage.device, item.op):
            return {"failed": f"{item.backend} cannot run there"}
        shapes = PROJECTORS if item.op == PROJECT else SHAPES
        self.stage.enter(Case(item.op, shapes[item.shape], item.dtype))
        if check:
            row = self.stage.check(item.direction, item.backend)
            if row.status != "ok":
                return {"failed": f"{row.status}, {row.reason}"}
        variant = self.stage.variant(item.direction, item.backend)
        if item not in self.warm:
            self.stage.seconds(variant)
            self.warm.add(item)
        samples = []
        while len(samples) < LEAST or (len(samples) < MOST and sum(samples) < TURN_S):
            samples.append(self.stage.seconds(variant))
        return {"seconds": min(samples)}


def main(device: str) -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    able = {op: backends(device, op) for op in (*OPS, PROJECT)}
    print(json.dumps({"package": str(Path(ppllava_kernels.__file__).parent), "backends": able}), file=out)
    bench = Bench(device)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(bench.answer(Item(*request["item"]), request["check"])), file=out)


if __name__ == "__main__":
    main(sys.argv[1])
