"""The chart of steps.json: how many times faster than the plain way, step by step."""

from __future__ import annotations

from . import report
from .drawing import beside, number

KEPT, LEFT_OUT = "#1b7837", "#bababa"


def figure(pyplot, results: dict):
    """A bar for each step, all steps above it that are kept included; for a result with at least one that has times."""
    rows = [row for row in results["rows"] if row["status"] == "ok"]
    picture, axis = pyplot.subplots(figsize=(9, 2.0 + 0.42 * len(rows)), layout="constrained")
    whole = 1.0
    for place, row in enumerate(rows):
        reached = whole * row["ratio"]
        axis.barh(place, reached, 0.7, color=KEPT if row["kept"] else LEFT_OUT, zorder=3)
        label = f"{reached:.2f}  (x {row['ratio']:.2f}{'' if row['kept'] else ', not kept'})"
        beside(axis, label, (reached, place), (5, 0), fontsize=9)
        whole = reached if row["kept"] else whole
    axis.axvline(1, color="black", linewidth=1, zorder=4)
    axis.set_yticks(range(len(rows)), [row["step"] for row in rows], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * max(bar.get_width() for bar in axis.patches))
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("times faster than without any of them (longer is better)", loc="left", fontsize=10)
    number(axis, "x")
    names = {KEPT: "kept in the steps below it", LEFT_OUT: "not kept"}
    handles = [
        pyplot.Rectangle((0, 0), 1, 1, color=colour, label=name)
        for colour, name in names.items()
        if any(row["kept"] == (colour == KEPT) for row in rows)
    ]
    picture.legend(handles=handles, ncols=len(handles), loc="outside upper left", frameon=False, fontsize=9)
    setup = results["protocol"]
    picture.supxlabel(
        "In brackets: what the step adds to those above it that are kept.\n"
        f"{setup['preset']}, {setup['dtype']}, {setup['frames']} frames, {setup['new_tokens']} new tokens. "
        f"{report.machine_line(results['machine'])}",
        fontsize=8,
    )
    return picture


__all__ = ["figure"]
