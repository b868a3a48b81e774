"""Relevance drawn over frames: where it is bright, and what comes out of the files."""

import re

import numpy as np
import pytest
from PIL import Image

from ppllava import relevance
from ppllava.video import open_video


def softmax_map(frames, height=6, width=8, spread=2.0, seed=0):
    """float32 [T, h, w] as the model makes it: a softmax of cosines times 100, which spread by 0.02."""
    logits = spread * np.random.default_rng(seed).standard_normal((frames, height, width))
    weights = np.exp(logits)
    return (weights / weights.sum()).astype(np.float32)


def noise(frames, height, width):
    return np.random.default_rng(1).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def magenta(drawn):
    """How far pixels [..., 3] are from grey towards the color of the peak, which is cyan's opposite on the scale."""
    return drawn[..., [0, 2]].mean(-1) - drawn[..., 1]


def test_the_formula():
    r = softmax_map(3)
    median, peak = float(np.median(r.astype(np.float64))), float(r.max())
    assert relevance.scale(r) == (median, peak)
    v = relevance.intensity(r)
    expected = np.clip(np.log(r.astype(np.float64) / median) / np.log(peak / median), 0, 1)
    np.testing.assert_allclose(v, expected, atol=1e-6)
    assert v.dtype == np.float32
    assert v.max() == 1
    assert (v == 0).mean() == pytest.approx(0.5, abs=0.02)


def test_peaks_and_structure_both_show():
    r = np.full((1, 4, 4), 1e-5)
    r[0, 0, 0], r[0, 1, 1], r[0, 2, 2] = 1e-2, 1e-3, 1e-4
    v = relevance.intensity(r)[0]
    np.testing.assert_allclose([v[0, 0], v[1, 1], v[2, 2], v[3, 3]], [1, 2 / 3, 1 / 3, 0], atol=1e-6)


def test_three_decades_below_the_peak_is_nothing():
    r = np.full((1, 4, 4), 1e-30)
    r[0, 0, 0], r[0, 1, 1], r[0, 2, 2] = 1, 10**-1.5, 1e-9
    v = relevance.intensity(r)[0]
    np.testing.assert_allclose([v[0, 0], v[1, 1], v[2, 2]], [1, 0.5, 0], atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1 / 48, 1.0])
def test_a_constant_map_colors_nothing(value):
    frames = noise(2, 12, 16)
    drawn = relevance.draw(frames, np.full((2, 3, 4), value, dtype=np.float32))
    np.testing.assert_array_equal(drawn, frames)


def test_a_flat_map_stays_faint():
    r = np.full((1, 4, 4), 1.0)
    r[0, 0, 0] = 1.1
    assert relevance.intensity(r).max() == pytest.approx(np.log(1.1) / np.log(2))


def test_one_scale_for_the_clip():
    r = np.full((2, 6, 6), 1e-6)
    r[0, 2, 2], r[1, 2, 2] = 1e-2, 1e-3
    drawn = relevance.draw(np.zeros((2, 60, 60, 3), dtype=np.uint8), r)
    assert drawn[0, 25, 25].max() > drawn[1, 25, 25].max() > 0
    limits = relevance.scale(r)
    np.testing.assert_array_equal(relevance.draw(np.zeros((1, 60, 60, 3), np.uint8), r[1:], limits), drawn[1:])


