"""What all charts share: a colour for each variant, axes that have numbers, and numbers that lines do not cross."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10

from .report import (
    COMPILED_ORIGINAL,
    COMPILED_REFERENCE,
    COMPILED_REORDERED,
    ORIGINAL,
    PEERS,
    PROJECTOR_PEERS,
    REORDERED,
)

# One hue for each function; the compiled one is the darker.
COLOURS = {
    "cuda": "#1b7837",
    "triton": "#a6c832",
    "cpp": "#138a5e",
    COMPILED_REFERENCE: "#08519c",
    "reference": "#6baed6",
    COMPILED_ORIGINAL: "#8c510a",
    ORIGINAL: "#f0a848",
    COMPILED_REORDERED: "#6a3d9a",
    REORDERED: "#c9a6dc",
}
FEWEST, MANY = 3, 9  # labels of an axis


def label(variant: str) -> str:
    """Of a backend or a peer, for a legend."""
    return variant if variant in (*PEERS, *PROJECTOR_PEERS) else f"ppllava_kernels, {variant}"


def order(variants: Sequence[str]) -> list[str]:
    """As the legend has them; what has no colour comes last and gets none."""
    names = [*COLOURS]
    return sorted(set(variants), key=lambda name: names.index(name) if name in names else len(names))


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers from low to high, at least FEWEST of them however short that range is."""
    if log:
        exponents = range(floor(log10(low)) - 1, ceil(log10(high)) + 1)
        for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
            found = [step * 10.0**n for n in exponents for step in steps]
            found = [x for x in found if low <= x <= high]
            if len(found) >= FEWEST + (steps == (1,)):
                return found[:: ceil(len(found) / MANY)]
    size = 10.0 ** floor(log10((high - low) / FEWEST))
    step = next(size * n for n in (5, 2, 1, 0.5) if (high - low) / (size * n) >= FEWEST)
    first = ceil(low / step - 1e-9)
    return [n * step for n in range(first, floor(high / step + 1e-9) + 1)]


def number(axis, which: str = "y") -> None:
    """Numbers on the axis "x" or "y" of a panel, for the limits that it has now and keeps from here on."""
    low, high = sorted(getattr(axis, f"get_{which}lim")())
    log = getattr(axis, f"get_{which}scale")() == "log"
    some = ticks(low, high, log)
    getattr(axis, f"set_{which}lim")(low, high)
    getattr(axis, f"set_{which}ticks")(some, [f"{x:,.10g}" for x in some])
    getattr(axis, f"set_{which}ticks")([], minor=True)
    axis.grid(axis=which, color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)


def beside(axis, text: str, point: tuple[float, float], offset: tuple[float, float], **style) -> None:
    """Text next to a point, so many points away, on white: a line behind it does not run through it."""
    x, y = offset
    sides = {
        "ha": "center" if x == 0 else "left" if x > 0 else "right",
        "va": "center" if y == 0 else "bottom" if y > 0 else "top",
    }
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
    place = {"xytext": offset, "textcoords": "offset points", **sides}
    axis.annotate(text, point, bbox=box, zorder=5, **{"fontsize": 8, "color": "0.15", **place, **style})
