"""One self-contained HTML page of a run, and its main curves as one SVG: no script, nothing fetched.

Drawn from metrics.jsonl, rollouts.jsonl and recipe.toml; can be rebuilt at any time, also while the run goes on:

    python page.py runs/NAME
"""

import html
import json
import math
import re
import sys
import tomllib
from collections import deque
from collections.abc import Callable
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

from report import format_eta, read_metrics, write_atomically


class Chart(NamedTuple):
    """`metrics`: a line each; where one holds a dict, a line for each of its parts. `kind` is the y axis: "amount"
    (from 0), "share" (%), "groups" (a count, as % of the step's groups), "level" (0 need not show) or "log".
    `of` says which rows: "rl", "sft", "steps" (both) or "eval" (the held-out ones)."""

    title: str
    metrics: str
    kind: str
    caption: str
    of: str = "rl"


CHARTS = [
    Chart("Held-out accuracy", "avg", "share", "Problems never trained on; the band is the 95% interval.", "eval"),
    Chart("Held-out accuracy by type", "by_type", "share", "A line for each type of problem, at most 12.", "eval"),
    Chart(
        "Reward and accuracy",
        "reward_mean accuracy",
        "amount",
        "Before rescue and substitution. Quickly above 0.7: the problems are too easy.",
    ),
    Chart(
        "Response length",
        "response_length_mean response_length_max max_response_tokens",
        "amount",
        "Tokens; the dashed line is the stage's limit.",
    ),
    Chart("Truncated share", "truncated_share", "share", "Rollouts cut at the limit before they ended."),
    Chart("SFT loss", "loss", "amount", "Cross-entropy on worked solutions, nats per token.", "sft"),
    Chart(
        "Distinct-4",
        "distinct4",
        "level",
        "Diversity of a problem's rollouts; a stage begins at the temperature that gives the last one's back.",
    ),
    Chart("Temperature", "temperature", "level", "Of the sampler and of the loss, raised from stage to stage."),
    Chart("Entropy", "entropy", "amount", "Nats per sampled token at the sampling temperature."),
    Chart(
        "Groups without a signal",
        "solve_none solve_all zero_variance",
        "groups",
        "Share of the batch's groups, before rescue and substitution.",
    ),
    Chart(
        "Rescued and substituted",
        "rescued substituted",
        "amount",
        "Groups per step that got an earlier correct rollout, or were replaced by an informative group.",
    ),
    Chart("Groups at a glance", "solve_none solve_all rescued substituted", "groups", "The same as shares, together."),
    Chart(
        "Sampler-trainer mismatch",
        "logprob_diff_mean logprob_diff_max",
        "log",
        "|log-prob of the sampler - of the trainer| per on-policy token. Log axis; an exact 0 is a gap.",
    ),
    Chart("RL loss", "loss", "amount", "Near 0 on policy in value, not in gradient: a group's advantages sum to 0."),
    Chart("Gradient norm", "grad_norm", "log", "Before clipping. Log axis.", "steps"),
    Chart("Importance ratio", "ratio_mean rescued_ratio_mean", "level", "1 on policy, not so for rescued rollouts."),
    Chart(
        "Tokens per second",
        "sample_tokens_per_s update_tokens_per_s tokens_per_s",
        "log",
        "Of each phase by itself. Log axis.",
        "steps",
    ),
    Chart("Seconds by phase", "seconds_sample seconds_grade seconds_update", "amount", "Of one step."),
]
PANELS = (
    "Held-out accuracy by type",
    "Reward and accuracy",
    "Response length",  # of curves.svg
    "Distinct-4",
    "Temperature",
    "Groups at a glance",
)
STAGE_COLUMNS = [  # title, metric, and what of it: mean of the first ten steps -> of the last ten, last value, or sum
    ("Reward", "reward_mean", "ends"),
    ("Accuracy", "accuracy", "ends %"),
    ("Length", "response_length_mean", "ends"),
    ("Truncated", "truncated_share", "ends %"),
    ("Limit", "max_response_tokens", "last"),
    ("T", "temperature", "last"),
    ("Distinct-4", "distinct4", "ends"),
    ("Problems", "problems", "last"),
    ("Rescued", "rescued", "sum"),
    ("Subst.", "substituted", "sum"),
    ("Skipped", "skipped", "sum"),
    ("Tokens", "tokens", "sum"),
]
FINAL_COLUMNS = [
    ("Accuracy", "avg", "last %"),
    ("95% from", "low", "last %"),
    ("to", "high", "last %"),
    ("Problems", "problems", "last"),
    ("Samples", "n", "last"),
    ("T", "temperature", "last"),
    ("Length", "length_mean", "last"),
    ("Truncated", "truncated_share", "last %"),
    ("No box", "no_box_share", "last %"),
]
GLOSSARY = {
    "avg, low, high": "mean accuracy over problems and samples of an evaluation, with its 95% interval",
    "n, no_box_share": "samples graded in an evaluation; share of responses without a final boxed answer",
    "reward_mean, accuracy": "mean reward; share of right answers: of all rollouts, before rescue and substitution",
    "reward_correct, reward_format, reward_steps": "parts of the reward: right answer, form, worked steps that hold",
    "verdicts": "how many rollouts the grader judged in which way",
    "response_length_mean, _max": "tokens in a response, its end-of-sequence token included",
    "max_response_tokens, truncated_share": "the stage's limit on them; share of rollouts that hit it",
    "temperature": "divides the logits, in the sampler and in the loss alike",
    "distinct4_left_out": "problems without any 4-gram, which distinct4 leaves out",
    "distinct4": "different over all 4-grams in a problem's rollouts, averaged over problems; 1 = all different",
    "groups, problems": "groups (a problem with its rollouts) in the step; problems left in the training set",
    "solve_none, solve_all, zero_variance": "groups with no right rollout, only right ones, equal rewards: no gradient",
    "rescued": "failed groups in which one rollout was swapped for an earlier correct one of the same problem",
    "substituted": "groups without a signal, replaced as a whole by informative groups of the batch",
    "skipped": "1 if too few groups were informative and the update was left out",
    "nonfinite": "1 if the gradient was not finite and the weights were left as they were",
    "loss": "token-mean clipped surrogate over the whole batch (RL), or cross-entropy in nats per token (SFT)",
    "grad_norm, lr": "norm of the gradient before clipping; learning rate",
    "clip_low_share, clip_high_share, dual_clip_share": "share of tokens whose gradient each bound of the clip cut",
    "ratio_mean, rescued_ratio_mean": "new over old token probability: of all tokens, of rescued rollouts",
    "logprob_diff_mean, _max": "distance of the sampler's and the trainer's log-probs, on-policy tokens",
    "entropy": "mean entropy of the policy per token, in nats, at the sampling temperature",
    "tokens, epoch, peak_memory_gib": "tokens of the step; passes over the training set; most memory of one device",
    "sample_, update_, tokens_per_s; seconds": "throughput of sampling, of the update, of SFT; wall time of the step",
}

