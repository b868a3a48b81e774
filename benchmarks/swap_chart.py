"""The chart of swap.json: how many times better than the stock model each compressed one is."""

from __future__ import annotations

from . import report
from .drawing import beside, number
from .swap_report import COLUMNS, GUIDED, MEAN, STOCK

COLOURS = {GUIDED: "#1b7837", MEAN: "#92c5de"}


def figure(pyplot, results: dict):
    """A panel for each family; for a result with at least one compressed row that has times."""
    rows = [row for row in results["rows"] if row["status"] == "ok"]
    families = list(dict.fromkeys(row["family"] for row in rows))
    names = {"visual_tokens": "visual tokens", **{key: head.partition(",")[0] for key, (head, *_) in COLUMNS.items()}}
    size = 1.5 + 4.6 * len(families), 1.6 + 0.5 * len(names)
    picture, axes = pyplot.subplots(1, len(families), figsize=size, squeeze=False, sharey=True, layout="constrained")
    ratios = [ratio for row in rows for ratio in row["ratios"].values()]
    least, most = min([0.5, *(0.9 * ratio for ratio in ratios)]), 2 * max([1.0, *ratios])
    for axis, family in zip(axes[0], families):
        counts = {row["variant"]: row["visual_tokens"] for row in rows if row["family"] == family}
        for row in rows:
            if row["family"] != family or row["variant"] == STOCK:
                continue
            shift = 0.19 if row["variant"] == MEAN else -0.19
            for place, name in enumerate(names):
                if (ratio := row["ratios"].get(name)) is not None:
                    axis.barh(place + shift, ratio - 1, 0.36, left=1, color=COLOURS[row["variant"]], zorder=3)
                    beside(axis, f"{ratio:.2f}", (max(ratio, 1), place + shift), (4, 0))
        axis.axvline(1, color="black", linewidth=1, zorder=4)
        axis.set(xscale="log", xlim=(least, most), xlabel="times better (log scale)")
        number(axis, "x")
        tokens = " to ".join(f"{n:,}" for n in dict.fromkeys(counts.values()))
        axis.set_title(f"{family}, {tokens} visual tokens", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", labelleft=True)
    axes[0, 0].set_yticks(range(len(names)), names.values(), fontsize=9)
    axes[0, 0].invert_yaxis()
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour, label=name) for name, colour in COLOURS.items()]
    picture.legend(handles=handles, ncols=2, loc="outside upper left", frameon=False, fontsize=9)
    setup = results["protocol"]
    picture.supxlabel(
        "Against the stock model: fewer tokens, less time, more videos, less memory. plain mean: the same windows "
        "without a guide.\n"
        f"{setup['sizes']}, {setup['dtype']}, {setup['frames']} frames, {setup['new_tokens']} new tokens\n"
        f"{report.machine_line(results['machine'])}",
        fontsize=8,
    )
    return picture


__all__ = ["figure"]
