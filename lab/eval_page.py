"""One self-contained HTML page of an evaluation: figures, pictures, and whole responses beside their verdicts."""

import random
from collections.abc import Sequence
from pathlib import Path

from engine.files import write_atomically
from lab import charts
from lab.benchmarks import file_name
from lab.page import folded, html_figures, html_page, html_table, html_text
from lab.problems import Problem
from lab.scores import Estimate, Evaluation, Response

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
    sections = [f"<h1>{html_text(model)}</h1>"]
    if found:
        sections += ["<h2>Beside the published results</h2>", html_table(table[0], table[1:])]
        sections.append('<p class="muted">avg@k in percent; [95% interval over problems], @n of this measurement.</p>')
    for kind, draw, tabulate in (
        ("temperature", temperature_figure, temperature_table),
        ("match", temperature_figure, temperature_table),
        ("length", length_figure, budget_table),
    ):
        for name, curve in curves.get(kind, {}).items():
            title, figure, caption = draw(name, curve)
            if figure is not None:
                charts.png(figure, out / f"{file_name(f'{kind}-{name}')}.png")
            head, *rows = tabulate(curve)
            said = f"<p>{html_text(describe_zones(curve['zones']))}</p>" if "zones" in curve else ""
            said += f"<p>Chosen: temperature {curve['chosen']:g}</p>" if "chosen" in curve else ""
            sections += [html_figures([(title, figure, caption)]), said, html_table(head, rows)]
    for setting, own in found.items():
        for evaluation in own:
            name = ", ".join(filter(None, (evaluation.name, setting)))
            head, *rows = k_table(evaluation)
            lengths_head, *lengths = length_table(evaluation)
            sections += [
                f"<h2>{html_text(name)}</h2>",
                figures_table(evaluation),
                html_figures([k_figure(evaluation), length_bands_figure(evaluation)]),
                html_table(head, rows),
                html_table(lengths_head, lengths),
                groupings(evaluation),
                responses_to_read(name, sets[evaluation.name], groups[setting][evaluation.name]),
            ]
    write_atomically(out / "report.html", [html_page(f"Evaluation of {model}", "".join(sections)).encode()])
    return out / "report.html"


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


def figures_table(found: Evaluation) -> str:
    """The figures of a set in one row."""
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
    return html_table(list(cells), [list(cells.values())])


def k_figure(found: Evaluation) -> tuple:
    """pass@k and maj@k against k."""

    def points(figures: dict[str, Estimate]) -> list[tuple[float, float]]:
        return [(float(k), figure.value) for k, figure in figures.items()]

    series = {"pass@k": points(found.pass_at), "maj@k": points(found.maj_at)}
    band = {
        title: [(float(k), figure.low, figure.high) for k, figure in figures.items()]
        for title, figures in (("pass@k", found.pass_at), ("maj@k", found.maj_at))
    }
    title = "pass@k and maj@k"
    figure = charts.line_chart(title, series, "share", x_label="k", smooth=False, band=band)
    return title, figure, "Bands: 95% intervals, problems being the sampling unit. A tie of votes is worth its share."


def length_bands_figure(found: Evaluation) -> tuple:
    """Accuracy by response length."""
    known = [band for band in found.by_length if band.accuracy is not None]
    middle = [(band.above + (band.up_to or found.by_length[-1].above * 1.5)) / 2 for band in known]
    series = {"accuracy": list(zip(middle, (band.accuracy for band in known), strict=True))}
    band = {"accuracy": [(x, b.low, b.high) for x, b in zip(middle, known, strict=True)]}
    title = "Accuracy by response length"
    figure = charts.line_chart(title, series, "share", x_label="tokens", smooth=False, band=band)
    return (
        title,
        figure,
        "Of responses whose length lies in a band of the trained length: "
        + "; ".join(
            f"{band.above:,.0f} to {f'{band.up_to:,.0f}' if band.up_to else 'the end'}: {band.responses:,} responses"
            for band in found.by_length
        ),
    )


def groupings(found: Evaluation) -> str:
    """Accuracy by type and by difficulty, where the data has them."""
    parts = []
    for title, grouped in (("type", found.by_type), ("difficulty", found.by_difficulty)):
        if grouped:
            rows = [[label, percent(g.avg), spread(g.low, g.high), f"{g.problems:,}"] for label, g in grouped.items()]
            parts.append(html_table([title, "accuracy", "95%", "problems"], rows))
    return "".join(parts)


def temperature_figure(name: str, curve: dict) -> tuple:
    """Accuracy and distinct-4 against temperature, with the zones or the target where there are such."""
    points = sorted(curve["points"], key=lambda point: point["temperature"])
    xs = [point["temperature"] for point in points]
    series = {key: [(p["temperature"], p[key]) for p in points] for key in ("accuracy", "distinct4")}
    band = {
        key: [
            (p["temperature"], max(0.0, p[key] - p[f"{key}_half"]), min(1.0, p[key] + p[f"{key}_half"]))
            for p in points
            if p[key] is not None
        ]
        for key in series
    }
    zones, rules, found = [], [], curve.get("zones")
    if "chosen" in curve:
        series["target"] = [(p["temperature"], p["target"]) for p in points]
        rules = [(curve["chosen"], f"chosen {curve['chosen']:g}")]
    if found and "none" not in found:
        ends = [xs[-1] if end is None else end for end in (found["robust_end"], found["exploration_end"])]
        edges = [xs[0], *ends, xs[-1]]
        zones = [(a, b, zone) for a, b, zone in zip(edges, edges[1:], ZONES, strict=False) if b > a]
        rules = [(found["start"], f"start {found['start']:g}")]
    title = f"Temperature {name}"
    figure = charts.line_chart(
        title, series, "amount", rules, x_label="temperature", smooth=False, band=band, zones=zones
    )
    return title, figure, "Bands: 95% intervals, problems being the sampling unit."


def length_figure(name: str, settings: dict) -> tuple:
    """Accuracy when responses are cut, against the budget, a line for each setting."""
    series = {setting: [(p["budget"], p["accuracy"]) for p in points] for setting, points in settings.items()}
    band = {setting: [(p["budget"], p["low"], p["high"]) for p in points] for setting, points in settings.items()}
    title = f"Length {name}"
    figure = charts.line_chart(title, series, "share", x_label="tokens", smooth=False, band=band)
    return title, figure, "Responses are cut at the budget, not sampled again. Bands: 95% intervals over problems."


def responses_to_read(name: str, problems: Sequence[Problem], groups: Sequence[Sequence[Response]]) -> str:
    """A few whole responses of every verdict."""
    by_verdict: dict[str, list[tuple[Problem, Response]]] = {}
    for problem, group in zip(problems, groups, strict=True):
        for response in group:
            by_verdict.setdefault(response.verdict, []).append((problem, response))
    parts = []
    for verdict, found in sorted(by_verdict.items()):
        chosen = random.Random(0).sample(found, min(RESPONSES_SHOWN, len(found)))
        parts.append(
            f"<h3>{html_text(verdict)}: {len(chosen)} of {len(found):,} responses, "
            f"all in responses/{html_text(file_name(name))}.jsonl</h3>"
        )
        for problem, response in chosen:
            summary = (
                f"{verdict} · {response.problem_id} sample {response.sample} · answer {response.answer} · "
                f"accepted {' | '.join(problem.answers) or 'none'} · {response.tokens:,} tokens · "
                f"{response.finish_reason}"
            )
            parts.append(folded(summary, {"problem": problem.text, "response": response.text}))
    return "".join(parts)
