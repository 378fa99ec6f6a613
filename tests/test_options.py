"""lab/options.py: bad arguments of eval.py and data_filter.py, and that parsing needs no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from lab.export import export_arguments
from lab.options import difficulty_arguments, evaluation_arguments, training_arguments
from lab.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("m", "a model and at least one --data are required"),
        ("m --data d --curve temperature", '--curve is "temperature FROM:TO:STEP" or "length"'),
        ("m --data d --curve temperature 1:2", "needs FROM:TO:STEP, for example 0.6:1.7:0.1, not 1:2"),
        ("m --data d --curve temperature 1:1:0.1", "needs FROM:TO:STEP"),
        ("m --data d --curve temperature 0.1:inf:0.1", "needs FROM:TO:STEP"),
        ("m --data d --curve temperature 1:0.5:0.1", "needs FROM:TO:STEP"),
        ("m --data d --curve temperature 0:1:0.5", "needs FROM:TO:STEP"),
        ("m --data d --curve temperature 1:2:0.5 --temperature 1", "sets the temperatures"),
        ("m --data d --columns Q", "must be FIELD=NAME,... with fields of problem, answer"),
        ("m --data d --columns text=Q", "must be FIELD=NAME,... with fields of problem, answer"),
        ("m --data d -n 0", "argument -n: must be at least 1, not "),
        ("m --data d --limit -1", "argument --limit: must be at least 1, not "),
        ("m --data d --max-tokens 0", "argument --max-tokens: must be at least 1, not "),
        ("m --data d --rows 0", "argument --rows: must be at least 1, not "),
        ("m --data d --trained-length 0", "argument --trained-length: must be at least 1, not "),
        ("m --data d --workers 0", "argument --workers: must be at least 1, not "),
        ("m --data d --seed -1", "argument --seed: must be at least 0, not -1"),
        ("m --data d --temperature -1", "argument --temperature: must be at least 0, not -1"),
        ("m --data d --temperature inf", "argument --temperature: must be at least 0, not inf"),
        ("m --data d --top-k -1", "argument --top-k: must be at least 0, not -1"),
        ("m --data d --temperature nan", "argument --temperature: must be at least 0, not nan"),
        ("m --data d --temperature 0 -n 2", "use -n 1"),
        ("m --data d --top-p 0", "argument --top-p: must be above 0 and at most 1, not 0"),
        ("m --data d --margin -1", "argument --margin: must be at least 0 and at most 1, not -1"),
        ("m --data d --original-window 64", "--original-window requires --yarn"),
        ("m --data d --beta-fast 2", "--beta-fast requires --yarn"),
        ("m --data d --compare a b", "give no model and no --data"),
        ("--compare a", "--compare takes at least two folders"),
        ("--compare a b --top-k 1", "leave out --top-k, which --compare does not use; it takes only --out"),
        ("--compare a b --regrade c", "leave out --compare, which --regrade does not use"),
        ("--regrade a -n 1 --limit 3", "leave out -n, --limit, which --regrade does not use; it takes only --out, --thinking"),
        ("--regrade a --thinking auto", "--regrade has no template to decide --thinking auto: give true or false"),
        ("m --data d --curve length --match 0.5", "--curve and --match exclude each other"),
    ],
)
def test_eval_refuses_bad_arguments(monkeypatch, capsys, words, sentence):
    monkeypatch.setattr("sys.argv", ["eval.py", *words.split()])
    with pytest.raises(SystemExit):
        evaluation_arguments(None)
    assert sentence in capsys.readouterr().err


def test_eval_collects_the_options_of_yarn(monkeypatch):
    words = "eval.py m --data d --yarn 2 --beta-fast 2 --original-window 64".split()
    monkeypatch.setattr("sys.argv", words)
    expected = {"factor": 2.0, "original_window": 64, "attention_factor": 1.0, "beta_fast": 2.0, "beta_slow": 1.0}
    assert evaluation_arguments(None).yarn == expected
    monkeypatch.setattr("sys.argv", words[:4])
    assert evaluation_arguments(None).yarn is None


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("", "the following arguments are required: command"),
        ("estimate m d -n 0", "argument -n: must be at least 1, not "),
        ("estimate m d --rows 0", "argument --rows: must be at least 1, not "),
        ("estimate m d --temperature 0", "argument --temperature: must be above 0, not 0"),
        ("estimate m d --temperature nan", "argument --temperature: must be above 0, not nan"),
        ("estimate m d --top-p 0", "argument --top-p: must be above 0 and at most 1, not 0"),
        ("estimate m d --out rates", "rates must end in .jsonl"),
        ("filter r d o.jsonl --max-unsolved-share 2", "--max-unsolved-share: must be at least 0 and at most 1, not 2"),
        ("filter r d o.jsonl --seed -1", "argument --seed: must be at least 0, not -1"),
        ("filter r d o.jsonl --batch 0", "argument --batch: must be at least 1, not "),
        ("drop r d o.jsonl --window last", "invalid choice: 'last'"),
        ("drop r d o.parquet", "o.parquet must end in .jsonl"),
    ],
)
def test_data_filter_refuses_bad_arguments(monkeypatch, capsys, words, sentence):
    monkeypatch.setattr("sys.argv", ["data_filter.py", *words.split()])
    with pytest.raises(SystemExit):
        difficulty_arguments(None)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, words, status, said",
    [
        ("train.py", "--help", 0, "The POLARIS recipe"),
        ("train.py", "--set stage.1.temprature=1", 1, "did you mean temperature?"),
        ("train.py", "--resume recipes/tiny.toml", 2, "put the recipe before --resume"),
        ("train.py", "--plan --resume runs/a", 2, "--plan takes a recipe"),
        ("train.py", "no.toml --resume runs/a", 2, "leave out no.toml; --set changes a value"),
        ("train.py", "--plan --seeds 0 1", 1, "2 values are a sweep, which --plan and --resume RUN do not take"),
        ("train.py", "--nproc-per-node 2", 2, "--nproc-per-node is of a sweep"),
        ("eval.py", "--help", 0, "How good is a model?"),
        ("eval.py", "model --data d --temprature 1", 2, "unrecognized arguments: --temprature 1"),
        ("data_filter.py", "--help", 0, "how hard problems are"),
        ("data_filter.py", "estimate model d -n 0", 2, "argument -n: must be at least 1, not "),
    ],
)
def test_help_and_argument_errors_need_no_torch(script, words, status, said):
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


def test_metrics_and_benchmarks_need_no_torch():
    code = "import sys, eval, lab.benchmarks, lab.options, lab.scores; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, tmp_path):
    """Guards: a shell leaves it to the program in --out=~/runs, and so does a recipe."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.toml").write_text(
        'name = "r"\nmodel = "~/m"\neval = { data = "~/e.jsonl" }\nguard = { benchmarks = ["~/b", "aime24"] }\n'
        '[[stage]]\nkind = "sft"\ndata = "~/s.jsonl"\nsteps = 1\n'
    )

    def parse(arguments_of, *words):
        monkeypatch.setattr("sys.argv", ["program", *words])
        return vars(arguments_of(None))

    recipe = load_recipe(tmp_path / "r.toml")
    assert recipe.model == f"{tmp_path}/m" and recipe.eval.data == f"{tmp_path}/e.jsonl"
    assert recipe.stage[0].data == f"{tmp_path}/s.jsonl" and recipe.guard.benchmarks == (f"{tmp_path}/b", "aime24")
    found = parse(training_arguments, "~/r.toml", "--out=~/o")
    assert (found["recipe"], found["out"]) == (tmp_path / "r.toml", tmp_path / "o")
    assert parse(training_arguments, "--resume=~/r")["resume"] == tmp_path / "r"
    found = parse(evaluation_arguments, "~/m", "--data=~/d", "--data=aime24", "--out=~/o", "--match=~/run")
    assert (found["model"], found["data"]) == (f"{tmp_path}/m", [f"{tmp_path}/d", "aime24"])
    assert (found["out"], found["match"]) == (tmp_path / "o", f"{tmp_path}/run")
    found = parse(difficulty_arguments, "estimate", "~/m", "~/d", "--out=~/o.jsonl")
    assert (found["model"], found["data"], found["out"]) == (f"{tmp_path}/m", f"{tmp_path}/d", tmp_path / "o.jsonl")
    found = vars(export_arguments(["~/m", "~/o"]))
    assert (found["model"], found["out"]) == (f"{tmp_path}/m", tmp_path / "o")
