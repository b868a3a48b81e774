"""The chart of fp8.json: how far fp8 is from bfloat16 beside how far that is from float32, and on a GPU the times."""

from __future__ import annotations

from . import report
from .drawing import beside, number
from .fp8_report import AGAINST, PARTS

COLOURS = {
    "fp8 against bf16": "#1b7837",
    "bf16 against float32": "#6baed6",
    "fp8": "#00441b",
    "bf16": "#2171b5",
    "compile(fp8)": "#a6c832",
    "compile(bf16)": "#54278f",
}
TITLES = {
    "visual_error": ("visual tokens, |difference| / |value|", "%", 100),
    "logits_error": ("logits after the prompt, |difference| / |value|", "%", 100),
    "kl": ("KL divergence of the next token", "0.001 nats", 1000),
    "equal_tokens": ("positions with the same most likely token", "%", 100),
}
Panel = tuple[str, str, dict[str, dict[int, float]]]  # title, unit, series -> frames -> number


def figure(pyplot, results: dict):
    """A panel for each kind of error, and for each part that was timed; None without numbers."""
    panels, frames = _panels([row for row in results["rows"] if row["status"] == "ok"])
    if not panels:
        return None
    lines = -(-len(panels) // 2)
    picture, axes = pyplot.subplots(lines, 2, figsize=(11, 1.6 + 2.4 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, unit, series) in zip(axes.flat, panels):
        width = 0.8 / len(series)
        for n, (name, numbers) in enumerate(series.items()):
            for count, y in numbers.items():
                x = frames.index(count) + (n - (len(series) - 1) / 2) * width
                axis.bar(x, y, 0.92 * width, color=COLOURS[name], zorder=3)
                beside(axis, report.show(y) if y >= 0.001 else f"{y:.0e}", (x, y), (0, 2))
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylabel(unit, fontsize=9)
        axis.set_ylim(0, 1.18 * max(y for numbers in series.values() for y in numbers.values()) or 1)
        axis.set_xlim(-0.6, len(frames) - 0.4)
        axis.set_xticks(range(len(frames)), [f"{count:,} frames" for count in frames], fontsize=9)
        axis.tick_params(axis="x", length=0)
        axis.spines[["top", "right"]].set_visible(False)
        number(axis)
    names = list(dict.fromkeys(name for _, _, series in panels for name in series))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name], label=name) for name in names]
    picture.legend(handles=handles, ncols=len(handles), loc="outside upper left", frameon=False, fontsize=9)
    setup = results["protocol"]
    picture.supxlabel(
        f"Means of {setup['clips']} clips with {len(setup['questions'])} questions each; {setup['model']}. Lower is "
        "better, but of the same tokens more.\n"
        f"{'fp8 is emulated here, so nothing is timed. ' * setup['emulated']}{report.machine_line(results['machine'])}",
        fontsize=8,
    )
    return picture


def _panels(rows: list[dict]) -> tuple[list[Panel], list[int]]:
    panels = []
    for key, (title, unit, factor) in TITLES.items():
        series = {
            AGAINST[name]: {row["frames"]: factor * row["errors"][name][key]["mean"] for row in rows}
            for name in AGAINST
        }
        panels.append((title, unit, series))
    for part, name in PARTS.items():
        series = {}
        for row in rows:
            for variant, taken in row["ms"].get(part, {}).items():
                series.setdefault(variant, {})[row["frames"]] = taken["p50"]
        if series:
            panels.append((f"{name} (lower is better)", "ms", series))
    return (panels if rows else []), [row["frames"] for row in rows]


__all__ = ["figure"]
