"""Charts of kernels.json, how close each variant comes to a copy, and of throughput.json, both models over frames."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from . import report
from .report import COMPILED_ORIGINAL, COMPILED_REFERENCE, ORIGINAL, PEER, PEER_TUNED, PPLLAVA
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
VIDEO_COLOURS = {PPLLAVA: "#1b7837", PEER: "#878787", PEER_TUNED: "#4393c3"}


def fingerprint(path: Path) -> str:
    """Stands in the chart, too, so that one can see whether it shows this file."""
    return f"sha256 of {path.name}: {hashlib.sha256(path.read_bytes()).hexdigest()}"


def draw(path: Path) -> str:
    """Write the chart of `path` beside it; returns the sentence to print."""
    pyplot = _pyplot()
    if pyplot is None:
        return NO_MATPLOTLIB
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
    return _save(pyplot, figure, path)


def draw_throughput(path: Path) -> str:
    """As `draw`: videos per second and time to first token over the number of frames."""
    pyplot = _pyplot()
    if pyplot is None:
        return NO_MATPLOTLIB
    results = report.read(path, "throughput")
    rows = results["rows"]
    if not any(row["status"] == "ok" for row in rows):
        return "left out the chart, there are no rows with times"
    panels = {
        "videos per second (longer is better)": lambda row: row["videos_s"],
        "milliseconds to the first token (shorter is better)": lambda row: row["first_token_ms"]["p50"],
    }
    frames = sorted({row["frames"] for row in rows})
    variants = [name for name in VIDEO_COLOURS if any(row["variant"] == name for row in rows)]
    tokens = {n: dict.fromkeys(f"{row['visual_tokens']:,}" for row in rows if row["frames"] == n) for n in frames}
    ticks = [f"{n} frames\n{' / '.join(tokens[n])}" for n in frames]
    size = 3 + 2 * len(frames) * (0.6 + 0.4 * len(variants)), 4.4
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained")
    bar = 0.86 / len(variants)
    for axis, (title, number) in zip(axes, panels.items()):
        for row in rows:
            x = frames.index(row["frames"]) + (variants.index(row["variant"]) - (len(variants) - 1) / 2) * bar
            if row["status"] != "ok":
                axis.text(
                    x, 0, f" {row['status']}", rotation=90, ha="center", va="bottom", fontsize=8, color="firebrick"
                )
                continue
            value = number(row)
            axis.bar(x, value, 0.92 * bar, color=VIDEO_COLOURS[row["variant"]])
            axis.text(
                x, value, f"{value:.3g}" if value < 1000 else f"{value:,.0f}", ha="center", va="bottom", fontsize=8
            )
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xticks(range(len(frames)), ticks, fontsize=8)
        axis.set_xlim(-0.55, len(frames) - 0.45)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", length=0)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=VIDEO_COLOURS[name]) for name in variants]
    figure.legend(handles, variants, ncols=len(variants), loc="outside upper left", frameon=False, fontsize=9)
    setup = results["protocol"]
    figure.supxlabel(
        f"Below the frames: visual tokens of one video, PPLLaVA / LLaVA-NeXT-Video. Sizes of {setup['preset']} with "
        f"random weights,\n{setup['dtype']}, batch {setup['batch']}, {setup['new_tokens']} new tokens. "
        f"{report.machine_line(results['machine'])}",
        fontsize=8,
    )
    return _save(pyplot, figure, path)


NO_MATPLOTLIB = "left out the chart, matplotlib is not installed"


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot, figure, path: Path) -> str:
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
    print({"throughput": draw_throughput}.get(Path(sys.argv[1]).stem, draw)(Path(sys.argv[1])))
