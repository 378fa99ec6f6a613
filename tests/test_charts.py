"""lab/charts.py: positions of what is drawn, read from the figures, and the contents of the SVG and the PNG."""

import math
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lab import charts

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'\x00\ud800"
ELEMENTS = {"svg", "title", "defs", "g", "path", "text", "use", "clipPath", "rect"}


def curves(figure) -> list:
    """The lines of the series; the y of a rule is in axes coordinates, not in data."""
    return [line for line in figure.axes[0].lines if line.get_transform() == figure.axes[0].transData]


def rules(figure) -> list[float]:
    return [line.get_xdata()[0] for line in figure.axes[0].lines if line not in curves(figure)]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def noisy(n: int, seed: int = 0) -> list[tuple[float, float]]:
    draw = random.Random(seed)
    return [(x, draw.random()) for x in range(n)]


def rich():
    """A chart with every element."""
    series = {f"series {i}": noisy(100, i) for i in range(2)} | {"target": [(x, 0.6) for x in range(100)]}
    band = {"series 1": [(x, y - 0.1, y + 0.1) for x, y in noisy(100, 1)]}
    zones = [(0, 50, "Robust Generation"), (50, 60, "Controlled Exploration"), (60, 99, "Performance Collapse")]
    return charts.line_chart("All", series, "amount", [(0, "SFT 1"), (55, "chosen 1.2")], band=band, zones=zones)


def test_a_curve_is_drawn_at_the_coordinates_of_its_values():
    figure = charts.line_chart("t", {"a": [(0, 0.0), (5, 0.5), (10, 1.0)]}, "share")
    (line,) = curves(figure)
    assert line.get_xydata().tolist() == [[0, 0], [5, 0.5], [10, 1]]
    ax = figure.axes[0]
    assert ax.get_xlim() == (0, 10) and ax.get_ylim() == (0, 1)
    assert figure.legends[0].get_title().get_text() == "t"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0%", "20%", "40%", "60%", "80%", "100%"]
    path = next(p for p in ElementTree.fromstring(charts.svg(figure)).iter("path") if "#0072b2" in p.get("style", ""))
    drawn = [tuple(map(float, point)) for point in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d"))]
    box = ax.get_position()
    left, right, middle = (charts.WIDTH * x for x in (box.x0, box.x1, (box.x0 + box.x1) / 2))
    floor, top, half = (charts.HEIGHT * (1 - y) for y in (box.y0, box.y1, (box.y0 + box.y1) / 2))
    assert drawn == [pytest.approx(point, abs=0.1) for point in ((left, floor), (middle, half), (right, top))]


def test_numpy_numbers_are_accepted():
    points = [(0, np.float32(0.5)), (np.int64(1), np.int64(2))]
    assert curves(charts.line_chart("t", {"a": points}))[0].get_ydata().tolist() == [0.5, 2]


@pytest.mark.parametrize("gap", [None, math.nan, math.inf])
def test_a_missing_value_is_a_gap_at_its_own_x(gap):
    figure = charts.line_chart("t", {"a": [(0, 1.0), (1, 2.0), (2, gap), (3, 3.0), (4, gap)]})
    x, y = curves(figure)[0].get_data()
    assert x.tolist() == [0, 1, 2, 3, 4] and np.isnan(y).tolist() == [False, False, True, False, True]
    assert figure.axes[0].get_xlim() == (0, 4) and legend(figure) == ["a 3"]


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(0, None), (1, math.nan)]}])
def test_without_values_there_is_no_figure(series):
    assert charts.line_chart("t", series) is None
    assert charts.line_chart("t", {"a": [(0, 1.0), (1, None)], "b": [(1, 2.0)]}) is None  # a point is no curve


def test_a_series_without_values_is_left_out_of_the_legend():
    assert legend(charts.line_chart("t", {"none": [(0, None)], "some": [(0, 1.0), (1, 2.0)]})) == ["some 2"]


