"""Charts: every axis has numbers, a colour of the legend is that of its series and of no other, ratios are beside."""

import itertools
import json
import sys
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed
from benchmarks import chart, drawing, fp8_chart, fp8_report, report, steps_chart, swap_chart, video_chart
from benchmarks.report import PEERS, PROJECTOR_PEERS
from benchmarks.video_report import OPS_OFF, PARTS, PEER, PEER_TUNED, PPLLAVA

CPU = {
    **{"device": "Test CPU", "type": "cpu", "cores": 2, "torch": "2.13.0", "triton": None, "python": "3.11.7"},
    **{"commit": "0123456789", "dirty": False, "date": "2026-01-01 00:00 UTC"},
}


def kernels(percents=(94, 69, 67, 19, 4.8)):
    cases = itertools.product(("prompt_relevance", "weighted_pool3d"), ("fp32", "bf16"), ("forward", "backward"))
    rows = [
        {
            **{"op": op, "shape": "tiny_video", "dtype": dtype, "direction": direction, "variant": variant},
            **{"status": "ok", "reason": None, "copy_percent": percent, "read_percent": 1.04 * percent},
        }
        for op, dtype, direction in cases
        for variant, percent in zip(("cpp", "reference", *PEERS), percents)
    ]
    return {"kind": "kernels", "machine": CPU, "protocol": {}, "rows": rows}


def projector(percents=(95, 26, 24, 25, 70, 92)):
    rows = [
        {
            **{"op": "prompt_guided_project", "shape": "tiny_clip", "dtype": dtype, "direction": direction},
            **{"variant": variant, "status": "ok", "reason": None, "products_percent": percent},
        }
        for dtype, direction in itertools.product(("fp32", "bf16"), ("forward", "both"))
        for variant, percent in zip(("cpp", "reference", *PROJECTOR_PEERS), percents)
        if (variant, direction) != ("reference", "both")
    ]
    return {"kind": "projector", "machine": CPU, "protocol": {}, "rows": rows}


def video_row(variant, frames, seconds, **changed):
    spread = {f"{name}_ms": {"p50": 1.0} for name in (*PARTS, "first_token", "generate")}
    spread["first_token_ms"], spread["generate_ms"] = {"p50": 700 * seconds}, {"p50": 1000 * seconds}
    row = {
        **{"variant": variant, "frames": frames, "batch": 1, "status": "ok", "reason": None, "streamed": frames > 16},
        **{"videos_s": 1 / seconds, "peak_bytes": int(5e8 * seconds), "ratios": {}, **spread},
    }
    return row | changed


def throughput(frames=(8, 16, 32), seconds=0.5):
    rows = []
    for n in frames:
        missing = {"status": "left out", "videos_s": None, "first_token_ms": None, "peak_bytes": None}
        gone = missing if n == 32 else {}
        scale = seconds * n / frames[0]
        ratios = {
            PEER: {"videos_s": 3.7, "first_token": 4.1, "peak_bytes": 2.4},
            PEER_TUNED: {"videos_s": 3.61, "first_token": 4.02, "peak_bytes": 2.31},
        }
        rows += [
            video_row(PPLLAVA, n, scale, ratios={} if gone else ratios),
            video_row(PEER, n, 3.7 * scale, **gone),
            video_row(PEER_TUNED, n, 3.61 * scale, **gone),
            video_row(OPS_OFF, n, 1.04 * scale, **gone),
        ]
    rows.append(video_row(PPLLAVA, frames[0], 0.3 * seconds, batch=4))
    setup = {"batch": None, "preset": "tiny", "dtype": "float32", "new_tokens": 8, "tokens": 64}
    return {"kind": "throughput", "machine": CPU, "protocol": setup, "rows": rows}


def steps(ratios=(1.29, 1.03, 1.06)):
    rows = [
        {"step": f"step {n}", "status": "ok", "reason": None, "ratio": ratio, "kept": n != 1}
        for n, ratio in enumerate(ratios)
    ]
    setup = {"preset": "tiny", "dtype": "float32", "frames": 4, "new_tokens": 8}
    return {"kind": "steps", "machine": CPU, "protocol": setup, "rows": rows}


