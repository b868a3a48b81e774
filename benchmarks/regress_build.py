"""The two sides of `make regress`: the files of a commit, or of this checkout, their kernels built, and a process."""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import torch

from .machine import ROOT, version
from .regress import Answer, Item

FOLDER = ROOT / ".venv" / "regress"
# Not those of the side: both are timed by the benchmarks of this checkout.
LEFT_OUT = ("benchmarks", "tests", "docs")
BUILT_FROM = ("csrc", "setup.py")


class ProcessSide:
    """A Side whose rounds are processes that import ppllava_kernels from `folder`."""

    def __init__(self, name: str, folder: Path, device: str):
        self.name, self.folder, self.device = name, folder, device
        self.process: subprocess.Popen | None = None
        self.greeted = False

    def start(self) -> None:
        # In the folder, so that its packages come first; benchmarks/ is not among them.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.regress_side", self.device],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.greeted = False

    def greet(self) -> dict[str, list[str]]:
        """The backends that can run each op there; waits for the imports of the process."""
        hello = self._read()
        if Path(hello["package"]) != self.folder / "ppllava_kernels":
            raise RuntimeError(f"{self.name} must run {self.folder}/ppllava_kernels, but imported {hello['package']}")
        self.greeted = True
        return hello["backends"]

    def time(self, item: Item, check: bool) -> Answer:
        try:
            if not self.greeted:
                self.greet()
            print(json.dumps({"item": item, "check": check}), file=self.process.stdin, flush=True)
            answer = self._read()
        except (BrokenPipeError, EOFError):
            how = f"its process ended with exit code {self.process.wait()}"
            self.stop()
            self.start()
            return Answer(None, how)
        return Answer(answer.get("seconds"), answer.get("failed"))

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def stop(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        if not self.greeted:  # still importing, for nobody
            self.process.kill()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.process = None


def side(commit: str | None, device: str, folder: Path = FOLDER) -> ProcessSide:
    """Of a commit, or of the files of this checkout as they are; its kernels are built unless the same were before."""
    if commit is None:
        name, place = "this checkout", folder / "checkout"
        copy_checkout(place)
    else:
        sha = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}").decode().strip()
        name, place = f"{commit} ({sha[:10]})", folder / sha[:12]
        if not place.exists():
            extract(sha, place)
    build(name, place, device, folder / "built")
    return ProcessSide(name, place.resolve(), device)


def git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if done.returncode:
        reason = done.stderr.decode().strip() or f"it is no commit here; `git {' '.join(arguments)}` does not know it"
        raise ValueError(f"BASE and --head must be commits of this repository: {reason}")
    return done.stdout


PATHS = (".", *(f":(exclude){name}" for name in LEFT_OUT))


def extract(sha: str, place: Path) -> None:
    """The files of a commit, without those that a side does not run."""
    partial = place.with_name(f"{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", sha, "--", *PATHS))) as archive:
        archive.extractall(partial, filter="data")
    partial.rename(place)


def copy_checkout(place: Path) -> None:
    """Tracked and new files of this checkout with their dates, so that objects of the last build stay valid."""
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PATHS).decode().split("\0")
    wanted = {ROOT / name for name in names if name and (ROOT / name).is_file()}
    for source in wanted:
        target = place / source.relative_to(ROOT)
        if not target.exists() or not filecmp.cmp(source, target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    for package in ("csrc", "ppllava_kernels", "ppllava"):  # what was deleted since
        for old in (place / package).rglob("*.*"):
            if old.is_file() and old.suffix not in (".so", ".pyc") and ROOT / old.relative_to(place) not in wanted:
                old.unlink()


def build(name: str, place: Path, device: str, store: Path) -> None:
    """Compile the extension in place, or take that of a side with the same sources."""
    archs = "{}{}".format(*torch.cuda.get_device_capability()) if torch.device(device).type == "cuda" else "none"
    kept = store / fingerprint(place, archs)
    package = place / "ppllava_kernels"
    for old in package.glob("_C*"):
        old.unlink()
    if not kept.exists():
        print(f"compiling the kernels of {name}", flush=True)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=place, env=os.environ | {"PPLLAVA_CUDA_ARCHS": archs}, capture_output=True)
        built = [path for path in package.glob("_C*") if path.suffix != ".missing"]
        if done.returncode or not built:
            lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            raise ValueError(f"the kernels of {name} cannot be built: {lines[-1] if lines else 'no message'}")
        partial = store / f"{kept.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in built:
            shutil.copy2(path, partial)
        partial.rename(kept)
    for path in kept.iterdir():
        shutil.copy2(path, package)


def fingerprint(place: Path, archs: str) -> str:
    """Of all that a build depends on."""
    parts = [archs, platform.python_version(), torch.__version__, version("pybind11") or "", os.environ.get("CXX", "")]
    digest = hashlib.sha256("\n".join(parts).encode())
    for path in sorted(path for name in BUILT_FROM for path in (place / name, *(place / name).rglob("*"))):
        if path.is_file():
            digest.update(path.relative_to(place).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
