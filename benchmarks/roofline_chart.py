"""The chart of kernels.json: how close each variant comes to the speed of a copy, which is the roof."""

from __future__ import annotations

from . import report
from .drawing import COLOURS, beside, label, number, order
from .report import PEERS
from .shapes import DIRECTIONS

WIDE = 24  # points side by side; with more a panel takes the whole width


def figure(pyplot, results: dict):
    """A panel for each op and direction, in it the variants of each shape and dtype; None without times."""
    machine, rows = results["machine"], [row for row in results["rows"] if row["copy_percent"]]
    if not rows:
        return None
    ops, groups = (list(dict.fromkeys(keys)) for keys in zip(*((r["op"], (r["shape"], r["dtype"])) for r in rows)))
    variants = order([row["variant"] for row in rows])
    columns = 2 if len(groups) * len(variants) <= WIDE else 1
    panels = [(op, direction) for op in ops for direction in DIRECTIONS]
    lines = -(-len(panels) // columns)
    picture, axes = pyplot.subplots(
        lines, columns, figsize=(13, 1.7 + 2.9 * lines), squeeze=False, sharey=True, layout="constrained"
    )
    percents = [row["copy_percent"] for row in rows]
    limits = min(percents) / 1.7, 1.9 * max(100, *percents)
    for axis, (op, direction) in zip(axes.flat, panels):
        axis.set(yscale="log", ylim=limits, xlim=(-0.5, len(groups) - 0.5))
        axis.axhline(100, color="black", linewidth=1.5, zorder=1)
        for row in rows:
            if (row["op"], row["direction"]) == (op, direction):
                _point(axis, row, groups.index((row["shape"], row["dtype"])), variants)
        axis.set_title(f"{op}, {direction}", loc="left", fontsize=10)
        axis.set_ylabel("% of the speed of a copy", fontsize=9)
        axis.set_xticks(range(len(groups)), [f"{shape}\n{dtype}" for shape, dtype in groups], fontsize=8)
        axis.tick_params(axis="x", length=0)
        axis.tick_params(axis="y", labelsize=8, labelleft=True)
        axis.spines[["top", "right"]].set_visible(False)
        number(axis)
    handles = [pyplot.Line2D([], [], linestyle="", marker="o", color=COLOURS[v], label=label(v)) for v in variants]
    handles.append(pyplot.Line2D([], [], color="black", linewidth=1.5, label="a copy"))
    if any(row["read_percent"] for row in rows):
        handles.append(pyplot.Line2D([], [], color="black", linestyle=":", label="sum() of the inputs: only reads"))
    picture.legend(handles=handles, ncols=len(handles), loc="outside upper left", frameon=False, fontsize=9)
    untimed = len(results["rows"]) - len(rows)
    picture.supxlabel(
        "Bytes per second, each input read once and each output written once, against those of a large copy, timed in "
        "turns in the same run (log scale, higher is better).\ncompile(): by torch.compile. "
        f"{f'{untimed} rows have no times. ' * bool(untimed)}{report.machine_line(machine)}",
        fontsize=8,
    )
    return picture


def _point(axis, row: dict, group: int, variants: list[str]) -> None:
    width = 0.84 / len(variants)
    x, y = group + (variants.index(row["variant"]) - (len(variants) - 1) / 2) * width, row["copy_percent"]
    style = {"s": 30, "marker": "D"} if row["variant"] in PEERS else {"s": 52, "marker": "o"}
    axis.scatter(x, y, color=COLOURS[row["variant"]], zorder=3, **style)
    # Away from the roof, which would cross it.
    beside(axis, report.show(y), (x, y), (0, -6 if 45 < y <= 100 else 6))
    if row["read_percent"]:  # the same for all variants of a group, but for rounding
        roof = 100 * y / row["read_percent"]
        axis.plot((group - 0.45, group + 0.45), (roof, roof), color="black", linestyle=":", linewidth=1, zorder=1)


__all__ = ["figure"]
