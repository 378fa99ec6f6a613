"""The HTML page of a run, and its main curves as one SVG: self-contained, without scripts.

Read from metrics.jsonl, rollouts.jsonl and recipe.toml; rebuild it at any time, also during the run:

    python -m lab.page runs/NAME
    python -m lab.page runs/A runs/B        # compare several: lab/compare_page.py
"""

import argparse
import sys
import tomllib
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from engine.errors import UserError, sentence
from engine.files import write_atomically
from engine.terminal import prepare_terminal
from lab.charts import BINS, bar_chart, clean, format_number, line_chart, number, panels, svg
from lab.console import format_eta
from lab.glossary import GLOSSARY
from lab.metrics import read_metrics, read_rows

Drawn = tuple[str, Figure | None, str]  # title, figure (None without data), caption


class Chart(NamedTuple):
    """`metrics`: a line per metric, or per part of a metric that is a dict. `kind` is the y axis: "amount" (from 0),
    "share" (%), "groups" (a count, as % of the step's groups), "level" (may leave out 0) or "log". `of` selects the
    rows: "rl", "sft", "steps" (both) or "eval" (the held-out ones)."""

    title: str
    metrics: str
    kind: str
    caption: str
    of: str = "rl"


CHARTS = [
    Chart("Held-out accuracy", "avg", "share", "Problems never trained on; the band is the 95% interval.", "eval"),
    Chart("Held-out accuracy by type", "by_type", "share", "At most 12 types of problems.", "eval"),
    Chart("Reward and accuracy", "reward_mean accuracy", "amount", "Quickly above 0.7: the problems are too easy."),
    Chart("Response length", "response_length_mean response_length_max max_response_tokens", "amount", "In tokens."),
    Chart("Truncated share", "truncated_share", "share", "Rollouts cut at the length limit."),
    Chart("SFT loss", "loss", "amount", "Cross-entropy on worked solutions, nats per token.", "sft"),
    Chart("Distinct-4", "distinct4", "level", "Diversity; each stage starts at the temperature that restores it."),
    Chart("Temperature", "temperature", "level", "In the sampler and in the loss; raised from stage to stage."),
    Chart("Entropy", "entropy", "amount", "Nats per sampled token at the sampling temperature."),
    Chart("Groups without a signal", "solve_none solve_all zero_variance", "groups", "Share of the batch, as sampled."),
    Chart("Rescued and substituted", "rescued substituted", "amount", "Groups per step with replaced responses."),
    Chart("Groups at a glance", "solve_none solve_all rescued substituted", "groups", "Shares of the batch."),
    Chart("Sampler-trainer mismatch", "logprob_diff_mean logprob_diff_max", "log", "Per token."),
    Chart("RL loss", "loss", "amount", "Near 0 on policy in value, not in gradient: a group's advantages sum to 0."),
    Chart("Gradient norm", "grad_norm", "log", "Before clipping. Log axis.", "steps"),
    Chart("Importance ratio", "ratio_mean rescued_ratio_mean", "level", "1 if on policy; rescued rollouts are not."),
    Chart("Tokens per second", "sample_tokens_per_s update_tokens_per_s tokens_per_s", "log", "By phase.", "steps"),
    Chart("Seconds by phase", "seconds_sample seconds_grade seconds_update", "amount", "Per step."),
]
PANELS = (  # of curves.svg
    "Held-out accuracy by type", "Reward and accuracy", "Response length",
    "Distinct-4", "Temperature", "Groups at a glance",
)  # fmt: skip
STAGE_COLUMNS = [  # title, metric, value: mean of the first ten steps -> of the last ten ("ends"), last value, or sum
    ("Reward", "reward_mean", "ends"), ("Accuracy", "accuracy", "ends %"), ("Length", "response_length_mean", "ends"),
    ("Truncated", "truncated_share", "ends %"), ("Limit", "max_response_tokens", "last"), ("T", "temperature", "last"),
    ("Distinct-4", "distinct4", "ends"), ("Problems", "problems", "last"), ("Rescued", "rescued", "sum"),
    ("Subst.", "substituted", "sum"), ("Skipped", "skipped", "sum"), ("Tokens", "tokens", "sum"),
]  # fmt: skip
FINAL_COLUMNS = [
    ("Accuracy", "avg", "last %"), ("95% from", "low", "last %"), ("to", "high", "last %"),
    ("Problems", "problems", "last"), ("Samples", "n", "last"), ("T", "temperature", "last"),
    ("Length", "length_mean", "last"), ("Truncated", "truncated_share", "last %"), ("No box", "no_box_share", "last %"),
]  # fmt: skip

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    finalize=lambda value: value if isinstance(value, Markup) else clean(value),  # before it is escaped
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["svg"] = lambda figure: Markup(svg(figure))


