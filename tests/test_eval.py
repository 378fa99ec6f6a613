"""eval.py: honest intervals, figures by hand, the search on the diversity curve, and the command line."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import eval as evaluation
from arithmetic import World, write_world
from attempts import Attempt
from data_filter import Problem, read_problems
from eval import TemperaturePoint, interval, match_diversity, summarise
from reward import Grade
from rollout import Rollout, Sampling


def attempt(problem_id, index, verdict, answer, text, tokens, finish_reason="stop"):
    tokens = np.arange(tokens, dtype=np.int32)
    rollout = Rollout(
        problem_id, index, np.zeros(3, np.int32), tokens, np.zeros(len(tokens), np.float32), finish_reason, 0.7
    )
    return Attempt(rollout, text, Grade(verdict, float(verdict == "right"), 0.0, 0.0, answer))


# ---------------------------------------------------------------------------------------------- intervals


def test_an_interval_by_hand():
    # mean 0.5, deviations -0.5, 0, 0.5: standard deviation 0.5, of the mean 0.5 / sqrt(3)
    low, high = interval([0.0, 0.5, 1.0])
    assert (low, high) == (0.0, 1.0)  # 0.5 +- 0.566 is cut off
    low, high = interval([0.4, 0.5, 0.6, 0.5])
    half = 1.959964 * math.sqrt(0.02 / 3) / 2
    assert (low, high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))


def test_one_problem_says_nothing_about_the_next():
    assert interval([0.75]) == (0.0, 1.0)


def answers_of(random, problems, n):
    """Right or wrong (P, n): problems differ in difficulty, so that the answers to one are alike."""
    return random.random((problems, n)) < random.beta(0.6, 0.6, size=(problems, 1))


def test_the_interval_is_a_bootstrap_over_problems():
    random = np.random.default_rng(1)
    right = answers_of(random, 60, 8)
    draws = random.integers(0, 60, (8000, 60))  # whole problems, with all their answers
    means = right[draws].mean(axis=(1, 2))
    low, high = interval(right.mean(axis=1))
    width = 2 * 1.959964 * means.std() * math.sqrt(60 / 59)
    assert high - low == pytest.approx(width, rel=0.04)
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.01)
    independent = 2 * 1.959964 * math.sqrt(right.mean() * (1 - right.mean()) / right.size)
    assert high - low > 1.5 * independent  # which answers counted one by one would claim


def test_the_interval_holds_the_truth_19_times_in_20():
    random = np.random.default_rng(2)
    held = 0
    for _ in range(2000):
        low, high = interval(answers_of(random, 60, 8).mean(axis=1))
        held += low <= 0.5 <= high
    assert abs(held / 2000 - 0.95) < 0.02  # 4 standard errors of 2,000 trials, and a little for the normal form


# ------------------------------------------------------------------------------------------------ figures


def test_figures_by_hand():
    problems = [Problem("p/a", "?", ("1",), "algebra"), Problem("p/b", "?", ("2",), "geometry"),
                Problem("p/c", "?", ("3",), "algebra"), Problem("p/d", "?", ("3",))]  # fmt: skip
    groups = [
        [attempt("p/a", 0, "right", "1", "a b c d", 4), attempt("p/a", 1, "right", "1", "a b c d", 6)],
        [attempt("p/b", 0, "right", "2", "a b c d e", 10), attempt("p/b", 1, "wrong", "7", "short", 2)],
        [attempt("p/c", 0, "no answer", None, "", 30, "length"), attempt("p/c", 1, "wrong", "4", "x", 8)],
        [attempt("p/d", 0, "timed out", "5", "", 1), attempt("p/d", 1, "grader failed", "6", "", 3, "length")],
    ]
    found = summarise("made up", problems, groups, 0.7)
    assert (found.name, found.problems, found.n, found.temperature) == ("made up", 4, 2, 0.7)
    assert found.avg == 3 / 8
    assert (found.low, found.high) == interval([1.0, 0.5, 0.0, 0.0])
    assert found.by_type == {"algebra": 0.5, "geometry": 0.5}  # a problem without a type is in none
    assert found.tokens == 64 and found.length_mean == 8.0
    assert found.truncated_share == 2 / 8
    assert found.no_box_share == 1 / 8
    assert found.distinct4 == (1 / 2 + 2 / 2) / 2  # the two problems that have a 4-gram
    assert found.verdicts == {"right": 3, "wrong": 2, "no answer": 1, "timed out": 1, "grader failed": 1}


def test_no_diversity_without_a_4_gram():
    found = summarise("short", [Problem("p", "?", ("1",))], [[attempt("p", 0, "wrong", "2", "one two three", 3)]], 1.0)
    assert found.distinct4 is None and (found.low, found.high) == (0.0, 1.0)


# --------------------------------------------------------------------------------- temperature by diversity


@pytest.fixture
def search(monkeypatch):
    """Run match_diversity over a made-up curve; returns what it chose, what it measured and what it said."""

    def run(diversity, start, target, **settings):
        measured, said = [], []

        def measure(respondent, problems, n, sampling):
            assert (problems, n, sampling.max_new_tokens, sampling.seed) == (["some"], 4, 50, 3)
            measured.append(sampling.temperature)
            return TemperaturePoint(sampling.temperature, 0.5, diversity(sampling.temperature))

        monkeypatch.setattr(evaluation, "measure_temperature", measure)
        respondent = SimpleNamespace(device=SimpleNamespace(say=said.append))
        sampling = Sampling(start, 50, (0,), seed=3)
        chosen, curve = match_diversity(respondent, ["some"], 4, sampling, target, **settings)
        assert [point.temperature for point in curve] == measured
        assert [point.distinct4 for point in curve] == [diversity(temperature) for temperature in measured]
        return chosen, measured, said

    return run


def test_the_first_temperature_that_restores_the_diversity(search):
    chosen, measured, said = search(lambda t: t / 2, 1.0, 0.62)
    assert (chosen, measured, said) == (1.25, [1.0, 1.05, 1.1, 1.15, 1.2, 1.25], [])


def test_reaching_the_target_exactly_is_enough(search):
    assert search(lambda t: {1.4: 0.5, 1.45: 0.6, 1.5: 0.7}[t], 1.4, 0.6)[:2] == (1.45, [1.4, 1.45])


def test_the_search_never_goes_below_its_start(search):
    assert search(lambda t: 0.9, 1.4, 0.1)[:2] == (1.4, [1.4])


def test_the_step_and_the_end_are_parameters(search):
    chosen, measured, _ = search(lambda t: t / 2, 0.7, 5.0, step=0.1, most=1.0)
    assert (chosen, measured) == (1.0, [0.7, 0.8, 0.9, 1.0])
    assert search(lambda t: t / 2, 0.7, 5.0, step=0.2, most=1.0)[1] == [0.7, 0.9]  # never beyond the end


def test_the_most_diverse_is_taken_when_none_restores_it(search):
    curve = {1.0: 0.3, 1.05: 0.5, 1.1: None, 1.15: 0.4}
    chosen, measured, said = search(curve.get, 1.0, 0.8, most=1.15)
    assert (chosen, measured) == (1.05, [1.0, 1.05, 1.1, 1.15])
    assert said == ["warning: no temperature up to 1.15 restores distinct-4 = 0.800; going on with 1.05 (0.500)"]


def test_a_start_beyond_the_end_is_measured_all_the_same(search):
    """Guards: a stage that stood above search.most measured nothing, and the search failed with it."""
    chosen, measured, said = search(lambda t: 0.4, 1.6, 0.5, most=1.5)
    assert (chosen, measured, len(said)) == (1.6, [1.6], 1)


def test_nothing_to_measure_keeps_the_start(search):
    assert search(lambda t: None, 1.0, 0.5, most=1.1)[0] == 1.0


# ------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds") / "world"
    sizes = {"sft_problems": 1, "train_problems": 5, "held_out_problems": 6, "beyond_problems": 1, "filler_tokens": 3}
    write_world(World(**sizes, hidden_size=32, layers=1, window=96), folder)
    return folder


@pytest.fixture
def command(world, tmp_path, monkeypatch):
    """eval.py as a user calls it, without the start of a process."""

    def run(*arguments, model=world / "model", data=("held-out",), out="out"):
        files = [word for name in data for word in ("--data", str(world / f"{name}.jsonl"))]
        settings = ["--temperature", "1", "--top-k", "0", "--instruction", "", "--out", str(tmp_path / out)]
        monkeypatch.setattr("sys.argv", ["eval.py", str(model), *files, *settings, *map(str, arguments)])
        evaluation.main()
        folder = tmp_path / out
        rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
        return json.loads((folder / "results.json").read_text()), rows

    return run


def test_the_files_that_it_writes_agree(command, world, capsys):
    results, rows = command("-n", 3, "--max-tokens", 7, "--limit", 4, data=("held-out", "train"))
    printed = capsys.readouterr().out
    assert [result["name"] for result in results] == [str(world / f"{name}.jsonl") for name in ("held-out", "train")]
    for result in results:
        problems = read_problems(result["name"])[:4]
        mine = [row for row in rows if row["data"] == result["name"]]
        ids = [(row["problem_id"], row["sample"]) for row in mine]
        assert ids == [(problem.id, sample) for problem in problems for sample in range(3)]
        assert (result["problems"], result["n"], result["temperature"]) == (4, 3, 1.0)
        assert result["avg"] == np.mean([row["verdict"] == "right" for row in mine])
        assert result["tokens"] == sum(row["tokens"] for row in mine)
        assert result["length_mean"] == result["tokens"] / 12
        assert result["truncated_share"] == np.mean([row["finish_reason"] == "length" for row in mine])
        assert result["no_box_share"] == np.mean([row["answer"] is None for row in mine])
        assert sum(result["verdicts"].values()) == 12
        assert all(1 <= row["tokens"] <= 7 for row in mine)
        assert result["by_type"] == {f"{terms} terms": 0.0 for terms in range(3, 7)}  # the first four problems'
        assert f"{result['name']}: avg@3 0.0 (95% 0.0 to 0.0) over 4 problems" in printed
    assert len(rows) == 24


def test_a_seed_fixes_the_responses_and_the_temperature_is_used(command):
    options = ["-n", 2, "--max-tokens", 6, "--limit", 2]
    same = [command(*options, "--seed", seed, out=f"out-{i}")[1] for i, seed in enumerate((1, 1, 2))]
    assert same[0] == same[1] != same[2]
    _, greedy = command(*options, "--temperature", 0, out="greedy")
    assert all(greedy[i]["response"] == greedy[i + 1]["response"] for i in (0, 2))


def test_an_instruction_is_part_of_the_prompt(command):
    options = ["-n", 1, "--max-tokens", 60, "--limit", 1]
    with pytest.raises(SystemExit, match="exceeds the model's window of 96"):
        command(*options, "--instruction", "=" * 40)
    assert len(command(*options)[1]) == 1


def test_yarn_lengthens_the_window(command, tmp_path):
    options = ["-n", 1, "--max-tokens", 90, "--limit", 1]
    with pytest.raises(SystemExit, match=r"eval.py: problem held-out/0: .* exceeds the model's window of 96: "):
        command(*options)
    assert not (tmp_path / "out").exists()  # the name is free for the next try
    _, rows = command(*options, "--yarn", 1.5)
    assert len(rows) == 1


@pytest.mark.parametrize(
    "arguments, options, sentence",
    [
        ((), {"model": "/no/such/model"}, "eval.py: /no/such/model: no such model folder"),
        ((), {"data": ("absent",)}, "eval.py: .*absent.jsonl"),
        (("--temperature", -1), {}, "eval.py: cannot sample with"),
        (("--max-tokens", 0), {}, "eval.py: cannot sample with"),
        (("--rows", 0), {}, "eval.py: cannot sample with"),
        (("--cache-tokens", 20), {}, "eval.py: problem held-out/0: .* exceed the cache of 20 tokens"),
        (("--yarn", 1), {}, "eval.py: a YaRN factor must be above 1, not 1.0"),
    ],
)
def test_bad_input_is_one_sentence(command, tmp_path, arguments, options, sentence):
    with pytest.raises(SystemExit, match=sentence) as caught:
        command("--max-tokens", 6, *arguments, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("-n", 0), ("--limit", 0), ("--limit", -1)])
def test_nothing_to_evaluate_is_refused(command, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command("--max-tokens", 6, *arguments)
    assert "eval.py: error: -n and --limit must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_earlier_results_is_left_alone(command, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match=r"eval.py: .*out exists already; give another --out"):
        command("--max-tokens", 6)
    assert not list((tmp_path / "out").iterdir())
