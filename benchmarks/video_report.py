"""What becomes of the measurements of both models: rows, their ratios, the table on the terminal. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .report import Outcome, machine_line, show

if TYPE_CHECKING:
    from rich.table import Table

PPLLAVA, OPS_OFF = "PPLLaVA", "PPLLaVA, ops off"
PEER, PEER_TUNED = "LLaVA-NeXT-Video", "LLaVA-NeXT-Video, our settings"
VARIANTS = (PPLLAVA, PEER, PEER_TUNED, OPS_OFF)
VIDEO_PEERS = VARIANTS[1:]
# Of the time from the file to the last token, in order.
PARTS = {
    "decode": "decode",
    "preprocess": "preprocess",
    "vision": "vision tower",
    "projector": "projector",
    "prefill": "prefill",
    "tokens": "further tokens",
}
Spread = dict[str, float]  # p20, p50, p80


@dataclass
class VideoRow(Outcome):
    """One variant on videos of so many frames. Times in milliseconds; without those of `generate` unless status is ok.

    Those of a batch: vision + projector + prefill = first_token, and first_token + (new tokens - 1) token = generate.
    """

    frames: int
    variant: str
    batch: int
    visual_tokens: int  # of one video, as `text_tokens` and `flops`
    text_tokens: int
    flops: dict[str, int]  # of the matrix products up to the first token, by part
    weight_bytes: int
    streamed: bool = False  # frames in chunks into the tower, without a tensor of all pixels
    past_context: bool = False  # the prompt is longer than the positions of the language model
    status: str = "ok"  # or "wrong", "failed", "does not fit", "left out"
    reason: str | None = None
    decode_ms: Spread | None = None  # one video, read from its file; the same for all variants
    preprocess_ms: Spread | None = None  # one video, resized and normalised, on the device
    vision_ms: Spread | None = None  # the tower
    projector_ms: Spread | None = None  # with the guide and the pooling
    prefill_ms: Spread | None = None  # the rest up to the first token
    first_token_ms: Spread | None = None
    token_ms: Spread | None = None  # each further one
    generate_ms: Spread | None = None
    samples: int = 0
    videos_s: float | None = None
    videos_s_file: float | None = None  # decoding and preprocessing included, one after the other
    peak_bytes: int | None = None  # weights, pixels, and what is held beyond them during `generate`
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)  # peer, same batch -> how many times better
    best: dict[str, dict[str, float]] = field(default_factory=dict)  # peer -> its rates, each at its best batch
    searched: bool = False  # whether the best batch is known
    search: str | None = None  # why the search for it ended
    error: float | None = None
    limit: float | None = None

    def set_rates(self) -> None:
        seconds = self.generate_ms["p50"] / 1e3
        file = self.batch * (self.decode_ms["p50"] + self.preprocess_ms["p50"]) / 1e3
        self.videos_s, self.videos_s_file = self.batch / seconds, self.batch / (seconds + file)

    def line(self) -> str:
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        head = f"{self.frames:,} frames{batch}, {self.variant}, {self.visual_tokens:,} visual tokens:"
        if self.status != "ok":
            return f"{head} {self.status}, {self.reason}"
        return f"{head} first token {show(self.first_token_ms['p50'])} ms, {self.videos_s:.3g} videos/s"


@dataclass
class Longest:
    """The longest video of a variant, of those that were tried, and why it is not longer."""

    variant: str
    frames: int | None
    visual_tokens: int | None
    next: int | None  # the next longer one; None at the end of the sweep
    why: str  # "does not fit", "left out", ..., "end of the sweep"
    reason: str | None = None

    def sentence(self) -> str:
        if self.frames is None:
            head = f"{self.variant}: none"
        else:
            head = f"{self.variant}: {self.frames:,} frames, {self.visual_tokens:,} visual tokens"
        if self.next is None:
            return f"{head}, the end of the sweep."
        return f"{head}; {self.next:,} frames: {self.why}{f' ({self.reason})' if self.reason else ''}."


def set_video_ratios(rows: Iterable[VideoRow]) -> None:
    """Ratios of PPLLaVA among the rows of one number of frames; `flops` needs no times.

    `ratios` compares the smallest batch of both, `best` the rows with the most videos/s.
    """
    batches: dict[str, list[VideoRow]] = {}
    for row in sorted(rows, key=lambda row: row.batch):
        batches.setdefault(row.variant, []).append(row)
    if PPLLAVA not in batches:
        return
    ours = batches[PPLLAVA][0]
    for name in VIDEO_PEERS:
        if name not in batches:
            continue
        peer = batches[name][0]
        ours.ratios[name] = _ratios(ours, peer)
        if all(row.status == "ok" and row.searched for row in (ours, peer)):
            pair = [max(batches[key], key=lambda row: row.videos_s or 0) for key in (PPLLAVA, name)]
            rates = {key: getattr(pair[0], key) / getattr(pair[1], key) for key in ("videos_s", "videos_s_file")}
            ours.best[name] = {"batch": pair[0].batch, "peer_batch": pair[1].batch, **rates}


def _ratios(ours: VideoRow, peer: VideoRow) -> dict[str, float]:
    bound = sum(peer.flops.values()) / sum(ours.flops.values())
    if not ours.status == peer.status == "ok":
        return {"flops": bound}
    first = peer.first_token_ms["p50"] / ours.first_token_ms["p50"]
    ratios = {
        "flops": bound,
        "first_token": first,
        "bound_percent": 100 * first / bound,
        "videos_s": ours.videos_s / peer.videos_s,
        "videos_s_file": ours.videos_s_file / peer.videos_s_file,
    }
    if ours.peak_bytes and peer.peak_bytes:
        ratios["peak_bytes"] = peer.peak_bytes / ours.peak_bytes
    return ratios


def shares(row: dict) -> dict[str, float] | None:
    """Percent of the time from the file to the last token that each of PARTS takes, of a row of the JSON."""
    if row["status"] != "ok":
        return None
    median = {name: row[f"{name}_ms"]["p50"] for name in ("decode", "preprocess", "vision", "projector", "prefill")}
    median |= {name: row["batch"] * median[name] for name in ("decode", "preprocess")}
    median["tokens"] = max(row["generate_ms"]["p50"] - row["first_token_ms"]["p50"], 0)
    whole = sum(median.values())
    return {name: 100 * ms / whole for name, ms in median.items()}


def throughput_table(rows: Sequence[VideoRow], machine: dict) -> Table:
    """The ratios of a row are how many times better PPLLaVA is with that batch."""
    from rich.table import Table

    table = Table(title=machine_line(machine), title_justify="left")
    table.add_column("frames", justify="right")
    table.add_column("model", no_wrap=True)
    for name in ("batch", "visual tokens", "first token ms", "ms per token", "videos/s", "from file"):
        table.add_column(name, justify="right")
    for name in ("peak MB", "% vision", "% projector", "% prefill", "% tokens"):
        table.add_column(name, justify="right")
    for name in ("first token", "% of bound", "videos/s", "from file", "memory", "FLOPs"):
        table.add_column(name if name == "% of bound" else f"x {name}", justify="right")
    ours = {row.frames: row for row in reversed(rows) if row.variant == PPLLAVA}  # of each the smallest batch
    for row, following in zip(rows, [*rows[1:], None]):
        numbers = [f"[red]{row.status}[/red]", *["-"] * 8]
        if row.status == "ok":
            part = shares(vars(row))
            numbers = [
                show(row.first_token_ms["p50"]),
                show(row.token_ms and row.token_ms["p50"]),
                f"{row.videos_s:.3g}",
                f"{row.videos_s_file:.3g}",
                show(row.peak_bytes and row.peak_bytes / 1e6),
                *(f"{part[name]:.0f}" for name in ("vision", "projector", "prefill", "tokens")),
            ]
        best = ours.get(row.frames)
        found = best.ratios.get(row.variant, {}) if best and best.batch == row.batch else {}
        keys = ("first_token", "bound_percent", "videos_s", "videos_s_file", "peak_bytes", "flops")
        last = following is None or following.frames != row.frames
        star = "*" if row.past_context else ""
        head = [f"{row.frames:,}", row.variant, str(row.batch), f"{row.visual_tokens:,}{star}"]
        table.add_row(*head, *numbers, *(show(found.get(key)) for key in keys), end_section=last)
    return table
