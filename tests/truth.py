"""What a backend's values and gradients are compared with: computed once for each case, whatever is compared.

The truth of a case is the reference in float64, and how far a right result may be from it (`close.py`). It does not
depend on a backend, a device or a layout, so all processes of a run share it as a file: its name is a digest of the op,
the case, the options and every bit of the inputs. `conftest.py` makes the folder, which ends with the run.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import AXES, BF16, DTYPES, F32, F64, OPS, RELEVANCE, Case, contiguous, cu_frames_of, make
from close import assert_within

import ppllava_kernels
from benchmarks.gate import nudged, relative_error

RUNS = 8  # of eager PyTorch and of nudged inputs: enough that their largest error is no matter of luck
FOLDER = "PPLLAVA_TEST_TRUTHS"  # set by conftest.py


@dataclass(frozen=True)
class Truth:
    """Of each output and each gradient: the exact tensor, the relative error of right results, the dtype to expect."""

    exact: dict[str, torch.Tensor]
    unavoidable: dict[str, float]
    dtypes: dict[str, torch.dtype]


def run(op: str, case: Case, tensors: dict, backend: str | None = None, directions=None, seed=0, **options) -> dict:
    """Outputs of an op and, for a fixed random loss, the gradients of all its inputs.

    directions: order of the channels of the loss, where the channels of values were reordered.
    seed: where it is not 0 the loss is also scaled for backward and its gradients are scaled back.
    """
    inputs = {name: tensors[name].detach().requires_grad_() for name in OPS[op] if tensors[name] is not None}
    arguments = {name: inputs.get(name) for name in OPS[op]}
    if op != "prompt_relevance":
        options |= case.window
    if op in RELEVANCE:
        options |= dict(return_relevance=True)
    if op == "prompt_guided_project":
        options |= dict(norm_eps=1e-5)
    result = getattr(ppllava_kernels, op)(**arguments, cu_frames=cu_frames_of(case), backend=backend, **options)
    outputs = dict(zip(("output", "relevance"), result if isinstance(result, tuple) else (result,)))
    high = all(out.dtype in (F32, F64) for out in outputs.values())
    factor = 1 + seed / 10 if high else 1  # in low precision the scaled loss would be another one
    loss = 0
    for n, out in enumerate(outputs.values()):
        generator = torch.Generator().manual_seed(n)
        direction = torch.randn(out.shape, generator=generator).to(BF16)  # the same numbers in every dtype
        if directions is not None and op != "prompt_relevance" and n == 0:
            direction = direction[..., directions]
        loss = loss + (out * (factor * direction.to(out))).sum()
    grads = torch.autograd.grad(loss, list(inputs.values()))
    grads = {f"grad of {k}": g if factor == 1 else g.double() / factor for k, g in zip(inputs, grads)}
    return {k: v.detach() for k, v in outputs.items()} | grads


def check(op: str, case: Case, tensors: dict, place: tuple[str, str], layout=contiguous, **options) -> None:
    """Values and gradients of an op on a backend, by the one tolerance rule."""
    backend, device = place
    tensors = {name: x if x is None or x.dim() < 2 else layout(x) for name, x in tensors.items()}
    there = {name: x if x is None else layout_preserving_copy(x, device) for name, x in tensors.items()}
    compare(f"{op} {backend}", run(op, case, there, backend, **options), truth(op, case, tensors, **options))


def compare(name: str, actual: dict[str, torch.Tensor], right: Truth) -> None:
    for key, exact in right.exact.items():
        assert_within(f"{name} {key}", actual[key], exact, right.unavoidable[key], right.dtypes[key])


def check_dtypes(op: str, case: Case, dtypes: str, place: tuple[str, str]) -> None:
    """`check` for named dtypes; on a GPU float64 must be refused, in one sentence, and never computed in less."""
    tensors = make(op, case, DTYPES[dtypes])
    backend = place[0]
    if dtypes != "fp64" or backend == "cpp":
        check(op, case, tensors, place)
        return
    message = rf"^backend='{backend}' cannot run: {backend} computes in float32 and got float64"
    with pytest.raises(ValueError, match=message):
        run(op, case, {name: x.to(place[1]) for name, x in tensors.items()}, backend)


def truth(op: str, case: Case, tensors: dict, **options) -> Truth:
    """`measure`, or what another test of this run has measured for the same numbers."""
    tensors = {name: tensors[name] if tensors[name] is None else tensors[name].contiguous() for name in OPS[op]}
    if FOLDER not in os.environ:  # not in a run of pytest
        return measure(op, case, tensors, **options)
    path = Path(os.environ[FOLDER]) / f"{digest(op, case, tensors, options)}.pt"
    if not path.exists():
        write(path, measure(op, case, tensors, **options))
    return Truth(**torch.load(path, weights_only=True))


def digest(op: str, case: Case, tensors: dict, options: dict) -> str:
    """Of all that a truth depends on, but for the definition itself."""
    said = hashlib.blake2b(repr((op, case, sorted(options.items()))).encode(), digest_size=16)
    for name, x in tensors.items():
        said.update(repr((name, x if x is None else (x.dtype, x.shape))).encode())
        if x is not None:
            said.update(x.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return said.hexdigest()


def write(path: Path, made: Truth) -> None:
    """Whole or not at all: another process may look for it at the same time."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save(vars(made), file)
    os.replace(file.name, path)


