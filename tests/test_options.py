"""The command lines of eval.py and data_filter.py: what they refuse, and that they answer before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from lab.options import difficulty_arguments, evaluation_arguments

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("m", "a model and at least one --data are needed"),
        ("m --data d --curve temperature", '--curve is "temperature FROM:TO:STEP" or "length"'),
        ("m --data d --curve temperature 1:2", "needs FROM:TO:STEP, such as 0.6:1.7:0.1, not 1:2"),
        ("m --data d --curve temperature 1:1:0.1", "needs FROM:TO:STEP"),
        ("m --data d --curve temperature 0.1:inf:0.1", "needs FROM:TO:STEP"),
        ("m --data d --curve temperature 1:0.5:0.1", "needs FROM:TO:STEP"),
        ("m --data d --curve temperature 0:1:0.5", "needs FROM:TO:STEP"),
        ("m --data d --curve temperature 1:2:0.5 --temperature 1", "has its own temperatures"),
        ("m --data d -n 0", "-n must be at least 1"),
        ("m --data d --limit -1", "--limit must be at least 1"),
        ("m --data d --max-tokens 0", "--max-tokens must be at least 1"),
        ("m --data d --rows 0", "--rows must be at least 1"),
        ("m --data d --trained-length 0", "--trained-length must be at least 1"),
        ("m --data d --workers 0", "--workers must be at least 1"),
        ("m --data d --temperature -1", "--temperature -1.0 is no temperature"),
        ("m --data d --temperature nan", "--temperature nan is no temperature"),
        ("m --data d --temperature 0 -n 2", "take -n 1"),
        ("m --data d --top-p 0", "--top-p lies above 0"),
        ("m --data d --margin -1", "--margin is a share"),
        ("m --data d --original-window 64", "--original-window belongs to --yarn"),
        ("m --data d --compare a b", "give no model and no --data"),
        ("m --data d --curve length --match 0.5", "two things to do"),
    ],
)
def test_eval_says_what_it_cannot_do(monkeypatch, capsys, words, sentence):
    monkeypatch.setattr("sys.argv", ["eval.py", *words.split()])
    with pytest.raises(SystemExit):
        evaluation_arguments(None)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("", "the following arguments are required: command"),
        ("estimate m d -n 0", "-n must be at least 1"),
        ("estimate m d --rows 0", "--rows must be at least 1"),
        ("estimate m d --temperature 0", "--temperature 0.0 cannot be trained at"),
        ("estimate m d --temperature nan", "--temperature nan cannot be trained at"),
        ("estimate m d --top-p 0", "--top-p lies above 0"),
        ("estimate m d --out rates", "rates must end in .jsonl"),
        ("filter r d o.jsonl --max-unsolved-share 2", "--max-unsolved-share is a share"),
        ("filter r d o.jsonl --batch 0", "--batch must be at least 1"),
        ("drop r d o.jsonl --window last", "invalid choice: 'last'"),
        ("drop r d o.parquet", "o.parquet must end in .jsonl"),
    ],
)
def test_data_filter_says_what_it_cannot_do(monkeypatch, capsys, words, sentence):
    monkeypatch.setattr("sys.argv", ["data_filter.py", *words.split()])
    with pytest.raises(SystemExit):
        difficulty_arguments(None)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, words, status, said",
    [
        ("eval.py", "--help", 0, "How good is a model?"),
        ("eval.py", "model --data d --temprature 1", 2, "unrecognized arguments: --temprature 1"),
        ("data_filter.py", "--help", 0, "How hard problems are"),
        ("data_filter.py", "estimate model d -n 0", 2, "-n must be at least 1"),
    ],
)
def test_help_and_mistakes_are_answered_before_torch_is_imported(script, words, status, said):
    code = f"""
import runpy, sys
sys.argv, sys.path[0] = [{script!r}, *{words.split()!r}], {str(ROOT)!r}
try:
    runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, said in done.stdout + done.stderr) == (status, True), done.stderr


def test_figures_and_benchmarks_are_read_without_torch():
    code = "import sys, eval, lab.benchmarks, lab.options, lab.scores; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
