"""Console output of training: a header and aligned lines, and alarms about metrics that go wrong."""

import math
from collections.abc import Mapping, Sequence

SMOOTHED = 5  # steps that an alarm averages over
QUIET = 10  # steps without an alarm before it is printed again
SFT_LINES = 20  # steps of fine-tuning between two printed lines
WIDTHS = {  # of the columns, by heading: of rollouts, "tokens" is the mean length and "cut" the truncated share
    "step": 11, "loss": 6, "reward": 6, "tokens": 6, "cut": 6, "distinct-4": 10, "no signal": 9, "rescued": 7,
    "substituted": 11, "tokens/s": 8, "ETA": 8,
}  # fmt: skip
# alarm thresholds, from RECIPE.md where it gives one, else choices
MOST_ZERO_VARIANCE = 2 / 3  # of groups: above it the update is skipped (RECIPE section 4)
MOST_TRUNCATED = 0.1  # of rollouts: fewer were cut at 52K; just under 15% did harm at 24K (RECIPE section 3)
MOST_GROWTH = 2.0  # a choice: of the mean length within a stage, unless accuracy grew as well
LEAST_DIVERSITY, MOST_DIVERSITY = 0.75, 1.25  # a choice: of distinct-4 at the stage's start, which a stage restores
LEAST_ENTROPY = 0.25  # a choice: of the entropy at the stage's start
MOST_GRADING = 0.2  # a choice: of a step's time, spent waiting for the grader after sampling
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


def console_cells(row: dict, total_steps: int, eta: str) -> dict[str, str]:
    """Return an "rl" or "sft" row's text by heading, a key of WIDTHS; tokens/s are over the whole step."""

    def text(heading: str, value: float | None, spec: str) -> str:
        text = "-" if value is None else format(value, spec)
        return text if len(text) <= WIDTHS[heading] else f"{value:.0e}"

    step = {"step": f"{row['step']}/{total_steps}"}
    if row["kind"] == "sft":
        speed = text("tokens/s", row.get("tokens_per_s"), ".0f")
        return step | {"loss": text("loss", row.get("loss"), ".3f"), "tokens/s": speed, "ETA": eta}
    speed = row["tokens"] / row["seconds"] if row.get("tokens") and row.get("seconds") else None
    return step | {
        "reward": text("reward", row.get("reward_mean"), ".3f"),
        "tokens": text("tokens", row.get("response_length_mean"), ".0f"),
        "cut": text("cut", row.get("truncated_share"), ".1%"),
        "distinct-4": text("distinct-4", row.get("distinct4"), ".3f"),
        "no signal": f"{row.get('zero_variance', '-')}/{row.get('groups', 0):.0f}",
        "rescued": "update" if row.get("skipped") else text("rescued", row.get("rescued"), ".0f"),
        "substituted": "skipped" if row.get("skipped") else text("substituted", row.get("substituted"), ".0f"),
        "tokens/s": text("tokens/s", speed, ".0f"),
        "ETA": eta,
    }


def console_header(row: dict) -> str:
    """Format the headings of lines of this kind of row."""
    return "  ".join(heading.rjust(WIDTHS[heading]) for heading in console_cells(row, 0, ""))


def console_line(row: dict, total_steps: int, eta: str) -> str:
    """Format an "rl" or "sft" row as one line of at most 100 characters, under the headings of `console_header`."""
    cells = console_cells(row, total_steps, eta)
    return "  ".join(text.rjust(WIDTHS[heading]) for heading, text in cells.items())


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
    waited, seconds = mean("seconds_grade", last), mean("seconds", last)
    if waited > MOST_GRADING * seconds:
        found["grading"] = f"{waited / seconds:.0%} of the time is spent on grading: raise reward.workers"
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