def measure(op: str, case: Case, tensors: dict, **options) -> Truth:
    """The reference in float64, and the largest error of results that no kernel can be blamed for (`close.py`)."""
    exact = run(op, case, cast(tensors, F64), "reference", **options)
    eager = eager_runs(op, case, tensors, **options)
    dtypes = {name: x.dtype for name, x in eager[0].items()}
    if tensors[OPS[op][0]].dtype == F64:
        # Nothing is more exact than float64, and `exact` has its error, too: eager's is also float32's, scaled by the
        # two eps, and counted twice.
        single, ratio = cast(tensors, F32), 2 * torch.finfo(F64).eps / torch.finfo(F32).eps
        exact32 = run(op, case, cast(single, F64), "reference", **options)
        eager += [
            {name: exact[name] + ratio * (x.double() - exact32[name]) for name, x in outputs.items()}
            for outputs in eager_runs(op, case, single, **options)
        ]
    moved = [
        run(op, case, {k: x if x is None else nudged(x, seed) for k, x in tensors.items()}, "reference", **options)
        for seed in range(RUNS)
    ]
    others = [*eager, *moved]
    return Truth(exact, {name: max(relative_error(x[name], exact[name]) for x in others) for name in exact}, dtypes)


def eager_runs(op: str, case: Case, tensors: dict, **options) -> list[dict]:
    """The reference on the same inputs with their channels in several orders and the loss in several scales.

    Both change nothing but roundings, so that together they show eager's error without its luck. Matrix products round
    in between, to the dtype, which no order changes: those of the projector get inputs moved by an eps of that dtype,
    each compared with its own exact result.
    """
    results, moves = [], op.endswith("project")
    here = run(op, case, cast(tensors, F64), "reference", **options) if moves else None
    for seed in range(RUNS):
        generator = torch.Generator().manual_seed(seed)
        orders = {
            axis: torch.randperm(n, generator=generator) if seed else torch.arange(n) for axis, n in case.widths.items()
        }
        inputs = tensors
        if moves and seed:
            inputs = {k: x if x is None else moved(x, seed) for k, x in tensors.items()}
        shuffled = {k: x if x is None else reorder(k, x, orders) for k, x in inputs.items()}
        outputs = run(op, case, shuffled, "reference", directions=orders["D"], seed=seed, **options)
        back = {axis: order.argsort() for axis, order in orders.items()}
        values = "weights" if op == "prompt_relevance" else "values"
        names = {k: values if k == "output" else k.removeprefix("grad of ") for k in outputs}
        outputs = {k: reorder(names[k], x, back) for k, x in outputs.items()}
        if inputs is not tensors:
            there = run(op, case, cast(inputs, F64), "reference", **options)
            # In float64, for the difference is what counts; the first run has the dtypes.
            outputs = {k: here[k] + (x.double() - there[k]) for k, x in outputs.items()}
        results.append(outputs)
    return results


def moved(x: torch.Tensor, seed: int) -> torch.Tensor:
    """x with each element moved by at most an eps of its dtype, relatively."""
    noise = torch.rand(x.shape, dtype=F64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (x.double() * (1 + torch.finfo(x.dtype).eps * noise)).to(x.dtype)


def reorder(name: str, x: torch.Tensor, orders: dict[str, torch.Tensor]) -> torch.Tensor:
    """x with its channels in these orders."""
    axes = AXES.get(name, "")
    for n, axis in enumerate(axes, start=x.dim() - len(axes)):
        x = x.index_select(n, orders[axis])
    return x


def cast(tensors: dict, dtype: torch.dtype) -> dict:
    return {name: x if x is None else x.to(dtype) for name, x in tensors.items()}


def layout_preserving_copy(x, device):
    return x if device == "cpu" else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
