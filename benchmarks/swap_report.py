"""What becomes of the measurements of `ppllava.compress`: rows, the table on the terminal, the markdown. Needs no
torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .report import MARK, Grid, Outcome, doubts_of, show

STOCK, GUIDED, MEAN = "stock", "compressed", "compressed, plain mean"
VARIANTS = (STOCK, GUIDED, MEAN)
# What is compared: its name and unit, what a row has of it, and how much of that is one of the unit.
COLUMNS = {
    "vision": ("vision, ms", "vision_ms", 1),
    "prefill": ("prefill, ms", "prefill_ms", 1),
    "first_token": ("first token, ms", "first_token_ms", 1),
    "videos_s": ("videos/s", "videos_s", 1),
    "peak": ("peak memory, GB", "peak_bytes", 1e9),
    "extra": ("beyond the weights, GB", "extra_bytes", 1e9),
}


@dataclass(kw_only=True)
class SwapRow(Outcome):
    """One variant of a family on one video. Times are of each part the best."""

    family: str
    variant: str
    frames: int
    visual_tokens: int
    text_tokens: int
    weight_bytes: int = 0
    past_context: bool = False  # the prompt is longer than the positions of the language model
    vision_ms: float | None = None  # from pixels to visual tokens, with guide and pooling
    prefill_ms: float | None = None  # the rest up to the first token
    first_token_ms: float | None = None
    token_ms: float | None = None  # each further one
    generate_ms: float | None = None
    samples: int = 0
    videos_s: float | None = None
    peak_bytes: int | None = None  # weights, pixels, and what is held beyond them during `generate`
    extra_bytes: int | None = None  # that without the weights
    ratios: dict[str, float] = field(default_factory=dict)  # of COLUMNS and the tokens: times better than stock
    error: float | None = None
    limit: float | None = None

    def set_memory(self, extra: int) -> None:
        self.extra_bytes, self.peak_bytes = extra, self.weight_bytes + extra

    def head(self) -> str:
        return f"{self.family}, {self.variant}, {self.visual_tokens:,} visual tokens"

    def result(self) -> str:
        return f"first token {show(self.first_token_ms)} ms, {self.videos_s:.3g} videos/s"


def set_ratios(rows: Sequence[SwapRow]) -> None:
    """Against the stock model, among the rows of one family that have times."""
    stock = next((row for row in rows if row.variant == STOCK and row.status == "ok"), None)
    for row in rows if stock else ():
        if row.status != "ok":
            continue
        row.ratios = {"visual_tokens": stock.visual_tokens / row.visual_tokens}
        for name, (_, key, _) in COLUMNS.items():
            mine, other = getattr(row, key), getattr(stock, key)
            if mine and other:
                row.ratios[name] = mine / other if name == "videos_s" else other / mine


def swap_tables(rows: Sequence[SwapRow]) -> list[Grid]:
    """One for each family; in brackets how many times better than stock."""
    shown = ("visual_tokens", "first_token", "videos_s", "peak")
    heads = ["", "visual tokens", *(COLUMNS[name][0] for name in shown[1:])]
    tables: dict[str, list[list[str]]] = {}
    for row in rows:
        cells = [row.status, *["-"] * (len(shown) - 1)]
        if row.status == "ok":
            cells = [_cell(row.as_dict(), name, True) for name in shown]
        tables.setdefault(row.family, []).append([row.variant, *cells])
    return [Grid(f"{family} (x better than stock)", heads, lines) for family, lines in tables.items()]


def swap_markdown(result: dict) -> tuple[list[list[str]], list[str]]:
    """(lines of the table, sentences below it)."""
    machine, setup, rows = result["machine"], result["protocol"], result["rows"]
    cuda = machine["type"] == "cuda"
    heads = [f"{head} (x)" if cuda else f"{head.partition(',')[0]}, x" for head, *_ in COLUMNS.values()]
    lines = [["model", "", "visual tokens (x)", *heads], ["---", "---", *["---:"] * (1 + len(COLUMNS))]]
    for row in rows:
        cells = [row["status"], *["-"] * len(COLUMNS)]
        if row["status"] == "ok":
            cells = [_cell(row, "visual_tokens", True), *(_cell(row, name, cuda) for name in COLUMNS)]
        lines.append([row["family"], row["variant"], *cells])
    kernel = ", ".join(map(str, setup["kernel_size"]))
    long = [f"{row['family']}, {row['variant']}" for row in rows if row["past_context"]]
    note = [
        f"One video of {setup['frames']} frames, from its pixels to the last of {setup['new_tokens']} new tokens; "
        f"{setup['sizes']}, random weights, {setup['dtype']}; windows of ({kernel}). "
        "x: how many times better than stock, below 1 is worse, in turns in one run, after the results were checked. "
        "Vision: from pixels to visual tokens, with the guide and the pooling. Beyond the weights: the pixels, and the "
        "most that `generate` holds.",
        *([f"Longer than the positions of the language model: {'; '.join(long)}."] if long else []),
        *doubts_of(rows, lambda row: f"{row['family']}, {row['variant']}"),
        *(f"{r['family']}, {r['variant']}: {r['status']} ({r['reason']})." for r in rows if r["status"] != "ok"),
    ]
    return lines, note


def _cell(row: dict, name: str, absolute: bool) -> str:
    """What was measured, and in brackets how many times better than stock that is; the latter alone without it."""
    ratio = row["ratios"].get(name)
    times = "-" if ratio is None else f"{ratio:.2f}" if ratio < 9.95 else show(ratio)
    times = "1" if row["variant"] == STOCK and ratio is not None else times
    if name != "visual_tokens" and ratio is not None and row.get("doubts"):
        times += MARK
    if not absolute:
        return times
    if name == "visual_tokens":
        number = f"{row[name]:,}"
    else:
        _, key, unit = COLUMNS[name]
        number = show(None if row[key] is None else row[key] / unit)
    return number if row["variant"] == STOCK else f"{number} ({times})"


__all__ = ["COLUMNS", "GUIDED", "MEAN", "STOCK", "VARIANTS", "SwapRow", "set_ratios", "swap_markdown", "swap_tables"]
