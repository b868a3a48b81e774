"""python -m fuzz {direct,public} [--seed N] [--count N] [--time-limit SECONDS], in tests/

    direct    torch.ops with arguments that may not fit together, on the CPU kernels under AddressSanitizer
    public    the public functions against the float64 reference

Call n of --seed s is the one of seed s + n: `--seed 4711 --count 1` repeats it. Exit code 1 where a call fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
COUNTS = {"direct": 10_000, "public": 20_000}
FOLDER = HERE.parent.parent / "build/fuzz"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=COUNTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int)
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds; then it stops and says so")
    parser.add_argument("--part", nargs=2, type=int, metavar=("FIRST", "STEP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    count = COUNTS[arguments.kind] if arguments.count is None else arguments.count
    if arguments.part:
        return run(arguments.kind, arguments.seed, count, arguments.time_limit, *arguments.part)
    return start(arguments.kind, arguments.seed, count, arguments.time_limit)


def start(kind: str, seed: int, count: int, limit: float) -> int:
    """One process for each core, each with every n-th call."""
    begun = time.monotonic()
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    paths = [str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if kind == "direct":
        from cuda_on_host import build

        environment |= build.environment(build.build_cpu(FOLDER).parent)
        environment["ASAN_OPTIONS"] += ":allocator_may_return_null=1"
        print(f"built in {time.monotonic() - begun:.0f} s", flush=True)
    workers = max(1, min(os.cpu_count() or 1, count // 50))

    def work(first: int) -> int:
        # Half of the processes on the plain instruction set, the others on the best of this machine.
        own = {"ATEN_CPU_CAPABILITY": "default"} if first % 2 else {}
        command = [sys.executable, "-m", "fuzz", kind, f"--seed={seed}", f"--count={count}", f"--time-limit={limit}"]
        return subprocess.run(
            [*command, "--part", str(first), str(workers)], env=environment | own, cwd=HERE.parent
        ).returncode

    with ThreadPoolExecutor(workers) as pool:
        failed = [status for status in pool.map(work, range(workers)) if status]
    print(f"{kind}: {count} calls from seed {seed}, {time.monotonic() - begun:.0f} s", "FAILED" if failed else "passed")
    return 1 if failed else 0


def run(kind: str, seed: int, count: int, limit: float, first: int, step: int) -> int:
    """The calls first, first + step, ... in this process."""
    if kind == "direct":
        from cuda_on_host import build

        build.load(FOLDER)
    import torch

    torch.set_num_threads(1)
    # Uninitialised memory is NaN: a kernel that leaves an element out cannot pass.
    torch.use_deterministic_algorithms(True, warn_only=True)
    if kind == "direct":
        from . import direct as kind_of_call
    else:
        from . import public as kind_of_call
    begun, seen, faults = time.monotonic(), Counter(), 0
    for n in range(first, count, step):
        if time.monotonic() - begun > limit:
            print(f"stopped at call {n} of {count}: the time limit of {limit:.0f} s", flush=True)
            break
        # Where a sanitizer ends the process this is the last line of the file: its seed.
        (FOLDER / f"{kind}.{first}").write_text(f"{seed + n}\n") if kind == "direct" else None
        try:
            seen[kind_of_call.check(seed + n)] += 1
        except AssertionError as error:
            faults += 1
            print(f"seed {seed + n}: {error}", flush=True)
        if n // step % 1000 == 999:
            print(f"{n + 1} of {count}: {dict(seen)}, {faults} faults", flush=True)
    print(f"process {first}: {dict(seen)}, {faults} faults, {time.monotonic() - begun:.0f} s", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