@pytest.mark.parametrize("brightness", [0, 255])
def test_the_brightest_spot_is_the_peak(brightness):
    r = softmax_map(4, 6, 8)
    r[2, 1, 5] = 3 * r.max()
    drawn = relevance.draw(np.full((4, 60, 80, 3), brightness, dtype=np.uint8), r)
    assert drawn.shape == (4, 60, 80, 3)
    assert drawn.dtype == np.uint8
    frame, row, column = np.unravel_index(magenta(drawn).argmax(), drawn.shape[:3])
    assert (frame, row // 10, column // 10) == (2, 1, 5)


def test_frames_smaller_than_the_map_and_single_patches():
    assert relevance.draw(noise(1, 3, 2), softmax_map(1, 24, 24)).shape == (1, 3, 2, 3)
    assert relevance.draw(noise(3, 5, 7), softmax_map(3, 1, 1)).shape == (3, 5, 7, 3)


@pytest.mark.parametrize(
    ("count", "size"),
    [
        *((count, size) for count in (1, 2, 5) for size in ((90, 160), (160, 90), (100, 1000), (1000, 100))),
        (64, (90, 160)),
    ],
)
def test_contact_sheet(tmp_path, count, size):
    path = tmp_path / "sheet.png"
    frames = np.full((count, *size, 3), 200, dtype=np.uint8)
    relevance.save_png(path, frames, [i / 2 for i in range(count)], "What costs $5, or $6? 何ですか")
    with Image.open(path) as sheet:
        width, height = sheet.size
        pixels = np.asarray(sheet.convert("RGB"))  # [y, x, 3]
    assert 100 <= width <= 1600
    assert 100 <= height <= 2600
    shown = (pixels == 200).all(-1).sum() / pixels[..., 0].size
    assert shown > 0.4  # the frames, not the margins
    scale = np.sqrt((pixels == 200).all(-1).sum() / (count * size[0] * size[1]))
    assert 0.1 < scale < 9


@pytest.mark.parametrize(("count", "size"), [(count, size) for count in (1, 9) for size in ((1, 4000), (4000, 1))])
def test_contact_sheet_of_lines_of_pixels(tmp_path, count, size):
    path = tmp_path / "sheet.png"
    relevance.save_png(path, np.full((count, *size, 3), 200, dtype=np.uint8), title="lines " * 50)
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))  # [y, x, 3]
    assert min(pixels.shape[:2]) >= 50
    assert max(pixels.shape[:2]) <= 2600
    assert (pixels == 200).all(-1).mean() > 0.2


def test_mp4_that_cannot_be_written(tmp_path):
    path = tmp_path / "none" / "clip.mp4"
    with pytest.raises(FileNotFoundError, match=f"'{path}'$"):
        relevance.save_mp4(path, noise(2, 48, 64), 5)


def test_contact_sheet_has_the_frames_in_order(tmp_path):
    colors = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 0], [0, 200, 200]], dtype=np.uint8)
    frames = np.tile(colors[:, None, None], (1, 30, 40, 1))  # [5, 30, 40, 3]
    relevance.save_png(tmp_path / "sheet.png", frames)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))  # [y, x, 3]
    centers = [np.argwhere((pixels == color).all(-1)).mean(0) for color in colors]
    assert [(round(y, -2), round(x, -2)) for y, x in centers] == sorted(
        (round(y, -2), round(x, -2)) for y, x in centers
    )


def test_contact_sheet_of_images_of_different_sizes(tmp_path):
    relevance.save_png(tmp_path / "sheet.png", [noise(1, 30, 40)[0], noise(1, 50, 20)[0]], title="two")
    assert Image.open(tmp_path / "sheet.png").format == "PNG"


@pytest.fixture
def figures(monkeypatch):
    """What `save_png` would write."""
    kept = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: kept.append(figure))
    return kept


def test_the_sheet_explains_itself(figures):
    frames, times = noise(5, 30, 40), [0, 1 / 8, 1 / 3, 10.5, 100]
    relevance.save_png("sheet.png", frames, times, "a.mp4: “What?”", (0.8, 41.5), ["Color: ...", "Random: nothing."])
    [figure] = figures
    *cells, bar = figure.axes
    assert [axes.get_title() for axes in cells] == ["0 s", "0.125 s", "0.333 s", "10.5 s", "100 s"]
    assert [text.get_text() for text in figure.texts] == ["a.mp4: “What?”", "Color: ...\nRandom: nothing."]
    assert bar.get_xlabel() == "relevance, x the mean patch"
    ticks = {label.get_text(): place for label, place in zip(bar.get_xticklabels(), bar.get_xticks())}
    assert [*ticks] == ["0.8", "2", "5", "10", "20", "42"]
    for text, place in ticks.items():
        assert place == pytest.approx(np.log(float(text) / 0.8) / np.log(41.5 / 0.8), abs=0.01)
    [[*colors]] = bar.images[0].get_array()  # [256, 3]
    assert colors[0].tolist() == [128, 128, 128]
    assert colors[-1].tolist() == [223, 32, 223]  # magenta at 75 %


