"""The chart of throughput.json: speed and memory over the number of frames, and where the time goes."""

from __future__ import annotations

import math

from . import report
from .video_report import OPS_OFF, PARTS, PEER, PEER_TUNED, PPLLAVA, VARIANTS, shares

COLOURS = {PPLLAVA: "#1b7837", PEER: "#878787", PEER_TUNED: "#4393c3", OPS_OFF: "#a6dba0"}
MARKERS = {PPLLAVA: "o", PEER: "s", PEER_TUNED: "D", OPS_OFF: "v"}
PART_COLOURS = dict(zip(PARTS, ("#dfc27d", "#bf812d", "#2166ac", "#1b7837", "#b2182b", "#f4a582")))


def figure(pyplot, results: dict):
    """For a result with at least one row that has times."""
    rows, setup = results["rows"], results["protocol"]
    variants = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    frames = sorted({row["frames"] for row in rows})
    size = 13, 8.6
    figure, axes = pyplot.subplot_mosaic(
        [["speed", "first", "memory"], ["parts"] * 3], figsize=size, layout="constrained", height_ratios=(1.15, 1)
    )
    panels = {
        "speed": ("videos per second (higher is better)", lambda row: row["videos_s"]),
        "first": ("seconds to the first token (lower is better)", lambda row: row["first_token_ms"]["p50"] / 1e3),
        "memory": ("GB of memory (lower is better)", lambda row: row["peak_bytes"] and row["peak_bytes"] / 1e9),
    }
    first = {}  # the smallest batch of each variant and number of frames
    for row in sorted(rows, key=lambda row: row["batch"]):
        first.setdefault((row["variant"], row["frames"]), row)
    for key, (title, number) in panels.items():
        _lines(axes[key], title, number, variants, frames, first)
    best = [row for row in rows if row["status"] == "ok" and row is not first[row["variant"], row["frames"]]]
    for row in best:
        axes["speed"].plot(
            row["frames"],
            row["videos_s"],
            marker=MARKERS[row["variant"]],
            color=COLOURS[row["variant"]],
            markerfacecolor="none",
            markersize=9,
            linestyle="",
        )
    _parts(axes["parts"], [first[name, n] for n in frames for name in variants if (name, n) in first], len(variants))
    handles = [
        pyplot.Line2D([], [], color=COLOURS[name], marker=MARKERS[name], label=name, linewidth=1.5) for name in variants
    ]
    if best:
        handles.append(
            pyplot.Line2D([], [], color="0.4", marker="o", markerfacecolor="none", linestyle="", label="best batch")
        )
    figure.legend(handles=handles, ncols=len(handles), loc="outside upper left", frameon=False, fontsize=9)
    parts = [pyplot.Rectangle((0, 0), 1, 1, color=PART_COLOURS[part]) for part in PARTS]
    axes["parts"].legend(
        parts, PARTS.values(), ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=8
    )
    batch = f"batch {setup['batch'] or 1}"
    figure.supxlabel(
        f"Sizes of {setup['preset']} with random weights, {setup['dtype']}, {batch}, {setup['new_tokens']} new tokens, "
        f"at most {setup['tokens']:,} visual tokens of PPLLaVA. A line ends where the next number of frames\ndoes "
        f"not fit into memory or was left out for time. {report.machine_line(results['machine'])}",
        fontsize=8,
    )
    return figure


def _lines(axis, title: str, number, variants: list[str], frames: list[int], first: dict) -> None:
    for name in reversed(variants):  # ours on top
        points = [(n, number(first[name, n])) for n in frames if first.get((name, n), {}).get("status") == "ok"]
        points = [(n, y) for n, y in points if y]
        if not points:
            continue
        known = dict(points)  # a gap where one in between was left out
        axis.plot(
            frames,
            [known.get(n, math.nan) for n in frames],
            color=COLOURS[name],
            marker=MARKERS[name],
            markersize=5,
            linewidth=1.5,
        )
        last = frames.index(points[-1][0])
        if last + 1 < len(frames):
            row = first.get((name, frames[last + 1]))
            if row is not None and row["status"] != "ok":
                place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
                axis.annotate(row["status"], points[-1], fontsize=7, color=COLOURS[name], **place)
    axis.set(xscale="log", yscale="log")
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xticks(frames, [f"{n:,}" for n in frames], fontsize=8)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("frames", fontsize=8)
    axis.set_xlim(frames[0] / 1.3, frames[-1] * 1.6)
    axis.tick_params(axis="y", which="both", labelsize=8)
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axis.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")
    axis.grid(axis="y", color="0.92")
    axis.spines[["top", "right"]].set_visible(False)


def _parts(axis, rows: list[dict], variants: int) -> None:
    """A bar of shares for each row, in groups of one number of frames."""
    ticks, labels, place = [], [], 0.0
    for i, row in enumerate(rows):
        if i and row["frames"] != rows[i - 1]["frames"]:
            place += 0.6
        share, bottom = shares(row), 0.0
        if share is None:
            axis.text(place, 2, row["status"], rotation=90, ha="center", va="bottom", fontsize=7, color="firebrick")
        else:
            for part, percent in share.items():
                axis.bar(place, percent, 0.86, bottom=bottom, color=PART_COLOURS[part])
                bottom += percent
        ticks.append(place)
        labels.append((row["frames"], row["variant"]))
        place += 1
    axis.set_xticks(ticks, [_short(variant) for _, variant in labels], fontsize=7, rotation=90)
    for n in dict.fromkeys(n for n, _ in labels):
        some = [tick for tick, (m, _) in zip(ticks, labels) if m == n]
        axis.text(sum(some) / len(some), 101, f"{n:,} frames", ha="center", va="bottom", fontsize=8)
    axis.set_title("% of the time from the file to the last token\n\n", loc="left", fontsize=10)
    axis.set_ylim(0, 108)
    axis.set_yticks([0, 25, 50, 75, 100])
    axis.set_xlim(-0.7, place - 0.3)
    axis.tick_params(axis="x", length=0)
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _short(variant: str) -> str:
    return {PPLLAVA: "PPLLaVA", OPS_OFF: "ops off", PEER: "peer", PEER_TUNED: "peer, tuned"}[variant]
