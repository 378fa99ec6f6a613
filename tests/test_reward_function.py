"""A reward of one's own: what it returns counts, its faults are told apart, and what it prints disturbs nothing."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.fingerprint import data_identity, function_identity
from engine.grader import Grader, GraderError, check_grader
from engine.own_function import FunctionError
from lab.data_files import DataError
from lab.problems import Problem, read_problems, write_problems
from lab.recipe import load_recipe
from train import make_groups

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "recipes"))
import countdown  # noqa: E402

FUNCTIONS = r"""
import os, subprocess, sys, time
print("on import")
LIMIT = 3

def parts(text, row):
    return 0.7 + 0.2 + 0.1 if text == row["best"] else row["share"]

def yes(text, row):
    return text == " so"

def noisy(text, row):
    print('{"id": 0, "score": 0.0}')
    os.write(1, b"nonsense\n")
    return sys.stdin.read() == "" and subprocess.run("echo x; cat", shell=True).returncode == 0

def raises(text, row):
    return row["missing"]

def nothing(text, row):
    pass

def nan(text, row):
    return float("nan")

def large(text, row):
    return 1.01

def ends(text, row):
    os._exit(3)

def late(text, row):
    child = subprocess.Popen(["sleep", "30"])
    if row:
        print(child.pid, file=open(row["out"], "w"), flush=True)
    child.wait()

def memory(text, row):
    return len(bytearray(8 << 30))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def line_of(text):
    """Return the number of the first line of FUNCTIONS with this text."""
    return next(i for i, line in enumerate(FUNCTIONS.splitlines(), 1) if text in line)


def test_a_score_is_learned_from_and_only_a_full_one_is_right(file):
    row = {"best": "b", "share": 0.25}
    with Grader(workers=2, thinking=False, reward=f"{file}:parts") as grader:
        grades = grader.grade([("a", [], row), ("b", [], row), ("c", [], row | {"share": 0})])
    assert [(g.verdict, g.correct, g.right) for g in grades] == [
        ("wrong", 0.25, False), ("right", 1.0, True), ("wrong", 0.0, False),
    ]  # fmt: skip

    class Attempt:
        rollout = None

        def __init__(self, grade):
            self.grade = grade

    recipe = load_recipe(ROOT / "recipes" / "tiny.toml")
    (group,) = make_groups(recipe, [Problem("p", "?", ())], [[Attempt(grade) for grade in grades]])
    assert group.rewards.tolist() == [0.25, 1.0, 0.0] and group.correct.tolist() == [False, True, False]


def test_the_text_is_what_follows_the_thinking(file):
    with Grader(thinking=True, reward=f"{file}:yes") as grader:
        grades = grader.grade([("hm</think> so", []), (" so", [])])
    assert [g.verdict for g in grades] == ["right", "no answer"]


def test_what_it_prints_and_reads_is_not_the_protocols(file, capfd):
    with Grader(thinking=False, reward=f"{file}:noisy") as grader:
        assert [g.verdict for g in grader.grade([("x", []), ("é\ud800" * 200_000, [])])] == ["right"] * 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name, verdict, why",
    [
        ("raises", "reward failed", f"KeyError: 'missing' (FILE, line {line_of('missing')})"),
        ("nothing", "reward failed", f"it returned None, not a number or a bool (FILE, line {line_of('nothing')})"),
        ("nan", "reward failed", "ValueError: it returned nan, not a number from 0 to 1"),
        ("large", "reward failed", "ValueError: it returned 1.01, not a number from 0 to 1"),
        ("ends", "reward failed", "a call ended its process"),
        ("late", "timed out", "a call took more than 0.3 seconds or 2 GiB"),
        ("memory", "timed out", "a call took more than"),
    ],
)  # fmt: skip
def test_its_faults_have_verdicts_and_the_first_is_a_sentence_with_its_line(file, name, verdict, why):
    with Grader(thinking=False, time_limit_s=0.3, reward=f"{file}:{name}") as grader:
        assert [(g.verdict, g.correct) for g in grader.grade([("x", [], {})] * 2)] == [(verdict, 0.0)] * 2
        assert list(grader.failures) == [verdict] and why.replace("FILE", str(file)) in grader.failures[verdict]


def test_what_a_late_call_has_started_is_killed_with_it(file, tmp_path):
    with Grader(thinking=False, time_limit_s=0.3, reward=f"{file}:late") as grader:
        assert grader.grade([("x", [], {"out": str(tmp_path / "pid")})])[0].verdict == "timed out"
    child, deadline = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/cmdline"), time.monotonic() + 5
    while child.exists() and child.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not child.exists() or not child.read_bytes()  # a zombie has no command line