def swap(ratio=1.1):
    rows = [
        {
            **{"family": family, "variant": variant, "visual_tokens": 8 if variant == "stock" else 2, "status": "ok"},
            "ratios": {} if variant == "stock" else {"visual_tokens": 4 * ratio, "vision": 0.9, "prefill": ratio},
        }
        for family in ("LLaVA-NeXT-Video", "Qwen2.5-VL")
        for variant in ("stock", "compressed", "compressed, plain mean")
    ]
    setup = {"sizes": "tiny sizes", "dtype": "float32", "frames": 4, "new_tokens": 8}
    return {"kind": "swap", "machine": CPU, "protocol": setup, "rows": rows}


def fp8(times=True):
    errors = {"visual_error": 0.05, "logits_error": 0.11, "kl": 1.2e-3, "equal_tokens": 0.5}
    taken = {name: {"p50": 10.0} for name in ("bf16", "fp8", "compile(bf16)", "compile(fp8)")}
    rows = [
        {
            **{"frames": frames, "status": "ok", "ms": {"vision": taken, "prefill": taken} if times else {}},
            "errors": {
                name: {key: {"mean": scale * x} for key, x in errors.items()}
                for name, scale in (("fp8", 1.0), ("bf16", 0.1))
            },
        }
        for frames in (8, 16)
    ]
    setup = {"clips": 2, "questions": ["?"], "model": "random weights", "emulated": not times}
    return {"kind": "fp8", "machine": CPU, "protocol": setup, "rows": rows}


RESULTS = {
    "kernels": kernels(),
    "kernels, alike": kernels((81, 80, 79, 78, 77)),
    "projector": projector(),
    "projector, alike": projector((99, 98, 97, 96, 95, 94)),
    "throughput": throughput(),
    "throughput of a quick run": throughput((4,), 0.37),
    "steps": steps(),
    "steps without gain": steps((0.99, 1.0, 1.01)),
    "swap": swap(),
    "swap with gain": swap(18.0),
    "fp8": fp8(),
    "fp8 without times": fp8(times=False),
}


@pytest.fixture(params=RESULTS, scope="module")
def picture(request):
    """A figure of each kind, made once for all that is asked of it."""
    results = RESULTS[request.param]
    figure = chart.FIGURES[results["kind"]](pyplot, results)
    yield figure
    pyplot.close(figure)


def labels_in_view(axis, which):
    low, high = sorted(getattr(axis, f"get_{which}lim")())
    some = getattr(axis, f"{which}axis").get_majorticklabels()
    at = {"x": 0, "y": 1}[which]
    return [x.get_text() for x in some if x.get_visible() and x.get_text() and low <= x.get_position()[at] <= high]


def series(axis):
    """The colours of all bars, points and lines of data."""
    bars = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
    points = [colour for c in axis.collections if isinstance(c, PathCollection) for colour in c.get_facecolors()]
    lines = [line.get_color() for line in axis.lines if line.get_marker() not in ("None", "", None)]
    return {to_rgba(x) for x in (*(bar.get_facecolor() for bar in bars), *map(tuple, points), *lines)}


def legends(figure):
    some = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    return [handle for legend in some for handle in legend.legend_handles]


def colour(handle):
    return to_rgba(handle.get_facecolor() if isinstance(handle, Rectangle) else handle.get_color())


def test_every_axis_of_every_chart_has_numbers_or_names(picture):
    for axis in picture.axes:
        assert len(labels_in_view(axis, "y")) >= 2, axis.get_title(loc="left")
        assert len(labels_in_view(axis, "x")) >= 1, axis.get_title(loc="left")
        numbers = [float(text.replace(",", "")) for text in labels_in_view(axis, "y") if text[0].isdigit()]
        assert len(set(numbers)) == len(numbers)