def test_a_bar_for_a_map_of_any_height(figures):
    for ends in ((1.0, 2.0), (1e-3, 18_432.0), (0.5, 1.2)):
        relevance.save_png("sheet.png", noise(1, 90, 30), None, "", ends)
        _, bar = figures.pop().axes
        texts = [label.get_text() for label in bar.get_xticklabels()]
        assert 2 <= len(texts) == len(set(texts)) <= 10
    relevance.save_png("sheet.png", noise(1, 90, 30), None, "", (0.0, 0.0))  # of a map of zeros
    assert len(figures.pop().axes) == 1


def test_what_the_ends_of_the_bar_stand_for():
    r = np.full((2, 5, 5), 1.0)
    r[0, 0, 0] = 51
    assert relevance.span(r) == (0.5, 25.5)
    assert relevance.span(np.ones((1, 4, 4))) == (1, 2)  # as `intensity`, which colors nothing then
    assert relevance.span(np.zeros((1, 4, 4))) == (0, 0)


def test_the_sheet_has_room_for_its_words(tmp_path):
    words = ["Color: how relevant a patch is to the question, from the median patch to the most relevant one. " * 2]
    for size in ((100, 1000), (1000, 100), (30, 40)):
        path = tmp_path / "sheet.png"
        frames = np.full((1, *size, 3), 200, dtype=np.uint8)
        relevance.save_png(path, frames, [0.5], "What?", (0.8, 41.5), words)
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)  # [y, x, 3]
        assert 450 <= pixels.shape[1] <= 1600
        assert (pixels[:, [0, -1]] == 255).all(where=(pixels[:, [0, -1]] != 200))  # no word is cut at the sides
        assert magenta(pixels).max() > 150


@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
def test_mp4_decodes_back(tmp_path, size):
    path = tmp_path / "clip.mp4"
    r = softmax_map(7, 6, 8)
    r[4, 3, 2] = 10 * r.max()
    drawn = relevance.draw(np.full((7, *size, 3), 128, dtype=np.uint8), r)
    relevance.save_mp4(path, drawn, 2.5)
    reader = open_video(path)
    assert len(reader) == 7
    assert reader.fps == pytest.approx(2.5)
    frames = reader.get_frames(range(7))
    assert frames.shape == (7, 48, 64, 3)
    frame, row, column = np.unravel_index(magenta(frames).argmax(), frames.shape[:3])
    assert (frame, row // 8, column // 8) == (4, 3, 2)
    np.testing.assert_allclose(frames[:, : size[0], : size[1]].mean(), drawn.mean(), atol=3)


@pytest.mark.parametrize(
    ("frames", "values", "message"),
    [
        (
            np.zeros((2, 4, 4, 3)),
            softmax_map(2),
            "frames must be uint8 [T, H, W, 3], got float64 of shape [2, 4, 4, 3]; pass the frames as `read_video` "
            "returns them",
        ),
        (
            noise(2, 4, 4),
            softmax_map(3),
            "relevance must be [T, h, w] with T = 2 frames, got [3, 6, 8]; pass the map of this clip",
        ),
        (
            noise(1, 4, 4),
            np.full((1, 2, 2), np.nan),
            "relevance must be finite and not negative, got other values; pass softmax probabilities",
        ),
    ],
)
def test_errors(frames, values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        relevance.draw(frames, values)
