"""Console output of a training step: one line with aligned columns, and alarms about metrics that go wrong."""

import math
from collections.abc import Mapping, Sequence

SMOOTHED = 5  # steps that an alarm averages over
QUIET = 10  # steps without an alarm before it is printed again
# alarm thresholds, from RECIPE.md where it gives one, else choices
MOST_ZERO_VARIANCE = 2 / 3  # of groups: above it the update is skipped (RECIPE section 4)
MOST_TRUNCATED = 0.1  # of rollouts: fewer were cut at 52K; just under 15% did harm at 24K (RECIPE section 3)
MOST_GROWTH = 2.0  # a choice: of the mean length within a stage, unless accuracy grew as well
LEAST_DIVERSITY, MOST_DIVERSITY = 0.75, 1.25  # a choice: of distinct-4 at the stage's start, which a stage restores
LEAST_ENTROPY = 0.25  # a choice: of the entropy at the stage's start
MOST_WASTED = 0.9  # a choice: of responses; from here on the cause is no problem's difficulty


def format_eta(seconds: float) -> str:
    """Format a duration in two units, in at most seven characters up to 99 days: "3m 05s", "4d 03h"; "?" if unknown."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    return f"{hours}h {minute:02d}m" if hours else f"{minutes}m {second:02d}s"


def console_line(row: dict, total_steps: int, eta_s: float) -> str:
    """Format an "rl" or "sft" row as one line, with the same columns for both; tok/s and grade are over the step."""

    def cell(value: float | None, width: int, spec: str) -> str:
        if value is None:
            return "-".rjust(width)
        text = format(value, spec)
        return (text if len(text) <= width else f"{value:.0e}").rjust(width)

    width = max(4, len(str(total_steps)))
    cells = [f"{row['stage']:>2} {row['kind']:<3}", f"{row['step']:>{width}}/{total_steps:<{width}}"]
    if row["kind"] == "rl":
        changed = f"rescued {cell(row.get('rescued'), 3, '.0f')} subst {cell(row.get('substituted'), 4, '.0f')}"
        cells += [
            f"reward {cell(row.get('reward_mean'), 6, '.3f')}",
            f"len {cell(row.get('response_length_mean'), 6, '.0f')}",
            f"trunc {cell(row.get('truncated_share'), 6, '.1%')}",
            f"d4 {cell(row.get('distinct4'), 5, '.3f')}",
            f"T {cell(row.get('temperature'), 4, '.2f')}",
            f"zerovar {cell(row.get('zero_variance'), 4, '.0f')}/{cell(row.get('groups'), 4, '.0f').strip():<4}",
            "update skipped".ljust(len(changed)) if row.get("skipped") else changed,
        ]
        speed = row["tokens"] / row["seconds"] if row.get("tokens") and row.get("seconds") else None
    else:
        blank = len("len 123456  trunc 12.3%_  d4 0.123  T 1.23  zerovar 1234/1234  rescued 123 subst 1234")
        cells += [f"loss   {cell(row.get('loss'), 6, '.3f')}", " " * blank]
        speed = row.get("tokens_per_s")
    waited = row["seconds_grade"] / row["seconds"] if "seconds_grade" in row and row.get("seconds") else None
    grading = f"grade {cell(waited, 5, '.1%')}" if row["kind"] == "rl" else " " * len("grade 12.3%")
    return "  ".join([*cells, f"{cell(speed, 6, '.0f')} tok/s {grading}", f"eta {format_eta(eta_s):>7}"])


def active_alarms(steps: Sequence[dict]) -> dict[str, str]:
    """Return the alarms after the last of these rows, the "rl" rows of one stage: a sentence by kind.

    Every figure is the mean over the last SMOOTHED rows; relative thresholds compare it with the stage's first rows.
    """

    def mean(key: str, rows: Sequence[dict]) -> float:
        values = [row[key] for row in rows if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
        return sum(values) / len(values) if values else math.nan  # fails every comparison

    if len(steps) < SMOOTHED:
        return {}
    first, last = steps[:SMOOTHED], steps[-SMOOTHED:]
    found = {}
    groups = mean("groups", last)
    empty = mean("zero_variance", last) / groups if groups else math.nan
    if empty > MOST_ZERO_VARIANCE:
        found["zero variance"] = f"{empty:.0%} of the groups have no signal: the problems are too easy or too hard"
    truncated = mean("truncated_share", last)
    if truncated > MOST_TRUNCATED:
        found["truncation"] = f"{truncated:.0%} of the rollouts are cut off: raise the stage's max_response_tokens"
    was, now = mean("response_length_mean", first), mean("response_length_mean", last)
    if now > MOST_GROWTH * was and mean("accuracy", last) <= mean("accuracy", first):
        found["length"] = f"response length runs away: {was:.0f} to {now:.0f} tokens, without more right answers"
    was, now = mean("distinct4", first), mean("distinct4", last)
    if now < LEAST_DIVERSITY * was:
        found["diversity"] = f"diversity collapses: distinct-4 {was:.3f} to {now:.3f}: raise the temperature"
    elif now > MOST_DIVERSITY * was:
        found["diversity"] = f"diversity explodes: distinct-4 {was:.3f} to {now:.3f}: lower the temperature"
    was, now = mean("entropy", first), mean("entropy", last)
    if now < LEAST_ENTROPY * was:
        found["entropy"] = f"entropy collapses: {was:.3f} to {now:.3f} nats per token"
    return found


def wasted_responses(seen: Mapping[str, int], most_tokens: int) -> dict[str, str]:
    """Return the ways in which nearly all responses of one sampling are wasted: a sentence by kind.

    `seen` counts "all" responses, those "cut" at most_tokens, and those without an answer: with "no box", among them
    "empty" ones, or "unclosed", with a box that no </think> precedes.
    """
    causes = {
        "cut": f"are cut at {most_tokens:,} tokens: allow longer ones, or check which token ends the model's turn",
        "no box": f"have no box ({seen['empty']:,} are empty): check the instruction, and that the model follows it",
        "unclosed": "have a box, but no </think> before it, which thinking = true requires: set thinking = false "
        "(--no-thinking) for a model that does not think, or allow longer responses",
    }
    least = max(1, MOST_WASTED * seen["all"])
    return {k: f"{seen[k]:,} of {seen['all']:,} responses {text}" for k, text in causes.items() if seen[k] >= least}


def new_alarms(steps: Sequence[dict]) -> list[str]:
    """Return the alarms that start with the last of these rows; one that persists or flickers is printed once."""
    printed = {kind for ago in range(1, QUIET + 1) for kind in active_alarms(steps[:-ago])}
    return [sentence for kind, sentence in active_alarms(steps).items() if kind not in printed]
