"""Where and with what a benchmark ran: the part of its JSON that makes the numbers mean something."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine_info(device: torch.device | str, command: list[str]) -> dict[str, object]:
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "type": device.type,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(torch.cuda.get_device_properties(device).total_memory / 1e9) if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "transformers": version("transformers"),
        **git_state(),
        "command": shlex.join(command),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def check_device(parser: argparse.ArgumentParser, name: str) -> None:
    """An error of the command line for a device that this machine has not."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        parser.error(f"--device must be one of this machine, got {name!r} ({reason}); try cpu")


def device_slug(machine: dict[str, object]) -> str:
    """Folder of this machine's results: `nvidia-h200`, `cpu-amd-epyc-2-cores`."""
    name = machine["device"] if machine["type"] == "cuda" else f"cpu {machine['device']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def results_folder(machine: dict[str, object]) -> Path:
    return RESULTS / device_slug(machine)


def cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    name = match.group(1) if match else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)| CPU| @.*| \d+-Core Processor", "", name, flags=re.IGNORECASE).strip()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, object]:
    """Commit, and whether files other than results differ from it; None without git."""
    try:
        commit = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changed)}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
