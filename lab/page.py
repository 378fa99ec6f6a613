"""One self-contained HTML page of a run, and its main curves as one SVG: no script, nothing fetched.

Drawn from metrics.jsonl, rollouts.jsonl and recipe.toml; can be rebuilt at any time, also while the run goes on:

    python -m lab.page runs/NAME
"""

import html
import json
import sys
import tomllib
from collections import deque
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from engine.files import write_atomically
from lab.charts import BINS, bar_chart, clean, format_number, line_chart, number, panels, svg
from lab.report import format_eta, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    Chart("Reward and accuracy", "reward_mean accuracy", "amount", "Quickly above 0.7: the problems are too easy."),
    Chart("Response length", "response_length_mean response_length_max max_response_tokens", "amount", "In tokens."),
    Chart("Truncated share", "truncated_share", "share", "Rollouts cut at the limit before they ended."),
    Chart("SFT loss", "loss", "amount", "Cross-entropy on worked solutions, nats per token.", "sft"),
    Chart("Distinct-4", "distinct4", "level", "Diversity; a stage begins at the temperature that gives it back."),
    Chart("Temperature", "temperature", "level", "Of the sampler and of the loss, raised from stage to stage."),
    Chart("Entropy", "entropy", "amount", "Nats per sampled token at the sampling temperature."),
    Chart("Groups without a signal", "solve_none solve_all zero_variance", "groups", "Of the batch, as sampled."),
    Chart("Rescued and substituted", "rescued substituted", "amount", "Groups per step that got another response."),
    Chart("Groups at a glance", "solve_none solve_all rescued substituted", "groups", "The same as shares, together."),
    Chart("Sampler-trainer mismatch", "logprob_diff_mean logprob_diff_max", "log", "Per token."),
    Chart("RL loss", "loss", "amount", "Near 0 on policy in value, not in gradient: a group's advantages sum to 0."),
    Chart("Gradient norm", "grad_norm", "log", "Before clipping. Log axis.", "steps"),
    Chart("Importance ratio", "ratio_mean rescued_ratio_mean", "level", "1 on policy, not so for rescued rollouts."),
    Chart("Tokens per second", "sample_tokens_per_s update_tokens_per_s tokens_per_s", "log", "By phase.", "steps"),
    Chart("Seconds by phase", "seconds_sample seconds_grade seconds_update", "amount", "Of one step."),
]
PANELS = (  # of curves.svg
    "Held-out accuracy by type",
    "Reward and accuracy",
    "Response length",
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
    "optimizer_steps": "steps made on the batch: 1, unless the update was skipped or the stage's variant makes several",
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
pre{white-space:pre-wrap;margin:0}figure text{font-family:system-ui,sans-serif!important}
dl{display:grid;grid-template-columns:minmax(120px,340px) 1fr;gap:4px 18px}"""


def html_text(value: object) -> str:
    """Escaped, and without the characters that HTML does not allow."""
    return html.escape(clean(value))


def html_page(title: str, body: str) -> str:
    """The whole document around `body`, which is HTML. Nothing in it can run or be fetched, whatever a model wrote."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html_text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><style>{PAGE_CSS}</style></head><body>{body}</body></html>\n'
    )


