"""report.py: what was written comes back, broken lines are said, resuming forgets, console lines align, alarms ring."""

import errno
import json
import math
import sys

import pytest

from lab import report


def test_read_metrics_drops_a_cut_last_line_and_says_so(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "sft", "step": 1, "stage": 0}\n{"kind": "r\xc3')
    assert [row["step"] for row in report.read_metrics(tmp_path)] == [1]
    assert "dropped 1 half-written last line (line 2)" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ['{"kind": "r', "3", "", '{"kind": "rl"}'])
def test_read_metrics_names_the_broken_line(tmp_path, broken):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        report.read_metrics(tmp_path)


def test_cut_back_drops_what_came_after_the_checkpoint_and_goes_on(tmp_path):
    metrics = report.Metrics(tmp_path)
    for step in range(6):
        metrics.write(dict(kind="sft", step=step, stage=0, loss=math.nan))
        metrics.write_rollouts([dict(step=step, response="é"), dict(step=step, response="b")])
        if step == 3:
            noted = list(metrics.position)
            metrics.write(dict(kind="filter", step=3, stage=0))  # same step, after the checkpoint: to be made again
    metrics.close()
    assert noted == [4, 8]
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 2, "a')
    metrics = report.Metrics(tmp_path)
    metrics.cut_back_to(noted)
    metrics.write(dict(kind="sft", step=4, stage=0))
    assert metrics.position == [5, 8]
    metrics.close()
    assert [(row["kind"], row["step"]) for row in report.read_metrics(tmp_path)] == [("sft", step) for step in range(5)]
    rollouts = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rollouts] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "rollouts.jsonl"]


@pytest.mark.parametrize("broken", ['{"step": 4, "x', '{"step": 4, "x": \n', "3\n", "\0\0\0\0\n"])
def test_what_follows_the_checkpoint_may_be_broken(tmp_path, broken):
    """A line cut by a lost machine is no matter when the checkpoint comes before it."""
    whole = [dict(kind="sft", step=step, stage=0) for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole) + broken + '{"step": 9}\n')
    assert report.whole_lines(tmp_path) == [4, 0]
    metrics = report.Metrics(tmp_path, position=[3, 0])
    metrics.write(whole[3])
    metrics.sync()
    metrics.close()
    assert report.read_metrics(tmp_path) == whole
    assert report.whole_lines(tmp_path) == [4, 0]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    metrics = report.Metrics(tmp_path)
    metrics.write(dict(kind="sft", step=1, stage=0))

    class Full:
        name = metrics.rows.name

        def writelines(self, lines):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics, "rows", Full())
    with pytest.raises(report.MetricsError, match=r"metrics.jsonl: a line cannot be written \(No space"):
        metrics.write(dict(kind="sft", step=2, stage=0))
    assert metrics.position == [1, 0]


def test_no_time_rate_or_memory_counts_as_deterministic():
    doubtful = ("seconds", "per_s", "memory", "preempt", "micro_batch")
    assert not [key for key in report.DETERMINISTIC if any(word in key for word in doubtful)]


def test_other_ranks_write_nothing(tmp_path):
    metrics = report.Metrics(tmp_path / "run", tensorboard=True, enabled=False)
    metrics.write(dict(kind="sft", step=1, stage=0))
    metrics.write_rollouts([dict(step=1)])
    metrics.cut_back_to((0, 0))
    metrics.close()
    assert not (tmp_path / "run").exists()


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
    assert report.format_eta(seconds) == text


def test_console_lines_align_and_fit():
    rl = dict(
        kind="rl",
        step=123,
        stage=1,
        reward_mean=0.512,
        response_length_mean=1234.5,
        truncated_share=0.031,
        distinct4=0.7123,
        temperature=1.4,
        zero_variance=12,
        groups=128.0,
        rescued=1.0,
        substituted=12,
        tokens=90_000,
        seconds=10.0,
        seconds_grade=0.123,
    )
    extreme = dict(
        rl,
        step=10_000,
        stage=12,
        reward_mean=-123456.0,
        response_length_mean=98304.0,
        truncated_share=1.0,
        zero_variance=128,
        rescued=128,
        substituted=1000,
        tokens=9e9,
    )
    lines = [
        report.console_line(row, 10_000, 7860)
        for row in (
            rl,
            extreme,
            dict(rl, skipped=1),
            dict(rl, reward_mean=math.nan),
            dict(kind="rl", step=1, stage=1),
            dict(kind="sft", step=7, stage=0, loss=2.31, tokens_per_s=9123.4),
            dict(kind="sft", step=8, stage=0, loss=None),
        )
    ]
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 160
    assert len({line.index(" tok/s") for line in lines}) == 1
    assert (
        lines[0].split()
        == (
            "1 rl 123/10000 reward 0.512 len 1234 trunc 3.1% d4 0.712 T 1.40 zerovar 12/128 "
            "rescued 1 subst 12 9000 tok/s grade 1.2% eta 2h 11m"
        ).split()
    )
    assert "update skipped" in lines[2] and "nan" in lines[3] and "loss    2.310" in lines[5]