def write_page(path: Path, template: str, **values: object) -> Path:
    """Render a template of lab/templates, with all text escaped, and write it; return `path`."""
    write_atomically(path, [TEMPLATES.get_template(template).render(values).encode()])
    return path


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _stages(rows: list[dict]) -> dict[str, list[dict]]:
    """Return the training steps of each stage, by its label: "SFT 1", "RL 1", "RL 2"."""
    labels, count, stages = {}, Counter(), defaultdict(list)
    for row in rows:
        if (kind := row["kind"].upper()) in ("SFT", "RL"):
            if row["stage"] not in labels:
                count[kind] += 1
                labels[row["stage"]] = f"{kind} {count[kind]}"
            stages[labels[row["stage"]]].append(row)
    return stages


def _held_out(rows: list[dict]) -> list[dict]:
    """Return the evaluations named "held-out", or else those with the name of the first evaluation."""
    evals = [row for row in rows if row["kind"] == "eval"]
    names = [row.get("name") for row in evals]
    return [row for row in evals if row.get("name") == ("held-out" if "held-out" in names else names[0])]


def _curve(chart: Chart, rows: list[dict], rules: list[tuple[float, str]]) -> dict:
    """Return the arguments of `line_chart`."""
    totals = [number(row.get("groups")) if chart.kind == "groups" else 1.0 for row in rows]
    series, band = {}, {}
    for key in chart.metrics.split():
        parts = sorted({part for row in rows if isinstance(row.get(key), dict) for part in row[key]})
        for part in parts or [key]:
            points = series[part] = []
            for row, total in zip(rows, totals, strict=True):
                value = number((row.get(key) or {}).get(part) if parts else row.get(key))
                points.append((row["step"], value / total if value is not None and total else None))
        if key == "avg":
            band = {key: [(row["step"], row.get("low"), row.get("high")) for row in rows]}
    drawn = dict(islice(series.items(), 12))  # a legend has room for 12
    smooth = chart.of != "eval"
    return dict(title=chart.title, series=drawn, kind=chart.kind, rules=rules, smooth=smooth, band=band)


def _difficulty(row: dict) -> Drawn:
    groups = {key: row[key] for key in ("before", "after") if row.get(key)}
    title, most = f"Difficulty {row.get('label', '')}", max(map(len, groups.values()), default=1) - 1
    caption = f"{row.get('rule', '')}: kept {row.get('kept', '?')}, dropped {row.get('dropped', '?')}."
    return title, bar_chart(title, groups, f"rollouts right of {most}"), caption


def temperature_figure(
    title: str, points: list[dict], rules: list[tuple[float, str]], zones: Sequence[tuple[float, float, str]] = ()
) -> Figure | None:
    """Draw accuracy, distinct-4 and, if there is one, the target distinct-4 against temperature."""
    points = sorted((p for p in points if number(p.get("temperature")) is not None), key=lambda p: p["temperature"])
    series, band = {}, {}
    for key in ("accuracy", "distinct4", "target"):
        known = [(p["temperature"], number(p.get(key)), number(p.get(f"{key}_half"))) for p in points]
        series[key] = [(x, y) for x, y, _ in known]
        band[key] = [(x, max(0.0, y - half), min(1.0, y + half)) for x, y, half in known if None not in (y, half)]
    return line_chart(title, series, "amount", rules, "temperature", smooth=False, band=band, zones=zones)


def _search(row: dict) -> Drawn:
    title, chosen, target = (
        f"Temperature {row.get('label', '')}",
        number(row.get("chosen")),
        row.get("target_distinct4"),
    )
    rules = [(chosen, f"chosen {format_number(chosen)}")] if chosen is not None else []
    figure = temperature_figure(title, [point | {"target": target} for point in row.get("curve") or []], rules)
    why = "to restore the last stage's diversity" if target else "where accuracy begins to fall"
    return title, figure, f"Chosen {why}. Bands: 95% intervals."


def _values(rows: list[dict], key: str) -> list[float]:
    return [value for row in rows if (value := number(row.get(key))) is not None]


def _cell(rows: list[dict], key: str, what: str) -> str:
    values, show = _values(rows, key), _share if "%" in what else format_number
    if not values:
        return show(None)
    if what == "sum":
        return show(sum(values))
    if "last" in what:
        return show(values[-1])
    return " → ".join(show(sum(ten) / len(ten)) for ten in (values[:10], values[-10:]))


def _gain(rows: list[dict]) -> tuple[str, str, str]:
    """Compare the last held-out accuracy before RL with the latest: title, values, difference."""
    held = _held_out(rows)
    first_rl = next((i for i, row in enumerate(rows) if row["kind"] == "rl"), len(rows))
    before = [row for row in rows[:first_rl] if row in held]
    if not before or held[-1] is before[-1]:
        return "Held-out accuracy", "–", "needs an evaluation before RL and one after"
    a, b = ({key: number(row.get(key)) for key in ("avg", "low", "high")} for row in (before[-1], held[-1]))
    change = "gain not known"
    if None not in (*a.values(), *b.values()):
        apart = "do not overlap" if a["high"] < b["low"] or b["high"] < a["low"] else "overlap"
        was, now = (f"[{_share(ends['low'])}, {_share(ends['high'])}]" for ends in (a, b))
        change = f"{100 * (b['avg'] - a['avg']):+.1f} points; 95% intervals {was} → {now} {apart}"
    title = f"Held-out accuracy, before RL → step {held[-1]['step']:,}"
    return title, f"{_share(a['avg'])} → {_share(b['avg'])}", change


