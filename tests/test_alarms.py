"""alarms.py: each rings beyond its threshold, once, and does without what a row lacks."""

import math

import pytest

from lab import alarms

CALM = dict(
    kind="rl", stage=1, groups=12, zero_variance=4, truncated_share=0.02, response_length_mean=100.0, accuracy=0.5,
    distinct4=0.6, entropy=0.8,
)  # fmt: skip


def rows(*changes):
    """Rows of a stage, each calm but for its changes."""
    return [CALM | {"step": step, **change} for step, change in enumerate(changes, 1)]


def rung(steps):
    """(step, first word) of every alarm that is said, as train.py says them: after each step."""
    return [(n, sentence.split()[0]) for n in range(1, len(steps) + 1) for sentence in alarms.new_alarms(steps[:n])]


ALARMS = {
    "68% of": (dict(zero_variance=8.1), dict(zero_variance=7.9)),
    "11% of": (dict(truncated_share=0.11), dict(truncated_share=0.099)),
    "responses run away: 201 tokens, not 100": (dict(response_length_mean=201.0), dict(response_length_mean=199.0)),
    "diversity collapses: distinct-4 0.440": (dict(distinct4=0.44), dict(distinct4=0.46)),
    "diversity explodes: distinct-4 0.760": (dict(distinct4=0.76), dict(distinct4=0.74)),
    "entropy collapses: 0.190 nats a token, not 0.800": (dict(entropy=0.19), dict(entropy=0.21)),
}


@pytest.mark.parametrize("says", ALARMS)
def test_an_alarm_rings_beyond_its_threshold_and_not_before(says):
    beyond, within = ALARMS[says]
    standing = alarms.standing_alarms(rows(*[{}] * 5, *[beyond] * 5))
    assert len(standing) == 1 and next(iter(standing.values())).startswith(says.split(":")[0])
    assert says in next(iter(standing.values()))
    assert alarms.standing_alarms(rows(*[{}] * 5, *[within] * 5)) == {}
    assert alarms.standing_alarms(rows({}, {}, {}, beyond)) == {}  # too few steps to say anything


def test_longer_responses_that_are_right_more_often_are_no_alarm():
    assert alarms.standing_alarms(rows(*[{}] * 5, *[dict(response_length_mean=300.0, accuracy=0.6)] * 5)) == {}


def test_an_alarm_is_said_when_it_begins_and_again_only_after_a_long_silence():
    cut, short = dict(truncated_share=0.5), 2 * alarms.SMOOTHED + alarms.QUIET
    # the mean of 5 passes a tenth with the first cut row; flickering within QUIET steps is one alarm
    assert rung(rows(*[{}] * 5, *[cut] * 20)) == [(6, "12%")]
    assert rung(rows(*[{}] * 5, *[cut] * 5, *[{}] * 6, *[cut] * 5)) == [(6, "12%")]
    assert rung(rows(*[{}] * 5, *[cut] * 5, *[{}] * short, *[cut] * 5)) == [(6, "12%"), (11 + short, "12%")]


def test_alarms_do_without_what_a_row_lacks_or_cannot_say():
    bare = [dict(kind="rl", step=step, stage=1) for step in range(8)]
    assert alarms.new_alarms(bare) == [] and alarms.new_alarms([]) == []
    odd = rows(*[dict(distinct4=None, entropy=math.nan, response_length_mean=math.inf, groups=0)] * 8)
    assert alarms.new_alarms(odd) == []