def test_tensorboard_missing_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="TensorBoard was asked for but is not installed: `pip install tensorboard`"):
        report.Metrics(tmp_path, tensorboard=True)


def test_tensorboard_gets_scalars_and_forgets_truncated_steps(tmp_path, monkeypatch):
    calls = []

    class Board:
        def __init__(self, folder, purge_step=None):
            calls.append(("open", purge_step))

        def add_scalar(self, tag, value, step):
            calls.append((tag, value, step))

        def close(self):
            calls.append("close")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("module", (), {"SummaryWriter": Board}))
    metrics = report.Metrics(tmp_path, tensorboard=True)
    metrics.write(dict(kind="rl", step=3, stage=1, loss=0.5, entropy=None, verdicts={"wrong": 2}))
    metrics.write(dict(kind="eval", step=3, stage=1, name="held-out", avg=0.4, final=False))
    metrics.cut_back_to((0, 0))
    metrics.close()
    assert calls == [
        ("open", None),
        ("rl/loss", 0.5, 3),
        ("rl/verdicts/wrong", 2, 3),
        ("eval/held-out/avg", 0.4, 3),
        "close",
        ("open", 0),
        "close",
    ]


# ------------------------------------------------------------------------------------------------------- alarms

CALM = dict(
    kind="rl", stage=1, groups=12, zero_variance=4, truncated_share=0.02, response_length_mean=100.0, accuracy=0.5,
    distinct4=0.6, entropy=0.8,
)  # fmt: skip


def rows(*changes):
    """Rows of a stage, each calm but for its changes."""
    return [CALM | {"step": step, **change} for step, change in enumerate(changes, 1)]


def rung(steps):
    """(step, first word) of every alarm that is said, as train.py says them: after each step."""
    return [(n, sentence.split()[0]) for n in range(1, len(steps) + 1) for sentence in report.new_alarms(steps[:n])]


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
    standing = report.standing_alarms(rows(*[{}] * 5, *[beyond] * 5))
    assert len(standing) == 1 and next(iter(standing.values())).startswith(says.split(":")[0])
    assert says in next(iter(standing.values()))
    assert report.standing_alarms(rows(*[{}] * 5, *[within] * 5)) == {}
    assert report.standing_alarms(rows({}, {}, {}, beyond)) == {}  # too few steps to say anything


def test_longer_responses_that_are_right_more_often_are_no_alarm():
    assert report.standing_alarms(rows(*[{}] * 5, *[dict(response_length_mean=300.0, accuracy=0.6)] * 5)) == {}


def test_an_alarm_is_said_when_it_begins_and_again_only_after_a_long_silence():
    cut, short = dict(truncated_share=0.5), 2 * report.SMOOTHED + report.QUIET
    # the mean of 5 passes a tenth with the first cut row; flickering within QUIET steps is one alarm
    assert rung(rows(*[{}] * 5, *[cut] * 20)) == [(6, "12%")]
    assert rung(rows(*[{}] * 5, *[cut] * 5, *[{}] * 6, *[cut] * 5)) == [(6, "12%")]
    assert rung(rows(*[{}] * 5, *[cut] * 5, *[{}] * short, *[cut] * 5)) == [(6, "12%"), (11 + short, "12%")]


def test_alarms_do_without_what_a_row_lacks_or_cannot_say():
    bare = [dict(kind="rl", step=step, stage=1) for step in range(8)]
    assert report.new_alarms(bare) == [] and report.new_alarms([]) == []
    odd = rows(*[dict(distinct4=None, entropy=math.nan, response_length_mean=math.inf, groups=0)] * 8)
    assert report.new_alarms(odd) == []


def test_alarms_see_the_rows_of_one_stage_also_after_a_resume(tmp_path):
    metrics = report.Metrics(tmp_path)
    for stage in (1, 2):
        for step in range(3):
            metrics.write(dict(kind="rl", step=3 * stage + step, stage=stage))
        metrics.write(dict(kind="eval", step=3 * stage + 2, stage=stage, name="held-out"))
    assert [row["step"] for row in metrics.steps] == [6, 7, 8]
    metrics.close()
    assert [row["step"] for row in report.Metrics(tmp_path, position=[7, 0]).steps] == [6, 7, 8]
    assert [row["step"] for row in report.Metrics(tmp_path, position=[3, 0]).steps] == [3, 4, 5]
