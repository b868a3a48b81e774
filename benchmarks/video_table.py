"""The tables of throughput.json: a line for each number of frames for the README, every row for the docs.

Of a CPU no absolute times, which say little about another one; ratios and shares within the run do.
"""

from __future__ import annotations

from . import report
from .report import MARK, show
from .video_report import AGAINST, OPS_OFF, PARTS, PEER, PPLLAVA, Longest, best, shares

PAST = "\\*"
LEFT_OUT = "left out"
Lines = list[list[str]]


def short(result: dict) -> tuple[Lines, list[str]]:
    """(lines, notes): PPLLaVA against the peer, with our settings / as users run it."""
    cuda = result["machine"]["type"] == "cuda"
    clips = _by_frames(result["rows"])
    columns = {
        "x first token": ("first_token", "ratios"),
        "% of the bound": ("bound_percent", "ratios"),
        "x videos/s": ("videos_s", "ratios"),
        "x videos/s, best batches": ("videos_s", "best"),
        "x memory": ("peak_bytes", "ratios"),
    }
    if not any(rows[PPLLAVA]["best"] for rows in clips.values()):
        del columns["x videos/s, best batches"]
    absolute = ["first token, ms", "videos/s"] if cuda else []
    head = ["frames", "visual tokens", "x fewer tokens", *absolute, "bound", *columns]
    lines = [head, ["---:"] * len(head)]
    for frames, rows in clips.items():
        ours, peer = rows[PPLLAVA], rows[PEER]
        counts = f"{ours['visual_tokens']:,} / {peer['visual_tokens']:,}{PAST if peer['past_context'] else ''}"
        cells = [f"{frames:,}", counts, show(peer["visual_tokens"] / ours["visual_tokens"])]
        if cuda:
            cells.append(_ms(ours, "first_token_ms"))
            cells.append(_rate(ours["videos_s"]))
        cells.append(show(ours["ratios"][PEER]["flops"]))
        marks = [MARK * any(row.get("doubts") for row in (ours, rows[name])) for name in AGAINST]
        compared = [[ours[kind].get(name, {}).get(key) for name in AGAINST] for key, kind in columns.values()]
        cells += [" / ".join("-" if n is None else show(n) + mark for n, mark in zip(each, marks)) for each in compared]
        if compared[0] == [None, None]:  # of both the same reason, or a reason each
            reasons = dict.fromkeys(_trouble(ours, rows[name]) for name in AGAINST)
            cells[-len(columns) :] = [" / ".join(reasons), *["-"] * (len(columns) - 1)]
        lines.append(cells)
    best_batches = ", and each at the batch with the most videos/s" if len(columns) == 5 else ""
    notes = [
        f"{PPLLAVA} / {PEER}: visual tokens. x: how many times better {PPLLAVA} is than {PEER} with our settings / as "
        f"users run it, below 1 is worse; at batch {result['protocol']['batch'] or 1}{best_batches}. Bound: how many "
        f"times more FLOPs {PEER} needs up to the first token, so what arithmetic alone would make of x first token.",
        *_notes(result),
        *_longest(result),
    ]
    return lines, notes


