"""Charts as matplotlib figures: lines and bars, alone or as panels, as inline SVG or PNG.

Never pyplot, whose figures are global. matplotlib is imported inside functions: train.py imports this room at its
start, and the second that matplotlib takes is a report's to pay, not every training process's.
"""

import html
import io
import math
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: for any colour vision
INK, GREY, GRID = "#1f2328", "#636c76", "#e6e8eb"
LOOK = {
    **dict.fromkeys(("axes.edgecolor", "grid.color"), GRID),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("axes.titlecolor", "legend.labelcolor"), INK),
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top", "xtick.bottom", "ytick.left"), False),
    **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.titlesize": 9, "font.size": 7.5},
    **{"axes.titleweight": "bold", "lines.markersize": 3.5, "legend.frameon": False, "savefig.dpi": 200},
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same layout on every machine
    "text.parse_math": False,  # a $ of a problem is a dollar
    **{"svg.fonttype": "none", "svg.hashsalt": "charts"},  # text stays text, ids stay the same
}
LOCK = threading.RLock()
WIDTH, HEIGHT, LEFT, RIGHT, BELOW = 302, 205, 40, 16, 26  # of a chart and its margins for tick labels, in points
BINS = 300  # a longer series is drawn as the lowest and the highest value of so many bins
DASHED = ("max_response_tokens", "target")  # limits and targets, not measurements


@contextmanager
def _look() -> Iterator[None]:
    """This file's settings over matplotlib's own, whatever the machine's are; they are global, hence the lock."""
    import matplotlib.style

    with LOCK, matplotlib.style.context(["default", LOOK]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # one that the measuring font lacks; a browser finds another font
        yield


def number(value: object) -> float | None:
    """A number that axes can show, or None; beyond 1e-30 and 1e30 they would overflow."""
    if not isinstance(value, int | float | np.integer | np.floating) or not abs(value) < 1e30:  # NaN, too, is not below
        return None
    return float(value) if abs(value) > 1e-30 else 0.0


def format_number(value: float | None, percent: bool = False, digits: int = 3) -> str:
    """A number for people: "–", "12.3%", "52,224", "0.0123", "1.23M"."""
    if value is None:
        return "–"
    if percent:
        return f"{100 * value:.{digits}g}%"
    size, unit = next((p for p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if abs(value) >= p[0]), (1, ""))
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value / size:.{digits}g}".replace("e-0", "e-") + unit


def clean(value: object) -> str:
    """Text without control characters and lone surrogates, which are legal in JSON but not in HTML or XML."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value))


def _short(value: object, most: int) -> str:
    text = " ".join(clean(value).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _smooth(x: np.ndarray, y: np.ndarray, breaks: Sequence[float]) -> np.ndarray:
    """A centred moving average over 1/30 of the points, that never averages across a stage's beginning."""
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
    """The lowest and the highest point of each bin, so that no spike is lost."""
    if len(x) <= 2 * BINS:
        return x, y
    kept = []
    for part in np.array_split(np.arange(len(x)), BINS):
        known = part[np.isfinite(y[part])]
        kept += sorted({known[y[known].argmin()], known[y[known].argmax()]}) if len(known) else [part[0]]
    return x[kept], y[kept]


def _ticks(low: float, high: float, kind: str, most: int = 5, whole: bool = False) -> np.ndarray:
    """Round ticks from below `low` to above `high`."""
    from matplotlib.ticker import MaxNLocator

    if kind == "log":
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        stride = max(1, math.ceil((last - first) / 6))
        return 10.0 ** np.arange(first, max(last, first + 1) + stride, stride)
    if kind != "level":
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-5 * max(abs(low), abs(high)):  # a constant
        low, high = low - abs(low) / 10, high + (abs(high) / 10 or 1.0)
    ticks = MaxNLocator(most, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1).tick_values(low, high)
    return np.array([float(f"{tick:.12g}") for tick in ticks])  # without rounding errors, which put 1.4 above 1.4


def _axes(figure: "Figure", left: float = 0, bottom: float = 0) -> "Axes":
    """Axes for one chart, whose lower left corner is there, in points."""
    across, up = 72 * figure.get_size_inches()
    size = ((WIDTH - LEFT - RIGHT) / across, (HEIGHT - BELOW) / up)
    return figure.add_axes(((left + LEFT) / across, (bottom + BELOW) / up, *size))