def test_a_value_between_two_gaps_is_a_dot_and_a_long_line_has_no_others():
    points = [(x, 1.0 if x % 3 == 0 or x > 100 else None) for x in range(200)]
    (line,) = curves(charts.line_chart("t", {"a": points}, smooth=False))
    assert line.get_marker() == "o" and line.get_markevery() == list(range(0, 100, 3))
    (line,) = curves(charts.line_chart("t", {"a": noisy(200)}, smooth=False))
    assert line.get_marker() == "None"
    (line,) = curves(charts.line_chart("t", {"a": noisy(20)}))
    assert line.get_marker() == "o" and len(line.get_markevery()) == 20


def test_smoothing_matches_a_plain_average_that_stops_at_stage_boundaries():
    draw = random.Random(1)
    points = [(x, None if x == 50 else draw.random() + (x >= 200)) for x in range(300)]
    faint, bold = curves(charts.line_chart("t", {"a": points}, rules=[(200, "RL 2")]))
    assert faint.get_alpha() == 0.3 and np.array_equal(faint.get_ydata()[51:], [y for _, y in points[51:]])
    half = 300 // 60
    for x, y in bold.get_xydata():
        near = [v for u, v in points if abs(u - x) <= half and (u >= 200) == (x >= 200) and v is not None]
        assert np.isnan(y) if x == 50 else y == pytest.approx(sum(near) / len(near))


def test_a_stage_shorter_than_the_window_is_averaged_alone():
    points = [(x, float(x >= 150)) for x in range(300)]
    _, bold = curves(charts.line_chart("t", {"a": points}, rules=[(150, "a"), (152, "b")]))
    assert bold.get_ydata().tolist() == [y for _, y in points]


def test_short_series_and_limits_are_not_smoothed():
    assert len(curves(charts.line_chart("t", {"a": noisy(29)}))) == 1
    assert len(curves(charts.line_chart("t", {"a": noisy(30)}))) == 2
    (limit,) = curves(charts.line_chart("t", {"limit": [(x, 96.0 + 64 * (x > 50)) for x in range(99)]}))
    assert limit.get_linestyle() == "--" and set(limit.get_ydata()) == {96, 160}


def test_a_huge_value_does_not_distort_the_average_elsewhere():
    points = [(x, 1e29 if x == 0 else 1e-3) for x in range(100)]
    _, bold = curves(charts.line_chart("t", {"a": points}))
    assert bold.get_ydata()[50:] == pytest.approx(1e-3)


def test_a_long_series_is_thinned_without_losing_its_spikes():
    points = [list(point) for point in noisy(10_000)]
    points[1777][1], points[7100][1], points[5000][1] = 40.0, -40.0, None
    faint, bold = curves(charts.line_chart("t", {"a": points}))
    x, y = faint.get_data()
    assert len(x) <= 2 * charts.BINS and np.all(np.diff(x) > 0) and len(bold.get_xdata()) <= 2 * charts.BINS
    assert (1777, 40.0) in zip(x, y, strict=True) and (7100, -40.0) in zip(x, y, strict=True)
    gap = [(x, None if 2000 <= x < 4000 else 1.0) for x in range(10_000)]
    (line,) = curves(charts.line_chart("t", {"a": gap}, smooth=False))
    assert np.isnan(line.get_ydata()).sum() == pytest.approx(charts.BINS / 5, abs=2)


def test_the_band_spans_the_interval_of_its_series_and_skips_unknown_ends():
    series = {"first": [(0, 0.9), (10, 0.9)], "avg": [(0, 0.25), (5, 0.5), (10, 0.75)]}
    band = {"avg": [(0, 0.0, 0.5), (5, None, None), (10, 0.5, 1.2)], "not drawn": [(0, 7, 9)]}
    figure = charts.line_chart("t", series, "share", band=band)
    (area,) = figure.axes[0].collections
    corners = {tuple(corner) for corner in area.get_paths()[0].vertices.tolist()}
    assert corners == {(0, 0), (0, 0.5), (10, 0.5), (10, 1.2)} and figure.axes[0].get_ylim()[1] >= 1.2
    assert matplotlib.colors.to_hex(area.get_facecolor()[0]) == curves(figure)[1].get_color().lower()


