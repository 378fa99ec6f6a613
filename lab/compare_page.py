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
    ("Mean reward in training", "reward_mean", "amount", "rl"),
    ("Accuracy in training", "accuracy", "share", "rl"),
    ("Mean response length (tokens)", "response_length_mean", "amount", "rl"),
    ("Truncated share", "truncated_share", "share", "rl"),
    ("Distinct-4", "distinct4", "level", "rl"),
    ("Entropy (nats per token)", "entropy", "amount", "rl"),
    ("Gradient norm of RL", "grad_norm", "log", "rl"),
    ("SFT loss (nats per token)", "loss", "amount", "sft"),
)
MOST_LINES = 12  # that a chart's legend has room for
PAIRED = ("A", "B", "B - A", "95%, paired", "up", "down", "same", "left out")
PAIRED_NOTE = "up and down: problems that B solves more and less often than A; a dash: no problem in common"


class Record(NamedTuple):
    """A run's files. Rows also have "spent", the tokens of training until then, and "of": their kind or evaluation."""

    rows: list[dict]
    recipe: dict[str, object]  # by dotted name
    made_with: dict[str, str]  # see engine.fingerprint.differences


def read_record(folder: Path) -> Record:
    """Read a run's metrics, recipe and newest fingerprint; only the metrics must be there."""
    rows, spent = read_metrics(folder), 0.0
    for row in rows:
        spent += (number(row.get("tokens")) or 0.0) * (row["kind"] in TRAINING)
        is_evaluation = row["kind"] == "eval" and number(row.get("avg")) is not None
        row |= {"spent": spent, "of": row["kind"]}
        if is_evaluation:  # points of all problems and of the first few are not one line
            row["of"] = f"{row['name']}, {row['problems']:,} problems"
    recipe, launches = folder / "recipe.toml", folder / "fingerprints.json"
    made_with = json.loads(launches.read_text(encoding="utf-8"))[-1] if launches.exists() else {}
    keys = flat_keys(recipe.read_text(encoding="utf-8")) if recipe.exists() else {}
    return Record(rows, keys, {k: v for k, v in made_with.items() if k not in ("recipe", "after_step")})


def write_comparison(groups: dict[str, list[Path]]) -> tuple[Path, list[list[str]]]:
    """Write compare.html beside the first folder; return its path and the table of the runs.

    A group is one run, or runs that differ in nothing but their seed. Raises MetricsError at a broken line.
    """
    records = {label: [read_record(folder) for folder in folders] for label, folders in groups.items()}
    (baseline, folders), *_ = groups.items()
    table, drawn = runs_table(records), dict(list(records.items())[:MOST_LINES])
    seeds = "Of several seeds the mean" * any(len(runs) > 1 for runs in records.values())
    few = f"Only the first {MOST_LINES} of {len(records)} are drawn" * (len(records) > MOST_LINES)
    notes = [seeds and f"{seeds}; bands: 95% intervals over seeds", few]
    parts = [
        ("Runs", ["95%: over problems, of several seeds over seeds", "Tokens: of training, with those of filters and "
         "temperature searches, without those of evaluations"], table, []),
        ("Evaluations, paired by problem", [f"A is {baseline}; {PAIRED_NOTE}", seeds], paired_table(records), []),
        ("What differs", other_differences(records), recipe_table(records), []),
        ("Against steps", notes, [], charts(drawn, "step", "step")),
        ("Against tokens", notes, [], charts(drawn, "spent", "tokens of training")),
    ]  # fmt: skip
    path = folders[0].resolve().parent / "compare.html"
    return write_page(path, "compare.html", title=" · ".join(groups), parts=parts), table


def evaluations(run: Record, name: str) -> list[dict]:
    """Return the evaluations of this name on the most problems: within a stage they may be of the first few."""
    named = [row for row in run.rows if row["of"].startswith(f"{name}, ")]
    most = max((row["problems"] for row in named), default=0)
    return [row for row in named if row["problems"] == most]


