"""The chart of throughput.json: speed and memory over the number of frames, and where the time goes."""

from __future__ import annotations

import math

from . import report
from .drawing import beside, number
from .video_report import OPS_OFF, PARTS, PEER, PEER_TUNED, PPLLAVA, VARIANTS, best, shares

COLOURS = {PPLLAVA: "#1b7837", PEER: "#4d4d4d", PEER_TUNED: "#2171b5", OPS_OFF: "#f08a24"}
MARKERS = {PPLLAVA: "o", PEER: "s", PEER_TUNED: "D", OPS_OFF: "v"}
PART_COLOURS = dict(zip(PARTS, ("#fff2b2", "#b8a13b", "#a6cbe3", "#c51b8a", "#9e2a2b", "#f4c2b5")))
# Of each panel its title, the key of the ratios that belong to it, and what of a row it shows.
PANELS = {
    "speed": ("videos per second (higher is better)", "videos_s", lambda row: row["videos_s"]),
    "first": (
        "seconds to the first token (lower is better)",
        "first_token",
        lambda row: best(row["first_token_ms"]) / 1e3,
    ),
    "memory": ("GB of memory (lower is better)", "peak_bytes", lambda row: (row["peak_bytes"] or 0) / 1e9),
}
ABOVE = {"speed": -1, "first": 1, "memory": 1}  # where the peers' lines have room: below or above them
First = dict[tuple[str, int], dict]


def figure(pyplot, results: dict):
    """For a result with at least one row that has times."""
    rows, setup = results["rows"], results["protocol"]
    variants = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    frames = sorted({row["frames"] for row in rows})
    picture, axes = pyplot.subplot_mosaic(
        [[*PANELS], ["parts"] * len(PANELS)], figsize=(13, 9), layout="constrained", height_ratios=(1.25, 1)
    )
    first: First = {}  # the smallest batch of each variant and number of frames
    for row in sorted(rows, key=lambda row: row["batch"]):
        first.setdefault((row["variant"], row["frames"]), row)
    largest = [row for row in rows if row["status"] == "ok" and row is not first[row["variant"], row["frames"]]]
    for row in largest:
        style = {"marker": MARKERS[row["variant"]], "color": COLOURS[row["variant"]], "markersize": 9}
        axes["speed"].plot(row["frames"], row["videos_s"], markerfacecolor="none", linestyle="", **style)
    for key in PANELS:
        _lines(axes[key], key, variants, frames, first)
        _ratios(axes[key], key, frames, first)
    chunks = [n for n in frames if first.get((PPLLAVA, n), {}).get("streamed")]
    if chunks and chunks[0] != frames[0]:
        _from_here(axes["memory"], frames[frames.index(chunks[0]) - 1], chunks[0])
    _parts(axes["parts"], [first[name, n] for n in frames for name in variants if (name, n) in first])
    handles = [
        pyplot.Line2D([], [], color=COLOURS[name], marker=MARKERS[name], label=name, linewidth=1.5) for name in variants
    ]
    if largest:
        hollow = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": "black", "linestyle": ""}
        handles.append(pyplot.Line2D([], [], label="hollow: the batch with the most videos/s", **hollow))
    picture.legend(handles=handles, ncols=len(handles), loc="outside upper left", frameon=False, fontsize=9)
    parts = [pyplot.Rectangle((0, 0), 1, 1, color=PART_COLOURS[part]) for part in PARTS]
    axes["parts"].legend(
        parts, PARTS.values(), ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=8
    )
    batch = f"batch {setup['batch'] or 1}"
    picture.supxlabel(
        f"x 3.6: how many times better PPLLaVA is than {PEER}, than the better one where there are two. The markers "
        "under the bars say which model. A line ends, and a bar is missing,\nwhere so many frames do not fit into "
        f"memory or were left out for time. Sizes of {setup['preset']} with random weights, {setup['dtype']}, {batch}, "
        f"{setup['new_tokens']} new tokens, at most {setup['tokens']:,} visual tokens\nof PPLLaVA. "
        f"{report.machine_line(results['machine'])}",
        fontsize=8,
    )
    return picture


