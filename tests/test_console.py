"""lab/console.py: the columns of a step's line, and when alarms are printed."""

import math
import re
from collections import Counter
from types import SimpleNamespace

import pytest

from engine.checkpoint import RunState
from engine.run import Run
from lab import console
from lab.recipe import RlStage, SftStage

RL = dict(
    kind="rl", step=123, stage=1, reward_mean=0.512, response_length_mean=1234.5, truncated_share=0.031,
    distinct4=0.7123, temperature=1.4, zero_variance=12, groups=128.0, rescued=1.0, substituted=12, tokens=90_000,
    seconds=10.0, seconds_grade=0.123,
)  # fmt: skip
EXTREME = RL | dict(
    step=10_000, stage=12, reward_mean=-123456.0, response_length_mean=98304.0, truncated_share=1.0, zero_variance=128,
    rescued=128, substituted=1000, tokens=9e9,
)  # fmt: skip


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0m 00s"),
        (185.4, "3m 05s"),
        (3599.7, "1h 00m"),
        (7860, "2h 11m"),
        (86_400 * 4 + 3 * 3600, "4d 03h"),
        (math.nan, "?"),
        (math.inf, "?"),
        (-1, "?"),
    ],
)
def test_format_eta(seconds, text):
    assert console.format_eta(seconds) == text


def test_console_lines_align_with_their_header_and_fit():
    rl = [RL, EXTREME, RL | {"skipped": 1}, RL | {"reward_mean": math.nan}, dict(kind="rl", step=1, stage=1)]
    sft = [dict(kind="sft", step=7, stage=0, loss=2.31, tokens_per_s=9123.4), dict(kind="sft", step=8, loss=None)]
    for rows in (rl, sft):
        lines = [console.console_header(rows[0]), *(console.console_line(row, 10_000, "> 2h 11m") for row in rows)]
        assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 100
        ends = [match.end() for match in re.finditer(r"[^ ](?=  |$)", lines[0])]
        assert all(line[end - 1] != " " and line[end : end + 1] in ("", " ") for line in lines for end in ends)
    heading, line, _, skipped, *_ = [console.console_header(RL), *(console.console_line(row, 10_000, "2h 11m") for row in rl)]
    assert heading.split() == "step reward tokens cut distinct-4 no signal rescued substituted tokens/s ETA".split()
    assert " ".join(line.split()) == "123/10000 0.512 1234 3.1% 0.712 12/128 1 12 9000 2h 11m"
    assert " ".join(skipped.split()) == "123/10000 0.512 1234 3.1% 0.712 12/128 update skipped 9000 2h 11m"


CALM = dict(
    kind="rl", stage=1, groups=12, zero_variance=4, truncated_share=0.02, response_length_mean=100.0, accuracy=0.5,
    distinct4=0.6, entropy=0.8,
)  # fmt: skip


def stage_rows(*changes):
    """Rows of a stage without alarms, except for these changes."""
    return [CALM | {"step": step, **change} for step, change in enumerate(changes, 1)]


def printed(steps):
    """(step, first word) of every alarm, asked for after each step as in a run."""
    return [(n, sentence.split()[0]) for n in range(1, len(steps) + 1) for sentence in console.new_alarms(steps[:n])]


ALARMS = {  # sentence: (values beyond the threshold, values within it)
    "21% of the time": (dict(seconds=10.0, seconds_grade=2.1), dict(seconds=10.0, seconds_grade=1.9)),
    "68% of": (dict(zero_variance=8.1), dict(zero_variance=7.9)),
    "11% of": (dict(truncated_share=0.11), dict(truncated_share=0.099)),
    "response length runs away: 100 to 201 tokens": (
        dict(response_length_mean=201.0), dict(response_length_mean=199.0)),
    "diversity collapses: distinct-4 0.600 to 0.440": (dict(distinct4=0.44), dict(distinct4=0.46)),
    "diversity explodes: distinct-4 0.600 to 0.760": (dict(distinct4=0.76), dict(distinct4=0.74)),
    "entropy collapses: 0.800 to 0.190 nats per token": (dict(entropy=0.19), dict(entropy=0.21)),
}  # fmt: skip


