"""The HTML page of a run, and its main curves as one SVG: self-contained, without scripts.

Read from metrics.jsonl, rollouts.jsonl and recipe.toml; rebuild it at any time, also during the run:

    python -m lab.page runs/NAME
    python -m lab.page runs/A runs/B        # compare several: lab/compare_page.py
"""

import argparse
import sys
import tomllib
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
from lab.metrics import read_metrics
from lab.story import held_out, share, training_stages, values, what_happened
from lab.transcripts import groups_to_read

Drawn = tuple[str, Figure | None, str]  # title, figure (None without data), caption


class Chart(NamedTuple):
    """`metrics`: a line per metric with its name, or per part of a metric that is a dict. `kind` is the y axis:
    "amount" (from 0), "share" (%), "groups" (a count, as % of the step's groups), "level" (may leave out 0) or "log".
    `of` selects the rows: "rl", "sft", "steps" (both) or "eval" (the held-out ones)."""

    title: str
    metrics: dict[str, str]
    kind: str
    caption: str
    of: str = "rl"


CHARTS = {  # by the part of the story that they tell
    "Learning": [
        Chart("Held-out accuracy", {"avg": ""}, "share", "Never trained on; bands: 95% intervals.", "eval"),
        Chart("Held-out accuracy by type", {"by_type": ""}, "share", "At most 12 types; of the larger set.", "eval"),
        Chart("Reward and accuracy", {"reward_mean": "mean reward", "accuracy": "share right"}, "amount",
              "In training. Quickly above 0.7: the problems are too easy."),
        Chart("SFT loss (nats per token)", {"loss": "loss"}, "amount", "Cross-entropy on worked solutions.", "sft"),
        Chart("RL loss", {"loss": "loss"}, "amount", "Near 0 on policy in value, not in gradient."),
        Chart("Gradient norm", {"grad_norm": "before clipping"}, "log", "Log axis.", "steps"),
    ],
    "Difficulty": [
        Chart("Groups (share of the batch)", {"solve_none": "all wrong", "solve_all": "all right",
              "zero_variance": "no signal", "rescued": "rescued", "substituted": "substituted"}, "groups",
              "As sampled; how many of them rescue and substitution changed."),
    ],
    "Exploration": [
        Chart("Distinct-4", {"distinct4": "distinct-4"}, "level", "Diversity of a group's responses; 1: all differ."),
        Chart("Temperature", {"temperature": "temperature"}, "level", "In the sampler and in the loss."),
        Chart("Entropy (nats per token)", {"entropy": "entropy"}, "amount", "At the sampling temperature."),
        Chart("Importance ratio", {"ratio_mean": "own rollouts", "rescued_ratio_mean": "rescued rollouts"}, "level",
              "Policy over sampler: 1 if on policy; rescued rollouts are not."),
    ],
    "Lengths": [
        Chart("Response length (tokens)", {"response_length_mean": "mean", "response_length_max": "longest",
              "max_response_tokens": "limit"}, "amount", "The end-of-sequence token included."),
        Chart("Truncated share", {"truncated_share": "cut at the limit"}, "share", "Of the rollouts."),
    ],
    "Machine": [
        Chart("Tokens per second", {"sample_tokens_per_s": "sampling", "update_tokens_per_s": "update",
              "tokens_per_s": "SFT"}, "log", "Log axis.", "steps"),
        Chart("Seconds per step", {"seconds_sample": "sampling", "seconds_grade": "waiting for grades",
              "seconds_update": "update"}, "amount", "By phase."),
        Chart("Sampler against trainer (nats)", {"logprob_diff_mean": "mean", "logprob_diff_max": "largest"}, "log",
              "Difference of a token's log-probs: rounding. Log axis."),
    ],
}  # fmt: skip
PANELS = (  # of curves.svg
    "Held-out accuracy by type", "Reward and accuracy", "Response length (tokens)",
    "Distinct-4", "Temperature", "Groups (share of the batch)",
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
SEEN = {  # by a premise's mechanism: the figure that its stage ends with
    "substitution": ("zero_variance", "last %", "lack a signal"), "rule of a third": ("skipped", "last", "skipped"),
    "rescue": ("rescued", "last", "rescues"), "drop": ("dropped", "last", "dropped"),
    "response limits": ("truncated_share", "last %", "cut"),
}  # fmt: skip

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


def _curve(chart: Chart, rows: list[dict], rules: list[tuple[float, str]]) -> dict:
    """Return the arguments of `line_chart`. Evaluations of fewer problems are a line of their own."""
    sizes = sorted({number(row.get("problems")) or 0 for row in rows}, reverse=True) if chart.of == "eval" else []
    sets = {f"{size:,.0f} problems": [row for row in rows if (row.get("problems") or 0) == size] for size in sizes}
    series, band = {}, {}
    for key, name in chart.metrics.items():
        for size, own in (sets or {name: rows}).items():
            totals = [number(row.get("groups")) if chart.kind == "groups" else 1.0 for row in own]
            parts = sorted({part for row in own if isinstance(row.get(key), dict) for part in row[key]})
            for part in parts or [size]:
                points = series[part] = []
                for row, total in zip(own, totals, strict=True):
                    value = number((row.get(key) or {}).get(part) if parts else row.get(key))
                    points.append((row["step"], value / total if value is not None and total else None))
            if key == "avg":
                band[size] = [(row["step"], row.get("low"), row.get("high")) for row in own]
            if parts:
                break  # of the largest set
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
    for key, name in {"accuracy": "accuracy", "distinct4": "distinct-4", "target": "target"}.items():
        known = [(p["temperature"], number(p.get(key)), number(p.get(f"{key}_half"))) for p in points]
        series[name] = [(x, y) for x, y, _ in known]
        band[name] = [(x, max(0.0, y - half), min(1.0, y + half)) for x, y, half in known if None not in (y, half)]
    return line_chart(title, series, "amount", rules, "temperature", smooth=False, band=band, zones=zones)


def _search(row: dict) -> Drawn:
    title, chosen, target = (
        f"Temperature {row.get('label', '')}",
        number(row.get("chosen")),
        row.get("target_distinct4"),
    )
    rules = [(chosen, f"chosen {format_number(chosen)}")] if chosen is not None else []
    figure = temperature_figure(title, [point | {"target": target} for point in row.get("curve") or []], rules)
    whose = f"the {row.get('restores') or 'first'} stage's" if target else "an earlier"
    return title, figure, f"The search for the temperature that restores {whose} diversity; bands: 95% intervals."


def _cell(rows: list[dict], key: str, what: str) -> str:
    known, show = values(rows, key), share if "%" in what else format_number
    if not known:
        return show(None)
    if what == "sum":
        return show(sum(known))
    if "last" in what:
        return show(known[-1])
    return " → ".join(show(sum(ten) / len(ten)) for ten in (known[:10], known[-10:]))


def _stage_table(stages: dict[str, list[dict]], planned: list[dict]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for label, steps in stages.items():
        named = [stage["name"] for stage in planned[steps[0]["stage"] :][:1] if "name" in stage]
        span = f"{steps[0]['step']:,}–{steps[-1]['step']:,}"
        cells = [_cell(steps, key, what) for _, key, what in STAGE_COLUMNS]
        rows.append([": ".join([label, *named]), span, *cells, format_eta(sum(values(steps, "seconds")))])
    return ["Stage", "Steps", *(title for title, _, _ in STAGE_COLUMNS), "Time"], rows


def _premise_table(stages: dict[str, list[dict]], rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    labels, cells = {steps[0]["stage"]: label for label, steps in stages.items()}, []
    ends = {row["stage"]: row["seen"] for row in rows if "seen" in row}
    for row in rows:
        for mechanism, figure, answer in row.get("table", ()):
            key, what, words = SEEN.get(mechanism.removesuffix(" (off)"), ("", "last", ""))
            seen = ends.get(row["stage"], {})
            seen = f"{_cell([seen], key, what)} {words}" if key in seen else "–"
            cells.append([labels.get(row["stage"], "next"), mechanism, figure, answer, seen])
    return ["Stage", "Mechanism", "Expected at its start", "Does it matter?", "Seen at its end"], cells


def _final_table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    final = [row for row in rows if row["kind"] == "eval" and row.get("final")]
    types = sorted({part for row in final for part in row.get("by_type") or {}})
    cells = []
    for row in final:
        shares = [_cell([row.get("by_type") or {}], part, "last %") for part in types]
        cells.append([row.get("name"), *(_cell([row], key, what) for _, key, what in FINAL_COLUMNS), *shares])
    return ["Evaluation", *(title for title, _, _ in FINAL_COLUMNS), *types], cells


def write_report(folder: Path) -> Path:
    """Write report.html and curves.svg into a run folder, and return the page's path.

    Needs metrics.jsonl; rollouts.jsonl and recipe.toml may be missing, and any key of a row but kind, step and stage.
    Raises FileNotFoundError without metrics.jsonl, MetricsError (file and line) at a broken line."""
    rows = read_metrics(folder)
    recipe_text = (folder / "recipe.toml").read_text(encoding="utf-8") if (folder / "recipe.toml").exists() else ""
    recipe, stages = tomllib.loads(recipe_text), training_stages(rows)
    title = recipe.get("name", folder.resolve().name)
    kinds = ("sft", "rl", "filter", "temperature", "premises")
    rows_of = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    steps = [row for part in stages.values() for row in part]
    rows_of |= {"steps": steps, "eval": held_out(rows)}
    rules = [(part[0]["step"], label) for label, part in stages.items()]
    curves = {chart.title: _curve(chart, rows_of[chart.of], rules) for part in CHARTS.values() for chart in part}
    curves_svg = svg(panels(title, [curves[name] for name in PANELS]))
    curves_svg = curves_svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    write_atomically(folder / "curves.svg", [curves_svg.encode()])
    more = {
        "Difficulty": [_difficulty(row) for row in rows_of["filter"]],
        "Exploration": [_search(row) for row in rows_of["temperature"]],
    }
    numbers = [(key, row["step"], value) for row in rows for key, value in row.items() if isinstance(value, float)]
    return write_page(
        folder / "report.html",
        "run.html",
        title=title,
        stages=stages,
        story=what_happened(rows),
        broken=[f"{key} at step {step}" for key, step, value in numbers if number(value) is None],
        cards=[
            ("Steps", f"{len(steps):,}", f"in {len(stages)} stages"),
            ("Tokens", format_number(sum(values(steps, "tokens"))), "sampled and trained on"),
            ("Wall time", format_eta(sum(values(steps, "seconds"))), "in steps, without evaluation"),
            ("Peak memory", format_number(max(values(steps, "peak_memory_gib"), default=None)), "GiB on one device"),
        ],
        final=_final_table(rows),
        stage_table=_stage_table(stages, recipe.get("stage", [])),
        premises=_premise_table(stages, rows_of["premises"]),
        bins=BINS,
        parts={
            part: [(chart.title, line_chart(**curves[chart.title]), chart.caption) for chart in charts]
            + more.get(part, [])
            for part, charts in CHARTS.items()
        },
        reading=groups_to_read(folder / "rollouts.jsonl", {own[0]["stage"]: label for label, own in stages.items()}),
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