# Okabe and Ito's palette, told apart with any colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CHART_CSS = """.chart{font:11px system-ui,sans-serif}.chart text{fill:#636c76}.chart .ink{fill:#1f2328}
.chart .name{font-size:13px;font-weight:600}.chart path{fill:none;stroke-width:1.75;stroke-linejoin:round}
.chart path{stroke-linecap:round}.chart .grid{stroke:#e6e8eb;stroke-width:1}
.chart .rule{stroke:#8c959f;stroke-width:1;stroke-dasharray:3 3}.chart .faint{stroke-width:1;opacity:.3}
.chart .dots{stroke-width:5.5}.band{opacity:.16}.chart .again{stroke-dasharray:1.5 3.5}
.hollow{fill:none;stroke:#636c76}""" + "".join(
    f".c{i}{{stroke:{colour}}}.chart .f{i}{{fill:{colour}}}" for i, colour in enumerate(COLOURS)
)
PAGE_CSS = """*{box-sizing:border-box}body{background:#f6f7f9;color:#1f2328;font:15px/1.5 system-ui,sans-serif}
body{margin:0 auto;max-width:1440px;padding:28px 24px 80px}h1{font-size:28px;margin:0;overflow-wrap:anywhere}
h2{font-size:20px;margin:44px 0 10px}h3{font-size:13px;margin:12px 0 2px}p{margin:6px 0;max-width:90ch}
figcaption,.muted,h3,th,dd{font-size:13px;color:#636c76}.alarm{border-left:4px solid #D55E00;padding-left:10px}
.figures,.cards{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr))}
.cards{margin:18px 0;grid-template-columns:repeat(auto-fit,minmax(min(100%,170px),1fr))}
.card b{display:block;font-size:24px;line-height:1.3}@media(min-width:520px){.card:first-child{grid-column:span 2}}
figure,.card,details,.table{margin:0;padding:12px;border-radius:8px;border:1px solid #e6e8eb;background:#fff}
figure svg{display:block;width:100%;height:auto}details{margin:8px 0}summary{cursor:pointer;overflow-wrap:anywhere}
.table{overflow-x:auto}table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:5px 0 5px 9px;text-align:right;white-space:nowrap;border-bottom:1px solid #e6e8eb}th{font-weight:500}
tr:last-child td{border-bottom:0}th:first-child,td:first-child{text-align:left;padding-left:0}
pre,dt{font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}dd{margin:0}
pre{white-space:pre-wrap;margin:0}dl{display:grid;grid-template-columns:minmax(120px,340px) 1fr;gap:4px 18px}"""

WIDTH, HEIGHT, LEFT, RIGHT, FLOOR = 420, 284, 54, 408, 250  # of a chart, in its own pixels
BINS = 300  # a longer series is drawn as the lowest and the highest value of so many bins
Points = list[tuple[float, float | None]]  # (x, y), where y None is a gap


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or not abs(value) < 1e30:  # NaN, too, is not below
        return None
    return float(value) if abs(value) > 1e-30 else 0.0  # beyond these, axes would overflow


def _text(value: object) -> str:
    # control characters and lone surrogates are legal in JSON but not in HTML or XML
    return html.escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value)))