@pytest.mark.parametrize("sentence", ALARMS)
def test_an_alarm_needs_a_mean_beyond_its_threshold(sentence):
    beyond, within = ALARMS[sentence]
    (alarm,) = console.active_alarms(stage_rows(*[{}] * 5, *[beyond] * 5)).values()
    assert alarm.startswith(sentence)
    assert console.active_alarms(stage_rows(*[{}] * 5, *[within] * 5)) == {}
    assert console.active_alarms(stage_rows({}, {}, {}, beyond)) == {}  # too few steps


def test_longer_responses_with_higher_accuracy_are_no_alarm():
    assert console.active_alarms(stage_rows(*[{}] * 5, *[dict(response_length_mean=300.0, accuracy=0.6)] * 5)) == {}


def test_an_alarm_is_printed_when_it_starts_and_again_only_after_a_long_quiet():
    cut, quiet = dict(truncated_share=0.5), 2 * console.SMOOTHED + console.QUIET
    # the mean of 5 passes a tenth with the first cut row; flickering within QUIET steps is one alarm
    assert printed(stage_rows(*[{}] * 5, *[cut] * 20)) == [(6, "12%")]
    assert printed(stage_rows(*[{}] * 5, *[cut] * 5, *[{}] * 6, *[cut] * 5)) == [(6, "12%")]
    twice = printed(stage_rows(*[{}] * 5, *[cut] * 5, *[{}] * quiet, *[cut] * 5))
    assert twice == [(6, "12%"), (11 + quiet, "12%")]


def test_an_alarm_names_why_nearly_all_responses_are_wasted():
    """Regression: a wrong `thinking` gave right answers no reward all night, and the problems were blamed."""
    seen = {"all": 20, "cut": 17, "no box": 1, "empty": 0, "unclosed": 17}
    assert console.wasted_responses(Counter(seen), 64) == {}
    for kind, sentence in {
        "cut": "18 of 20 responses are cut at 1,024 tokens: ",
        "no box": "18 of 20 responses have no box (7 are empty): check the instruction",
        "unclosed": "18 of 20 responses have a box, but no </think> before it, which thinking = true requires",
    }.items():
        found = console.wasted_responses(Counter(seen | {kind: 18, "empty": 7}), 1024)
        assert found.keys() == {kind} and found[kind].startswith(sentence)
    assert console.wasted_responses(Counter(), 64) == {}


def test_missing_and_non_finite_metrics_raise_no_alarm():
    bare = [dict(kind="rl", step=step, stage=1) for step in range(8)]
    assert console.new_alarms(bare) == [] and console.new_alarms([]) == []
    odd = stage_rows(*[dict(distinct4=None, entropy=math.nan, response_length_mean=math.inf, groups=0)] * 8)
    assert console.new_alarms(odd) == []


def test_eta_counts_the_stages_to_come(monkeypatch):
    sft, small, large = SftStage(steps=10), RlStage(steps=10, batch_problems=4), RlStage(steps=20, batch_problems=8)
    state = RunState(step=12, stage_step=4)
    run = SimpleNamespace(recipe=SimpleNamespace(stage=(sft, small, large)), state=state, stage_first_step=2)
    run.stage_began, run.steps_began = 100.0, 130.0
    monkeypatch.setattr("time.perf_counter", lambda: 136.0)  # 3 s for each of two steps, after 30 s of preparation
    assert Run.eta(run, 1, small) == console.format_eta(6 * 3 + 30 + 20 * 2 * 3)
    assert Run.eta(run, 2, large) == console.format_eta(16 * 3)
    assert Run.eta(run, 0, sft) == "> 0m 18s"
