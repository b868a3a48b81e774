"""Fixtures of the tests of benchmarks, which share this machine with other tests."""

import pytest
import torch

from benchmarks import load, report, throughput, video_models, video_sweep
from benchmarks.video_report import OPS_OFF, PEER, PEER_TUNED, PPLLAVA

NEW_TOKENS, TOKENS = 3, 10
MODELS = {PPLLAVA: PPLLAVA, OPS_OFF: PPLLAVA, PEER: PEER, PEER_TUNED: PEER}


@pytest.fixture(autouse=True, scope="module")
def alone():
    """No word of other processes: they do run, and rows would be marked for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "read_ticks", lambda: None)
        yield


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are tiny, and threads that wait for each other on a busy machine take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def short_clip():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_models, "CLIP_FRAMES", 20)
        patch.setattr(video_sweep, "CLIP_FRAMES", 20)
        patch.setattr(video_models, "PERIOD", 20)
        yield


def command(folder, *arguments):
    fixed = {"--preset": "tiny", "--device": "cpu", "--new-tokens": str(NEW_TOKENS), "--out": str(folder)}
    return throughput.main([*(word for pair in fixed.items() for word in pair), *arguments])


def once(folder, *arguments, frames=(4,)):
    return command(folder, "--batch", "1", "--repeats", "1", "--frames", *map(str, frames), *arguments)


def rows_of(folder):
    result = report.read(folder / "throughput.json", "throughput")
    return {
        (row["frames"], row["variant"]): row for row in result["rows"] if row["batch"] == result["rows"][0]["batch"]
    }


def sweep(*arguments, frames=(4, 8, 16)):
    args = throughput.parse(["--preset", "tiny", "--device", "cpu", "--frames", *map(str, frames), *arguments])
    return lambda folder: video_sweep.Sweep(args, folder, {"type": "cpu", "cores": 2})