def _stage_table(stages: dict[str, list[dict]], planned: list[dict]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for label, steps in stages.items():
        named = [stage["name"] for stage in planned[steps[0]["stage"] :][:1] if "name" in stage]
        span = f"{steps[0]['step']:,}–{steps[-1]['step']:,}"
        cells = [_cell(steps, key, what) for _, key, what in STAGE_COLUMNS]
        rows.append([": ".join([label, *named]), span, *cells, format_eta(sum(_values(steps, "seconds")))])
    return ["Stage", "Steps", *(title for title, _, _ in STAGE_COLUMNS), "Time"], rows


def _final_table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    final = [row for row in rows if row["kind"] == "eval" and row.get("final")]
    types = sorted({part for row in final for part in row.get("by_type") or {}})
    cells = []
    for row in final:
        shares = [_cell([row.get("by_type") or {}], part, "last %") for part in types]
        cells.append([row.get("name"), *(_cell([row], key, what) for _, key, what in FINAL_COLUMNS), *shares])
    return ["Evaluation", *(title for title, _, _ in FINAL_COLUMNS), *types], cells


def _rollouts(path: Path, each: int = 3) -> list[tuple[str, dict[str, str]]]:
    """Return the first and the last few rollouts, each as a summary line and its long texts."""
    if not path.exists():
        return []
    rows, rollouts = (row for _, row in read_rows(path)), []
    for row in [*islice(rows, each), *deque(rows, maxlen=each)]:
        long = {key: str(v) for key, v in row.items() if key in ("prompt", "response") or len(str(v)) > 80}
        rollouts.append((" · ".join(f"{key} {value}" for key, value in row.items() if key not in long), long))
    return rollouts


def write_report(folder: Path) -> Path:
    """Write report.html and curves.svg into a run folder, and return the page's path.

    Needs metrics.jsonl; rollouts.jsonl and recipe.toml may be missing, and any key of a row but kind, step and stage.
    Raises FileNotFoundError without metrics.jsonl, MetricsError (file and line) at a broken line."""
    rows = read_metrics(folder)
    recipe_text = (folder / "recipe.toml").read_text(encoding="utf-8") if (folder / "recipe.toml").exists() else ""
    recipe, stages = tomllib.loads(recipe_text), _stages(rows)
    title = recipe.get("name", folder.resolve().name)
    rows_of = {kind: [row for row in rows if row["kind"] == kind] for kind in ("sft", "rl", "filter", "temperature")}
    steps = [row for part in stages.values() for row in part]
    rows_of |= {"steps": steps, "eval": _held_out(rows)}
    rules = [(part[0]["step"], label) for label, part in stages.items()]
    curves = {chart.title: _curve(chart, rows_of[chart.of], rules) for chart in CHARTS}
    curves_svg = svg(panels(title, [curves[name] for name in PANELS]))
    curves_svg = curves_svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    write_atomically(folder / "curves.svg", [curves_svg.encode()])
    numbers = [(key, row["step"], value) for row in rows for key, value in row.items() if isinstance(value, float)]
    return write_page(
        folder / "report.html",
        "run.html",
        title=title,
        stages=stages,
        broken=[f"{key} at step {step}" for key, step, value in numbers if number(value) is None],
        cards=[
            _gain(rows),
            ("Steps", f"{len(steps):,}", f"in {len(stages)} stages"),
            ("Tokens", format_number(sum(_values(steps, "tokens"))), "sampled and trained on"),
            ("Wall time", format_eta(sum(_values(steps, "seconds"))), "in steps, without evaluation"),
            ("Peak memory", format_number(max(_values(steps, "peak_memory_gib"), default=None)), "GiB on one device"),
        ],
        final=_final_table(rows),
        stage_table=_stage_table(stages, recipe.get("stage", [])),
        bins=BINS,
        curves=[(chart.title, line_chart(**curves[chart.title]), chart.caption) for chart in CHARTS],
        difficulty=[_difficulty(row) for row in rows_of["filter"]],
        searches=[_search(row) for row in rows_of["temperature"]],
        rollouts=_rollouts(folder / "rollouts.jsonl"),
        recipe=recipe_text,
        glossary=GLOSSARY,
    )


if __name__ == "__main__":
    prepare_terminal()
    parser = argparse.ArgumentParser(
        "python -m lab.page", description="Write a run's report.html and curves.svg again; of several, compare.html."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; several are compared, with the first")
    runs = parser.parse_args().runs
    for run in runs:
        if not (run / "metrics.jsonl").exists():
            sys.exit(f"lab.page: {run} is not a run: it has no metrics.jsonl; give a folder that train.py has made")
    try:
        if len(runs) > 1:
            from lab.compare_page import write_comparison

            names = [run.resolve().name for run in runs]
            labels = names if len(set(names)) == len(runs) else map(str, runs)
            print(write_comparison({label: [run] for label, run in zip(labels, runs, strict=True)})[0])
        else:
            print(write_report(runs[0]))
    except (UserError, OSError) as error:
        sys.exit(f"lab.page: {sentence(error)}")
