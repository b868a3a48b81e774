"""Which tests one worker of pytest-xdist runs: all of a file that shares an expensive run, else each by itself.

pytest-xdist 3.8 has groups for that (`--dist loadgroup`), but writes them into a private field of pytest that pytest
9.2 does not read: there it leaves each group to all workers, without a word (issue 1386 of pytest-xdist). This is its
hook for schedulers of one's own, which knows files alone.
"""

from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling

# The file, and what its tests have in common.
TOGETHER = {
    "test_benchmarks.py": "one run of the command",
    "test_checkpoints.py": "one model",
    "test_cli_convert.py": "one conversion",
    "test_cuda_compile.py": "compilers",
    "test_cuda_on_host.py": "compilers",
    "test_packaging.py": "one sdist",
    "test_projector_benchmark.py": "one run of the command",
    "test_ray.py": "one cluster",
    "test_run.py": "one killed job",
    "test_run_errors.py": "one job",
    "test_scheduling.py": "itself",
    "test_shim.py": "compilers",
    "test_steps.py": "one run of the command",
    "test_swap_benchmark.py": "one run of the command",
    "test_throughput.py": "runs that are timed",
    "test_throughput_time.py": "runs that are timed",
    "test_triton_compile.py": "compilers",
}
# Of several files, which must not run beside each other.
OF_SEVERAL = {"compilers", "runs that are timed"}


class OneWorkerForAFile(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        """Tests of the same scope go to the same worker, one after the other."""
        file = PurePosixPath(nodeid.partition("::")[0]).name
        common = TOGETHER.get(file)
        return nodeid if common is None else common if common in OF_SEVERAL else file