def test_a_band_that_reaches_0_is_left_out_on_a_log_axis():
    figure = charts.line_chart("t", {"a": [(0, 1.0), (1, 2.0)]}, "log", band={"a": [(0, 0.0, 2.0), (1, 1.0, 3.0)]})
    assert figure.axes[0].get_ylim() == (1, 10)


def test_zones_are_shaded_within_the_axes_and_labelled():
    zones = [(0.0, 1.1, "Robust Generation"), (1.1, 1.4, "Controlled Exploration"), (1.4, 9.0, "Performance Collapse")]
    figure = charts.line_chart("t", {"a": [(0.4, 1.0), (1.8, 0.0)]}, x_label="temperature", zones=zones)
    spans = [patch.get_extents().transformed(figure.axes[0].transData.inverted()) for patch in figure.axes[0].patches]
    assert [(span.x0, span.x1) for span in spans] == [
        pytest.approx(ends) for ends in ((0.4, 1.1), (1.1, 1.4), (1.4, 1.8))
    ]
    assert legend(figure) == ["a 0"] + [label for *_, label in zones]
    handles = figure.legends[0].legend_handles[1:]
    assert [h.get_facecolor() for h in handles] == [patch.get_facecolor() for patch in figure.axes[0].patches]
    assert len({h.get_facecolor() for h in handles}) == 3


def test_rules_mark_stage_starts_and_labels_of_short_stages_are_left_out():
    figure = charts.line_chart("t", {"a": noisy(100)}, rules=[(-5, "before"), (0, "SFT 1"), (2, "RL 1"), (60, "RL 2")])
    assert rules(figure) == [0, 2, 60] and [text.get_text() for text in figure.axes[0].texts] == ["SFT 1", "RL 2"]


def overlaps(figure) -> list[tuple[str, str]]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    unseen = [tick.label1 for ax in figure.axes for tick in ax.xaxis.get_major_ticks()
              if not ax.get_xlim()[0] <= tick.get_loc() <= ax.get_xlim()[1]]  # beyond the axis: never drawn
    shown = [text for text in figure.findobj(matplotlib.text.Text) if text.get_visible() and text not in unseen]
    texts = [text for text in shown if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[i + 1 :] if one.overlaps(other)]


def test_texts_do_not_overlap_or_leave_the_chart():
    types = {f"{'multiplication of'[: 4 + i]} {i}": [(x, i * 1000.0) for x in range(50)] for i in range(12)}
    stages = [(0, "SFT 1"), (3, "RL 1"), (20, "RL 2"), (48, "RL 3"), (49, "RL 4")]
    zones = [(0, 1, "Robust Generation"), (1, 4, "Controlled Exploration"), (4, 49, "Performance Collapse")]
    late = [(0, 40, "Robust Generation"), (40, 48, "Controlled Exploration"), (48, 49, "Performance Collapse")]
    for figure in (
        rich(), charts.line_chart("Twelve", types, rules=stages), charts.line_chart("t", types, zones=zones),
        charts.line_chart("x" * 99, {"a": noisy(100_000)}, "log", stages, zones=late),
        charts.line_chart("t", {"a": [(0, -2e5), (100_000, 4e5)]}, x_label="tokens"),
        charts.bar_chart("Difficulty", {"before": range(9), "after": [99_999] * 9}, "rollouts right of 8"),
        charts.panels("name", [dict(title=f"t{i}", series=types, rules=stages) for i in range(5)]),
    ):  # fmt: skip
        assert not overlaps(figure)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (1.4, 1.5), (3, 3), (-2e-6, 5e-6), (0, 0), (-1e29, 1e29), (5, 52224),
                                       (1, 1 + 1e-6), (99_990, 100_000)])  # fmt: skip