def runs_table(records: dict[str, list[Record]]) -> list[list[str]]:
    """Tabulate each group: steps, tokens, and held-out accuracy, first and last."""
    rows = [["run", "seeds", "steps", "tokens", "held-out, first", "last", "95%"]]
    for label, runs in records.items():
        seeds = ", ".join(dict.fromkeys(str(run.recipe.get("seed", "–")) for run in runs))
        sums = [
            mean_over_runs([max((row[x] for row in run.rows), default=0) for run in runs]) for x in ("step", "spent")
        ]
        cells, found = ["–"] * 3, [own for run in runs if (own := evaluations(run, "held-out"))]
        if found:
            first, (last, half) = (mean_over_runs([own[i]["avg"] for own in found]) for i in (0, -1))
            ends = (found[0][-1]["low"], found[0][-1]["high"]) if half is None else (last - half, last + half)
            cells = [percent(first[0]), percent(last), spread(max(0.0, ends[0]), min(1.0, ends[1]))]
        rows.append([label, seeds, *(format_number(mean) for mean, _ in sums), *cells])
    return rows


def paired_row(found: Comparison) -> list[str]:
    """Return the cells of PAIRED."""
    averages, ends = [percent(found.avg_a), percent(found.avg_b)], f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    counts = found.up, found.down, found.same, found.only_a + found.only_b
    return [*averages, f"{100 * found.difference:+.1f}", ends, *map(str, counts)]


def paired_table(records: dict[str, list[Record]]) -> list[list[str]]:
    """Tabulate the last evaluation of each name against the first group's, where both have some of its problems."""

    def solved_in(run: Record, name: str) -> dict[str, float]:
        source = run.recipe.get("eval.data" if name == "held-out" else "final.data")
        data = run.made_with.get(f"data {source}")  # other data has other problems, even under the same ids
        return {f"{key} {data}": share for key, share in dict(evaluations(run, name)[-1].get("by_problem", ())).items()}

    def shares(runs: list[Record], name: str) -> dict[str, float]:
        solved = [solved_in(run, name) for run in runs if evaluations(run, name)]
        shared = [key for key in (solved or [{}])[0] if all(key in own for own in solved)]
        return {key: mean_over_runs([own[key] for own in solved])[0] for key in shared}

    (_, first), *others = records.items()
    rows = [["evaluation", "B is", *PAIRED]]
    for name in dict.fromkeys(row.get("name", "") for row in first[0].rows if row["kind"] == "eval"):
        for label, runs in others:
            a, b = shares(first, name), shares(runs, name)  # older versions did not write them
            rows.append([name, label, *(paired_row(compare(name, a, b)) if a.keys() & b.keys() else "–" * len(PAIRED))])
    return rows


def recipe_table(records: dict[str, list[Record]]) -> list[list[str]]:
    """Tabulate the recipes' keys whose values are not the same in all groups."""
    rows = [["key", *records]]
    for key in dict.fromkeys(chain(*(run.recipe for runs in records.values() for run in runs))):
        values = [", ".join(dict.fromkeys(str(run.recipe.get(key, "–")) for run in runs)) for runs in records.values()]
        rows += [[key, *values]] * (key != "name" and len(set(values)) > 1)
    return rows


def other_differences(records: dict[str, list[Record]]) -> list[str]:
    """Say which runs were made with other code, model or data than the first."""
    (_, (first, *_)), *_ = records.items()
    found = {label: differences(first.made_with, run.made_with) for label, runs in records.items() for run in runs}
    return [f"{label}, beyond the recipe: {'; '.join(names)}" for label, names in found.items() if names]


def charts(records: dict[str, list[Record]], x: str, x_label: str) -> list[Drawn]:
    """Draw the curves over each other against the rows' key `x`; of a group the mean, at the steps of all its runs."""
    kinds = dict.fromkeys(row["of"] for runs in records.values() for run in runs for row in run.rows if "avg" in row)
    drawn = []
    for title, key, kind, of in (*((f"Accuracy: {of}", "avg", "share", of) for of in kinds), *CURVES):
        series, band = {}, {}
        for label, runs in records.items():
            rows = [[row for row in run.rows if row["of"] == of and number(row.get(key)) is not None] for run in runs]
            points = [{row["step"]: (row[x], row[key]) for row in own} for own in rows]
            steps = [step for step in points[0] if all(step in own for own in points)]
            means = [[mean_over_runs(v) for v in zip(*(own[s] for own in points), strict=True)] for s in steps]
            series[label] = [(at, mean) for (at, _), (mean, _) in means]
            ends = [(at, max(0.0, y - half), min(1.0, y + half)) for (at, _), (y, half) in means if half is not None]
            band[label] = ends if of in kinds else []
        figure = line_chart(title, series, kind, x_label=x_label, smooth=of not in kinds, band=band)
        drawn.append((title, figure, ""))
    return drawn
