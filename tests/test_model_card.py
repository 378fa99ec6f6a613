"""lab/model_card.py: what a stage's model says of its training, and who takes it."""

import argparse
import json
import os
import shutil
import signal
import stat
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import GenerationConfig

from data_filter import History
from engine.run_folder import read_recipe
from eval import distinct_ngrams
from lab import difficulty, evaluation
from lab.model_card import settings_files, write_cards
from lab.options import difficulty_arguments, evaluation_arguments
from lab.recipe import load_recipe
from model import load, save

RECIPE = """
name = "sums"
model = "Qwen/Qwen3-0.6B-Base"
instruction = "Box it."
thinking = true
[[stage]]
kind = "sft"
data = "s.jsonl"
steps = 5
[[stage]]
kind = "rl"
data = "someone/problems"
steps = 2
group_size = 4
temperature = 1.1
max_response_tokens = 40
[[stage]]
kind = "rl"
steps = 2
temperature = "match"
max_response_tokens = 48
"""
EVAL = '[eval]\ndata = "h.jsonl"\nsamples = 2\ntemperature = 0.5\ntop_k = 3\nmax_response_tokens = 9\n'
HELD_OUT = {"n": 2, "temperature": 0.5, "top_k": 3, "max_tokens": 9}
STAGES = [
    {"n": 4, "temperature": 1.1, "top_k": 0, "max_tokens": 40},  # the next stage's
    {"n": 4, "temperature": 1.1, "top_k": 0, "max_tokens": 40},
    {"n": 8, "temperature": 1.35, "top_k": 0, "max_tokens": 48},  # the temperature that the search has found
]


def written(path: Path, text: str):
    path.write_text(text)
    return load_recipe(path)


@pytest.mark.parametrize("index, newest", [(0, 0.0), (1, 1.1), (2, 1.35)])
def test_settings_are_those_of_the_recipe_and_of_the_temperature_search(tmp_path, index, newest):
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05, "pad_token_id": 7, "eos_token_id": 9}'
    )
    for more, held_out in ((EVAL, HELD_OUT), ("", STAGES[index])):
        recipe = written(tmp_path / "r.toml", RECIPE + more)
        files = settings_files(recipe, index, newest, (3, 5), tmp_path)
        shared = {"instruction": "Box it.", "thinking": True}
        assert files["nanopolaris.json"] == shared | {"evaluation": held_out, "training": STAGES[index]}
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "generation_config.json").write_text(json.dumps(files["generation_config.json"]))
        read = GenerationConfig.from_pretrained(tmp_path / "out")  # nothing of the base's sampling is left
        assert (read.do_sample, read.temperature, read.top_k) == (True, held_out["temperature"], held_out["top_k"])
        assert (read.max_new_tokens, read.top_p, read.repetition_penalty) == (held_out["max_tokens"], 1.0, None)
        assert (read.eos_token_id, read.pad_token_id) == ([3, 5], 7)


