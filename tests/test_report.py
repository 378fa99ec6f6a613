"""report.py: what was written comes back, broken lines are said, resuming forgets, console lines align."""

import json
import math
import sys

import pytest

import report


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


def test_other_ranks_write_nothing(tmp_path):
    metrics = report.Metrics(tmp_path / "run", tensorboard=True, enabled=False)
    metrics.write(dict(kind="sft", step=1, stage=0))
    metrics.write_rollouts([dict(step=1)])
    metrics.cut_back_to((0, 0))
    metrics.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seconds, text", [(0, "0m 00s"), (185.4, "3m 05s"), (3599.7, "1h 00m"), (7860, "2h 11m"),
                                           (86_400 * 4 + 3 * 3600, "4d 03h"), (math.nan, "?"), (math.inf, "?"), (-1,
                                                                                                                 "?")])
def test_format_eta(seconds, text):
    assert report.format_eta(seconds) == text


def test_console_lines_align_and_fit():
    rl = dict(kind="rl", step=123, stage=1, reward_mean=0.512, response_length_mean=1234.5, truncated_share=0.031,
              distinct4=0.7123, temperature=1.4, zero_variance=12, groups=128.0, rescued=1.0, substituted=12,
              tokens=90_000, seconds=10.0, seconds_grade=0.123)
    extreme = dict(rl, step=10_000, stage=12, reward_mean=-123456.0, response_length_mean=98304.0, truncated_share=1.0,
                   zero_variance=128, rescued=128, substituted=1000, tokens=9e9)
    lines = [report.console_line(row, 10_000, 7860) for row in (
        rl, extreme, dict(rl, skipped=1), dict(rl, reward_mean=math.nan), dict(kind="rl", step=1, stage=1),
        dict(kind="sft", step=7, stage=0, loss=2.31, tokens_per_s=9123.4), dict(kind="sft", step=8, stage=0,
                                                                                loss=None))]
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 160
    assert len({line.index(" tok/s") for line in lines}) == 1
    assert lines[0].split() == ("1 rl 123/10000 reward 0.512 len 1234 trunc 3.1% d4 0.712 T 1.40 zerovar 12/128 "
                                "rescued 1 subst 12 9000 tok/s grade 1.2% eta 2h 11m").split()
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
    assert calls == [("open", None), ("rl/loss", 0.5, 3), ("rl/verdicts/wrong", 2, 3), ("eval/held-out/avg", 0.4, 3),
                     "close",
                     ("open", 0), "close"]
