"""Charts of the files of results, each beside its file.

python -m benchmarks.chart benchmarks/results/cpu-amd-epyc-2-cores/kernels.json
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import fp8_chart, projector_chart, report, roofline_chart, steps_chart, swap_chart, video_chart
from .drawing import COLOURS

FIGURES: dict[str, Callable] = {
    "kernels": roofline_chart.figure,
    "throughput": video_chart.figure,
    "projector": projector_chart.figure,
    "steps": steps_chart.figure,
    "swap": swap_chart.figure,
    "fp8": fp8_chart.figure,
}
NO_MATPLOTLIB = "left out the chart, matplotlib is not installed"


def fingerprint(path: Path) -> str:
    """Stands in the chart, too, so that one can see whether it shows this file."""
    return f"sha256 of {path.name}: {hashlib.sha256(path.read_bytes()).hexdigest()}"


def picture(path: Path) -> Path:
    """The chart that belongs to a file of results."""
    return path.with_name("roofline.png" if path.stem == "kernels" else f"{path.stem}.png")


def draw(kind: str, path: Path) -> str:
    """Write the chart of `path`, a file of results of this kind, beside it; returns the sentence to print."""
    try:
        import matplotlib
    except ImportError:
        return NO_MATPLOTLIB
    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = report.read(path, kind)
    timed = any(row["status"] == "ok" for row in results["rows"])
    figure = FIGURES[kind](pyplot, results) if timed else None
    if figure is None:
        return "left out the chart, there are no rows with times"
    target = picture(path)
    figure.savefig(target, dpi=110, metadata={"Source": fingerprint(path)})
    pyplot.close(figure)
    return f"wrote {target}"


DRAW = {kind: partial(draw, kind) for kind in FIGURES}
draw_roofline, draw_throughput, draw_projector, draw_steps, draw_swap, draw_fp8 = DRAW.values()


def refresh(folder: Path) -> None:
    """Draw again where a file of results has no chart, or one of other results: a run that was stopped drew none."""
    for path in sorted(path for name in DRAW for path in folder.glob(f"*/{name}.json")):
        if not picture(path).exists() or _source(picture(path)) != fingerprint(path):
            print(DRAW[path.stem](path))


def _source(chart: Path) -> str | None:
    try:
        from PIL import Image  # comes with matplotlib
    except ImportError:
        return None
    with Image.open(chart) as image:
        return image.info.get("Source")


__all__ = ["COLOURS", "DRAW", "FIGURES", "fingerprint", "picture", "refresh"]

if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(DRAW[Path(name).stem](Path(name)))
