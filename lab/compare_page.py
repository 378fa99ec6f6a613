"""The page that compares runs: a table, curves over each other, what differs in the recipes, paired evaluations.

python -m lab.page runs/a runs/b runs/c         # writes compare.html beside the first
"""

import json
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from engine.fingerprint import differences, flat_keys
from lab.charts import format_number, line_chart, number
from lab.eval_page import percent, spread
from lab.metrics import read_metrics
from lab.page import Drawn, write_page
from lab.scores import Comparison, compare, mean_over_runs

TRAINING = ("sft", "rl", "filter", "temperature")  # rows whose tokens training took; evaluations only measure
CURVES = (  # title, metric, y axis of lab.charts.line_chart, rows
    ("Reward", "reward_mean", "amount", "rl"),
    ("Accuracy in training", "accuracy", "share", "rl"),
    ("Response length", "response_length_mean", "amount", "rl"),
    ("Truncated share", "truncated_share", "share", "rl"),
    ("Distinct-4", "distinct4", "level", "rl"),
    ("Entropy", "entropy", "amount", "rl"),
    ("Gradient norm of RL", "grad_norm", "log", "rl"),
    ("SFT loss", "loss", "amount", "sft"),
)
MOST_LINES = 12  # that a chart's legend has room for
PAIRED = ("A", "B", "B - A", "95%, paired", "up", "down", "same", "left out")
PAIRED_NOTE = "up and down: problems that B solves more and less often than A; left out: those that only one has"


class Record(NamedTuple):
    """What a run's folder says of it. Each row of the metrics also has "spent": training's tokens until then."""

    rows: list[dict]
    recipe: dict[str, object]  # by dotted name
    made_with: dict[str, str]  # see engine.fingerprint.differences


def read_record(folder: Path) -> Record:
    """Read a run's metrics, recipe and fingerprint."""
    rows, spent = read_metrics(folder), 0.0
    for row in rows:
        spent += (number(row.get("tokens")) or 0.0) * (row["kind"] in TRAINING)
        row["spent"] = spent
    recipe, launches = folder / "recipe.toml", folder / "fingerprints.json"
    made_with = json.loads(launches.read_text())[-1] if launches.exists() else {}
    keys = flat_keys(recipe.read_text(encoding="utf-8")) if recipe.exists() else {}
    return Record(rows, keys, {k: v for k, v in made_with.items() if k not in ("recipe", "after_step")})


def write_comparison(groups: dict[str, list[Path]]) -> tuple[Path, list[list[str]]]:
    """Write compare.html beside the first folder; return its path and the table of the runs.

    A group is one run, or runs that differ in nothing but their seed, of which lines are the mean. Paired differences
    are to the first group. Raises MetricsError at a broken line.
    """
    records = {label: [read_record(folder) for folder in folders] for label, folders in groups.items()}
    table, paired = runs_table(records), paired_table(records)
    shown = dict(list(records.items())[:MOST_LINES])
    few = f" Only the first {MOST_LINES} of {len(records)} are drawn." * (len(records) > MOST_LINES)
    parts = [
        ("Runs", "95%: over problems; of several seeds, over seeds. Tokens: all that training took, with those of "
         "filters and temperature searches; evaluations are not counted.", table, []),
        ("Evaluations, paired by problem", f"A is {next(iter(groups))}, B the run named; {PAIRED_NOTE}. Of several "
         "seeds the mean; the interval is over problems.", paired, []),
        ("What differs", " ".join(other_differences(records)), recipe_table(records), []),
        ("Against steps", f"Of several seeds the mean.{few}", [], charts(shown, "step")),
        ("Against tokens", f"All that training took, as in the first table.{few}", [], charts(shown, "spent")),
    ]  # fmt: skip
    path = next(iter(groups.values()))[0].resolve().parent / "compare.html"
    return write_page(path, "compare.html", title=f"{' · '.join(groups)}", parts=parts), table


def held_out(record: Record) -> list[dict]:
    """Return the evaluations named "held-out", with accuracy."""
    named = [row for row in record.rows if row["kind"] == "eval" and row.get("name") == "held-out"]
    return [row for row in named if number(row.get("avg")) is not None]


