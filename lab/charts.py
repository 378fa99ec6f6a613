"""Line and bar charts as matplotlib figures, alone or as panels, saved as inline SVG or PNG; never through pyplot."""

import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

from engine.files import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito, for any colour vision
GREY = "#636c76"
STYLE = Path(__file__).with_name("charts.mplstyle")
WIDTH, HEIGHT = 302, 205  # of a chart, in points
SIZE = (WIDTH / 72, HEIGHT / 72)  # in inches
BINS = 300  # a series of more than 2 * BINS values is drawn as the lowest and highest value of each bin
DASHED = ("limit", "target")  # not measurements
STEPPED = ("limit", "temperature")  # hold until they are set anew


@contextmanager
def _style() -> Iterator[None]:
    """Apply STYLE to matplotlib's defaults, ignoring the user's own settings."""
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # missing in the font used for measuring; the browser has another
        yield


def number(value: object) -> float | None:
    """Return a number that axes can show, or None: they overflow from 1e30 on; below 1e-30 it is 0."""
    if not isinstance(value, int | float | np.integer | np.floating) or not abs(value) < 1e30:  # also excludes NaN
        return None
    return float(value) if abs(value) > 1e-30 else 0.0


def format_number(value: float | None, percent: bool = False, digits: int = 3) -> str:
    """Format a number for display: "–", "12.3%", "52,224", "0.0123", "1.23M"."""
    if value is None:
        return "–"
    if percent:
        return f"{100 * value:.{digits}g}%"
    size, unit = next((p for p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if abs(value) >= p[0]), (1, ""))
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value / size:.{digits}g}".replace("e-0", "e-") + unit


def clean(value: object) -> str:
    """Replace control characters and lone surrogates, which are legal in JSON but not in HTML or XML."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value))


def _short(value: object, most: int) -> str:
    text = " ".join(clean(value).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _smooth(x: np.ndarray, y: np.ndarray, breaks: Sequence[float]) -> np.ndarray:
    """Return the centred moving average over 1/30 of the points; windows do not cross `breaks`, where stages begin."""
    half, smoothed = max(2, len(x) // 60), np.full(len(y), math.nan)
    window = np.ones(2 * half + 1)
    for start, end in pairwise([-math.inf, *sorted(breaks), math.inf]):
        part = np.flatnonzero((start <= x) & (x < end))
        if len(part):
            known = np.isfinite(y[part])
            total, count = (np.convolve(v, window)[half:-half] for v in (np.where(known, y[part], 0.0), known))
            smoothed[part[known]] = total[known] / count[known]
    return smoothed


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and the highest point of each bin, which keeps every spike."""
    if len(x) <= 2 * BINS:
        return x, y
    kept = []
    for part in np.array_split(np.arange(len(x)), BINS):
        known = part[np.isfinite(y[part])]
        kept += sorted({known[y[known].argmin()], known[y[known].argmax()]}) if len(known) else [part[0]]
    return x[kept], y[kept]


def _scale_y(ax: Axes, low: float, high: float, kind: str) -> None:
    """Set the scale and round ticks of the y axis, from a tick at or below `low` to one at or above `high`."""
    if kind == "log":
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        stride = max(1, math.ceil((last - first) / 6))
        ticks = 10.0 ** np.arange(first, max(last, first + 1) + stride, stride)
    else:
        if kind != "level":
            low, high = min(low, 0.0), max(high, 0.0)
        if high - low <= 1e-5 * max(abs(low), abs(high)):  # a constant
            low, high = low - abs(low) / 10, high + (abs(high) / 10 or 1.0)
        ticks = MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=1).tick_values(low, high)
        ticks = [float(f"{tick:.12g}") for tick in ticks]  # rounding errors would put 1.4 above 1.4
    ax.set(yscale="log" if kind == "log" else "linear", ylim=(ticks[0], ticks[-1]))
    ax.set_yticks(ticks, [format_number(tick, kind in ("share", "groups"), 6) for tick in ticks])
    ax.minorticks_off()