def full(result: dict) -> tuple[Lines, list[str]]:
    """(lines, notes): every row."""
    cuda, clips = result["machine"]["type"] == "cuda", _by_frames(result["rows"])
    absolute = ["first token, ms", "ms per token", "videos/s", "from the file"] if cuda else []
    ratios = {
        "x first token": "first_token",
        "bound": "flops",
        "% of the bound": "bound_percent",
        "x videos/s": "videos_s",
        "x from the file": "videos_s_file",
        "x memory": "peak_bytes",
    }
    head = ["frames", "model", "batch", "visual tokens", *absolute]
    head += [*(f"% {part}" for part in PARTS.values()), "memory, MB", *ratios]
    lines = [head, ["---:", "---", *["---:"] * (len(head) - 2)]]
    searched: dict[tuple[int, str], str] = {}
    for row in result["rows"]:
        ours = clips[row["frames"]][PPLLAVA]
        found = ours["ratios"].get(row["variant"], {}) if row["batch"] == ours["batch"] else {}
        if row["variant"] in ours["best"] and row["batch"] == ours["best"][row["variant"]]["peer_batch"] > 1:
            found = found or ours["best"][row["variant"]]
        star, mark = PAST if row["past_context"] else "", f" {MARK}" if row.get("doubts") else ""
        cells = [f"{row['frames']:,}", row["variant"] + mark, str(row["batch"]), f"{row['visual_tokens']:,}{star}"]
        if cuda:
            cells += [_ms(row, "first_token_ms"), _ms(row, "token_ms")]
            cells += [_rate(row["videos_s"]), _rate(row["videos_s_file"])]
        part = shares(row)
        cells += [row["status"], *["-"] * (len(PARTS) - 1)] if part is None else [f"{part[x]:.1f}" for x in PARTS]
        cells.append(show(row["peak_bytes"] and row["peak_bytes"] / 1e6))
        cells += [show(found.get(key)) for key in ratios.values()]
        lines.append(cells)
        if row["searched"]:  # the best one comes last
            searched[row["frames"], row["variant"]] = f"{row['batch']} ({row['search']})"
    notes = [
        f"x: how many times better {PPLLAVA} is than this row, at the same batch, and against rows of a larger batch "
        f"at its own best one; below 1 is worse. {OPS_OFF}: its pooling in plain PyTorch, in the original's order. "
        "Bound: the FLOPs of this row over those of PPLLaVA up to the first token, and how much of that ratio was "
        "reached. %: of the time from the file to the last token, one after the other; a streamed video has its "
        "pixels normalised on the way into the tower, which counts as its time.",
        *_notes(result),
    ]
    if searched:
        each = "; ".join(f"{n:,} frames, {variant}: {best}" for (n, variant), best in searched.items())
        notes.append(f"Best batch, where time was left to find it: {each}.")
    return lines, notes


def _longest(result: dict) -> list[str]:
    each = [Longest(**each) for each in result["longest"]]
    for one in each:
        if one.why == LEFT_OUT:  # the reason is a time
            one.reason = None
    return ["The longest video that ran:", *(one.sentence() for one in each)] if each else []


def _notes(result: dict) -> list[str]:
    setup = result["protocol"]
    notes = [
        f"Sizes of `{setup['preset']}` with random weights, {setup['dtype']}, {setup['new_tokens']} new tokens, at "
        f"most {setup['tokens']:,} visual tokens of {PPLLAVA}; frames of one H.264 file for all.",
        "Memory: weights, pixels and the most beyond them during `generate`.",
    ]
    if any(row["past_context"] for row in result["rows"]):
        notes.append(
            f"{PAST}: more than the positions that its language model was configured for. It is run all the same where "
            "memory and time allow, but its answer would be worth nothing."
        )
    bad: dict[str, dict[str, list[str]]] = {}
    for row in result["rows"]:
        if row["status"] != "ok":
            why = LEFT_OUT if row["status"] == LEFT_OUT else f"{row['status']} ({row['reason']})"
            bad.setdefault(why, {}).setdefault(row["variant"], []).append(f"{row['frames']:,}")
    for why, variants in bad.items():
        each = "; ".join(f"{variant}, at {_and(frames)} frames" for variant, frames in variants.items())
        notes.append(f"{'Left out for lack of time' if why == LEFT_OUT else why.capitalize()}: {each}.")
    return notes + report.doubts_of(result["rows"], lambda row: f"{row['variant']}, {row['frames']:,} frames")


def _and(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _by_frames(rows: list[dict]) -> dict[int, dict[str, dict]]:
    """The row of the smallest batch of each variant."""
    clips: dict[int, dict[str, dict]] = {}
    for row in sorted(rows, key=lambda row: (row["frames"], row["batch"])):
        clips.setdefault(row["frames"], {}).setdefault(row["variant"], row)
    return clips


def _trouble(*rows: dict) -> str:
    return next((row["status"] for row in rows if row["status"] != "ok"), "-")


def _ms(row: dict, key: str) -> str:
    return row["status"] if row["status"] != "ok" else show(row[key] and best(row[key]))


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.3g}"
