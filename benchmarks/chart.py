"""A chart of kernels.json: how close each variant comes to a copy."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from . import report
from .report import COMPILED_ORIGINAL, COMPILED_REFERENCE, ORIGINAL
from .shapes import DIRECTIONS

COLOURS = {
    "cuda": "#1b7837",
    "triton": "#5aae61",
    "cpp": "#1b7837",
    COMPILED_REFERENCE: "#4393c3",
    "reference": "#92c5de",
    COMPILED_ORIGINAL: "#878787",
    ORIGINAL: "#bababa",
}


def fingerprint(path: Path) -> str:
    """Stands in the chart, too, so that one can see whether it shows this file."""
    return f"sha256 of {path.name}: {hashlib.sha256(path.read_bytes()).hexdigest()}"


def draw(path: Path) -> str:
    """Write the chart of `path` beside it; returns the sentence to print."""
    try:
        import matplotlib
    except ImportError:
        return "left out the chart, matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = report.read(path, "kernels")
    rows, machine = results["rows"], results["machine"]
    if not rows:
        return "left out the chart, there are no rows"
    ops, groups = (
        list(dict.fromkeys(key)) for key in zip(*((row["op"], (row["shape"], row["dtype"])) for row in rows))
    )
    variants = [name for name in COLOURS if any(row["variant"] == name for row in rows)]
    found = {(row["direction"], row["op"], row["shape"], row["dtype"], row["variant"]): row for row in rows}
    bar = 0.86 / len(variants)
    size = 1 + 4.2 * len(ops), 1.6 + 2 * (0.5 + 0.14 * len(groups) * (len(variants) + 0.8))
    figure, axes = pyplot.subplots(
        2, len(ops), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for line, direction in zip(axes, DIRECTIONS):
        for axis, op in zip(line, ops):
            for g, group in enumerate(groups):
                for v, name in enumerate(variants):
                    row = found.get((direction, op, *group, name))
                    _bar(axis, g + (v - (len(variants) - 1) / 2) * bar, 0.9 * bar, COLOURS[name], row)
            axis.axvline(100, color="black", linestyle="--", linewidth=1)
            axis.set_title(f"{op}, {direction}", loc="left", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(axis="y", length=0, labelsize=8)
    axes[0, 0].set_yticks(range(len(groups)), [f"{shape}\n{dtype}" for shape, dtype in groups])
    axes[0, 0].set_ylim(len(groups) - 0.45, -0.55)
    axes[0, 0].set_xlim(0, 1.13 * max(100, *(row["copy_percent"] or 0 for row in rows)))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in variants]
    names = [name if "(" in name or name == ORIGINAL else f"ppllava_kernels, {name}" for name in variants]
    figure.legend(handles, names, ncols=len(variants), loc="outside upper left", frameon=False, fontsize=9)
    figure.supxlabel(
        f"% of the speed of a copy (dashed) on the same machine in the same run; longer is better\n"
        f"{report.machine_line(machine)}",
        fontsize=9,
    )
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110, metadata={"Source": fingerprint(path)})
    pyplot.close(figure)
    return f"wrote {target}"


def _bar(axis, y: float, height: float, colour: str, row: dict | None) -> None:
    if row is None:
        return
    percent = row["copy_percent"]
    if percent is None:
        axis.text(1, y, row["status"], va="center", fontsize=7, color="firebrick")
        return
    axis.barh(y, percent, height, color=colour)
    axis.text(percent + 1, y, report.show(percent), va="center", fontsize=7)


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])))
