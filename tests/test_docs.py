"""The Python of README and docs runs as it stands, with random weights and small clips."""

import re
from pathlib import Path

import clips
import pytest
import torch
from PIL import Image

from ppllava_kernels import weighted_pool3d

ROOT = Path(__file__).parent.parent
# Whose blocks are parts of one program, run in order as a reader pastes them. Each block of the other pages runs alone.
IN_ORDER = ("README.md", "docs/swap.md")
ELSEWHERE = ("docs/hub.md",)  # tests/hub_smoke.py runs its blocks, where `kernels` is installed


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def programs():
    """A list of blocks for each program of each page."""
    for page in sorted(str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))):
        found = blocks(page)
        if not found or page in ELSEWHERE:
            continue
        for number, program in enumerate([found] if page in IN_ORDER else [[block] for block in found], start=1):
            yield pytest.param(page, program, id=f"{page}-{number}")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder with the files that the pages ask about."""
    folder = tmp_path_factory.mktemp("media")
    for name in ("a.mp4", "hour.mp4"):
        clips.encode(folder / name, 60, fps=10)
    Image.fromarray(clips.draw(3, 80, 60)).save(folder / "c.jpg")
    return folder


def run(page, program):
    namespace = {}
    with torch.compiler.set_stance("force_eager"):  # what is compiled there takes minutes on a CPU
        for block in program:
            exec(compile(block, page, "exec"), namespace)
    return namespace


@pytest.mark.parametrize(("page", "program"), [*programs()])
def test_code_blocks_run(page, program, media, monkeypatch, capsys):
    monkeypatch.chdir(media)
    run(page, program)
    assert "'error'" not in capsys.readouterr().out  # of `ppllava.batch`, which raises none


def test_pages_with_code():
    """So that a page that loses its blocks, or a new one, is seen."""
    found = {page: len(program) for page, program in (param.values for param in programs())}
    assert {"README.md", "docs/batch.md", "docs/fast.md", "docs/fp8.md", "docs/model.md", "docs/swap.md"} <= {*found}
    assert all(blocks(page) for page in ELSEWHERE)
    assert all("exec" not in block for page in found for block in blocks(page))


def test_the_replacement_of_swap_md():
    """With the mean in the place of the guide it is the model that it replaced."""
    page = "docs/swap.md"
    home_grown = re.search(r"class VideoLLM.*?\n\n\n|class VideoLLM.*$", blocks(page)[0], re.DOTALL)[0]
    assert len(home_grown.strip().splitlines()) <= 30
    namespace = run(page, blocks(page)[:2])
    plain = namespace["VideoLLM"]().eval()
    swapped = namespace["PromptGuidedVideoLLM"]().eval()
    swapped.load_state_dict(plain.state_dict())
    swapped.pool = lambda tokens, features, ids: weighted_pool3d(tokens, None, kernel_size=(2, 3, 3))
    inputs = torch.randn(1, 3, 4, 126, 126), torch.randint(0, 1000, (1, 7))
    with torch.no_grad():
        torch.testing.assert_close(swapped(*inputs), plain(*inputs))
