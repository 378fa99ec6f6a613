"""lab/metrics.py: rows are written and read back, broken lines are reported, resuming drops later lines."""

import errno
import json
import math

import pytest

from engine.errors import sentence
from lab import metrics as record


def test_read_metrics_drops_a_cut_last_line_with_a_note(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "sft", "step": 1, "stage": 0}\n{"kind": "r\xc3')
    assert [row["step"] for row in record.read_metrics(tmp_path)] == [1]
    assert "dropped 1 half-written last line (line 2)" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ['{"kind": "r', "3", "", '{"kind": "rl"}'])
def test_read_metrics_names_the_broken_line(tmp_path, broken):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    with pytest.raises(record.MetricsError, match=r"metrics\.jsonl, line 2: "):
        record.read_metrics(tmp_path)


def test_resuming_drops_the_lines_after_the_checkpoint_and_appends(tmp_path):
    metrics = record.Metrics(tmp_path)
    for step in range(6):
        metrics.write(dict(kind="sft", step=step, stage=0, loss=math.nan))
        metrics.write_rollouts([dict(step=step, response="é"), dict(step=step, response="b")])
        if step == 3:
            noted = list(metrics.position)
            metrics.write(dict(kind="filter", step=3, stage=0))  # same step, after the checkpoint
    metrics.close()
    assert noted == [4, 8]
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 2, "a')
    metrics = record.Metrics(tmp_path, position=noted)
    metrics.write(dict(kind="sft", step=4, stage=0))
    assert metrics.position == [5, 8]
    metrics.close()
    assert [(row["kind"], row["step"]) for row in record.read_metrics(tmp_path)] == [("sft", step) for step in range(5)]
    rollouts = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rollouts] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "rollouts.jsonl"]


@pytest.mark.parametrize("broken", ['{"step": 4, "x', '{"step": 4, "x": \n', "3\n", "\0\0\0\0\n"])
def test_lines_after_the_checkpoint_may_be_broken(tmp_path, broken):
    whole = [dict(kind="sft", step=step, stage=0) for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole) + broken + '{"step": 9}\n')
    assert record.whole_lines(tmp_path) == [4, 0]
    metrics = record.Metrics(tmp_path, position=[3, 0])
    metrics.write(whole[3])
    metrics.sync()
    metrics.close()
    assert record.read_metrics(tmp_path) == whole
    assert record.whole_lines(tmp_path) == [4, 0]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    metrics = record.Metrics(tmp_path)
    metrics.write(dict(kind="sft", step=1, stage=0))

    class Full:
        name = metrics.rows.name

        def writelines(self, lines):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics, "rows", Full())
    with pytest.raises(OSError) as raised:
        metrics.write(dict(kind="sft", step=2, stage=0))
    assert f"{metrics.rows.name} cannot be written (No space" in sentence(raised.value)
    assert metrics.position == [1, 0]


def test_closing_on_a_full_disk_raises_nothing(tmp_path):
    """Guards: the row left in the buffer was written again at the end, and a traceback hid the sentence."""
    metrics = record.Metrics(tmp_path)
    metrics.rows = open("/dev/full", "w")
    with pytest.raises(OSError):
        metrics.write(dict(kind="sft", step=1, stage=0))
    metrics.close()
    assert metrics.rollouts.closed


def test_other_ranks_write_nothing(tmp_path):
    metrics = record.Metrics(tmp_path / "run", enabled=False)
    metrics.write(dict(kind="sft", step=1, stage=0))
    metrics.write_rollouts([dict(step=1)])
    metrics.close()
    assert not (tmp_path / "run").exists()


def test_metrics_keep_the_rows_of_the_current_stage_also_after_a_resume(tmp_path):
    metrics = record.Metrics(tmp_path)
    for stage in (1, 2):
        for step in range(3):
            metrics.write(dict(kind="rl", step=3 * stage + step, stage=stage))
        metrics.write(dict(kind="eval", step=3 * stage + 2, stage=stage, name="held-out"))
    assert [row["step"] for row in metrics.steps] == [6, 7, 8]
    metrics.close()
    assert [row["step"] for row in record.Metrics(tmp_path, position=[7, 0]).steps] == [6, 7, 8]
    assert [row["step"] for row in record.Metrics(tmp_path, position=[3, 0]).steps] == [3, 4, 5]