def runs_table(records: dict[str, list[Record]]) -> list[list[str]]:
    """Tabulate each group: steps, tokens and held-out accuracy, first and last, on the same number of problems."""
    rows = [["run", "seeds", "steps", "tokens", "held-out, first", "last", "95%"]]
    for label, runs in records.items():
        seeds = ", ".join(dict.fromkeys(str(run.recipe.get("seed", "?")) for run in runs))
        steps, tokens = (max((row[x] for row in run.rows), default=0) for x in ("step", "spent") for run in runs[:1])
        found = [evaluations for run in runs if (evaluations := held_out(run))]
        cells = ["–", "–", "–"]
        if found:
            last = [evaluations[-1] for evaluations in found]
            first = [next(r for r in own if r["problems"] == own[-1]["problems"]) for own in found]
            mean, half = mean_over_runs([row["avg"] for row in last])
            low, high = (last[0]["low"], last[0]["high"]) if half is None else (mean - half, mean + half)
            cells = [percent(mean_over_runs([row["avg"] for row in first])[0]), percent(mean), spread(low, high)]
        rows.append([label, seeds, f"{steps:,}", format_number(tokens), *cells])
    return rows


def paired_row(found: Comparison) -> list[str]:
    """Return the cells of PAIRED."""
    return [
        percent(found.avg_a), percent(found.avg_b), f"{100 * found.difference:+.1f}",
        f"{100 * found.low:+.1f} to {100 * found.high:+.1f}", str(found.up), str(found.down), str(found.same),
        str(found.only_a + found.only_b),
    ]  # fmt: skip


def paired_table(records: dict[str, list[Record]]) -> list[list[str]]:
    """Tabulate the last evaluation of each name against the first group's; runs of older versions have no shares."""

    def shares(runs: list[Record], name: str) -> dict[str, float]:
        last = [[r for r in run.rows if r["kind"] == "eval" and r.get("name") == name][-1:] for run in runs]
        solved = [dict(row.get("by_problem") or ()) for row in chain(*last)]
        common = [key for key in solved[0] if all(key in own for own in solved)] if solved else []
        return {key: mean_over_runs([own[key] for own in solved])[0] for key in common}

    (_, first), *others = records.items()
    names = dict.fromkeys(row.get("name", "") for row in first[0].rows if row["kind"] == "eval")
    rows = [["evaluation", "B", *PAIRED]]
    for name in names:
        a = shares(first, name)
        for label, runs in others:
            b = shares(runs, name)
            rows.append([name, label, *(paired_row(compare(name, a, b)) if a.keys() & b.keys() else ["–"] * 8)])
    return rows


def recipe_table(records: dict[str, list[Record]]) -> list[list[str]]:
    """Tabulate the recipes' keys that are not the same in all groups."""
    rows = [["key", *records]]
    for key in dict.fromkeys(chain(*(run.recipe for runs in records.values() for run in runs))):
        values = [", ".join(dict.fromkeys(str(run.recipe.get(key, "–")) for run in runs)) for runs in records.values()]
        if key != "name" and len(set(values)) > 1:
            rows.append([key, *values])
    return rows


def other_differences(records: dict[str, list[Record]]) -> list[str]:
    """Return a sentence for each run that was made with other code, model or data than the first."""
    (_, (first, *_)), *_ = records.items()
    found = {label: differences(first.made_with, run.made_with) for label, runs in records.items() for run in runs}
    return [f"{label}, beyond the recipe: {'; '.join(names)}." for label, names in found.items() if names]


def charts(records: dict[str, list[Record]], x: str) -> list[Drawn]:
    """Draw the curves over each other against the rows' key `x`."""
    everything = [row for runs in records.values() for run in runs for row in held_out(run)]
    lines = [  # points of all problems and of the first few are not one line
        (f"Held-out accuracy, {size:,} problems", "avg", "share", "eval", size)
        for size in sorted({row["problems"] for row in everything}, reverse=True)
    ] + [(*curve, None) for curve in CURVES]
    drawn = []
    for title, key, kind, rows, size in lines:
        series, band = {}, {}
        for label, runs in records.items():
            points = []
            for run in runs:
                own = held_out(run) if size else run.rows
                own = [
                    row for row in own if row["kind"] == rows and row.get("problems") == (size or row.get("problems"))
                ]
                points.append({row["step"]: (row[x], y) for row in own if (y := number(row.get(key))) is not None})
            steps = [step for step in points[0] if all(step in own for own in points)]
            means = [
                [mean_over_runs(values) for values in zip(*(own[step] for own in points), strict=True)]
                for step in steps
            ]
            series[label] = [(at, mean) for (at, _), (mean, _) in means]
            band[label] = [
                (at, mean - half, mean + half) for (at, _), (mean, half) in means if size and half is not None
            ]
        label = "step" if x == "step" else "tokens"
        drawn.append((title, line_chart(title, series, kind, x_label=label, smooth=not size, band=band), ""))
    return drawn