def test_the_legend_has_the_colour_of_each_series_and_no_colour_twice(picture):
    named = [handle for handle in legends(picture) if getattr(handle, "get_linestyle", lambda: "-")() != ":"]
    colours = [colour(handle) for handle in named if "hollow" not in handle.get_label()]
    assert len(set(colours)) == len(colours)
    for axis in picture.axes:
        assert series(axis) <= set(colours), axis.get_title(loc="left")
        assert all(x[3] == 1 for x in series(axis))  # none lets another through


@pytest.mark.parametrize(
    "colours",
    [
        drawing.COLOURS,
        {**video_chart.COLOURS, **video_chart.PART_COLOURS},
        fp8_chart.COLOURS,
        swap_chart.COLOURS,
        {"kept": steps_chart.KEPT, "left out": steps_chart.LEFT_OUT},
    ],
)
def test_no_two_series_look_alike(colours):
    for (_, one), (_, other) in itertools.combinations(colours.items(), 2):
        assert sum(abs(a - b) for a, b in zip(to_rgba(one), to_rgba(other))) > 0.2, (one, other)


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize(
    ("low", "high"), [(0.31, 0.52), (1.01, 1.4), (87, 111), (0.0101, 0.0109), (2e-6, 3.0), (1, 1e9), (0.7, 7), (3, 30)]
)
def test_ticks_of_any_range_are_round_and_inside(low, high, log):
    some = drawing.ticks(low, high, log)
    assert drawing.FEWEST <= len(some) <= 12
    assert some == sorted(set(some))
    assert low <= some[0] < some[-1] <= high * (1 + 1e-9)
    assert all(len(f"{x:.10g}".replace(".", "").strip("0").split("e")[0]) <= 5 for x in some)


def test_the_ratio_stands_beside_the_points_of_the_closer_peer():
    figure = chart.FIGURES["throughput"](pyplot, throughput())
    texts = {axis.get_title(loc="left").split(" (")[0]: [x.get_text() for x in axis.texts] for axis in figure.axes}
    pyplot.close(figure)
    assert texts["videos per second"].count("x 3.6") == 2
    assert texts["seconds to the first token"].count("x 4.0") == 2
    assert texts["GB of memory"].count("x 2.3") == 2
    assert any("in chunks" in text for text in texts["GB of memory"])  # why the memory falls there


def test_what_was_not_run_has_no_bar_and_no_gap():
    figure = chart.FIGURES["throughput"](pyplot, throughput())
    assert len(figure.axes[-1].patches) == len(PARTS) * (4 + 4 + 1)
    pyplot.close(figure)
    figure = chart.FIGURES["projector"](pyplot, projector())
    forward, both = ([bar.get_x() for bar in axis.patches] for axis in figure.axes)
    pyplot.close(figure)
    assert (len(forward), len(both)) == (2 * 6, 2 * 5)
    places = sorted(both[:5])
    assert max(b - a for a, b in itertools.pairwise(places)) == pytest.approx(places[1] - places[0])


def test_words_of_the_projector_chart_are_explained():
    figure = chart.FIGURES["projector"](pyplot, projector())
    words = figure.get_supxlabel()
    assert all(word in words for word in ("original:", "reordered:", "compile():", "both:", "1:"))
    assert all(axis.get_ylabel() for axis in figure.axes)
    pyplot.close(figure)


def test_the_fp8_chart_stands_in_its_docs(tmp_path):
    folder = tmp_path / "results" / "cpu-test"
    folder.mkdir(parents=True)
    results = fp8(times=False)
    for row in results["rows"]:
        row.update(visual_tokens=8, failed={}, weight_bytes={"bf16": 2, "fp8": 1})
        row["errors"] = {
            name: {key: {**x, "worst": x["mean"]} for key, x in found.items()} for name, found in row["errors"].items()
        }
    results["machine"] = CPU | {"command": "python -m benchmarks.fp8"}
    results["protocol"] |= {"left_out": [], "torchao": "0.18.0"}
    path = folder / "fp8.json"
    path.write_text(json.dumps(results))
    assert chart.draw_fp8(path) == f"wrote {folder / 'fp8.png'}"
    block = fp8_report.fp8_block(tmp_path / "results", tmp_path)
    assert "](results/cpu-test/fp8.png)" in block
    assert report.read(path, "fp8")["rows"]
