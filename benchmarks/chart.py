"""Charts of kernels.json, a roofline of every variant, of projector.json, and of throughput.json, over frames."""

from __future__ import annotations

import hashlib
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import report, steps_chart, swap_chart, video_chart
from .report import (
    COMPILED_ORIGINAL,
    COMPILED_REFERENCE,
    COMPILED_REORDERED,
    ORIGINAL,
    PEERS,
    PROJECTOR_PEERS,
    REORDERED,
)
from .shapes import DIRECTIONS, PROJECTORS

COLOURS = {
    "cuda": "#1b7837",
    "triton": "#5aae61",
    "cpp": "#1b7837",
    COMPILED_REFERENCE: "#4393c3",
    "reference": "#92c5de",
    COMPILED_ORIGINAL: "#878787",
    ORIGINAL: "#bababa",
    COMPILED_REORDERED: "#d6604d",
    REORDERED: "#f4a582",
}


def fingerprint(path: Path) -> str:
    """Stands in the chart, too, so that one can see whether it shows this file."""
    return f"sha256 of {path.name}: {hashlib.sha256(path.read_bytes()).hexdigest()}"


def picture(path: Path) -> Path:
    """The chart that belongs to a file of results."""
    return path.with_name("roofline.png" if path.stem == "kernels" else f"{path.stem}.png")