@pytest.fixture
def run(small_world, tmp_path):
    """A run's folder with the model of a first stage, and its metrics."""
    folder = tmp_path / "runs" / "sums"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE.replace("thinking = true", 'thinking = "auto"') + EVAL)
    rows = [{"kind": "sft", "step": step, "stage": 0} for step in range(1, 6)]
    figures = {"name": "held-out", "n": 2, "avg": 0.5, "low": 0.25, "high": 0.75, "problems": 6, "temperature": 0.5}
    rows += [{"kind": "eval", "step": step, "stage": 1, **figures, "avg": avg} for step, avg in ((5, 0.5), (6, 0.9))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = settings_files(load_recipe(folder / "recipe.toml"), 0, 0.0, (0,), small_world / "model")
    save(load(small_world / "model"), folder / "stage-0", torch.float32, small_world / "model", files)
    return folder


def test_the_card_is_one_that_the_hub_reads_and_its_code_runs(run):
    write_cards(run)
    card = ModelCard.load(run / "stage-0" / "README.md")
    tags = ["nanopolaris", "polaris", "grpo", "reinforcement-learning"]
    assert yaml.safe_load(card.data.to_yaml()) == {
        "base_model": "Qwen/Qwen3-0.6B-Base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    assert "| 0 | sft | s.jsonl | 5 | 1e-05 |  |  |\n\n" in card.text  # the first stage alone
    assert "- held-out: avg@2 50.0 (95% 25.0 to 75.0) over 6 problems" in card.text and "90.0" not in card.text
    code, printed = card.text.partition("```python\n")[2].partition("```")[0], StringIO()
    with redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue().startswith("<|user|> 4 + 8 - 6 Box it.<|end|><|assistant|><think>")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_others_may_read_a_model_as_the_umask_says(small_world, tmp_path, umask, mode):
    """Guards: safetensors writes its files for the owner alone."""
    before = os.umask(umask)
    try:
        save(load(small_world / "model"), tmp_path / "out", tokenizer_from=small_world / "model")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {mode}


# ------------------------------------------------------------------------------------------- who takes them


@pytest.fixture
def command(run, small_world, tmp_path, monkeypatch):
    """Run eval.py or data_filter.py in the folder that holds runs/."""
    monkeypatch.chdir(tmp_path)
    for name in ("held-out", "train"):
        shutil.copy(small_world / f"{name}.jsonl", tmp_path / f"{name}.jsonl")

    def call(line):
        program, *words = line.split()
        monkeypatch.setattr("sys.argv", [program, *words])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            if program == "eval.py":
                evaluation.main(evaluation_arguments(None))
            else:
                difficulty.main(difficulty_arguments(None))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return call


def settings(number):
    return json.loads(Path(f"runs/eval{number}/settings.json").read_text())


def test_eval_samples_as_the_run_did_and_the_command_line_overrides(command, capsys):
    command("eval.py runs/sums/stage-0 --data held-out.jsonl")
    taken = HELD_OUT | {"instruction": "Box it.", "thinking": True}
    assert {name: settings("")[name] for name in taken} == taken
    said = "n = 2, temperature = 0.5, top_k = 3, max_tokens = 9, instruction = 'Box it.', thinking = 'auto'"
    assert f"from runs/sums/stage-0/nanopolaris.json: {said}\n" in capsys.readouterr().err
    command("eval.py runs/sums/stage-0 --data held-out.jsonl --top-k 0 --instruction X -n 1 --no-thinking")
    given = taken | {"n": 1, "top_k": 0, "instruction": "X", "thinking": False}
    assert {name: settings("-2")[name] for name in taken} == given
    assert "from runs/sums/stage-0/nanopolaris.json: temperature = 0.5, max_tokens = 9\n" in capsys.readouterr().err


def test_a_curve_does_not_take_the_temperature_that_it_sets(command, run, capsys):
    """Guards: with a remembered temperature of 0 it asked for -n 1, and refused --temperature 1 as well."""
    held = {"evaluation": {"temperature": 0, "n": 1, "max_tokens": 4}}
    (run / "stage-0" / "nanopolaris.json").write_text(json.dumps(held))
    command("eval.py runs/sums/stage-0 --data held-out.jsonl --limit 2 --curve temperature 0.6:1.0:0.2 -n 4")
    assert "nanopolaris.json: max_tokens = 4\n" in capsys.readouterr().err
    assert (settings("")["n"], settings("")["temperature"]) == (4, None)
    assert "<dt>temperature</dt>" not in Path("runs/eval/report.html").read_text()
    points = json.loads(Path("runs/eval/results.json").read_text())["temperature"]["held-out"]["points"]
    assert [point["temperature"] for point in points] == [0.6, 0.8, 1.0]


def test_evaluations_are_numbered_and_the_same_command_goes_on(command, capsys):
    """Guards: `--match runs/eval` and `--curve`, as documented, failed, since all wrote to runs/eval."""
    first = "eval.py runs/sums/stage-0 --data held-out.jsonl"
    command(first)
    command(f"{first} --curve temperature 0.5:1:0.5")
    command(f"{first} --match runs/eval")
    assert sorted(path.name for path in Path("runs").glob("eval*")) == ["eval", "eval-2", "eval-3"]
    rows = [json.loads(line) for line in Path("runs/eval/responses/held-out.jsonl").read_text().splitlines()]
    texts = {row["problem_id"]: [r["text"] for r in rows if r["problem_id"] == row["problem_id"]] for row in rows}
    point = json.loads(Path("runs/eval-3/results.json").read_text())["match"]["held-out"]["points"][0]
    assert point["target"] == pytest.approx(distinct_ngrams(list(texts.values()))[0])
    capsys.readouterr()
    command(first)
    assert "resuming in runs/eval\n" in capsys.readouterr().out
    command("eval.py --regrade runs/eval")
    command("eval.py --compare runs/eval runs/eval-4")
    assert sorted(path.name for path in Path("runs").glob("eval*"))[-1] == "eval-4"


def test_fewer_samples_do_not_replace_the_results_of_more(command, capsys):
    first = "eval.py runs/sums/stage-0 --data held-out.jsonl --limit 2"
    command(f"{first} -n 2")
    before = Path("runs/eval/results.json").read_bytes()
    command(f"{first} -n 1")
    assert Path("runs/eval/results.json").read_bytes() == before and settings("-2")["n"] == 1
    command(f"{first} -n 1")
    command(f"{first} -n 3")
    assert capsys.readouterr().out.count("resuming in runs/eval\n") == 1
    assert sorted(path.name for path in Path("runs").glob("eval*")) == ["eval", "eval-2"]


def test_estimate_samples_as_training_did(command):
    command("data_filter.py estimate runs/sums/stage-0 train.jsonl --out rates.jsonl")
    held = History.load(Path("rates.jsonl")).settings
    assert {name: held[name] for name in STAGES[0]} == STAGES[0]
    assert (held["instruction"], held["thinking"]) == ("Box it.", True)


def test_a_following_run_takes_instruction_and_thinking_unless_its_recipe_has_its_own(run, tmp_path, capsys):
    text = f'name = "next"\nmodel = "{run / "stage-0"}"\n[[stage]]\nkind = "sft"\ndata = "s.jsonl"\nsteps = 1\n'
    (tmp_path / "next.toml").write_text(text)

    def read(*values):
        return read_recipe(argparse.Namespace(recipe=tmp_path / "next.toml", set=values, resume=None))

    assert read().instruction == "Box it."
    assert f"{run / 'stage-0'} was trained with instruction = 'Box it.'" in capsys.readouterr().err
    assert read("instruction=Mine").instruction == "Mine"
    (tmp_path / "next.toml").write_text('instruction = "Mine"\n' + text)
    assert read().instruction == "Mine" and not capsys.readouterr().err.count("Mine was")


@pytest.mark.parametrize(
    "held, sentence",
    [
        ({"instruction": 3}, "instruction must be a string, not '3'"),
        ({"thinking": "maybe"}, "thinking must be true, false or auto, not 'maybe'"),
        ({"evaluation": {"max_tokens": 0}}, "max_tokens must be a whole number from 1 to "),
        ({"evaluation": {"temperature": -1}}, "temperature must be a number from 0 to "),
        ({"evaluation": [1]}, "evaluation must be an object"),
        ({"evaluation": {"temperature": 0, "n": 2}}, "at temperature 0 all responses to a problem are equal"),
    ],
)
def test_broken_settings_are_one_sentence(command, run, held, sentence):
    (run / "stage-0" / "nanopolaris.json").write_text(json.dumps(held))
    with pytest.raises(SystemExit, match=sentence):
        command("eval.py runs/sums/stage-0 --data held-out.jsonl")
    assert not list(Path("runs").glob("eval*"))