def _frame(ax: "Axes", title: str, legend: "list[tuple[Artist, str]]", x_label: str, strips: int = 0) -> None:
    """Title and legend above the axes, which make room for them and for `strips` lines of labels in between."""
    rows, strips = math.ceil(len(legend) / 2), 9 * strips + 6
    height, margin = HEIGHT - BELOW - 16 - 11 * rows - strips, (4 - LEFT) / (WIDTH - LEFT - RIGHT)
    x, y, across, up = ax.get_position().bounds
    ax.set_position((x, y, across, up * height / (HEIGHT - BELOW)))
    ax.set_title(_short(title, 48), loc="left", x=margin, pad=strips + 11 * rows + 3)
    handles, labels = zip(*legend, strict=True)
    place = {"loc": "lower left", "bbox_to_anchor": (margin, 1 + strips / height), "borderpad": 0, "borderaxespad": 0}
    gaps = {"handlelength": 1.3, "handletextpad": 0.5, "columnspacing": 1.2, "labelspacing": 0.45}
    ax.legend(handles, labels, ncols=2, **place, **gaps)
    ax.set_xlabel(_short(x_label, 40), loc="right", labelpad=1)


def _above(ax: "Axes", x: float, label: str, strip: int, free: float, centre: bool = False) -> float:
    """A label at `x` in a strip above the axes, unless something there reaches as far as `free`; centred ones make way.

    Returns where the strip is free from then on; in parts of the axes' width, by an average letter."""
    width, at = 4.3 * len(label) / (WIDTH - LEFT - RIGHT), ax.transLimits.transform((x, 0))[0]
    start = max(0.0, min(at - width / 2 * centre, 1.0 - width))
    start = max(start, free) if centre else start
    if start < free or start + width > 1.05:
        return free
    from_axes = {"xycoords": "axes fraction", "textcoords": "offset points"}
    ax.annotate(label, (start, 1), (0, 9 * strip + 4), annotation_clip=False, **from_axes)
    return start + width + 0.02


