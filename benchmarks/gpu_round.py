"""The GPU round: build, test, compute-sanitizer, benchmarks and tables, one step after the other, in under ten minutes.

    python -m benchmarks.gpu_round                # make gpu
    python -m benchmarks.gpu_round --resume       # without the steps that passed before, on the same sources

Needs no network. A step that fails stops none after it. What each did goes to gpu_round.json beside the other results,
as it happens; the exit code is 0 where every step passed, or was skipped for the lack of a tool.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from . import report
from .machine import ROOT, machine_info, results_folder, version
from .rounds import Record, Step, run_round

SOURCES = ("csrc", "ppllava_kernels", "ppllava", "benchmarks", "tests")
SANITIZER = "compute-sanitizer"
# A build without a compiler leaves kernels out and says so, but does not fail.
CAN_RUN = """
import sys, ppllava_kernels as k
reasons = {name: k.why_not(name) for name in k.backends.BACKENDS}
print(*(f"{name}: {reason or 'can run'}" for name, reason in reasons.items()), sep=chr(10))
sys.exit(any(reasons.values()))
"""


def steps(out: Path | None) -> tuple[Step, ...]:
    python, pytest = sys.executable, _without("pytest")
    model = _without("transformers", "av")
    # The model's tests need packages that the kernels do not; of them only those of other video LLMs are for the GPU.
    texts = {path: path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))}
    files = [path.relative_to(ROOT).as_posix() for path in texts if re.search(r"\bplace\b|mark\.gpu", texts[path])]
    others = ["tests/swap/test_swap_objects.py"] if (model or _without("torchvision", "accelerate")) is None else []
    tests = (python, "-m", "pytest", "-m", "gpu", "--tb=short", *files)
    workers = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    # PyTorch's own kernels are left out, and its allocator, in whose blocks a kernel can write past a tensor unseen.
    sanitizer = (SANITIZER, "--error-exitcode", "86", "--report-api-errors", "no")
    sanitizer += ("--kernel-name-exclude", "kns=2at6native")
    small = ("-k", "test_against_reference and bf16 and (leftover or ragged_adaptive or odd_channels)")
    sanitize = {
        "limit_s": 75,
        "least_s": 30,
        "why_not": pytest or (None if shutil.which(SANITIZER) else f"{SANITIZER} is not on the PATH"),
        "refusal": r"Device not supported.*|.*doesn't support.*device.*",
        "environment": (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    }
    # For this GPU alone: an installation compiles for every architecture.
    only_here = ()
    if torch.cuda.is_available():
        only_here = (("PPLLAVA_CUDA_ARCHS", "{}{}".format(*torch.cuda.get_device_capability())),)
    measure = ("--device", "cuda", "--time-limit", "{limit}", *(("--out", str(out.resolve())) if out else ()))
    return (
        Step("build", (python, "setup.py", "build_ext", "--inplace"), 200, always=True, environment=only_here),
        Step("backends", (python, "-c", CAN_RUN), 60, always=True),
        Step("tests", (*tests, *others, *workers), 150, 20, pytest),
        Step("memcheck", (*sanitizer, "--tool", "memcheck", *tests, *small), **sanitize),
        Step("racecheck", (*sanitizer, "--tool", "racecheck", *tests, *small), **sanitize),
        Step("kernels", (python, "-m", "benchmarks.kernels", "--budget", "0.5", *measure), 270, 70),
        Step("projector", (python, "-m", "benchmarks.projector", "--budget", "0.5", *measure), 150, 70),
        Step("throughput", (python, "-m", "benchmarks.throughput", *measure), 200, 90, model),
        Step("steps", (python, "-m", "benchmarks.steps", *measure), 90, 45, model),
        Step("swap", (python, "-m", "benchmarks.swap", *measure), 90, 45, model),
        Step("fp8", (python, "-m", "benchmarks.fp8", *measure), 90, 45, model or _without("torchao")),
        Step("tables", (python, "-m", "benchmarks.table"), 30, 15, always=True),
    )


def _without(*packages: str) -> str | None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            return f"the Python package {package} is not installed"
    if "transformers" in packages and tuple(map(int, re.findall(r"\d+", version("transformers"))[:2])) < (5, 20):
        return f"transformers 5.20 or newer is needed, {version('transformers')} is installed"
    return None


def fingerprint() -> str:
    """Of the sources, with or without git, and of what they ran on."""
    digest = hashlib.sha256(f"{sys.version} {torch.__version__}".encode())
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.is_file()]
    kinds = (".py", ".cpp", ".h", ".cu", ".cuh")
    for path in sorted([ROOT / "setup.py", ROOT / "pyproject.toml", *(p for p in files if p.suffix in kinds)]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def execute(plan: Sequence[Step], path: Path, machine: dict, time_limit: float, resume: bool) -> int:
    """Run the round and print what went wrong; the exit code of the command."""
    out, start, sources, passed = report.console(), time.monotonic(), fingerprint(), {}
    if resume and path.exists():
        earlier = report.read(path, "gpu_round")
        same = earlier["protocol"]["sources"] == sources
        passed = {row["name"]: Record(**row) for row in earlier["rows"] if same and row["status"] == "passed"}

    def save(records: list[Record]) -> None:
        seconds = round(time.monotonic() - start, 1)
        protocol = {"time_limit_s": time_limit, "seconds": seconds, "sources": sources}
        report.write(path, "gpu_round", machine, protocol, [asdict(record) for record in records])

    def tell(line: str) -> None:
        out.print(line, highlight=False, soft_wrap=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the file is written, no process stays
    records = run_round(plan, time_limit, passed, save, tell)
    bad = [record for record in records if record.status not in ("passed", "skipped")]
    for record in bad:
        out.rule(f"{record.name}: {record.status}, {record.reason}")
        out.print(record.tail, highlight=False, markup=False, soft_wrap=True)
    tell(f"wrote {path}, {time.monotonic() - start:.0f} s in all")
    return 1 if bad else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_round", description=__doc__.splitlines()[0])
    parser.add_argument("--time-limit", type=float, default=570, metavar="S", help="of all steps; default: 570")
    parser.add_argument("--resume", action="store_true", help="not again what passed before, on the same sources")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, and torch.cuda.is_available() is False; `make benchmark` measures a CPU")
    words = list(sys.argv[1:] if arguments is None else arguments)
    machine = machine_info("cuda", ["python", "-m", "benchmarks.gpu_round", *words])
    path = (args.out or results_folder(machine)).resolve() / "gpu_round.json"
    return execute(steps(args.out), path, machine, args.time_limit, args.resume)


if __name__ == "__main__":
    sys.exit(main())
