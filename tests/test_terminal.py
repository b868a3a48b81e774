"""The tables of all benchmarks on a terminal of 80 columns and one of 120: every number is there, and whole."""

import io

from rich.console import Console

from benchmarks import report, swap_report, video_report
from benchmarks.fp8_report import AGAINST, ERRORS, PARTS, Fp8Row, fp8_tables
from benchmarks.report import PEERS, PROJECTOR_PEERS, ProjectorRow, Row
from benchmarks.steps import STEPS
from benchmarks.steps_report import StepRow, steps_tables
from benchmarks.video_report import VARIANTS, VideoRow


def rendered(tables, width):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    for table in tables:
        console.print(table)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    return text


def cells(text):
    """The cells of each line of a table."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def measured(kind, **more):
    numbers = dict(us_p20=1.0, us_p50=123456.7, us_p80=3.0, samples=3, extra_bytes=10**9, first_call_s=2.0)
    return kind(**numbers, **more)


def kernels():
    rows = [
        measured(
            Row,
            op=op,
            shape=shape,
            dtype="bf16",
            direction=direction,
            variant=variant,
            flops=1,
            bytes=1,
            ratios=dict.fromkeys(PEERS, 0.0567 if variant == "reference" else 123.4),
            copy_percent=118.4 if direction == "forward" else 0.0123,
        )
        for shape in ("vicuna7b_16frames", "qwen2_7b_video")
        for op in ("prompt_relevance", "weighted_pool3d", "prompt_guided_pool3d")
        for direction in ("forward", "backward")
        for variant in ("triton", "reference", *PEERS)
    ]
    rows[0].doubts = {"load": "others used 1.0 of the 2 cores"}
    rows[-4].fail("out of memory")
    return report.kernels_tables(rows)


def test_kernels():
    fits, wide = kernels()
    found = [cells(rendered([fits], width)) for width in (80, 120)]
    assert found[0] == found[1]
    assert ["vicuna7b_16frames, bf16, forward / backward"] in found[0]
    assert ["prompt_guided_pool3d", "triton", *["123/123"] * 3, "118/0.01"] in found[0]
    assert ["weighted_pool3d", "reference", *["0.06/0.06"] * 3, "118/0.01"] in found[0]
    assert ["prompt_relevance", "triton", *["123?/123"] * 3, "118?/0.01"] in found[0]
    for width in (80, 120):
        assert rendered([wide], width).count("0.06/does not fit") == 3


def test_projector():
    rows = [
        measured(
            ProjectorRow,
            op="prompt_guided_project",
            shape="vicuna7b_128frames",
            dtype="bf16",
            direction=direction,
            variant=variant,
            flops=1,
            original_flops=4,
            products_percent=104.2,
            ratios=dict.fromkeys(PROJECTOR_PEERS, 123.4),
            memory_percent=157.0,
        )
        for direction in ("forward", "both")
        for variant in ("reference", *PROJECTOR_PEERS)
    ]
    for width in (80, 120):
        found = cells(rendered(report.projector_tables(rows), width))
        assert ["reference", "104/104", *["123/123"] * 4, "157/157"] in found
        assert ["vicuna7b_128frames, bf16, forward / both"] in found


def video(variant, frames, ms, **more):
    spread = {"best": ms, "p20": ms, "p50": 9 * ms, "p80": 9 * ms}
    times = {f"{part}_ms": spread for part in ("vision", "projector", "prefill", "first_token", "token", "generate")}
    sizes = dict(visual_tokens=518_400, text_tokens=60, flops={"all": frames * 10**9}, weight_bytes=1, samples=2)
    row = VideoRow(frames=frames, variant=variant, batch=1, **sizes, **times, decode_ms=spread, preprocess_ms=spread)
    row.set_rates()
    row.peak_bytes = more.pop("peak", 10**9)
    for name, value in more.items():
        setattr(row, name, value)
    return row


def test_throughput():
    eight = [video(v, 8, ms) for v, ms in zip(VARIANTS, (12345.0, 1_000_000.0, 900_000.0, 12345.0))]
    hour = [video(v, 3600, 123456.0) for v in VARIANTS]
    hour[1].fail("out of memory")
    hour[2].fail("too slow", "left out")
    eight[1].doubts = {"samples": "one sample"}
    for rows in (eight, hour):
        video_report.set_video_ratios(rows)
    tables = video_report.throughput_tables(eight + hour)
    found = [cells(rendered(tables, width)) for width in (80, 120)]
    assert found[0] == found[1]
    assert ["8", "12,345", "73 / 81?", "73 / 81?", "1.0 / 1.0?", "7,290 / 8,100?"] in found[0]
    assert ["3,600", "123,456", "left out / does not fit", "-", "-", "-"] in found[0]
    for head in ("frames", "first token, ms", "x first token", "x videos/s", "x memory", "% of the bound"):
        assert all(word in rendered(tables, 80) for word in head.split())


def test_swap():
    rows = [
        swap_report.SwapRow(
            family=family,
            variant=variant,
            frames=32,
            visual_tokens=4608 if variant == swap_report.STOCK else 256,
            text_tokens=1,
            vision_ms=1234.0,
            prefill_ms=1.0,
            first_token_ms=123450.0 if variant == swap_report.STOCK else 2345.0,
            videos_s=0.0123,
            samples=2,
            peak_bytes=123_000_000_000,
        )
        for family in ("LLaVA-NeXT-Video", "Qwen2.5-VL")
        for variant in swap_report.VARIANTS
    ]
    for family in (rows[:3], rows[3:]):
        swap_report.set_ratios(family)
    rows[1].doubts = {"samples": "one sample"}
    rows[4].fail("ValueError: no")
    found = [cells(rendered(swap_report.swap_tables(rows), width)) for width in (80, 120)]
    assert found[0] == found[1]
    assert ["stock", "4,608", "123,450", "0.01", "123"] in found[0]
    assert ["compressed, plain mean", "256 (18)", "2,345 (53)", "0.01 (1.00)", "123 (1.00)"] in found[0]
    assert ["compressed", "256 (18)", "2,345 (53?)", "0.01 (1.00?)", "123 (1.00?)"] in found[0]
    assert ["compressed", "failed", "-", "-", "-"] in found[0]


def test_steps():
    rows = [StepRow(step=step.name, switch=step.switch, kept=True, samples=2) for step in STEPS]
    for row in rows:
        row.set_times(4, 1234.0, 123.0, 0.75)
    rows[1].fail("ValueError: no")
    rows[2].doubts = {"samples": "one sample"}
    found = [cells(rendered(steps_tables(rows), width)) for width in (80, 120)]
    assert found[0] == found[1]
    assert ["frames decoded while the tower runs", "yes", "1,234", "123", "10.03", "75%"] in found[0]
    assert ["no unused layers in the vision tower", "yes", "failed", "-", "-", "-"] in found[0]
    assert ["the ops of ppllava_kernels", "yes", "1,234", "123", "10.03?", "75%"] in found[0]


def test_fp8():
    error = {"mean": 0.123456, "worst": 0.9}
    spread = {"p20": 1.0, "p50": 12345.6, "p80": 3.0}
    row = Fp8Row(frames=3600, visual_tokens=1024, samples=6, weight_bytes={})
    row.errors = {name: dict.fromkeys(ERRORS, error) for name in AGAINST}
    row.ms = {part: dict.fromkeys(("bf16", "fp8", "compile(bf16)", "compile(fp8)"), spread) for part in PARTS}
    found = [cells(rendered(fp8_tables([row]), width)) for width in (80, 120)]
    assert found[0] == found[1]
    assert ["3600", "bf16 against float32", "12", "12", "1.2e-01", "12"] in found[0]
    assert ["3600", "each further token", "12,346", "12,346", "1.0", "12,346", "12,346", "1.0"] in found[0]


def test_a_table_that_does_not_fit_is_a_block_for_each_row():
    row = ["[red]not markup[/red]", "12,345,678.9 / 12,345,678.9", "does not fit / left out", "98,765.4 / 4,321.0"]
    heads = ["variant", "x first token", "x memory", "a head of several words"]
    grid = report.Grid("A title", heads, [row, row])
    wide, narrow = rendered([grid], 120), rendered([grid], 80)
    assert cells(wide)[-1] == row
    assert "a head of several" in wide
    assert narrow.count("[red]not markup[/red]\n") == 2
    assert "x first token: 12,345,678.9 / 12,345,678.9; x memory: does not fit / left out" in narrow
    for number in ("98,765.4", "4,321.0"):
        assert narrow.count(number) == 2
    numbers = report.Grid("A title", ["frames", "x"], [["1,024", "1" * 90]], left=0)
    assert "frames 1,024" in rendered([numbers], 80)
