"""One self-contained HTML page of an evaluation: figures, pictures, and whole responses beside their verdicts."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lab import charts
from lab.benchmarks import file_name
from lab.page import Drawn, temperature_figure, write_page
from lab.problems import Problem
from lab.scores import Evaluation, Response

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESPONSES_SHOWN = 6  # of each verdict of each set, drawn at random but always the same
ZONES = ("robust generation", "controlled exploration", "performance collapse")


def write_evaluation_page(
    out: Path,
    model: str,
    found: dict[str, list[Evaluation]],
    sets: dict[str, list[Problem]],
    groups: dict[str, dict[str, list[list[Response]]]],
    table: list[list[str]],
    curves: dict,
) -> Path:
    """Write OUT/report.html (and a PNG of each curve); returns the page's path.

    `found` and `groups` are by setting; `table` is RECIPE.md section 6 with this model; `curves` is that part of
    results.json: temperature, match, length.
    """
    drawn = []  # (figure with title and caption, a note, a table) of each curve
    for kind in ("temperature", "match", "length"):
        for name, curve in curves.get(kind, {}).items():
            figure = length_figure(name, curve) if kind == "length" else curve_figure(name, curve)
            if figure[1] is not None:
                charts.png(figure[1], out / f"{file_name(f'{kind}-{name}')}.png")
            note = describe_zones(curve["zones"]) if "zones" in curve else ""
            note += f"Chosen: temperature {curve['chosen']:g}" if "chosen" in curve else ""
            drawn.append((figure, note, budget_table(curve) if kind == "length" else temperature_table(curve)))
    shown = []
    for setting, own in found.items():
        for evaluation in own:
            name = ", ".join(filter(None, (evaluation.name, setting)))
            shown.append({
                "name": name,
                "file": file_name(name),
                "summary": summary_table(evaluation),
                "figures": [k_figure(evaluation), length_bands_figure(evaluation)],
                "tables": [k_table(evaluation), length_table(evaluation), *group_tables(evaluation)],
                "responses": responses_to_read(sets[evaluation.name], groups[setting][evaluation.name]),
            })  # fmt: skip
    values = {"title": f"Evaluation of {model}", "model": model, "published": table, "curves": drawn, "sets": shown}
    return write_page(out / "report.html", "evaluation.html", **values)


def percent(value: float | None) -> str:
    """A share in percent with one decimal."""
    return "-" if value is None else f"{100 * value:.1f}"


def spread(low: float | None, high: float | None) -> str:
    """An interval in percent."""
    return "-" if low is None or high is None else f"{percent(low)} to {percent(high)}"


def k_table(found: Evaluation) -> list[list[str]]:
    """pass@k and maj@k with both intervals: a head, then rows."""
    rows = [["", "value", "95%, other problems", "95%, these problems again"]]
    for title, figures in (("pass", found.pass_at), ("maj", found.maj_at)):
        for k, e in figures.items():
            again = spread(e.resampled_low, e.resampled_high)
            rows.append([f"{title}@{k}", percent(e.value), spread(e.low, e.high), again])
    return rows


def length_table(found: Evaluation) -> list[list[str]]:
    """Accuracy by response length: a head, then rows."""
    rows = [["length in tokens", "responses", "accuracy", "95%"]]
    for band in found.by_length:
        name = f"{band.above:,g} to {band.up_to:,g}" if band.up_to else f"above {band.above:,g}"
        rows.append([name, f"{band.responses:,}", percent(band.accuracy), spread(band.low, band.high)])
    return rows


def temperature_table(curve: dict) -> list[list[str]]:
    """Accuracy and distinct-4 by temperature, each with half its 95% interval: a head, then rows."""
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
    """Accuracy against the token budget, a column for each setting: a head, then rows."""
    rows = [["tokens", *settings]]
    for points in zip(*settings.values(), strict=True):
        cells = [f"{percent(p['accuracy'])} [{percent(p['low'])}, {percent(p['high'])}]" for p in points]
        rows.append([f"{points[0]['budget']:,}", *cells])
    return rows


def describe_zones(zones: dict) -> str:
    """The zones in words."""
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
    """The figures of a set: a head and one row."""
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


def group_tables(found: Evaluation) -> list[list[list[str]]]:
    """Accuracy by type and by difficulty, where the data has them: for each a head, then rows."""
    tables = []
    for title, groups in (("type", found.by_type), ("difficulty", found.by_difficulty)):
        rows = [[label, percent(g.avg), spread(g.low, g.high), f"{g.problems:,}"] for label, g in groups.items()]
        tables += [[[title, "accuracy", "95%", "problems"], *rows]] if rows else []
    return tables


def draw(title: str, lines: dict[str, list[tuple]], kind: str, x_label: str, **options: object) -> "Figure | None":
    """A chart of points (x, value, low, high): each line with the band of its 95% intervals."""
    series = {label: [(x, value) for x, value, _, _ in points] for label, points in lines.items()}
    band = {label: [(x, low, high) for x, _, low, high in points] for label, points in lines.items()}
    return charts.line_chart(title, series, kind, x_label=x_label, smooth=False, band=band, **options)


def k_figure(found: Evaluation) -> Drawn:
    """pass@k and maj@k against k."""
    lines = {
        title: [(float(k), e.value, e.low, e.high) for k, e in figures.items()]
        for title, figures in (("pass@k", found.pass_at), ("maj@k", found.maj_at))
    }
    title = "pass@k and maj@k"
    caption = "Bands: 95% intervals, problems being the sampling unit. A tie of votes is worth its share."
    return title, draw(title, lines, "share", "k"), caption


def length_bands_figure(found: Evaluation) -> Drawn:
    """Accuracy by response length, each band of lengths at its middle."""
    points = []
    for band in found.by_length:
        middle = (band.above + (band.up_to or found.by_length[-1].above * 1.5)) / 2
        points.append((middle, band.accuracy, band.low, band.high))
    title, caption = "Accuracy by response length", "Of the responses in each band of lengths, drawn at its middle."
    return title, draw(title, {"accuracy": points}, "share", "tokens"), caption


def curve_figure(name: str, curve: dict) -> Drawn:
    """Accuracy and distinct-4 against temperature, with the zones or the target where the curve has them."""
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


def length_figure(name: str, settings: dict) -> Drawn:
    """Accuracy when responses are cut, against the budget, a line for each setting."""
    lines = {
        setting: [(p["budget"], p["accuracy"], p["low"], p["high"]) for p in points]
        for setting, points in settings.items()
    }
    title = f"Length {name}"
    caption = "Responses are cut at the budget, not sampled again. Bands: 95% intervals over problems."
    return title, draw(title, lines, "share", "tokens"), caption


def responses_to_read(problems: Sequence[Problem], groups: Sequence[Sequence[Response]]) -> list[tuple]:
    """(verdict, how many responses got it, a few of them): of each a line about it, and its whole texts."""
    by_verdict: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for problem, group in zip(problems, groups, strict=True):
        accepted = " | ".join(problem.answers) or "none"
        for r in group:
            summary = (
                f"{r.verdict} · {r.problem_id} sample {r.sample} · answer {r.answer} · accepted {accepted} · "
                f"{r.tokens:,} tokens · {r.finish_reason}"
            )
            by_verdict.setdefault(r.verdict, []).append((summary, {"problem": problem.text, "response": r.text}))
    return [
        (verdict, len(found), random.Random(0).sample(found, min(RESPONSES_SHOWN, len(found))))
        for verdict, found in sorted(by_verdict.items())
    ]