def _format(value: float | None, percent: bool = False, digits: int = 3) -> str:
    if value is None:
        return "–"
    if percent:
        return f"{100 * value:.{digits}g}%"
    size, unit = next((p for p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if abs(value) >= p[0]), (1, ""))
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value / size:.{digits}g}".replace("e-0", "e-") + unit


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _axis(low: float, high: float, kind: str) -> list[float]:
    """Nice ticks (1, 2 or 5 times a power of ten) from below `low` to above `high`."""
    if kind == "log":
        first = math.floor(math.log10(low))
        return [10.0**e for e in range(first, max(math.ceil(math.log10(high)), first + 1) + 1)]
    if kind != "level":
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-5 * max(abs(low), abs(high)):  # a constant
        low, high = low - abs(low) / 10, high + (abs(high) / 10 or 1.0)
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= (high - low) / 5 * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [float(f"{step * i:.12g}") for i in range(first, last + 1)]


def _smooth(points: Points, breaks: list[float]) -> Points:
    """A centred moving average over 1/30 of the points, that never averages across a stage's beginning."""
    half, smoothed = max(2, len(points) // 60), []
    for start, end in zip([-math.inf, *breaks], [*breaks, math.inf], strict=True):
        part = [p for p in points if start <= p[0] < end]
        sums = [0.0, *accumulate(y or 0.0 for _, y in part)]
        counts = [0, *accumulate(y is not None for _, y in part)]
        for i, (x, y) in enumerate(part):
            a, b = max(0, i - half), min(len(part), i + half + 1)
            smoothed.append((x, None if y is None else (sums[b] - sums[a]) / (counts[b] - counts[a])))
    return smoothed


def _thin(points: Points) -> Points:
    """The lowest and the highest point of each bin, so that no spike is lost."""
    if len(points) <= 2 * BINS:
        return points
    edges, thin = [i * len(points) // BINS for i in range(BINS + 1)], []
    for start, end in zip(edges, edges[1:], strict=False):
        known = [(y, x) for x, y in points[start:end] if y is not None]
        thin += sorted({(x, y) for y, x in (min(known), max(known))}) if known else [(points[start][0], None)]
    return thin


def _frame(title: str, ticks: list[float], py: Callable, percent: bool, x_label: str, marks: list[str]) -> str:
    grid = [
        f'<path class="grid" d="M{LEFT} {py(t):.1f}H{RIGHT}"/><text x="{LEFT - 6}" y="{py(t) + 4:.1f}" '
        f'text-anchor="end">{_format(t, percent, 6)}</text>'
        for t in ticks
    ]
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{_text(title)}</title>'
        f'<text class="name ink" x="6" y="15">{_text(title)}</text>{"".join(grid + marks)}'
        f'<text x="{RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{_text(x_label)}</text></svg>'
    )


def line_chart(
    title: str,
    series: dict[str, Points],
    kind: str = "amount",
    rules: list[tuple[float, str]] = (),
    x_label: str = "step",
    smooth: bool = True,
    band: list[tuple] = (),
) -> str:
    """Lines as one SVG element; "" where no series has a value to draw. `kind` is that of a `Chart`.

    `rules`: (x, label) of vertical lines, where stages begin. `band`: (x, low, high). `smooth`: series of 30 values
    and more are drawn faint, with a moving average on top."""
    xs = [x for points in series.values() for x, _ in points]  # also of gaps, so that charts align
    if kind == "log":  # 0 has no place on it
        series = {label: [(x, y if y and y > 0 else None) for x, y in points] for label, points in series.items()}
    series = {label: points for label, points in series.items() if any(y is not None for _, y in points)}
    if not series:
        return ""
    outline = [(x, low) for x, low, _ in band] + [(x, high) for x, _, high in reversed(band)]
    values = [y for points in [*series.values(), outline] for _, y in points if y is not None]
    ticks, percent = _axis(min(values), max(values), kind), kind in ("share", "groups")
    scale = math.log10 if kind == "log" else float
    x0, x1 = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0] - 0.5, xs[0] + 0.5)
    low, high, top = scale(ticks[0]), scale(ticks[-1]), 60 + 14 * ((len(series) - 1) // 2)

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (RIGHT - LEFT)

    def py(y: float) -> float:
        return FLOOR - (scale(y) - low) / (high - low) * (FLOOR - top)

    def path(style: str, points: Points) -> str:
        parts, pen = [], ""
        for x, y in points:
            at = "" if y is None else f"{px(x):.1f} {py(y):.2f}"
            parts.append(at and (f"L{at}" if pen else f"M{at}L{at}"))  # a lone point shows as a dot
            pen = at
        return f'<path class="{style}" d="{"".join(parts)}"/>'

    corners = " ".join(f"{px(x):.1f},{py(y):.2f}" for x, y in outline if y is not None)
    marks = [f'<polygon class="band f0" points="{corners}"/>'] if corners else []
    free = 0.0
    for x, label in (rule for rule in rules if x0 <= rule[0] <= x1):
        marks.append(f'<path class="rule" d="M{px(x):.1f} {top - 12}V{FLOOR}"/>')
        if px(x) >= free:  # labels of short stages would overlap
            marks.append(f'<text x="{px(x) + 3:.1f}" y="{top - 4}">{_text(label)}</text>')
            free = px(x) + 7 * len(label)
    for i, (label, points) in enumerate(series.items()):
        known, drawn = [p for p in points if p[1] is not None], _thin(points)
        dashed = label in ("max_response_tokens", "target")
        style, dot = ("rule", "") if dashed else (f"c{i % 6}" + " again" * (i >= 6), f"f{i % 6}")
        if smooth and len(known) >= 30:
            marks.insert(0, path(f"faint {style}", drawn))
            points = _smooth(points, [x for x, _ in rules])
        marks.append(path(style, _thin(points)))
        if len(known) <= 40 and not dashed:
            marks += [path(f"dots {style}", [p]) for p in known]
        last = _format([y for _, y in points if y is not None][-1], percent)
        marks.append(
            f'<text x="{8 + i % 2 * 200}" y="{33 + i // 2 * 14}"><tspan class="{dot}">'
            f'{"●○"[i >= 6]}</tspan><tspan class="ink"> {_text(label[:24])} {last}</tspan></text>'
        )
    marks += [
        f'<text x="{px(t):.1f}" y="{FLOOR + 15}" text-anchor="middle">{_format(t, digits=6)}</text>'
        for t in _axis(x0, x1, "level")
        if x0 <= t <= x1 and (x_label != "step" or t == round(t))
    ]
    return _frame(title, ticks, py, percent, x_label, marks)


def bar_chart(title: str, groups: dict[str, list[float]], x_label: str) -> str:
    """Counts of 0, 1, 2, ... as bars side by side, the first group hollow, the others filled; "" without a count."""
    groups = {label: [_number(count) or 0.0 for count in counts] for label, counts in groups.items()}
    most = max((count for counts in groups.values() for count in counts), default=0)
    if not most:
        return ""
    slots, ticks, marks = max(map(len, groups.values())), _axis(0.0, most, "amount"), []
    slot = (RIGHT - LEFT) / slots
    bar = slot * 0.8 / len(groups)

    def py(y: float) -> float:
        return FLOOR - y / ticks[-1] * (FLOOR - 50)

    for g, (label, values) in enumerate(groups.items()):
        style, x = f"f{g - 1}" if g else "hollow", 8 + 137 * g
        marks += [
            f'<rect class="{style}" x="{LEFT + slot * (i + 0.1) + g * bar:.1f}" y="{py(v):.1f}" '
            f'width="{bar - 1:.1f}" height="{FLOOR - py(v):.1f}"/>'
            for i, v in enumerate(values)
        ]
        marks.append(
            f'<rect class="{style}" x="{x}" y="24" width="9" height="9"/>'
            f'<text class="ink" x="{x + 14}" y="33">{_text(label)} {sum(values):,.0f}</text>'
        )
    marks += [
        f'<text x="{LEFT + slot * (i + 0.5):.1f}" y="{FLOOR + 15}" text-anchor="middle">{i}</text>'
        for i in range(slots)
    ]
    return _frame(title, ticks, py, False, x_label, marks)


def _stages(rows: list[dict]) -> dict[str, list[dict]]:
    """The training steps of each stage, under a short name of the stage."""
    stages: dict[int, list[dict]] = {}
    for row in rows:
        if row["kind"] in ("sft", "rl"):
            stages.setdefault(row["stage"], []).append(row)
    kinds = [steps[0]["kind"].upper() for steps in stages.values()]
    return {
        f"{kind} {kinds[: i + 1].count(kind)}": steps
        for i, (kind, steps) in enumerate(zip(kinds, stages.values(), strict=True))
    }


def _held_out(rows: list[dict]) -> list[dict]:
    """The evaluations named "held-out", else those named as the first one: the curve that the run is judged by."""
    evals = [row for row in rows if row["kind"] == "eval"]
    names = [row.get("name") for row in evals]
    return [row for row in evals if row.get("name") == ("held-out" if "held-out" in names else names[0])]


def _curve(chart: Chart, rows: list[dict], rules: list[tuple[float, str]]) -> str:
    series, band = {}, []
    for key in chart.metrics.split():
        for part in sorted({part for row in rows if isinstance(row.get(key), dict) for part in row[key]}) or [None]:
            points = series[part or key] = []
            for row in rows:
                value = _number(row.get(key) if part is None else (row.get(key) or {}).get(part))
                whole = _number(row.get("groups")) if chart.kind == "groups" else 1.0
                points.append((row["step"], value / whole if value is not None and whole else None))
        if key == "avg":
            band = [(row["step"], _number(row.get("low")), _number(row.get("high"))) for row in rows]
    shown = dict(islice(series.items(), 12))  # as many labels as fit
    return line_chart(chart.title, shown, chart.kind, rules, smooth=chart.of != "eval", band=band)


def _difficulty(row: dict) -> tuple[str, str, str]:
    groups = {key: row[key] for key in ("before", "after") if row.get(key)}
    title, most = f"Difficulty {row.get('label', '')}", max(map(len, groups.values()), default=1) - 1
    caption = f"{row.get('rule', '')}: kept {row.get('kept', '?')}, dropped {row.get('dropped', '?')}."
    return title, bar_chart(title, groups, f"rollouts right of {most}"), caption


def _search(row: dict) -> tuple[str, str, str]:
    title, target = f"Temperature {row.get('label', '')}", row.get("target_distinct4")
    chosen, curve = _number(row.get("chosen")), [c | {"target": target} for c in row.get("curve") or []]
    curve = sorted((c for c in curve if _number(c.get("temperature")) is not None), key=lambda c: c["temperature"])
    series = {
        key: [(c["temperature"], _number(c.get(key))) for c in curve] for key in ("accuracy", "distinct4", "target")
    }
    rules = [(chosen, f"chosen {_format(chosen)}")] if chosen is not None else []
    caption = "To give back the last stage's diversity." if target else "Exploration begins where accuracy falls."
    return title, line_chart(title, series, "amount", rules, "temperature", smooth=False), caption


def _figures(figures: list[tuple[str, str, str]]) -> str:
    drawn = [f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>" for _, svg, caption in figures if svg]
    empty = [title for title, svg, _ in figures if not svg]
    return (
        f'<div class="figures">{"".join(drawn)}</div>'
        + f'<p class="muted">No data for: {_text(", ".join(empty) or "this part")}.</p>' * bool(empty or not drawn)
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    top, *body = (
        "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in [("th", head), *(("td", row) for row in rows)]
    )
    return f'<div class="table"><table><thead>{top}</thead><tbody>{"".join(body)}</tbody></table></div>'


def _values(rows: list[dict], key: str) -> list[float]:
    return [value for row in rows if (value := _number(row.get(key))) is not None]


def _cell(rows: list[dict], key: str, what: str) -> str:
    values, show = _values(rows, key), _share if "%" in what else _format
    if not values or "last" in what or what == "sum":
        return show(None if not values else sum(values) if what == "sum" else values[-1])
    return " → ".join(show(sum(ten) / len(ten)) for ten in (values[:10], values[-10:]))


def _headline(rows: list[dict], stages: dict[str, list[dict]], name: str) -> str:
    steps, held = [row for part in stages.values() for row in part], _held_out(rows)
    first_rl = next((i for i, row in enumerate(rows) if row["kind"] == "rl"), len(rows))
    before = [row for row in rows[:first_rl] if row in held]
    gain = ("Held-out accuracy", "–", "needs an evaluation before RL and one after")
    if before and held[-1] is not before[-1]:
        (a, a_low, a_high), (b, b_low, b_high) = (
            [_number(row.get(key)) for key in ("avg", "low", "high")] for row in (before[-1], held[-1])
        )
        change = "gain not known"
        if None not in (a, a_low, a_high, b, b_low, b_high):
            apart = "do not overlap" if a_high < b_low or b_high < a_low else "overlap"
            change = (
                f"{100 * (b - a):+.1f} points; 95% intervals [{_share(a_low)}, {_share(a_high)}] → "
                f"[{_share(b_low)}, {_share(b_high)}] {apart}"
            )
        gain = (f"Held-out accuracy, before RL → step {held[-1]['step']:,}", f"{_share(a)} → {_share(b)}", change)
    cards = [
        gain,
        ("Steps", f"{len(steps):,}", f"in {len(stages)} stages"),
        ("Tokens", _format(sum(_values(steps, "tokens"))), "sampled and trained on"),
        ("Wall time", format_eta(sum(_values(steps, "seconds"))), "in steps, without evaluation"),
        ("Peak memory", _format(max(_values(steps, "peak_memory_gib"), default=None)), "GiB on one device"),
    ]
    shown = "".join(f'<div class="card">{a}<b>{b}</b><span class="muted">{c}</span></div>' for a, b, c in cards)
    broken = [
        f"{key} at step {row['step']}"
        for row in rows
        for key, value in row.items()
        if isinstance(value, float) and _number(value) is None
    ]
    listed = ", ".join(broken[:6]) + ", …" * (len(broken) > 6)
    alarm = f'<p class="alarm">{len(broken):,} values are not finite, left as gaps: {_text(listed)}.</p>' * bool(broken)
    chain = " → ".join(f"{label} ({len(part):,} steps)" for label, part in stages.items()) or "no step yet"
    return f'<h1>{_text(name)}</h1><p class="muted">{chain}</p>{alarm}<div class="cards">{shown}</div>'


def _rollouts(path: Path, each: int = 3) -> str:
    """The first and the last few rollouts, folded."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        lines = [*islice(file, each), *deque(file, maxlen=each)]
    folded = []
    for row in (json.loads(line) for line in lines if line.endswith(b"\n")):  # else half-written
        long = {key: str(v) for key, v in row.items() if key in ("prompt", "response") or len(str(v)) > 80}
        summary = " · ".join(f"{key} {value}" for key, value in row.items() if key not in long)
        texts = [
            f"<h3>{_text(key)}</h3><pre>{_text(text[:30_000])}</pre>"
            + f"<p>… and {len(text) - 30_000:,} characters more in rollouts.jsonl</p>" * (len(text) > 30_000)
            for key, text in long.items()
        ]
        folded.append(f"<details><summary>{_text(summary)}</summary>{''.join(texts)}</details>")
    return "".join(folded)


def _curves_svg(charts: dict[str, str], name: str) -> str:
    panels, width, height = [], 380, 380 * HEIGHT // WIDTH
    for i, title in enumerate(PANELS):
        x, y = 20 + i % 3 * (width + 10), 66 + i // 3 * (height + 40)
        empty = f'<svg><title>{title}</title><text x="6" y="15">{title}: no data yet</text></svg>'
        place = f'<svg x="{x}" y="{y}" width="{width}" height="{height}"'
        panels.append((charts[title] or empty).replace("<svg", place, 1))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="1200" height="680" viewBox="0 0 1200 680" class="chart">'
        f"<title>Training curves of {_text(name)}</title><style>{CHART_CSS}</style>"
        '<rect width="1200" height="680" rx="10" fill="#fff"/><text class="ink" x="26" y="38" '
        f'style="font-size:19px;font-weight:600">{_text(name)}</text>{"".join(panels)}</svg>'
    )


def write_report(folder: Path) -> Path:
    """Writes report.html and curves.svg from a run folder's metrics.jsonl, rollouts.jsonl and recipe.toml; returns
    the page's path. The last two files may be missing, and so may any key of a row but kind, step and stage.

    Raises FileNotFoundError without metrics.jsonl, ValueError (file and line) where a line of it is broken."""
    folder = Path(folder)
    rows = read_metrics(folder)
    recipe_text = (folder / "recipe.toml").read_text() if (folder / "recipe.toml").exists() else ""
    recipe, stages = tomllib.loads(recipe_text), _stages(rows)
    name, planned = recipe.get("name", folder.resolve().name), recipe.get("stage", [])
    rows_of = {
        "eval": _held_out(rows),
        "steps": [row for row in rows if row["kind"] in ("sft", "rl")],
        **{kind: [r for r in rows if r["kind"] == kind] for kind in ("sft", "rl", "filter", "temperature")},
    }
    rules = [(steps[0]["step"], label) for label, steps in stages.items()]
    curves = [(chart.title, _curve(chart, rows_of[chart.of], rules), chart.caption) for chart in CHARTS]

    stage_rows = []
    for label, steps in stages.items():
        index = steps[0]["stage"]
        named = [stage["name"] for stage in planned[index : index + 1] if "name" in stage]
        stage_rows.append(
            [
                ": ".join([label, *named]),
                f"{steps[0]['step']:,}–{steps[-1]['step']:,}",
                *(_cell(steps, key, what) for _, key, what in STAGE_COLUMNS),
                format_eta(sum(_values(steps, "seconds"))),
            ]
        )
    final = [row for row in rows if row["kind"] == "eval" and row.get("final")]
    types = sorted({part for row in final for part in row.get("by_type") or {}})
    columns = FINAL_COLUMNS + [(part, f"type {part}", "last %") for part in types]
    final = [row | {f"type {part}": share for part, share in (row.get("by_type") or {}).items()} for row in final]
    final_rows = [[row.get("name"), *(_cell([row], key, what) for _, key, what in columns)] for row in final]
    terms = "".join(f"<dt>{key}</dt><dd>{sentence}</dd>" for key, sentence in GLOSSARY.items())
    sections = {
        "Final evaluation": _table(["Evaluation", *(title for title, _, _ in columns)], final_rows),
        "Stages": _table(["Stage", "Steps", *(title for title, _, _ in STAGE_COLUMNS), "Time"], stage_rows)
        + '<p class="muted">Arrows: mean of the first ten steps → mean of the last ten.</p>',
        "Curves": '<p class="muted">Faint: every step. Bold, and the value above: a centred moving average over 1/30 '
        "of the steps, within a stage. Vertical rules: a stage begins. Gaps: no value, or a skipped update. "
        f"Beyond {2 * BINS} steps: the lowest and the highest value of each of {BINS} bins.</p>" + _figures(curves),
        "Difficulty": _figures([_difficulty(row) for row in rows_of["filter"]]),
        "Temperature searches": _figures([_search(row) for row in rows_of["temperature"]]),
        "Whole rollouts to read": _rollouts(folder / "rollouts.jsonl"),
        "Recipe": f"<details><summary>recipe.toml, as resolved</summary><pre>{_text(recipe_text)}</pre></details>",
        "Glossary": f"<dl>{terms}</dl>",
    }
    body = _headline(rows, stages, name) + "".join(f"<h2>{title}</h2>{part}" for title, part in sections.items())
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # no script and nothing fetched, whatever a model wrote
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{_text(name)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><style>{PAGE_CSS}{CHART_CSS}</style></head>'
        f"<body>{body}</body></html>\n"
    )
    write_atomically(folder / "curves.svg", [_curves_svg({title: svg for title, svg, _ in curves}, name).encode()])
    write_atomically(folder / "report.html", [page.encode()])
    return folder / "report.html"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").exists():
        sys.exit("usage: python page.py RUN, a folder with a metrics.jsonl")
    print(write_report(Path(sys.argv[1])))