def test_the_y_axis_spans_the_values_with_a_few_distinct_ticks(low, high):
    for kind in ("level", "amount", "share", "groups"):
        ax = charts.line_chart("t", {"a": [(0, low), (1, high)]}, kind).axes[0]
        ticks, labels = ax.get_yticks(), [label.get_text() for label in ax.get_yticklabels()]
        assert ticks[0] <= low and ticks[-1] >= high and ax.get_ylim() == (ticks[0], ticks[-1])
        assert 2 <= len(ticks) <= 8 and len(set(labels)) == len(labels)
        assert kind == "level" or ticks[0] <= 0 <= ticks[-1]


@pytest.mark.parametrize("low, high", [(1e-6, 3e-5), (2.0, 3.0), (10.0, 10.0), (1e-29, 1e29)])
def test_a_log_axis_spans_decades_and_0_is_a_gap(low, high):
    figure = charts.line_chart("t", {"a": [(0, low), (1, 0.0), (2, -1.0), (3, high)]}, "log")
    ax = figure.axes[0]
    ticks = ax.get_yticks()
    assert ax.get_yscale() == "log" and ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
    assert np.isnan(curves(figure)[0].get_ydata()).tolist() == [False, True, True, False]
    assert charts.line_chart("t", {"a": [(0, 0.0)]}, "log") is None


def test_steps_have_integer_ticks():
    for last in (1, 2, 99):
        ax = charts.line_chart("t", {"a": [(x, 1.0) for x in range(last + 1)]}).axes[0]
        assert len(ax.get_xticks()) and all(tick == round(tick) for tick in ax.get_xticks())
    assert 0.2 in charts.line_chart("t", {"a": [(0.1, 1.0), (0.9, 1.0)]}).axes[0].get_xticks()


@pytest.mark.parametrize("kind", ["amount", "share", "level", "log"])
def test_extreme_values_never_raise(kind):
    for value in [5e-324, -5e-324, 1e308, 10**400, True, math.nan, -math.inf, 0, "1", [2]]:
        text = charts.svg(charts.line_chart("t", {"a": [(0, value), (1, 1e-29), (2, 1e-29)]}, kind))
        assert not [
            d for node in ElementTree.fromstring(text).iter() if "nan" in (d := node.get("d", "")) or "inf" in d
        ]


def test_twelve_series_have_distinct_styles():
    figure = charts.line_chart("t", {str(i): [(0, i), (1, i)] for i in range(12)})
    assert len({(line.get_color(), line.get_linestyle()) for line in curves(figure)}) == 12
    assert {line.get_linestyle() for line in curves(figure)[:6]} == {"-"}


def test_bars_have_the_height_of_their_counts_and_the_first_group_is_hollow():
    figure = charts.bar_chart("t", {"before": [3, 0, 5], "after": [1, math.nan]}, "rollouts right of 2")
    before, after = figure.axes[0].containers
    assert [bar.get_height() for bar in before] == [3, 0, 5] and [bar.get_height() for bar in after] == [1, 0]
    assert before[0].get_facecolor()[3] == 0 and after[0].get_facecolor()[3] == 1
    assert [round(bar.get_center()[0]) for bar in before] == [0, 1, 2] == figure.axes[0].get_xticks().tolist()
    assert before[0].get_x() + before[0].get_width() <= after[0].get_x()
    assert legend(figure) == ["before 8", "after 1"] and figure.axes[0].get_ylim()[1] >= 5
    assert charts.bar_chart("t", {}, "x") is charts.bar_chart("t", {"before": [0, 0]}, "x") is None


def test_panels_draw_the_lines_of_single_charts_and_name_those_without_data():
    options = dict(title="One", series={"a": noisy(40)}, kind="level", rules=[(20, "RL 1")])
    figure = charts.panels("run $x$", [options, dict(title="Two", series={})])
    alone = charts.line_chart(**options)
    for one, other in zip(figure.axes[0].lines, alone.axes[0].lines, strict=True):
        assert np.array_equal(one.get_xydata(), other.get_xydata())
    texts = [node.text for node in ElementTree.fromstring(charts.svg(figure)).iter("text")]
    assert {"run $x$", "One", "RL 1", "Two: no data yet"} <= set(texts)


