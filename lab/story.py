"""What happened in a run: sentences with numbers, derived from the rows of metrics.jsonl alone.

They end the console's output and open report.html. Every sentence holds for any run: an unfinished one, one without
rl stages, held-out problems, a filter or a search. What a row lacks is not told.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import groupby, pairwise

from lab.charts import clean, format_number, number
from lab.console import QUIET, active_alarms
from lab.scores import compare

ENDS = 10  # the first and the last steps of a stage that means are taken over
FALL = 0.02  # of the mean reward between two stages, from which on it is told


def values(rows: Sequence[dict], key: str) -> list[float]:
    """Return the finite values of a key."""
    return [value for row in rows if (value := number(row.get(key))) is not None]


def mean(rows: Sequence[dict], key: str) -> float | None:
    """Return the mean of a key's finite values; None without any."""
    known = values(rows, key)
    return sum(known) / len(known) if known else None


def training_stages(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Return the training steps of each stage, by its label: "SFT 1", "RL 1", "RL 2"."""
    labels, count, stages = {}, Counter(), defaultdict(list)
    for row in rows:
        if (kind := row["kind"].upper()) in ("SFT", "RL"):
            if row["stage"] not in labels:
                count[kind] += 1
                labels[row["stage"]] = f"{kind} {count[kind]}"
            stages[labels[row["stage"]]].append(row)
    return stages


def held_out(rows: Sequence[dict]) -> list[dict]:
    """Return the evaluations named "held-out", or else those with the name of the first evaluation."""
    evals = [row for row in rows if row["kind"] == "eval"]
    names = [row.get("name") for row in evals]
    return [row for row in evals if row.get("name") == ("held-out" if "held-out" in names else names[0])]


def measured(evaluations: Sequence[dict]) -> list[dict]:
    """Return the evaluations that have an accuracy with its interval."""
    return [row for row in evaluations if all(values([row], key) for key in ("avg", "low", "high"))]


def change(a: dict, b: dict) -> str:
    """Return the difference of two accuracies in points, with a 95% interval paired by problem where both have them."""
    means_a, means_b = (dict(row.get("by_problem") or ()) for row in (a, b))
    told = f"{100 * (b['avg'] - a['avg']):+.1f} points"
    if means_a and means_a.keys() == means_b.keys():
        found = compare("", means_a, means_b)
        told += f" (95% {100 * found.low:+.1f} to {100 * found.high:+.1f}, paired by problem)"
    return told


def what_happened(rows: Sequence[dict]) -> list[str]:
    """Return the sentences, at most eight."""
    stages = training_stages(rows)
    rl = {label: steps for label, steps in stages.items() if label.startswith("RL")}
    told = [_gain(rows, stages)]
    if rl:
        told += [
            _problems(rows, rl), _temperatures(rows, rl), _falls(rows, rl), _signal(rl), _lengths(rl), _beyond(rows),
            _alarms(rl),
        ]  # fmt: skip
    return [clean(sentence) for sentence in told if sentence]


def share(value: float | None) -> str:
    """Format a share in percent."""
    return "–" if value is None else f"{100 * value:.1f}%"


def _accuracy(row: dict) -> str:
    return f"{share(row['avg'])} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def _listed(items: Sequence[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def _course(rl: dict[str, list[dict]], key: str) -> str:
    """Tell the values of a setting from stage to stage: "was 1", "went from 1 to 1.2 and 1.3"."""
    used = [format_number(value) for steps in rl.values() for value in values(steps, key)[:1]]
    first, *others = [value for value, _ in groupby(used)] or ["–"]
    return f"went from {first} to {_listed(others)}" if others else f"was {first}"


def _gain(rows: Sequence[dict], stages: dict[str, list[dict]]) -> str:
    first = min((row["step"] for row in rows if row["kind"] == "rl"), default=math.inf)
    held, like = measured(held_out(rows)), ("problems", "n", "temperature")
    before = next((row for row in reversed(held) if row["step"] < first), None)
    later = [row for row in held if row["step"] >= first]
    after = next((row for row in reversed(later) if not before or all(row.get(k) == before.get(k) for k in like)), None)
    if before and after:
        told = f"Held-out accuracy went from {_accuracy(before)} before RL to {_accuracy(after)} at step "
        told += f"{after['step']:,}: {change(before, after)}"
        if before.get("pass_at") and after.get("pass_at"):
            was, now = (share(row["pass_at"][str(row["n"])]["value"]) for row in (before, after))
            told += f"; at least one of {before['n']} responses is right for {now} of the problems, {was} before"
        return told + "."
    if row := before or after:
        return f"Held-out accuracy was {_accuracy(row)} at step {row['step']:,}; no other evaluation compares with it."
    for kind, key, what in (("RL", "reward_mean", "reward"), ("SFT", "loss", "loss")):
        steps = [row for label, own in stages.items() if label.startswith(kind) for row in own]
        half = min(ENDS, -(-len(steps) // 2))
        ends = [mean(some, key) for some in (steps[:half], steps[-half:])]
        if None not in ends:
            course = " to ".join(map(format_number, ends))
            return f"No held-out problems were evaluated; the {what} went from {course} in {len(steps):,} steps."
    return ""


def _problems(rows: Sequence[dict], rl: dict[str, list[dict]]) -> str:
    filters, told = [row for row in rows if row["kind"] == "filter" and {"kept", "dropped"} <= row.keys()], []
    for when, name in (("before", "the filter before"), ("after", "the drop after")):
        if own := [row for row in filters if str(row.get("label")).startswith(when)]:
            counts = _listed([f"{row['dropped']:,} of {row['kept'] + row['dropped']:,}" for row in own])
            stage = "a stage" if len(own) == 1 else "each stage"
            told.append(f"{name} {stage} took out {counts} ({own[0].get('rule')})")
    label, steps = list(rl.items())[-1]
    trained = [f"; {label} trained on {count:,.0f} problems" for count in values(steps, "problems")[-1:]]
    return f"Of the problems, {_listed(told)}{''.join(trained)}." if told else "No problem was filtered or dropped."


def _temperatures(rows: Sequence[dict], rl: dict[str, list[dict]]) -> str:
    labels = {steps[0]["stage"]: label for label, steps in rl.items()}
    searches = [
        row for row in rows if row["kind"] == "temperature" and number(row.get("target_distinct4")) and row.get("curve")
    ]
    targets = list(dict.fromkeys(f"{row['target_distinct4']:.3f}" for row in searches))
    told, short = f"The temperature {_course(rl, 'temperature')}", []
    for row in searches:
        target, first, last = row["target_distinct4"], row["curve"][0], row["curve"][-1]
        got = min(row["curve"], key=lambda point: abs(point["temperature"] - row["chosen"]))["distinct4"] or 0.0
        if got < target:
            of = f" of {target:.3f}" * (len(targets) > 1)
            short.append(
                f"{labels.get(row['stage'], 'the next stage')} began with {got:.3f}{of}, as the search ended at "
                f"{last['temperature']:g}, where accuracy was {share(last['accuracy'])}, not "
                f"{share(first['accuracy'])}"
            )
    if not searches:
        return f"{told}." if "–" not in told else ""
    missed = f"; it could not all be restored: {'; '.join(short)}" if short else ", and every search restored it"
    return f"{told}, to restore a distinct-4 of {_listed(targets)}{missed}."


def _falls(rows: Sequence[dict], rl: dict[str, list[dict]]) -> str:
    """Say why the reward falls between two stages: what of the task changed, and what the search measured of it."""
    searches = {row["stage"]: row["curve"] for row in rows if row["kind"] == "temperature" and row.get("curve")}
    told = []
    for (_, was), (label, now) in pairwise(rl.items()):
        a, b = mean(was[-ENDS:], "reward_mean"), mean(now[:ENDS], "reward_mean")
        if None in (a, b) or a - b < FALL or was[-1]["step"] + 1 < now[0]["step"]:  # fine-tuning between them
            continue
        causes = []
        for key, name in (("temperature", "temperature"), ("problems", "problems"), ("max_response_tokens", "limit")):
            ends = [number(step.get(key)) for step in (was[-1], now[0])]
            if ends[0] != ends[1]:
                causes.append(f"{name} {' → '.join(map(format_number, ends))}")
                known = {point["temperature"]: point.get("accuracy") for point in searches.get(now[0]["stage"], ())}
                cost = [known.get(value) for value in ends]
                if key == "temperature" and None not in cost:
                    causes[-1] += f", which alone costs {100 * (cost[0] - cost[1]):.1f} points by its search"
        told.append(f"from {a:.2f} to {b:.2f} at {label} ({'; '.join(causes) or 'no other setting changed'})")
    return f"The reward falls where a stage begins, with the weights unchanged: {_listed(told)}." if told else ""


def _signal(rl: dict[str, list[dict]]) -> str:
    steps = [row for own in rl.values() for row in own]
    groups, empty, rescued, substituted, skipped = (
        sum(values(steps, key)) for key in ("groups", "zero_variance", "rescued", "substituted", "skipped")
    )
    if not groups:
        return ""
    return (
        f"Of {groups:,.0f} groups {empty:,.0f} had equal rewards and no signal ({share(empty / groups)}); rescue gave "
        f"{rescued:,.0f} failed groups an earlier right response, substitution overwrote {substituted:,.0f} groups "
        f"with informative ones, and {skipped:,.0f} of {len(steps):,} updates were skipped for want of them."
    )


def _lengths(rl: dict[str, list[dict]]) -> str:
    first, *_, last = [*rl.values()] * 2
    keys = ("response_length_mean", "truncated_share")
    lengths, cut = ([mean(some, key) for some in (first[:ENDS], last[-ENDS:])] for key in keys)
    if None in (*lengths, *cut, mean(last, "max_response_tokens")):
        return ""
    return (
        f"The limit on a response {_course(rl, 'max_response_tokens')} tokens; their mean length went from "
        f"{lengths[0]:,.0f} to {lengths[1]:,.0f} tokens, the share cut off from {share(cut[0])} to {share(cut[1])}."
    )


def _beyond(rows: Sequence[dict]) -> str:
    held = held_out(rows)
    final = measured([row for row in rows if row["kind"] == "eval" and row.get("final") and row not in held])
    told = [f"{row.get('name')}: {_accuracy(row)}" for row in final]
    compared = f"; the last against the first {change(final[0], final[-1])}" if len(final) > 1 else ""
    return f"Longer than trained, the final model reaches {_listed(told)}{compared}." if told else ""


def _alarms(rl: dict[str, list[dict]]) -> str:
    rang = defaultdict(list)  # kind -> (step, sentence) of each time it began
    for steps in rl.values():
        seen: dict[str, int] = {}
        for i in range(len(steps)):
            for kind, sentence in active_alarms(steps[: i + 1]).items():
                if i - seen.get(kind, -math.inf) > QUIET:
                    rang[kind].append((steps[i]["step"], sentence))
                seen[kind] = i
    told = [f"{len(times)} of {kind}, first at step {times[0][0]:,} ({times[0][1]})" for kind, times in rang.items()]
    if broken := sum(sum(values(steps, "nonfinite")) for steps in rl.values()):
        told.append(f"{broken:,.0f} of a gradient that was not finite")
    none = "No alarm of signal, lengths, diversity, entropy, gradients or grading rang."
    return f"Alarms: {'; '.join(told)}." if told else none