def test_failures_count_as_the_graders_own_and_the_error_names_the_first():
    failures = {"reward failed": "mine.py:score: KeyError: 'x' (mine.py, line 3)"}
    with pytest.raises(GraderError, match=r"reward function failed on 6 of 10 .*first: mine.py:score: .* line 3"):
        check_grader({"reward failed": 6, "right": 4}, 0.02, failures)
    check_grader({"timed out": 10}, 0.02)  # a response may be hostile


@pytest.mark.parametrize(
    "given, why",
    [
        ("FILE", "must be FILE.py:FUNCTION"),
        ("FILE.txt:score", r"cannot be read \(No such file"),
        ("FILE:absent", "it has no absent"),
        ("FILE:LIMIT", "it has no callable LIMIT"),
        ("import absent_module", r"No module named 'absent_module' \(.*, line 1\)"),
        ("def (", r"SyntaxError: invalid syntax \(.*, line 1\)"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import os; os._exit(0)", "its import ends the process"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_sentence_at_the_start(file, tmp_path, given, why):
    if "FILE" not in given:
        (tmp_path / "broken.py").write_text(given)
        given = f"{tmp_path}/broken.py:score"
    with pytest.raises(FunctionError, match=why) as raised:
        Grader(reward=given.replace("FILE", str(file)))
    assert "\n" not in str(raised.value)


def test_an_edit_during_a_run_changes_the_identity_but_not_the_run(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import os\ndef score(text, row): return os._exit(1) if text == 'end' else True")
    before = function_identity(f"{path}:score")
    with Grader(thinking=False, reward=f"{path}:score") as grader:
        path.write_text("def score(text, row): return False")
        assert [g.verdict for g in grader.grade([("end", []), ("x", [])])] == ["reward failed", "right"]
    assert function_identity(f"{path}:score") != before and function_identity("") is None


def test_rows_are_kept_whole_need_no_answer_and_survive_writing(tmp_path):
    rows = [{"id": i, "problem": f"p{i}", "numbers": [i, 2], "level": "Level 3", "nested": {"a": None}} for i in (0, 1)]
    path, copy = tmp_path / "data.jsonl", tmp_path / "copy.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(DataError):
        read_problems(path)
    problems = read_problems(path, rewarded=True)
    assert [problem.row for problem in problems] == rows and not problems[0].answers
    write_problems(problems, copy)
    assert read_problems(copy, rewarded=True) == problems
    assert data_identity(problems) != data_identity([replace(p, row=p.row | {"numbers": []}) for p in problems])


# ------------------------------------------------------------------------------------------------------ Countdown


@pytest.mark.parametrize(
    "answer, score",
    [
        ("55+36-7-19", 1.0),
        ("(55 + 36) - (7 + 19) = 65", 1.0),
        (r"\left(55 + 36\right) - 7 - 19", 1.0),
        ("-7 + 55 + 36 - 19", 1.0),
        (r"55 \times 36 \div 7 − 19", 0.1),
        ("55 + 36 - 26", 0.0),  # other numbers
        ("55 + 36 - 7 - 19 + 7 - 7", 0.0),  # one of them thrice
        ("55 + 36", 0.0),
        ("65", 0.0),
        ("55 / (36 - 36) + 7 + 19", 0.0),
        ("", 0.0),
        ("10**10**10", 0.0),
        ("55 // 36 + 7 + 19", 0.0),
        ("__import__('os').system('touch x')", 0.0),
        ("(" * 10_000 + "1" + ")" * 10_000, 0.0),
        ("(" * 99 + "1" + ")" * 99, 0.0),
        ("٥٥ + 36 - 7 - 19", 0.0),
        ("5_5 + 36 - 7 - 19", 0.0),
        ("55(36)(7)(19)", 0.0),
        ("9" * 5000, 0.0),
    ],
)
def test_countdown_rewards_what_it_should(answer, score):
    row = {"numbers": [19, 36, 55, 7], "target": 65}
    assert countdown.score(rf"1 + 1 is \boxed{{2}}, so \boxed{{{answer}}}.", row) == score
    assert countdown.score(answer, row) == 0.0  # no box


def test_countdown_problems_are_distinct_and_solvable_and_follow_the_seed():
    """Each target is found again by trying every way to combine the numbers."""

    def reachable(values):
        if len(values) == 1:
            return set(values)
        found = set()
        for i, a in enumerate(values):
            for j, b in enumerate(values):
                if i != j:
                    rest = [v for k, v in enumerate(values) if k not in (i, j)]
                    results = [a + b, a - b, a * b, *([a / b] if b else [])]
                    found |= {value for result in results for value in reachable([*rest, result])}
        return found

    rows = countdown.problems(20, seed=1)
    assert len({(*sorted(row["numbers"]), row["target"]) for row in rows}) == 20
    assert rows == countdown.problems(20, seed=1) != countdown.problems(20, seed=2)
    for row in rows:
        assert np.isclose([float(v) for v in reachable(row["numbers"])], row["target"]).any()
        assert str(row["numbers"]) in row["problem"] and f"equals {row['target']}." in row["problem"]