@pytest.mark.filterwarnings("error")  # such as a missing glyph: the user can do nothing about it
@pytest.mark.parametrize("text", [HOSTILE, r"costs $5 \frac{1}{", "_hidden", "two\nlines", "中文", "",
                                  ' id="line2d_1" ', "<g id='x'> xlink:href 1.23456", "%d {0}"])  # fmt: skip
def test_model_output_is_escaped_wherever_it_is_drawn(text):
    line = charts.line_chart(text, {text: noisy(40)}, rules=[(0, text)], x_label=text, zones=[(0, 9, text)])
    for figure in (
        line,
        charts.bar_chart(text, {text: [1, 2]}, text),
        charts.panels(text, [dict(title=text, series={})]),
    ):
        root = ElementTree.fromstring(charts.svg(figure))
        assert {node.tag for node in root.iter()} <= ELEMENTS
        assert not [name for node in root.iter() for name in node.attrib if name.startswith("on")]
        assert root.find("title").text in (charts.clean(text), None)
    root = ElementTree.fromstring(charts.svg(line))
    texts, shown = [node.text for node in root.iter("text")], " ".join(charts.clean(text).split())
    if shown:
        assert sum(t == shown for t in texts) == sum(len(shown) <= most for most in (48, 40, 30, 30))
    assert sum(t.startswith(shown[:23]) and t != shown for t in texts) >= 1  # the legend


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    assert charts.svg(rich()) == charts.svg(rich())
    for name in ("a.png", "b.png"):
        charts.png(rich(), tmp_path / name)
    written = (tmp_path / "a.png").read_bytes()
    assert written == (tmp_path / "b.png").read_bytes() and written.startswith(b"\x89PNG") and b"tEXt" not in written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_ids_shared_by_figures_are_the_same_element_and_every_reference_is_defined():
    texts = [charts.svg(figure) for figure in (rich(), rich(), charts.line_chart("t", {"a": noisy(9)}))]
    defined: dict[str, bytes] = {}
    for text in texts:
        root = ElementTree.fromstring(text)
        ids = {node.get("id"): ElementTree.tostring(node) for node in root.iter() if node.get("id")}
        assert set(re.findall(r'url\(#(\w+)\)|href="#(\w+)"', text)) and all(
            (clip or used) in ids for clip, used in re.findall(r'url\(#(\w+)\)|href="#(\w+)"', text)
        )
        assert all(defined.setdefault(name, element) == element for name, element in ids.items())


def test_the_svg_is_one_small_element_without_style_sheet_or_url():
    text = charts.svg(rich())
    assert text.startswith("<svg ") and text.rstrip().endswith("</svg>") and len(text) < 40_000
    assert not re.search(r"https?:|<style|<\?xml|<!DOCTYPE|<metadata|\n", text)
    assert {"series 0", "All"} <= {re.sub(r" [\d.]+$", "", t) for t in re.findall(r"<text[^>]*>([^<]*)", text)}


def test_the_users_matplotlib_settings_change_nothing(monkeypatch):
    ours = charts.svg(rich())
    for key, value in {"axes.facecolor": "red", "font.size": 30.0, "axes.grid": False, "lines.linewidth": 9.0}.items():
        monkeypatch.setitem(matplotlib.rcParams, key, value)
    assert charts.svg(rich()) == ours and matplotlib.rcParams["font.size"] == 30


def test_drawing_leaves_the_settings_alone_and_never_imports_pyplot():
    before = dict(matplotlib.rcParams)
    charts.svg(rich())
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys; from lab import charts; charts.svg(charts.line_chart('t', {'a': [(0, 1.0), (1, 2.0)]})); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(charts.__file__).parent.parent)


@pytest.mark.parametrize("value, text", [(None, "–"), (0, "0"), (0.01234, "0.0123"), (52224, "52,224"),
                                         (1.234e6, "1.23M"),
                                         (2e-5, "2e-5"), (-1500.4, "-1,500"), (3e12, "3T")])  # fmt: skip
def test_number_formats(value, text):
    assert charts.format_number(value) == text
    assert charts.format_number(0.123, percent=True) == "12.3%"