def _lines(axis, key: str, variants: list[str], frames: list[int], first: First) -> None:
    title, _, value = PANELS[key]
    axis.set(xscale="log", yscale="log")
    for name in reversed(variants):  # ours on top
        points = [(n, value(first[name, n])) for n in frames if first.get((name, n), {}).get("status") == "ok"]
        points = [(n, y) for n, y in points if y]
        if not points:
            continue
        known = dict(points)  # a gap where one in between was left out
        style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 5, "linewidth": 1.5}
        axis.plot(frames, [known.get(n, math.nan) for n in frames], zorder=3, **style)
        last = frames.index(points[-1][0])
        if last + 1 < len(frames):
            row = first.get((name, frames[last + 1]))
            if row is not None and row["status"] != "ok":
                # Off the lines that go on: the other peer's on one side, ours close by on the other.
                place = (0, 7 * ABOVE[key]) if name == OPS_OFF and key != "memory" else (7, -3 * ABOVE[key])
                beside(axis, row["status"], points[-1], place, fontsize=7)
    axis.margins(y=0.12)
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel("frames", fontsize=8)
    axis.set_xlim(frames[0] / 2.2, frames[-1] * 1.6)
    axis.tick_params(axis="both", which="both", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    number(axis)
    axis.set_xticks(frames, [f"{n:,}" for n in frames])
    axis.set_xticks([], minor=True)


def _ratios(axis, key: str, frames: list[int], first: First) -> None:
    """How many times better PPLLaVA is, beside the points of the peer that comes closer to it."""
    _, name, value = PANELS[key]
    for n in frames:
        ours = first.get((PPLLAVA, n))
        found = {peer: ours["ratios"].get(peer, {}).get(name) for peer in (PEER, PEER_TUNED)} if ours else {}
        found = {peer: ratio for peer, ratio in found.items() if ratio}
        if found:
            peer = min(found, key=found.get)
            place = n, value(first[peer, n])
            beside(axis, f"x {report.show(found[peer])}", place, (-5, 5 * ABOVE[key]), fontweight="bold")


def _from_here(axis, before: int, after: int) -> None:
    """Why the memory falls there."""
    x = math.sqrt(before * after)
    axis.axvline(x, color="0.4", linestyle=":", linewidth=1, zorder=1)
    words = "PPLLaVA: from here\nframes go through the\ntower in chunks while\nthey are decoded"
    axis.text(x * 1.08, 0.02, words, transform=axis.get_xaxis_transform(), fontsize=7, color="0.15", va="bottom")


def _parts(axis, rows: list[dict]) -> None:
    """A bar of shares for each row that has times, in groups of one number of frames."""
    groups: dict[int, list[tuple[dict, dict[str, float]]]] = {}
    for row in rows:
        if share := shares(row):
            groups.setdefault(row["frames"], []).append((row, share))
    ticks, place = [], 0.0
    for some in groups.values():
        ticks.append(place + (len(some) - 1) / 2)
        for row, share in some:
            bottom = 0.0
            for part, percent in share.items():
                axis.bar(place, percent, 0.86, bottom=bottom, color=PART_COLOURS[part], zorder=3)
                bottom += percent
            style = {"marker": MARKERS[row["variant"]], "color": COLOURS[row["variant"]], "markersize": 6}
            axis.plot(place, -5, clip_on=False, linestyle="", **style)
            place += 1
        place += 0.9
    axis.set_title("where the time goes from the file to the last token\n\n", loc="left", fontsize=10)
    axis.set_ylabel("% of the time", fontsize=9)
    axis.set(ylim=(0, 100), xlim=(-0.9, place - 1))
    number(axis)
    axis.set_xticks(ticks, [f"{n:,}" for n in groups], fontsize=8)
    axis.set_xlabel("frames", fontsize=8)
    axis.tick_params(axis="x", length=0, pad=16)
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


__all__ = ["figure"]
