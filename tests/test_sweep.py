"""lab/sweep.py: the runs of a sweep, one after another; a small script stands for train.py."""

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from lab import sweep
from lab.recipe import RecipeError

ROOT = Path(__file__).resolve().parent.parent
TRAIN = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from lab.recipe import load_recipe, to_toml
recipe = load_recipe(sys.argv[1], [sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == "--set"])
rate, seed = recipe.stage[1].learning_rate, recipe.seed
folder = Path(sys.argv[3]) / recipe.name
if (rate, seed) == (2.0, 1) and not (folder / "tried").exists():
    folder.mkdir(parents=True)
    (folder / "tried").touch()
    sys.exit(1)
folder.mkdir(parents=True, exist_ok=True)
row = dict(kind="eval", step=0, stage=1, name="held-out", problems=2, avg=0.5, low=0.1, high=0.9)
rows = [row, dict(kind="rl", step=1, stage=1, tokens=100, reward_mean=0.5)]
rows.append(row | dict(step=1, avg=rate / 4 + seed / 10))
rows[-1]["by_problem"] = [["a", rate / 4], ["b", rate / 4 + seed / 5]]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "recipe.toml").write_text(to_toml(recipe))
(folder / "finished").touch()
"""


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(sweep, "TRAIN", tmp_path / "train.py")
    monkeypatch.delenv("RANK", raising=False)
    values = ["stage.rl.learning_rate=1,2", "seed=0,1", "stage.*.steps=3"]
    recipe, out = ROOT / "recipes" / "tiny.toml", tmp_path / "runs"
    return argparse.Namespace(recipe=recipe, set=values, out=out, resume_anyway=False, nproc_per_node=None)


def test_a_sweep_runs_every_combination_and_the_same_command_only_what_is_left(arguments, capfd):
    status = sweep.run_sweep(arguments)
    assert status.startswith("train.py: 1 of 4 runs failed, the same command tries again: learning_rate=2,seed=1")
    folder = arguments.out / "tiny-sweep"
    names = [f"learning_rate={rate},seed={seed}" for rate in (1, 2) for seed in (0, 1)]
    assert sorted(path.name for path in folder.iterdir()) == ["compare.html", *names]
    capfd.readouterr()
    made = {name: (folder / name / "metrics.jsonl").stat().st_mtime_ns for name in names[:3]}
    assert sweep.run_sweep(arguments) == 0
    assert {name: (folder / name / "metrics.jsonl").stat().st_mtime_ns for name in names[:3]} == made
    printed = capfd.readouterr().out
    assert printed.count(": has finished") == 3 and f"run 4 of 4, {names[3]}\n" in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith("learning_rate")]
    # means of 0.25 and 0.35, and of 0.5 and 0.6; Student's t of 1 degree of freedom is 12.7062
    assert rows[0] == "learning_rate=1 0, 1 1 100 50.0 30.0 0.0 to 93.5".split()
    assert rows[1] == "learning_rate=2 0, 1 1 100 50.0 55.0 0.0 to 100.0".split()


def test_a_finished_run_of_another_recipe_is_not_taken(arguments):
    arguments.set = ["seed=0,1"]
    assert sweep.run_sweep(arguments) == 0
    arguments.set.append("eval.samples=9")
    with pytest.raises(RecipeError, match=r"seed=0 differs from this sweep: recipe: eval.samples was 8, is 9: "):
        sweep.run_sweep(arguments)


def test_finished_runs_from_a_trained_model_are_taken(arguments, tmp_path, capfd):
    """Guards: their recipe.toml has the instruction that the model was trained with, which the recipe leaves out."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "nanopolaris.json").write_text('{"instruction": "Box it."}')
    as_trained = "import to_toml; from engine.run_folder import with_remembered as load_recipe"
    (tmp_path / "train.py").write_text(TRAIN.replace("import load_recipe, to_toml", as_trained))
    lines = arguments.recipe.read_text().splitlines(keepends=True)
    arguments.recipe = tmp_path / "r.toml"
    arguments.recipe.write_text("".join(line for line in lines if not line.startswith("instruction")))
    arguments.set = ["seed=0,1", f"model={tmp_path / 'model'}"]
    assert sweep.run_sweep(arguments) == sweep.run_sweep(arguments) == 0
    assert capfd.readouterr().out.count(": has finished") == 2


def test_mistakes_are_found_before_the_first_run(arguments, monkeypatch):
    arguments.set = ["stage.rl.temperature=1,-1"]
    with pytest.raises(RecipeError, match="stage.1.temperature must be above 0"):
        sweep.run_sweep(arguments)
    arguments.set = ["model=a/b,a b"]
    with pytest.raises(RecipeError, match="two runs of the sweep have one name: model=a_b, model=a_b"):
        sweep.run_sweep(arguments)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RecipeError, match="a sweep starts its runs itself: python train.py ... --nproc-per-node N"):
        sweep.run_sweep(arguments)
    assert not arguments.out.exists()


def test_names_say_as_much_of_a_key_as_they_must():
    overrides = ["stage.1.temperature=1,2", "stage.2.temperature=3,4", "seed=5"]
    names = [name for name, _, _ in sweep.combinations(overrides)]
    assert names[0] == "stage.1.temperature=1,stage.2.temperature=3" and len(names) == 4
    overrides = ['instruction="a,b"', "stage.1.variant.loss=gspo,cispo", "seed=1,2"]
    name, setting, overrides = next(sweep.combinations(overrides))
    assert (name, setting) == ("loss=gspo,seed=1", "loss=gspo")
    for values in (["seed=0,1", "stage.1.steps=3,4"], ["stage.1.steps=3,4", "seed=0,1"]):
        assert [setting for _, setting, _ in sweep.combinations(values)].count("steps=3") == 2
    assert overrides == ['instruction="a,b"', 'stage.1.variant.loss="gspo"', "seed=1", 'name="loss=gspo,seed=1"']


def test_a_signal_is_passed_on_once_and_ends_the_sweep(tmp_path, monkeypatch):
    """Guards against a sweep that goes on with its next run, and a child that two signals end before it has saved."""
    script = (
        "import signal, sys, time; from pathlib import Path; seen = []\n"
        "signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))\n"
        f"Path({str(tmp_path / 'ready')!r}).touch()\n"
        "while not seen: time.sleep(0.01)\n"
        f"time.sleep(0.1); Path({str(tmp_path / 'saved')!r}).write_text(str(len(seen)))"
    )
    raised, before = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(signal, "raise_signal", raised.append)

    def interrupt():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        sweep.run_child([sys.executable, "-c", script])
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert (tmp_path / "saved").read_text() == "1" and raised == [signal.SIGINT]