def html_table(head: list[str], rows: list[list[str]]) -> str:
    """A table, with its cells escaped."""
    top, *body = (
        "<tr>" + "".join(f"<{tag}>{html_text(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in [("th", head), *(("td", row) for row in rows)]
    )
    return f'<div class="table"><table><thead>{top}</thead><tbody>{"".join(body)}</tbody></table></div>'


def html_figures(figures: "list[tuple[str, Figure | None, str]]") -> str:
    """A grid of (title, figure, caption), and a line that names those without a figure."""
    drawn = [
        f"<figure>{svg(figure)}<figcaption>{html_text(caption)}</figcaption></figure>"
        for _, figure, caption in figures
        if figure
    ]
    empty = ", ".join(title for title, figure, _ in figures if not figure) or "this part"
    said = f'<p class="muted">No data for: {html_text(empty)}.</p>' * (not drawn or len(drawn) < len(figures))
    return f'<div class="figures">{"".join(drawn)}</div>{said}'


def folded(summary: str, texts: dict[str, str], most_characters: int | None = None) -> str:
    """A line that opens to show `texts` under their titles, each up to so many characters; by default all of them."""
    parts = []
    for title, text in texts.items():
        cut = len(text) - len(text[:most_characters])
        more = f"<p>… and {cut:,} characters more, not shown</p>" * bool(cut)
        parts.append(f"<h3>{html_text(title)}</h3><pre>{html_text(text[:most_characters])}</pre>{more}")
    return f"<details><summary>{html_text(summary)}</summary>{''.join(parts)}</details>"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


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


def _curve(chart: Chart, rows: list[dict], rules: list[tuple[float, str]]) -> dict:
    """The arguments of `line_chart`."""
    series, band = {}, {}
    for key in chart.metrics.split():
        for part in sorted({part for row in rows if isinstance(row.get(key), dict) for part in row[key]}) or [None]:
            points = series[part or key] = []
            for row in rows:
                value = number(row.get(key) if part is None else (row.get(key) or {}).get(part))
                whole = number(row.get("groups")) if chart.kind == "groups" else 1.0
                points.append((row["step"], value / whole if value is not None and whole else None))
        if key == "avg":
            band = {key: [(row["step"], row.get("low"), row.get("high")) for row in rows]}
    drawn = dict(islice(series.items(), 12))  # as many labels as fit
    smooth = chart.of != "eval"
    return dict(title=chart.title, series=drawn, kind=chart.kind, rules=rules, smooth=smooth, band=band)


def _difficulty(row: dict) -> "tuple[str, Figure | None, str]":
    groups = {key: row[key] for key in ("before", "after") if row.get(key)}
    title, most = f"Difficulty {row.get('label', '')}", max(map(len, groups.values()), default=1) - 1
    caption = f"{row.get('rule', '')}: kept {row.get('kept', '?')}, dropped {row.get('dropped', '?')}."
    return title, bar_chart(title, groups, f"rollouts right of {most}"), caption


def _search(row: dict) -> "tuple[str, Figure | None, str]":
    title, target = f"Temperature {row.get('label', '')}", row.get("target_distinct4")
    chosen, curve = number(row.get("chosen")), [c | {"target": target} for c in row.get("curve") or []]
    curve = sorted((c for c in curve if number(c.get("temperature")) is not None), key=lambda c: c["temperature"])
    series = {
        key: [(c["temperature"], number(c.get(key))) for c in curve] for key in ("accuracy", "distinct4", "target")
    }
    rules = [(chosen, f"chosen {format_number(chosen)}")] if chosen is not None else []
    caption = "To give back the last stage's diversity." if target else "Exploration begins where accuracy falls."
    return title, line_chart(title, series, "amount", rules, "temperature", smooth=False), caption


def _values(rows: list[dict], key: str) -> list[float]:
    return [value for row in rows if (value := number(row.get(key))) is not None]


def _cell(rows: list[dict], key: str, what: str) -> str:
    values, show = _values(rows, key), _share if "%" in what else format_number
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
            [number(row.get(key)) for key in ("avg", "low", "high")] for row in (before[-1], held[-1])
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
        ("Tokens", format_number(sum(_values(steps, "tokens"))), "sampled and trained on"),
        ("Wall time", format_eta(sum(_values(steps, "seconds"))), "in steps, without evaluation"),
        ("Peak memory", format_number(max(_values(steps, "peak_memory_gib"), default=None)), "GiB on one device"),
    ]
    shown = "".join(f'<div class="card">{a}<b>{b}</b><span class="muted">{c}</span></div>' for a, b, c in cards)
    broken = [
        f"{key} at step {row['step']}"
        for row in rows
        for key, value in row.items()
        if isinstance(value, float) and number(value) is None
    ]
    listed = ", ".join(broken[:6]) + ", …" * (len(broken) > 6)
    alarm = f'<p class="alarm">{len(broken):,} values are not finite, left as gaps: {html_text(listed)}.</p>' * bool(
        broken
    )
    chain = " → ".join(f"{label} ({len(part):,} steps)" for label, part in stages.items()) or "no step yet"
    return f'<h1>{html_text(name)}</h1><p class="muted">{chain}</p>{alarm}<div class="cards">{shown}</div>'


def _rollouts(path: Path, each: int = 3) -> str:
    """The first and the last few rollouts, folded."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        lines = [*islice(file, each), *deque(file, maxlen=each)]
    rollouts = []
    for row in (json.loads(line) for line in lines if line.endswith(b"\n")):  # else half-written
        long = {key: str(v) for key, v in row.items() if key in ("prompt", "response") or len(str(v)) > 80}
        summary = " · ".join(f"{key} {value}" for key, value in row.items() if key not in long)
        rollouts.append(folded(summary, long, 30_000))
    return "".join(rollouts)


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
    curves = {chart.title: _curve(chart, rows_of[chart.of], rules) for chart in CHARTS}
    figures = [(chart.title, line_chart(**curves[chart.title]), chart.caption) for chart in CHARTS]

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
        "Final evaluation": html_table(["Evaluation", *(title for title, _, _ in columns)], final_rows),
        "Stages": html_table(["Stage", "Steps", *(title for title, _, _ in STAGE_COLUMNS), "Time"], stage_rows)
        + '<p class="muted">Arrows: mean of the first ten steps → mean of the last ten.</p>',
        "Curves": '<p class="muted">Faint: every step. Bold, and the value above: a centred moving average over 1/30 '
        "of the steps, within a stage. Vertical rules: a stage begins. Gaps: no value, or a skipped update. "
        f"Beyond {2 * BINS} steps: the lowest and the highest value of each of {BINS} bins.</p>"
        + html_figures(figures),
        "Difficulty": html_figures([_difficulty(row) for row in rows_of["filter"]]),
        "Temperature searches": html_figures([_search(row) for row in rows_of["temperature"]]),
        "Whole rollouts to read": _rollouts(folder / "rollouts.jsonl"),
        "Recipe": folded("recipe.toml, as resolved", {"recipe.toml": recipe_text}),
        "Glossary": f"<dl>{terms}</dl>",
    }
    body = _headline(rows, stages, name) + "".join(f"<h2>{title}</h2>{part}" for title, part in sections.items())
    together = svg(panels(name, [curves[title] for title in PANELS]))
    alone = together.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    write_atomically(folder / "curves.svg", [alone.encode()])
    write_atomically(folder / "report.html", [html_page(name, body).encode()])
    return folder / "report.html"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").exists():
        sys.exit("usage: python -m lab.page RUN, a folder with a metrics.jsonl")
    try:
        print(write_report(Path(sys.argv[1])))
    except (ValueError, OSError) as error:
        sys.exit(f"page.py: {error}")
