"""The HTML page of an evaluation: tables, charts, and responses with their verdicts; self-contained."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lab.benchmarks import file_name
from lab.charts import line_chart, png
from lab.page import Drawn, temperature_figure, write_page
from lab.problems import Problem
from lab.scores import Evaluation, GroupAccuracy, Response
from lab.transcripts import shorten, transcript

RESPONSES_SHOWN = 6  # per verdict and set, drawn at random with a fixed seed
ZONES = ("robust generation", "controlled exploration", "performance collapse")


def write_evaluation_page(
    out: Path,
    settings: dict,
    found: dict[str, list[Evaluation]],
    sets: dict[str, list[Problem]],
    groups: dict[str, dict[str, list[list[Response]]]],
    table: list[list[str]],
    curves: dict,
) -> Path:
    """Write OUT/report.html and a PNG of each curve; return the page's path.

    `settings` are those of settings.json; `found` and `groups` are by setting; `table` has the published results for
    what was measured; `curves` is that part of results.json: temperature, match, length.
    """
    drawn = []  # (chart, note, table) of each curve
    for kind in ("temperature", "match", "length"):
        for name, curve in curves.get(kind, {}).items():
            if kind == "length":
                chart, note, rows = budget_chart(name, curve), "", budget_table(curve)
            else:
                chart, rows = temperature_chart(name, curve), temperature_table(curve)
                chosen = f"Chosen: temperature {curve['chosen']:g}" if "chosen" in curve else ""
                note = describe_zones(curve["zones"]) if "zones" in curve else chosen
            if chart[1] is not None:
                png(chart[1], out / f"{file_name(f'{kind}-{name}')}.png")
            drawn.append((chart, note, rows))
    shown = []
    for setting, own in found.items():
        for evaluation in own:
            name = ", ".join(filter(None, (evaluation.name, setting)))
            by_group = {"type": evaluation.by_type, "difficulty": evaluation.by_difficulty}
            tables = [group_table(title, by_label) for title, by_label in by_group.items() if by_label]
            shown.append({
                "name": name,
                "score": (
                    f"{name}, avg@{evaluation.n}", f"{percent(evaluation.avg)}%",
                    f"95% {spread(evaluation.low, evaluation.high)}, {evaluation.problems:,} problems",
                ),
                "file": file_name(name),
                "summary": summary_table(evaluation),
                "figures": [k_chart(evaluation), length_chart(evaluation)],
                "tables": [k_table(evaluation), length_table(evaluation), *tables],
                "responses": sample_responses(sets[evaluation.name], groups[setting][evaluation.name]),
            })  # fmt: skip
    return write_page(
        out / "report.html",
        "evaluation.html",
        title=f"Evaluation of {Path(settings['model']).name}",
        settings={
            key.replace("_", " "): value
            for key, value in settings.items()
            if key not in ("identity", "data") and value not in (None, "")
        },
        published=table if len(table) > 1 + len(found) else [],
        curves=drawn,
        sets=shown,
    )


def percent(value: float | None) -> str:
    """Format a share in percent with one decimal."""
    return "-" if value is None else f"{100 * value:.1f}"


def spread(low: float | None, high: float | None) -> str:
    """Format an interval in percent."""
    return "-" if low is None else f"{percent(low)} to {percent(high)}"


def k_table(found: Evaluation) -> list[list[str]]:
    """Tabulate pass@k and maj@k with both intervals; as in every table here, the first row is the header."""
    rows = [["", "value", "95%, other problems", "95%, these problems again"]]
    for title, figures in (("pass", found.pass_at), ("maj", found.maj_at)):
        for k, e in figures.items():
            intervals = spread(e.low, e.high), spread(e.resampled_low, e.resampled_high)
            rows.append([f"{title}@{k}", percent(e.value), *intervals])
    return rows


def length_table(found: Evaluation) -> list[list[str]]:
    """Tabulate accuracy by response length."""
    rows = [["length in tokens", "responses", "accuracy", "95%"]]
    for band in found.by_length:
        name = f"{band.above:,g} to {band.up_to:,g}" if band.up_to else f"above {band.above:,g}"
        rows.append([name, f"{band.responses:,}", percent(band.accuracy), spread(band.low, band.high)])
    return rows


def temperature_table(curve: dict) -> list[list[str]]:
    """Tabulate accuracy and distinct-4 by temperature, each with half its 95% interval."""
    rows = [["temperature", "accuracy", "+-", "distinct-4", "+-", "problems"]]
    for point in curve["points"]:
        diversity = "-" if point["distinct4"] is None else f"{point['distinct4']:.3f}"
        rows.append([
            f"{point['temperature']:g}", percent(point["accuracy"]), percent(point["accuracy_half"]),
            diversity, f"{point['distinct4_half']:.3f}", str(point["problems"]),
        ])  # fmt: skip
        if point["target"] is not None:
            rows[-1].append(f"{point['target']:.3f}")
    if curve["points"] and curve["points"][0]["target"] is not None:
        rows[0].append("to restore")
    return rows


def budget_table(settings: dict) -> list[list[str]]:
    """Tabulate accuracy by token budget, with a column for each setting."""
    rows = [["tokens", *settings]]
    for points in zip(*settings.values(), strict=True):
        cells = [f"{percent(p['accuracy'])} [{percent(p['low'])}, {percent(p['high'])}]" for p in points]
        rows.append([f"{points[0]['budget']:,}", *cells])
    return rows


def describe_zones(zones: dict) -> str:
    """Return a sentence on the zones."""
    if "none" in zones:
        return zones["none"]
    between = "" if zones["start_low"] is None else f" (95% {zones['start_low']:g} to {zones['start_high']:g})"
    if zones["robust_end"] is None:
        return f"accuracy does not fall up to temperature {zones['start']:g}: measure higher ones{between}"
    end = "beyond what was measured" if zones["exploration_end"] is None else f"at {zones['exploration_end']:.2f}"
    return (
        f"robust generation up to {zones['robust_end']:.2f}, controlled exploration from there, "
        f"performance collapse {end}; start training at {zones['start']:g}{between}"
    )


def summary_table(found: Evaluation) -> list[list[str]]:
    """Tabulate the figures of a set, in one row."""
    cells = {
        f"avg@{found.n}": percent(found.avg),
        "95% over problems": spread(found.low, found.high),
        "problems": f"{found.problems:,}",
        "without an answer": f"{found.unanswerable:,}",
        "temperature": f"{found.temperature:g}",
        "mean tokens": f"{found.length_mean:,.0f}",
        "truncated": percent(found.truncated_share),
        "no box": percent(found.no_box_share),
        "distinct-4": "-" if found.distinct4 is None else f"{found.distinct4:.3f}",
        "tokens/s": "-" if found.tokens_per_s is None else f"{found.tokens_per_s:,.0f}",
        "peak GiB": "-" if found.peak_memory_gib is None else f"{found.peak_memory_gib:.2f}",
        **{verdict: f"{count:,}" for verdict, count in found.verdicts.items()},
    }
    return [list(cells), list(cells.values())]


def group_table(title: str, groups: dict[str, GroupAccuracy]) -> list[list[str]]:
    """Tabulate accuracy by label."""
    rows = [[title, "accuracy", "95%", "problems"]]
    for label, group in groups.items():
        rows.append([label, percent(group.avg), spread(group.low, group.high), f"{group.problems:,}"])
    return rows


def accuracy_chart(title: str, x_label: str, caption: str, lines: dict[str, list[tuple]]) -> Drawn:
    """Draw points (x, accuracy, low, high), each line with the band of its 95% intervals."""
    series = {label: [(x, value) for x, value, _, _ in points] for label, points in lines.items()}
    band = {label: [(x, low, high) for x, _, low, high in points] for label, points in lines.items()}
    return title, line_chart(title, series, "share", x_label=x_label, smooth=False, band=band), caption


def k_chart(found: Evaluation) -> Drawn:
    """Draw pass@k and maj@k against k."""
    lines = {
        title: [(float(k), e.value, e.low, e.high) for k, e in figures.items()]
        for title, figures in (("pass@k", found.pass_at), ("maj@k", found.maj_at))
        if figures
    }
    caption = (
        "Bands: 95% intervals, problems being the sampling unit. A tied vote counts by its share of right answers."
    )
    return accuracy_chart(" and ".join(lines), "k", caption, lines)


def length_chart(found: Evaluation) -> Drawn:
    """Draw accuracy by response length, each band of lengths at its middle."""
    points = []
    for band in found.by_length:
        middle = (band.above + (band.up_to or found.by_length[-1].above * 1.5)) / 2
        points.append((middle, band.accuracy, band.low, band.high))
    caption = "Of the responses in each band of lengths, drawn at its middle."
    return accuracy_chart("Accuracy by response length", "tokens", caption, {"accuracy": points})


def temperature_chart(name: str, curve: dict) -> Drawn:
    """Draw accuracy and distinct-4 against temperature, with the curve's zones or target."""
    zones, rules, found = [], [], curve.get("zones")
    if "chosen" in curve:
        rules = [(curve["chosen"], f"chosen {curve['chosen']:g}")]
    if found and "none" not in found:
        measured = [point["temperature"] for point in curve["points"]]
        ends = [max(measured) if end is None else end for end in (found["robust_end"], found["exploration_end"])]
        zones = list(zip([min(measured), *ends], [*ends, max(measured)], ZONES, strict=True))
        rules = [(found["start"], f"start {found['start']:g}")]
    title = f"Temperature {name}"
    figure = temperature_figure(title, curve["points"], rules, zones)
    return title, figure, "Bands: 95% intervals, problems being the sampling unit."


def budget_chart(name: str, settings: dict) -> Drawn:
    """Draw accuracy of responses cut at a budget against the budget, with a line for each setting."""
    lines = {
        setting: [(p["budget"], p["accuracy"], p["low"], p["high"]) for p in points]
        for setting, points in settings.items()
    }
    caption = "Responses are cut at the budget, not sampled again. Bands: 95% intervals over problems."
    return accuracy_chart(f"Length {name}", "tokens", caption, lines)


def sample_responses(problems: Sequence[Problem], groups: Sequence[Sequence[Response]]) -> list[tuple]:
    """Return (verdict, number of responses, transcripts of a few of them with their problems) for each verdict."""
    by_verdict = defaultdict(list)
    for problem, group in zip(problems, groups, strict=True):
        for response in group:
            by_verdict[response.verdict].append((problem, response))
    sampled = []
    for verdict, found in sorted(by_verdict.items()):
        some = random.Random(0).sample(found, min(RESPONSES_SHOWN, len(found)))
        shown = [(problem, shorten(problem.text), transcript(asdict(response))) for problem, response in some]
        sampled.append((verdict, len(found), shown))
    return sampled