def _line(ax: "Axes", x: np.ndarray, y: np.ndarray, dots: bool, **style: object) -> "Artist":
    """A line, thinned; without `dots` only values between two gaps have one, which would not show otherwise."""
    x, y = _thin(x, y)
    there = np.isfinite(np.pad(y, 1, constant_values=math.nan))
    marked = there[1:-1] & (dots | ~(there[:-2] | there[2:]))
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
    ax: "Axes | None" = None,
) -> "Figure | None":
    """A line for each series; None where none has a value to draw. None and NaN are gaps.

    `kind` is the y axis: "amount" (from 0), "share" or "groups" (%), "level" (0 need not show) or "log".
    `rules`: (x, label) of vertical lines, where stages begin. `smooth`: series of 30 values and more are drawn faint,
    with a moving average on top. `band`: (x, low, high) of an interval, by series. `zones`: (from, to, label) of
    shaded spans of x. `ax`: draws there, instead of on a figure of its own."""
    from matplotlib.figure import Figure

    def y_of(value: float | None) -> float:
        value = number(value)
        return math.nan if value is None or (kind == "log" and value <= 0) else value  # 0 has no place on a log axis

    xs = [x for points in series.values() for x, _ in points]  # also of gaps, so that charts align
    lines = {label: np.array([(x, y_of(y)) for x, y in points]).reshape(-1, 2).T for label, points in series.items()}
    lines = {label: line for label, line in lines.items() if np.isfinite(line[1]).any()}
    if not lines:
        return None
    bands = {label: [(x, y_of(low), y_of(high)) for x, low, high in (band or {}).get(label, ())] for label in lines}
    bands = {label: [row for row in rows if np.isfinite(row[1:]).all()] for label, rows in bands.items()}
    values = [y for _, y in lines.values()] + [row[1:] for rows in bands.values() for row in rows]
    values = np.concatenate(values)
    ticks, percent = _ticks(np.nanmin(values), np.nanmax(values), kind), kind in ("share", "groups")
    x0, x1 = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0] - 0.5, xs[0] + 0.5)
    with _look():
        ax = ax or _axes(Figure((WIDTH / 72, HEIGHT / 72), label=title))
        ax.set(xlim=(x0, x1), yscale="log" if kind == "log" else "linear", ylim=(ticks[0], ticks[-1]))
        ax.minorticks_off()
        ax.set_yticks(ticks, [format_number(tick, percent, 6) for tick in ticks])
        whole, edge = all(x == round(x) for x in xs), 1e-9 * (x1 - x0)  # there is no half step; of rounding
        x_ticks = [tick for tick in _ticks(x0, x1, "level", 7, whole) if x0 - edge <= tick <= x1 + edge]
        ax.set_xticks(x_ticks, [format_number(tick, digits=6) for tick in x_ticks])
        free = [0.0, 0.0, 0.0]  # of the three strips: two for zones, in turn, and one for rules
        for i, (start, end, label) in enumerate(zones):
            start, end = max(start, x0), min(end, x1)
            if start < end:
                ax.axvspan(start, end, color=COLOURS[i % 6], alpha=0.07, linewidth=0)
                free[i % 2] = _above(ax, (start + end) / 2, _short(label, 30), i % 2, free[i % 2], centre=True)
        for x, label in rules:
            if x0 <= x <= x1:
                ax.axvline(x, color="#8c959f", linewidth=0.7, linestyle=(0, (3, 3)), zorder=1)
                free[2] = _above(ax, x, _short(label, 30), 2 * bool(zones), free[2])
        legend = []
        for i, (label, (x, y)) in enumerate(lines.items()):
            known, limit = np.isfinite(y), label in DASHED
            style = {"color": GREY if limit else COLOURS[i % 6], "linestyle": "--" if limit else "-:"[i // 6 % 2]}
            style["dots"] = known.sum() <= 40 and not limit
            if bands[label]:
                ax.fill_between(*np.array(bands[label]).T, color=style["color"], alpha=0.16, linewidth=0)
            if smooth and not limit and known.sum() >= 30:
                _line(ax, x, y, **style, linewidth=0.7, alpha=0.3, zorder=1.9)
                y = _smooth(x, y, [start for start, _ in rules])
            line = _line(ax, x, y, **style, linewidth=1.25)
            legend.append((line, f"{_short(label, 24)} {format_number(y[known][-1], percent)}"))
        _frame(ax, title, legend, x_label, 2 * bool(zones) + bool(rules))
    return ax.figure


def bar_chart(title: str, groups: dict[str, list[float]], x_label: str) -> "Figure | None":
    """Counts of 0, 1, 2, ... as bars side by side, the first group hollow, the others filled; None without a count."""
    from matplotlib.figure import Figure

    groups = {label: [number(count) or 0.0 for count in counts] for label, counts in groups.items()}
    most = max((count for counts in groups.values() for count in counts), default=0)
    if not most:
        return None
    slots, ticks, width = max(map(len, groups.values())), _ticks(0.0, most, "amount"), 0.8 / len(groups)
    with _look():
        ax = _axes(Figure((WIDTH / 72, HEIGHT / 72), label=title))
        legend = []
        for g, (label, counts) in enumerate(groups.items()):
            style = {"color": COLOURS[(g - 1) % 6]} if g else {"facecolor": "none", "edgecolor": GREY}
            x = np.arange(len(counts)) - 0.4 + (g + 0.5) * width
            legend.append((ax.bar(x, counts, width * 0.9, **style), f"{_short(label, 24)} {sum(counts):,.0f}"))
        ax.set(xlim=(-0.5, slots - 0.5), ylim=(0, ticks[-1]), xticks=range(slots)[:: math.ceil(slots / 16)])
        ax.set_yticks(ticks, [format_number(tick, digits=6) for tick in ticks])
        _frame(ax, title, legend, x_label)
    return ax.figure


def panels(title: str, charts: Sequence[dict], columns: int = 3) -> "Figure":
    """Charts side by side on one figure, each given by the arguments of `line_chart`."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(charts) / columns)
    width, height = columns * WIDTH + 8, rows * (HEIGHT + 8) + 30
    with _look():
        figure = Figure((width / 72, height / 72), label=title)
        figure.text(8 / width, 1 - 10 / height, _short(title, 80), va="top", size=13, weight="bold", color=INK)
        for i, chart in enumerate(charts):
            ax = _axes(figure, i % columns * WIDTH + 4, (rows - 1 - i // columns) * (HEIGHT + 8) + 4)
            if line_chart(**chart, ax=ax) is None:
                ax.set_axis_off()
                ax.set_title(f"{_short(chart['title'], 40)}: no data yet", loc="left")
    return figure


def _saved(figure: "Figure", form: str, **metadata: None) -> bytes:
    file = io.BytesIO()
    with _look():
        figure.savefig(file, format=form, metadata=metadata)
    return file.getvalue()


def svg(figure: "Figure") -> str:
    """The figure as an <svg> element for an HTML page; the same bytes for the same figure.

    Ids are hashes of what they name, so that those which two figures of a page share mean the same. A file of its own
    needs xmlns="http://www.w3.org/2000/svg" added."""

    def shorten(tag: re.Match) -> str:  # what a model wrote is outside of tags: its < and > are escaped
        tag = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=^<g) id="[^"]*"|\n', "", tag[0].replace(" xlink:href", " href"))
        return re.sub(r"\d+\.\d{2,}", lambda digits: f"{float(digits[0]):.4g}", tag)

    text = _saved(figure, "svg", Date=None, Creator=None, Format=None, Type=None).decode()
    text = re.sub(r"<style.*?</style>", "", text[text.index("<svg") :], count=1, flags=re.S)  # would hold for the page
    text = re.sub(r"<[^<>]+>\s*", shorten, text)
    head = f' role="img" stroke-linejoin="round"><title>{html.escape(clean(figure.get_label()))}</title>'
    return text.replace(">", head, 1)


def png(figure: "Figure", path: Path) -> None:
    """Writes the figure as a PNG, atomically; the same bytes for the same figure."""
    write_atomically(Path(path), [_saved(figure, "png", Software=None)])
