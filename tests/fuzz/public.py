"""Random calls of the public functions: values and gradients against the float64 reference, by the rule of close.py.

A call that is within one rounding of the largest element passes at once; else as many others as the rule names are
computed, and, since one of them can be exact by luck, 64 of each before a call fails. Left out, each with its reason:

- fewer than 4 channels: the cosine of one channel is exactly 1 or -1 in the reference and within an eps of it in a
  kernel, times the scale; a layer norm over two channels gives the same;
- saturated softmaxes, by scales up to 20 and temperatures from 0.02 on: where all shares but one are 0 in float64 a
  gradient is the difference of rounded numbers, and 1e-15 of its terms;
- NaN and infinity: the reference spreads them into gradients that kernels leave finite; tests/test_memory.py and the
  tests of each op say where they must stay.
"""

from __future__ import annotations

import random

import torch
import truth
from cases import DTYPES, LAYOUTS, OPS, Case, make_inputs, make_projector_inputs

from benchmarks import gate

MORE_RUNS = 64


def check(seed: int) -> str:
    """One call; how much it took to judge it."""
    chance = random.Random(seed)
    op, case, dtypes, layout, options = draw(chance)
    make = make_projector_inputs if op.endswith("project") else make_inputs
    tensors = make(case, DTYPES[dtypes], seed)
    if op == "weighted_pool3d" and chance.random() < 0.2:
        tensors["weights"] = None
    what = f"{op} {case} {dtypes} {layout} {options}"
    place = ("cpp", "cpu")
    try:
        if is_close(op, case, tensors, LAYOUTS[layout], options):
            return "within a rounding"
        truth.check(op, case, tensors, place, LAYOUTS[layout], **options)
    except AssertionError:
        usual, truth.RUNS = truth.RUNS, MORE_RUNS
        try:
            truth.check(op, case, tensors, place, LAYOUTS[layout], **options)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error
        finally:
            truth.RUNS = usual
        return f"by {MORE_RUNS} others"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return f"by {truth.RUNS} others"


def is_close(op: str, case: Case, tensors: dict, layout, options: dict) -> bool:
    """Within eps(dtype) of the largest element: so whatever the others are."""
    tensors = {k: x if x is None or x.dim() < 2 else layout(x) for k, x in tensors.items()}
    actual = truth.run(op, case, tensors, "cpp", **options)
    exact = truth.run(op, case, truth.cast(tensors, torch.float64), "reference", **options)
    dtypes = truth.run(op, case, tensors, "reference", **options)
    for name, x in exact.items():
        if actual[name].dtype != dtypes[name].dtype:
            raise AssertionError(f"{name} is {actual[name].dtype} and not {dtypes[name].dtype}")
        if not gate.relative_error(actual[name], x) <= torch.finfo(actual[name].dtype).eps:
            return False
    return True


def draw(chance: random.Random) -> tuple[str, Case, str, str, dict]:
    op = chance.choice(list(OPS))
    frames = [chance.randint(1, 6) for _ in range(chance.randint(1, 4))]
    height, width = chance.randint(1, 7), chance.randint(1, 7)
    ragged = chance.random() < 0.4
    size = (sum(frames), height, width) if ragged else (chance.randint(1, 3), frames[0], height, width)
    shortest = (min(frames) if ragged else frames[0], height, width)
    if chance.random() < 0.4:
        window = dict(output_size=tuple(chance.randint(1, 5) for _ in range(3)))
    else:
        window = dict(kernel_size=tuple(chance.randint(1, min(n, 4)) for n in shortest))
        if chance.random() < 0.5:
            window["stride"] = tuple(chance.randint(1, 4) for _ in range(3))
    channels = tuple(chance.choice((4, 7, 16, 24, 33, 64, 100)) for _ in range(2))
    starts = tuple(sum(frames[:n]) for n in range(len(frames) + 1)) if ragged else None
    case = Case(size, channels, window, starts)
    layouts = [name for name in LAYOUTS if name != "expanded" or not ragged]
    options = {} if op == "prompt_relevance" else dict(temperature=chance.choice((0.02, 0.05, 0.3, 1.0, 10.0)))
    return op, case, chance.choice(list(DTYPES)), chance.choice(layouts), options
