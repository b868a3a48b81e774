"""What becomes of the measurements of both models: rows, their ratios, the answer. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .report import MARK, Grid, Outcome, show

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
AGAINST = (PEER_TUNED, PEER)  # in this order in a cell: with our settings / as users run it
Spread = dict[str, float]  # best, p20, p50, p80; without the first in results of older versions


@dataclass(kw_only=True)
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
    bound_percent: float | None = None  # of a peer: of the bound, that the ratio of the first tokens is
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)  # peer, same batch -> how many times better
    best: dict[str, dict[str, float]] = field(default_factory=dict)  # peer -> its rates, each at its best batch
    searched: bool = False  # whether the best batch is known
    search: str | None = None  # why the search for it ended
    error: float | None = None
    limit: float | None = None

    def set_rates(self) -> None:
        seconds = best(self.generate_ms) / 1e3
        file = self.batch * (best(self.decode_ms) + best(self.preprocess_ms)) / 1e3
        self.videos_s, self.videos_s_file = self.batch / seconds, self.batch / (seconds + file)

    def fail(self, reason: str, status: str | None = None) -> None:
        """Without the times of `generate` that it may have had."""
        super().fail(reason, status)
        for name in ("vision", "projector", "prefill", "first_token", "token", "generate"):
            setattr(self, f"{name}_ms", None)
        self.samples, self.videos_s, self.videos_s_file = 0, None, None

    def percent_of_bound(self) -> float | None:
        return self.bound_percent

    def head(self) -> str:
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{self.frames:,} frames{batch}, {self.variant}, {self.visual_tokens:,} visual tokens"

    def result(self) -> str:
        return f"first token {show(best(self.first_token_ms))} ms, {self.videos_s:.3g} videos/s"


def best(spread: Spread) -> float:
    return spread.get("best", spread["p50"])


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
        peer.bound_percent = ours.ratios[name].get("bound_percent")
        if all(row.status == "ok" and row.searched for row in (ours, peer)):
            pair = [max(batches[key], key=lambda row: row.videos_s or 0) for key in (PPLLAVA, name)]
            rates = {key: getattr(pair[0], key) / getattr(pair[1], key) for key in ("videos_s", "videos_s_file")}
            ours.best[name] = {"batch": pair[0].batch, "peer_batch": pair[1].batch, **rates}


def _ratios(ours: VideoRow, peer: VideoRow) -> dict[str, float]:
    bound = sum(peer.flops.values()) / sum(ours.flops.values())
    if not ours.status == peer.status == "ok":
        return {"flops": bound}
    first = best(peer.first_token_ms) / best(ours.first_token_ms)
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
    part = {name: best(row[f"{name}_ms"]) for name in ("decode", "preprocess", "vision", "projector", "prefill")}
    part |= {name: row["batch"] * part[name] for name in ("decode", "preprocess")}
    part["tokens"] = max(best(row["generate_ms"]) - best(row["first_token_ms"]), 0)
    whole = sum(part.values())
    return {name: 100 * ms / whole for name, ms in part.items()}


def by_frames(rows: Iterable[VideoRow]) -> dict[int, dict[str, VideoRow]]:
    """The row of the smallest batch of each variant."""
    clips: dict[int, dict[str, VideoRow]] = {}
    for row in sorted(rows, key=lambda row: (row.frames, row.batch)):
        clips.setdefault(row.frames, {}).setdefault(row.variant, row)
    return clips


def throughput_tables(rows: Sequence[VideoRow]) -> list[Grid]:
    """A line for each number of frames: how many times better PPLLaVA is than each way to run the peer."""
    columns = {
        "x first token": "first_token",
        "x videos/s": "videos_s",
        "x memory": "peak_bytes",
        "% of the bound": "bound_percent",
    }
    lines = []
    for frames, variants in by_frames(rows).items():
        ours, cells = variants[PPLLAVA], {name: [] for name in columns}
        for name in AGAINST:
            pair = [ours, variants[name]]
            mark = MARK * any(row.doubts for row in pair)
            for head, key in columns.items():
                number = ours.ratios.get(name, {}).get(key)
                status = next((row.status for row in pair if row.status != "ok"), "-")
                text = show(number) + mark if number is not None else status if key == "first_token" else "-"
                cells[head].append(text)
        first = "-" if ours.status != "ok" else show(best(ours.first_token_ms)) + MARK * bool(ours.doubts)
        lines.append([f"{frames:,}", first, *map(_both, cells.values())])
    title = f"{PPLLAVA} against {PEER} with our settings / as users run it"
    return [Grid(title, ["frames", "first token, ms", *columns], lines, left=0)]


def _both(texts: Sequence[str]) -> str:
    """Two in a cell; the same words once."""
    return " / ".join(texts if any(text[0].isdigit() for text in texts) else dict.fromkeys(texts))


def answers(rows: Sequence[VideoRow], nothing: str = "Could not tell: nothing was compared.") -> list[str]:
    """What a run says in one line for each number of frames: how many times better, or why it cannot tell."""
    lines = [_answer(frames, variants) for frames, variants in by_frames(rows).items()]
    return list(filter(None, lines)) or list(filter(None, [nothing]))


def _answer(frames: int, variants: dict[str, VideoRow]) -> str | None:
    """None where the peer was left out. With our settings, or, where that was not measured, as users run it."""
    ours = variants[PPLLAVA]
    tried = [name for name in AGAINST if variants[name].status != "left out"]
    name = next((name for name in tried if variants[name].status == "ok"), tried[0] if tried else None)
    if name is None or ours.status == "left out":
        return None
    pair, head = (ours, variants[name]), f"{frames:,} frames"
    for row in pair:
        if row.status == "does not fit":
            return f"{head}: {row.variant} does not fit into memory"
        if row.status != "ok":
            return f"{head}: could not tell, {row.variant}: {row.status}, {row.reason}"
    if doubts := [f"{row.variant}: {', '.join(row.doubts.values())}" for row in pair if row.doubts]:
        return f"{head}: could not tell, {'; '.join(doubts)}"
    ratios = ours.ratios[name]
    parts = [f"{_times(ratios['videos_s'])} times the videos/s of {PEER}{' as users run it' if name == PEER else ''}"]
    parts.append("first token " + _change(ratios["first_token"], "sooner", "later"))
    if "peak_bytes" in ratios:
        parts.append(_change(ratios["peak_bytes"], "less memory", "more memory"))
    return f"{head}: {', '.join(parts)}"


def _change(ratio: float, better: str, worse: str) -> str:
    return f"{_times(max(ratio, 1 / ratio))} times {better if ratio >= 1 else worse}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if 0.95 <= ratio < 9.95 else show(ratio)