def draw_roofline(path: Path) -> str:
    """Write the roofline of `path`, a kernels.json, beside it; returns the sentence to print.

    Every row is a point: its operations per byte, and its operations per second, of which a copy's bytes per second
    allow no more than the roof. A CPU has no absolute axis: there the unit of time is that of a copied byte.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return NO_MATPLOTLIB
    results = report.read(path, "kernels")
    machine, rows = results["machine"], [row for row in results["rows"] if row["copy_percent"]]
    if not rows:
        return "left out the chart, there are no rows with times"
    cuda = machine["type"] == "cuda"
    roof = statistics.median(100 * row["gb_s"] / row["copy_percent"] for row in rows) if cuda else 1.0  # GB/s
    ops, groups = (list(dict.fromkeys(keys)) for keys in zip(*((r["op"], (r["shape"], r["dtype"])) for r in rows)))
    variants = sorted({row["variant"] for row in rows}, key=[*COLOURS].index)
    markers = dict(zip(groups, itertools.cycle("os^Dv<>pP*Xd")))
    figure, axes = pyplot.subplots(
        2, len(ops), figsize=(1.2 + 4.6 * len(ops), 9), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    intensities, heights = zip(*(_point(row, roof) for row in rows))
    left, right = min(intensities) / SPREAD / 1.2, max(intensities) * SPREAD * 1.2
    for line, direction in zip(axes, DIRECTIONS):
        for axis, op in zip(line, ops):
            for percent in (100, 10, 1):
                ends = [percent / 100 * roof * x for x in (left, right)]
                style = {"color": "black", "linewidth": 1.5} if percent == 100 else {"color": "0.8", "linestyle": "--"}
                axis.plot((left, right), ends, zorder=0, **style)
                if axis is line[-1]:
                    name = " copy" if percent == 100 else f" {percent} %"
                    axis.text(right, ends[1], name, va="center", fontsize=8, color=style["color"], clip_on=False)
            _points(axis, [r for r in rows if (r["op"], r["direction"]) == (op, direction)], variants, markers, roof)
            axis.set_title(f"{op}, {direction}", loc="left", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
    axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(heights) / 2.2, max(*heights, right * roof)))
    ticks = [2.0**n for n in range(-4, 8) if left < 2.0**n < right]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    handles = [pyplot.Line2D([], [], linestyle="", marker="o", color=COLOURS[v], label=_label(v)) for v in variants]
    handles += [
        pyplot.Line2D([], [], linestyle="", marker=marker, color="0.4", label=" ".join(group))
        for group, marker in markers.items()
    ]
    if not cuda:
        handles.append(pyplot.Line2D([], [], color="black", linestyle=":", label="sum() of the inputs, the read roof"))
    figure.legend(handles=handles, ncols=min(len(handles), 5), loc="outside upper left", frameon=False, fontsize=9)
    figure.supylabel("GFLOP/s" if cuda else "operations in the time in which a copy moves one byte", fontsize=9)
    untimed = len(results["rows"]) - len(rows)
    figure.supxlabel(
        "operations per byte, each input read once and each output written once. Numbers: % of the speed of a copy on "
        "the same machine in the same run.\nPoints of one dtype stand beside each other along the roof, so that their "
        f"distance to it is exact. {f'{untimed} rows have no times. ' * bool(untimed)}{report.machine_line(machine)}",
        fontsize=8,
    )
    return _save(pyplot, figure, path)


SPREAD = 1.25  # how far, as a factor, the variants of one dtype stand from their operations per byte


def _point(row: dict, roof: float) -> tuple[float, float]:
    """(operations per byte, operations per second in the unit of `roof`)."""
    intensity = row["flops"] / row["bytes"]
    return intensity, intensity * roof * row["copy_percent"] / 100


def _points(axis, rows: Sequence[dict], variants: Sequence[str], markers: dict, roof: float) -> None:
    """The rows of one op and direction."""
    places = [0.0] if len(variants) == 1 else [2 * v / (len(variants) - 1) - 1 for v in range(len(variants))]
    shift = {name: SPREAD**place for name, place in zip(variants, places)}  # along the roof
    columns: dict[tuple[str, bool], list[tuple[float, float, dict]]] = {}
    for row in rows:
        x, y = (z * shift[row["variant"]] for z in _point(row, roof))
        peer = row["variant"] in PEERS
        style = {"alpha": 0.55, "s": 26} if peer else {"s": 46, "edgecolors": "white", "linewidths": 0.5}
        marker = markers[row["shape"], row["dtype"]]
        axis.scatter(x, y, marker=marker, color=COLOURS[row["variant"]], zorder=2 if peer else 3, **style)
        columns.setdefault((row["variant"], row["dtype"] == "fp32"), []).append((y, x, row))
        if row["read_percent"]:
            x, y = _point(row, roof)
            ends = [(x * f, y * f * 100 / row["read_percent"]) for f in (1 / SPREAD, SPREAD)]
            axis.plot(*zip(*ends), color="black", linestyle=":", linewidth=1, zorder=1)
    for column in columns.values():  # its fastest and its slowest shape
        column.sort(key=lambda point: point[2]["copy_percent"])
        x = statistics.geometric_mean(x for _, x, _ in column)
        for (y, _, row), offset, side in ((column[-1], 5, "bottom"), (column[0], -5, "top"))[: len(column)]:
            style = {"fontsize": 7, "color": "0.3" if row["variant"] in PEERS else "black", "zorder": 4}
            place = {"xytext": (0, offset), "textcoords": "offset points", "ha": "center", "va": side}
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.3}
            axis.annotate(report.show(row["copy_percent"]), (x, y), bbox=box, **style, **place)
    for wide in (True, False):
        some = [row for row in rows if (row["dtype"] == "fp32") == wide]
        if some:
            names = ", ".join(dict.fromkeys(row["dtype"] for row in some))
            x = statistics.geometric_mean(_point(row, roof)[0] for row in some)
            axis.text(x, 0.01, names, transform=axis.get_xaxis_transform(), ha="center", fontsize=8, color="0.4")


def draw_projector(path: Path) -> str:
    """As `draw_roofline`: for each case a bar of each variant, its time over that of its matrix products alone."""
    pyplot = _pyplot()
    if pyplot is None:
        return NO_MATPLOTLIB
    results = report.read(path, "projector")
    rows = [row for row in results["rows"] if row["status"] != "ok" or row["products_percent"]]
    if not any(row["status"] == "ok" for row in rows):
        return "left out the chart, there are no rows with times"
    directions: dict[str, dict[tuple[str, str], list[dict]]] = {}
    for row in rows:
        directions.setdefault(row["direction"], {}).setdefault((row["shape"], row["dtype"]), []).append(row)
    names = [*PROJECTORS]
    # A row of axes for up to CASES of one direction.
    panels = [
        (direction, sorted(cases.items(), key=lambda case: names.index(case[0][0]))[n : n + CASES])
        for direction, cases in directions.items()
        for n in range(0, len(cases), CASES)
    ]
    variants = sorted({row["variant"] for row in rows}, key=[*COLOURS].index)
    bar, most = 0.86 / len(variants), max(len(cases) for _, cases in panels)
    size = min(WIDTH, 3 + most * (0.6 + 0.28 * len(variants))), 1.6 + 2.8 * len(panels)
    figure, axes = pyplot.subplots(len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, (direction, cases) in zip(axes[:, 0], panels):
        axis.axhline(1, color="black", linewidth=1)
        for place, (_, some) in enumerate(cases):
            for row in some:
                _bar(axis, place + (variants.index(row["variant"]) - (len(variants) - 1) / 2) * bar, bar, row)
        axis.set_title(direction, loc="left", fontsize=11)
        axis.set_xticks(range(len(cases)), [f"{shape}, {dtype}" for (shape, dtype), _ in cases], fontsize=10)
        axis.set_xlim(-0.55, most - 0.45)  # bars of one width in all
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", length=0)
    figure.supylabel("time over that of the matrix products that nobody avoids (shorter is better)", fontsize=10)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in variants]
    names = [_label(name) for name in variants]
    figure.legend(handles, names, ncols=min(len(names), 4), loc="outside upper left", frameon=False, fontsize=10)
    figure.supxlabel(
        "both: forward and the gradients of features, text and all weights, in one call.\n"
        f"{report.machine_line(results['machine'])}",
        fontsize=9,
    )
    return _save(pyplot, figure, path)


CASES, WIDTH = 4, 14.0  # at most, in a row of axes, and of the figure in inches


def _bar(axis, x: float, width: float, row: dict) -> None:
    if row["status"] != "ok":
        text = row["reason"] if row["reason"] == "out of memory" else row["status"]
        axis.text(x, 1, f" {text}", rotation=90, ha="center", va="bottom", fontsize=9, color="firebrick")
        return
    height = 100 / row["products_percent"]
    axis.bar(x, height, 0.92 * width, color=COLOURS[row["variant"]])
    # Above the line of the products, not on it.
    place = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    axis.annotate(f"{height:.2f}", (x, max(height, 1)), fontsize=9, **place)


def _label(variant: str) -> str:
    return variant if variant in (*PEERS, *PROJECTOR_PEERS) else f"ppllava_kernels, {variant}"


def draw_throughput(path: Path) -> str:
    """As `draw_roofline`: speed and memory over the number of frames, and where the time goes."""
    return _draw(path, "throughput", video_chart.figure)


def draw_steps(path: Path) -> str:
    """As `draw_roofline`: how many times faster each step of the fast path is."""
    return _draw(path, "steps", steps_chart.figure)


def draw_swap(path: Path) -> str:
    """As `draw_roofline`: how many times better compressed models are than those of transformers."""
    return _draw(path, "swap", swap_chart.figure)


def _draw(path: Path, kind: str, figure: Callable) -> str:
    pyplot = _pyplot()
    if pyplot is None:
        return NO_MATPLOTLIB
    results = report.read(path, kind)
    if not any(row["status"] == "ok" for row in results["rows"]):
        return "left out the chart, there are no rows with times"
    return _save(pyplot, figure(pyplot, results), path)


NO_MATPLOTLIB = "left out the chart, matplotlib is not installed"


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


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot, figure, path: Path) -> str:
    target = picture(path)
    figure.savefig(target, dpi=110, metadata={"Source": fingerprint(path)})
    pyplot.close(figure)
    return f"wrote {target}"


DRAW = {
    "kernels": draw_roofline,
    "throughput": draw_throughput,
    "projector": draw_projector,
    "steps": draw_steps,
    "swap": draw_swap,
}

if __name__ == "__main__":
    print(DRAW[Path(sys.argv[1]).stem](Path(sys.argv[1])))
