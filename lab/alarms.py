"""Alarms of an rl stage: what its metrics say is going wrong, in a sentence for the console."""

import math
from collections.abc import Sequence

SMOOTHED = 5  # steps over which an alarm takes its means
QUIET = 10  # steps for which an alarm must have been silent before it is said again
# thresholds of the alarms; RECIPE's where it gives one, else choices
MOST_ZERO_VARIANCE = 2 / 3  # of groups: from there on the update is skipped (RECIPE section 4)
MOST_TRUNCATED = 0.1  # of rollouts: at 52K fewer were cut; 24K, with less than 15%, did harm (RECIPE section 3)
MOST_GROWTH = 2.0  # a choice: of the mean length within a stage, unless accuracy grew as well
LEAST_DIVERSITY, MOST_DIVERSITY = 0.75, 1.25  # a choice: of distinct-4 at the stage's start, which a stage restores
LEAST_ENTROPY = 0.25  # a choice: of that at the stage's start


def standing_alarms(steps: Sequence[dict]) -> dict[str, str]:
    """What is wrong after the last of these rows, the "rl" rows of one stage: a sentence by its kind.

    Every figure is the mean over the last SMOOTHED rows, against that over the stage's first where it is relative.
    """

    def mean(key: str, rows: Sequence[dict]) -> float:
        values = [row[key] for row in rows if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
        return sum(values) / len(values) if values else math.nan  # which no comparison holds for

    if len(steps) < SMOOTHED:
        return {}
    first, last = steps[:SMOOTHED], steps[-SMOOTHED:]
    found = {}
    groups = mean("groups", last)
    empty = mean("zero_variance", last) / groups if groups else math.nan
    if empty > MOST_ZERO_VARIANCE:
        found["zero variance"] = (
            f"{empty:.0%} of the groups have no signal: the problems are too easy or too hard for the model"
        )
    truncated = mean("truncated_share", last)
    if truncated > MOST_TRUNCATED:
        found["truncation"] = f"{truncated:.0%} of the rollouts are cut off: raise the stage's max_response_tokens"
    was, now = mean("response_length_mean", first), mean("response_length_mean", last)
    if now > MOST_GROWTH * was and mean("accuracy", last) <= mean("accuracy", first):
        found["length"] = f"responses run away: {now:.0f} tokens, not {was:.0f}, and no more of them are right"
    was, now = mean("distinct4", first), mean("distinct4", last)
    if now < LEAST_DIVERSITY * was:
        found["diversity"] = f"diversity collapses: distinct-4 {now:.3f}, not {was:.3f}: raise the temperature"
    elif now > MOST_DIVERSITY * was:
        found["diversity"] = f"diversity explodes: distinct-4 {now:.3f}, not {was:.3f}: lower the temperature"
    was, now = mean("entropy", first), mean("entropy", last)
    if now < LEAST_ENTROPY * was:
        found["entropy"] = f"entropy collapses: {now:.3f} nats a token, not {was:.3f}"
    return found


def new_alarms(steps: Sequence[dict]) -> list[str]:
    """The alarms that begin with the last of these rows: one that goes on, or flickers, is said once."""
    said = {kind for ago in range(1, QUIET + 1) for kind in standing_alarms(steps[:-ago])}
    return [sentence for kind, sentence in standing_alarms(steps).items() if kind not in said]
