"""The chart of projector.json: the time of each variant over that of its matrix products alone."""

from __future__ import annotations

from . import report
from .drawing import COLOURS, beside, label, number, order
from .shapes import PROJECTORS

CASES, WIDTH = 4, 14.0  # at most, in a row of axes, and of the picture in inches


def figure(pyplot, results: dict):
    """A group of bars for each case, those of one direction in a row of panels; None without times."""
    rows = [row for row in results["rows"] if row["status"] != "ok" or row["products_percent"]]
    if not any(row["status"] == "ok" for row in rows):
        return None
    directions: dict[str, dict[tuple[str, str], list[dict]]] = {}
    for row in rows:
        directions.setdefault(row["direction"], {}).setdefault((row["shape"], row["dtype"]), []).append(row)
    names = [*PROJECTORS]
    panels = [
        (direction, sorted(cases.items(), key=lambda case: names.index(case[0][0]))[n : n + CASES])
        for direction, cases in directions.items()
        for n in range(0, len(cases), CASES)
    ]
    variants = order([row["variant"] for row in rows])
    bar, most = 0.86 / len(variants), max(len(cases) for _, cases in panels)
    size = max(9.0, min(WIDTH, 3 + most * (0.6 + 0.28 * len(variants)))), 2.0 + 2.9 * len(panels)
    picture, axes = pyplot.subplots(len(panels), figsize=size, squeeze=False, layout="constrained")
    longest = max(100 / row["products_percent"] for row in rows if row["status"] == "ok")
    for axis, (direction, cases) in zip(axes[:, 0], panels):
        axis.axhline(1, color="black", linewidth=1, zorder=4)
        for place, (_, some) in enumerate(cases):
            some = sorted(some, key=lambda row: variants.index(row["variant"]))
            for n, row in enumerate(some):  # side by side, without the place of one that was not run
                _bar(axis, place + (n - (len(some) - 1) / 2) * bar, bar, row)
        axis.set_title(direction, loc="left", fontsize=11)
        axis.set_ylabel("time, 1: that of its\nmatrix products alone", fontsize=9)
        axis.set_xticks(range(len(cases)), [f"{shape}, {dtype}" for (shape, dtype), _ in cases], fontsize=10)
        axis.set(xlim=(-0.55, most - 0.45), ylim=(0, 1.12 * max(longest, 1)))  # bars of one width in all
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", length=0)
        number(axis)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name], label=label(name)) for name in variants]
    picture.legend(handles=handles, ncols=min(len(handles), 3), loc="outside upper left", frameon=False, fontsize=10)
    picture.supxlabel(
        "Shorter is better. 1: the matrix products that no implementation avoids, alone, timed in the same run.\n"
        "original: both layers on all patches, then the pooling. reordered: pooled before the second layer, as ours, "
        "in plain PyTorch.\ncompile(): by torch.compile. both: forward and the gradients of features, text and all "
        f"weights, in one call.\n{report.machine_line(results['machine'])}",
        fontsize=9,
    )
    return picture


def _bar(axis, x: float, width: float, row: dict) -> None:
    if row["status"] != "ok":
        text = row["reason"] if row["reason"] == "out of memory" else row["status"]
        beside(axis, text, (x, 1), (0, 4), rotation=90, fontsize=9, color="firebrick")
        return
    height = 100 / row["products_percent"]
    axis.bar(x, height, 0.92 * width, color=COLOURS[row["variant"]], zorder=3)
    # Above the line of the products, not on it.
    beside(axis, f"{height:.2f}", (x, max(height, 1)), (0, 2), fontsize=9)


__all__ = ["figure"]