def _label(ax: Axes, title: str, x_label: str, legend: list[tuple[Artist, str]]) -> None:
    """Label the x axis; put the title and the legend above the axes."""
    handles, labels = zip(*legend, strict=True)
    style = {"title_fontproperties": {"weight": "bold", "size": 9}, "alignment": "left", "ncols": 2}
    ax.set_xlabel(_short(x_label, 40), loc="right", labelpad=1)
    ax.figure.legend(handles, labels, loc="outside upper left", title=_short(title, 48), **style)


def _line(ax: Axes, x: np.ndarray, y: np.ndarray, dots: bool, **style: object) -> Artist:
    """Draw a thinned line. Without `dots` only values between two gaps get one: they would be invisible."""
    x, y = _thin(x, y)
    known = np.isfinite(np.pad(y, 1, constant_values=math.nan))
    marked = known[1:-1] & (dots | ~(known[:-2] | known[2:]))
    marks = {"marker": "o", "markevery": np.flatnonzero(marked).tolist()} if marked.any() else {}
    return ax.plot(x, y, clip_on=False, **style, **marks)[0]


def line_chart(
    title: str,
    series: dict[str, list[tuple[float, float | None]]],
    kind: str = "amount",
    rules: Sequence[tuple[float, str]] = (),
    x_label: str = "step",
    smooth: bool = True,
    band: dict[str, list[tuple[float, float | None, float | None]]] | None = None,
    zones: Sequence[tuple[float, float, str]] = (),
    figure: FigureBase | None = None,
) -> FigureBase | None:
    """Draw a line per series, with gaps at None and NaN. Return None if no series has two values.

    `kind` is the y axis: "amount" (from 0), "share" or "groups" (%), "level" (may leave out 0) or "log".
    `rules`: (x, label) of vertical lines, where stages begin. `smooth`: series of 30 values and more are drawn faint,
    with a moving average on top. `band`: (x, low, high) of an interval, by series. `zones`: (from, to, label) of
    shaded spans of x. `figure`: the figure to draw on, by default a new one."""

    def y_of(value: float | None) -> float:
        value = number(value)
        return math.nan if value is None or (kind == "log" and value <= 0) else value  # log(0)

    xs = [x for points in series.values() for x, _ in points]  # of gaps too, so that charts align
    lines = {label: np.array([(x, y_of(y)) for x, y in points]).reshape(-1, 2).T for label, points in series.items()}
    lines = {label: line for label, line in lines.items() if np.isfinite(line[1]).any()}
    if all(np.isfinite(y).sum() < 2 for _, y in lines.values()):
        return None
    bands = {label: [(x, y_of(low), y_of(high)) for x, low, high in (band or {}).get(label, ())] for label in lines}
    bands = {label: [ends for ends in rows if np.isfinite(ends).all()] for label, rows in bands.items()}
    values = np.concatenate([y for _, y in lines.values()] + [ends[1:] for rows in bands.values() for ends in rows])
    x0, x1 = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0] - 0.5, xs[0] + 0.5)
    with _style():
        figure = figure or Figure(SIZE, label=title)
        ax = figure.add_subplot(xlim=(x0, x1))
        _scale_y(ax, np.nanmin(values), np.nanmax(values), kind)
        integers = all(x == round(x) for x in xs)  # such as steps
        ax.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=integers, min_n_ticks=1))
        ax.xaxis.set_major_formatter(lambda x, _: format_number(x, digits=6))
        legend = []
        for i, (label, (x, y)) in enumerate(lines.items()):
            known, limit = np.isfinite(y), label in DASHED
            style = {"color": GREY if limit else COLOURS[i % 6], "linestyle": "--" if limit else "-:"[i // 6 % 2]}
            style["dots"] = known.sum() <= 40 and not limit
            style["drawstyle"] = "steps-post" if label in STEPPED else "default"
            if bands[label]:
                ax.fill_between(*np.array(bands[label]).T, color=style["color"], alpha=0.16, linewidth=0)
            if smooth and not limit and known.sum() >= 30:
                _line(ax, x, y, **style, linewidth=0.7, alpha=0.3, zorder=1.9)
                y = _smooth(x, y, [start for start, _ in rules])
            line = _line(ax, x, y, **style, linewidth=1.25)
            last = format_number(y[known][-1], kind in ("share", "groups"))
            legend.append((line, f"{_short(label, 24)} {last}"))
        for i, (start, end, label) in enumerate(zones):
            if max(start, x0) < min(end, x1):  # colours from the end, unlike the lines
                span = ax.axvspan(max(start, x0), min(end, x1), color=COLOURS[-1 - i % 6], alpha=0.15, linewidth=0)
                legend.append((span, _short(label, 30)))
        taken = 0.0  # share of the width that rule labels occupy so far
        for x, label in rules:
            if x0 <= x <= x1:
                ax.axvline(x, color="#8c959f", linewidth=0.7, linestyle=(0, (3, 3)), zorder=1)
                label = _short(label, 30)
                width = 0.018 * len(label)  # letters of average width
                place = max(0.0, min((x - x0) / (x1 - x0), 1 - width))
                if place >= taken:  # else there is no room: the previous stage is short
                    taken = place + width + 0.02
                    above = {"xycoords": "axes fraction", "textcoords": "offset points", "color": GREY}
                    ax.annotate(label, (place, 1), (0, 4), **above)
        _label(ax, title, x_label, legend)
    return figure


def bar_chart(title: str, groups: dict[str, list[float]], x_label: str) -> Figure | None:
    """Draw each group's counts of 0, 1, 2, ... as bars, the first group hollow. Return None if all counts are 0."""
    groups = {label: [number(count) or 0.0 for count in counts] for label, counts in groups.items()}
    most = max((count for counts in groups.values() for count in counts), default=0)
    if not most:
        return None
    slots, width, legend = max(map(len, groups.values())), 0.8 / len(groups), []
    with _style():
        figure = Figure(SIZE, label=title)
        ax = figure.add_subplot(xlim=(-0.5, slots - 0.5), xticks=range(slots)[:: math.ceil(slots / 16)])
        for g, (label, counts) in enumerate(groups.items()):
            style = {"color": COLOURS[(g - 1) % 6]} if g else {"facecolor": "none", "edgecolor": GREY}
            x = np.arange(len(counts)) - 0.4 + (g + 0.5) * width
            legend.append((ax.bar(x, counts, width * 0.9, **style), f"{_short(label, 24)} {sum(counts):,.0f}"))
        _scale_y(ax, 0.0, most, "amount")
        _label(ax, title, x_label, legend)
    return figure


def panels(title: str, charts: Sequence[dict], columns: int = 3) -> Figure:
    """Draw several charts on one figure; each is the keyword arguments of `line_chart`."""
    rows = math.ceil(len(charts) / columns)
    with _style():
        figure = Figure((columns * WIDTH / 72, (rows * HEIGHT + 30) / 72), label=title)
        figure.suptitle(_short(title, 80), x=4 / WIDTH / columns, ha="left", size=13, weight="bold")
        parts = figure.subfigures(rows, columns, squeeze=False).flat
        for chart, part in zip(charts, parts, strict=False):
            if line_chart(**chart, figure=part) is None:
                part.text(4 / WIDTH, 1 - 4 / HEIGHT, f"{_short(chart['title'], 40)}: no data yet", va="top", size=9)
    return figure


def _save(figure: Figure, file_format: str, **metadata: None) -> bytes:
    file = io.BytesIO()
    with _style():
        figure.savefig(file, format=file_format, metadata=metadata)
    return file.getvalue()


def svg(figure: Figure) -> str:
    """Return the figure as an <svg> element for an HTML page; equal figures give equal text.

    Ids are hashes of their content, so figures of one page may share them. To save the element as a file, add
    xmlns="http://www.w3.org/2000/svg"."""

    def shorten(tag: re.Match) -> str:  # text written by a model is never in a tag: its < and > are escaped
        tag = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=^<g) id="[^"]*"|\n', "", tag[0].replace(" xlink:href", " href"))
        return re.sub(r"\d+\.\d{2,}", lambda digits: f"{float(digits[0]):.4g}", tag)

    text = _save(figure, "svg", Date=None, Creator=None, Format=None, Type=None).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, count=1, flags=re.S)  # it would apply to the rest of the page
    text = re.sub(r"<[^<>]+>\s*", shorten, text)
    head = f' role="img" stroke-linejoin="round"><title>{html.escape(clean(figure.get_label()))}</title>'
    return text.replace(">", head, 1)


def png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG; equal figures give equal bytes."""
    write_atomically(path, [_save(figure, "png", Software=None)])
