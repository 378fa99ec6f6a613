"""Right answers earn, wrong ones do not, and nothing that a model writes can hang or break the grader."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine import grader as graders  # noqa: E402
from engine.grader import Grader  # noqa: E402
from lab import answers  # noqa: E402
from lab.answers import number  # noqa: E402
from reward import (  # noqa: E402
    format_reward,  # noqa: E402
    last_boxed,  # noqa: E402
    step_reward,  # noqa: E402
)

DATA = ROOT.parent / "shared" / "data" / "math"


def boxed(answer: str) -> str:
    return rf"<think>hm</think> So \boxed{{{answer}}}"


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as grader:
        yield grader


@pytest.fixture(scope="module")
def hasty_grader(tmp_path_factory):
    """Its worker runs in an empty directory, which must stay empty."""
    home, here = tmp_path_factory.mktemp("empty"), os.getcwd()
    os.chdir(home)
    with Grader(time_limit_s=1.0) as grader:
        yield grader
    os.chdir(here)


def test_any_accepted_answer_counts(grader):
    golds = ["6630.65\n", "6630\n"]
    verdicts = [g.verdict for g in grader.grade([(boxed(a), golds) for a in ("6630", "6630.65", "6631")])]
    assert verdicts == ["right", "right", "wrong"]
    assert grader.grade([(boxed("x+1"), ["3", "1+x"])])[0].verdict == "right"
    with pytest.raises(TypeError):  # it would be read as the golds 1 and 2
        grader.submit(boxed("1"), "12")


def test_last_box():
    assert last_boxed(r"</think> \boxed{1} and \boxed{\frac{1}{2}}", True) == r"\frac{1}{2}"
    assert last_boxed(r"</think> \fbox{3}", True) == "3"
    assert last_boxed(r"</think> \boxed{\boxed{4}}", True) == "4"
    assert last_boxed(r"</think> \boxed{\{1,2\}}", True) == r"\{1,2\}"
    assert last_boxed(r"</think> \boxed{5} then \boxed{6", True) == "5"
    assert last_boxed(r"</think> \boxed 7", True) is None


def test_answer_counts_only_after_the_thinking_block():
    assert last_boxed(r"<think> \boxed{1}", True) is None
    assert last_boxed(r"\boxed{1} </think> none", True) is None
    assert last_boxed(r"\boxed{1} </think> \boxed{2}", True) == "2"
    assert last_boxed(r"<think> \boxed{1}", False) == "1"
    with Grader(thinking=True) as closed, Grader(thinking=False) as free:
        assert closed.grade([(r"\boxed{1}", ["1"])])[0].verdict == "no answer"
        assert free.grade([(r"\boxed{1}", ["1"])])[0].verdict == "right"


@pytest.mark.parametrize(
    "text, thinking, earned",
    [
        (r"<think>x</think> It is \boxed{5}", True, 1.0),
        (r"</think> It is **$\boxed{\frac{1}{2}}$.**", True, 1.0),
        (r"<think>\boxed{3}</think> \[\boxed{5}\]", True, 1.0),
        (r"<think>x It is \boxed{5}", True, 0.0),
        (r"It is \boxed{5}", False, 1.0),
        (r"</think> \boxed{5} or \boxed{6}", True, 0.0),
        (r"</think> \boxed{5} I hope", True, 0.0),
        (r"</think> \boxed{5", True, 0.0),
        ("</think> 5", True, 0.0),
    ],
)
def test_format(text, thinking, earned):
    assert format_reward(text, thinking) == earned


@pytest.mark.parametrize(
    "text, earned",
    [
        ("3+5=8", 1.0),
        ("3 + 5 = 9", 0.0),
        ("3 + 5 - 2 = 8 - 2 = 6", 1.0),
        ("3 + 5 - 2 = 7 - 2 = 6", 0.0),
        ("1 + 1 = 2. Then 2 + 2 = 5.", 0.5),
        ("2 + 3 * 4 = 14", 1.0),
        ("8 - 3 - 2 = 3", 1.0),
        ("10 / 4 = 2.5 and 0.1 + 0.2 = 0.3", 1.0),
        ("1 / 0 = 3", 0.0),
        ("-3 + 5 = 2, 5 - -3 = 8, 7 − 9 = −2", 1.0),
        (r"3 x 5 = 15, 3x5=15, 3×5=15, 3 \times 5 = 15, \(3 \cdot 5 = 15\), 6 ÷ 2 = 3", 1.0),
        ("$3 + $5 = $8 and 1,000 + 1 = 1,001", 1.0),
        ("48/2 = <<48/2=24>>24", 1.0),
        ("- 3 + 5 = 8\n1) 2 + 2 = 4\n**1 + 1 = 2**", 1.0),
        ("x + 3 + 5 = 8 + 2 = 10", 1.0),
        ("3 + 5 = 8 = 2x", 1.0),
        ("no steps, x = 3, 3 = 3", 0.0),
    ],
)
def test_steps(text, earned):
    assert step_reward(text) == earned


@pytest.mark.parametrize(
    "equation",
    ["2x + 3 = 7", "x - 3 + 5 = 8", "2^3 + 5 = 14", "(3+5)*2 - 6 = 11", "3 + 5 = 9x", "2**3 = 9", "2 x -3 = 7"],
)
def test_an_equation_is_no_step(equation):
    """A part of it, read alone, would be a false step: beside a true one the share shows it."""
    assert step_reward(f"{equation}\n1 + 1 = 2") == 1.0


def test_number():
    assert number(r"\frac{-1}{2}") == Fraction(-1, 2) and number("+.5") == Fraction(1, 2)
    assert number("50%") == Fraction(1, 2) and number("1,234.50") == Fraction(2469, 2)
    assert number("0." + "0" * 60 + "1") == Fraction(1, 10**61)
    for text in ("", "x", "1/0", "1,23", "2+3", "1_000", "٣", "0x10", "nan", "inf", "1 1"):
        assert number(text) is None


def test_hostile_text_takes_no_time():
    started = time.monotonic()
    for text in ("9" * 1_000_000, "1e999999999", r"10^{999999999}", "9" * 300 + "e399999"):
        assert number(text) is None
    for text in (r"\boxed{" * 100_000, r"\boxed{" * 100_000 + "}" * 100_000, "{" * 100_000, "}" * 100_000):
        last_boxed(text, False), format_reward(text, False)
    for text in ("1+" * 300_000, "1=" * 300_000, "9" * 1_000_000, "1 " * 300_000, "1+1=2 " * 5_000, "*" * 300_000):
        step_reward(text)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "answer",
    [
        "9**9**9**9",
        "9^{9^{9^{9}}}",
        "10^{10^{10}}!",
        "{" * 100_000 + "5" + "}" * 100_000,
        "(" * 900 + "5" + ")" * 900,
        "7" * 1_000_000,
        "__import__('os').system('touch x')",
        "5\0",
        "\0",
        "\\" * 501,
        "1,".join("2" * 400),
    ],
    ids=lambda a: a[:12].replace("\0", "NUL"),
)
def test_hostile_answer_is_not_right_within_the_limit(hasty_grader, answer):
    hasty_grader.grade([(boxed("y"), ["x"])])  # the start-up of a worker is not part of the limit
    started = time.monotonic()
    (grade,) = hasty_grader.grade([(boxed(answer), ["5"])])
    assert grade.verdict != "right" and grade.correct == 0.0
    assert time.monotonic() - started < 1.5
    assert os.listdir() == []


def _alive(pid: int) -> bool:
    """Whether a process still runs (or is a zombie: its parent has not waited for it)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_late_worker_is_killed_and_replaced():
    with Grader(time_limit_s=0.5) as grader:
        grader.grade([(boxed("y"), ["x"])])
        (worker,) = {slot.process.pid for slot in grader._slots}
        os.kill(worker, signal.SIGSTOP)
        verdicts = [g.verdict for g in grader.grade([(boxed("y+1"), ["1+y"]), (boxed("z+1"), ["1+z"])])]
        assert verdicts == ["timed out", "right"]
        assert not _alive(worker)


def test_a_dead_worker_is_replaced():
    with Grader() as grader:
        grader.grade([(boxed("y"), ["x"])])
        grader._slots[0].process.kill()
        verdicts = [g.verdict for g in grader.grade([(boxed("y+1"), ["1+y"]), (boxed("z+1"), ["1+z"])])]
        assert verdicts == ["grader failed", "right"]


def test_a_worker_that_talks_nonsense_is_replaced(monkeypatch):
    with Grader() as grader:
        real, told = graders._Worker.read, []

        def read(worker, limit_s):
            reply = real(worker, limit_s)
            if "right" in reply and not told:
                told.append(reply)
                return {"id": -1, "right": True}
            return reply

        monkeypatch.setattr(graders._Worker, "read", read)
        verdicts = [g.verdict for g in grader.grade([(boxed("y+1"), ["1+y"]), (boxed("z+1"), ["1+z"])])]
        assert verdicts == ["grader failed", "right"]


def test_a_gold_that_math_verify_cannot_compare_is_the_graders_failure(grader):
    assert grader.grade([(boxed(r"\frac{2}{0}"), ["1/0"])])[0].verdict == "grader failed"
    assert grader.grade([(boxed("1+x"), ["x+1"])])[0].verdict == "right"


def test_the_memory_limit_holds():
    with Grader(memory_limit_bytes=2 << 30) as grader:
        grader.grade([(boxed("y"), ["x"])])
        limits = Path(f"/proc/{grader._slots[0].process.pid}/limits")
        if not limits.exists():
            pytest.skip("no /proc here")
        assert re.search(r"Max address space\s+(\d+)", limits.read_text())[1] == str(2 << 30)


def test_order_is_kept_and_plain_numbers_start_no_worker():
    with Grader(workers=2) as grader:
        plain = [(boxed(str(i)), [str(i % 3)]) for i in range(6)]
        assert [g.correct for g in grader.grade(plain)] == [1, 1, 1, 0, 0, 0]
        assert not grader._threads and grader._slots == [None, None]
        mixed = [
            (boxed(a), [g]) for a, g in [("1+x", "x+1"), ("3", "4"), ("2x", "x"), ("7", "7"), ("y^2", r"y \cdot y")]
        ]
        tickets = [grader.submit(*item) for item in mixed]
        assert [g.answer for g in grader.collect(tickets[::-1])] == ["y^2", "7", "2x", "3", "1+x"]
        assert [g.correct for g in grader.grade(mixed)] == [1, 0, 0, 1, 1]
        with pytest.raises(KeyError):
            grader.collect(tickets[:1])


def test_the_worker_loads_no_torch(grader):
    """Neither itself nor through math-verify; a mapped library shows whatever imported it."""
    assert grader.grade([(boxed("1+x"), ["x+1"])])[0].verdict == "right"
    maps = Path(f"/proc/{grader._slots[0].process.pid}/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    assert "python" in maps.read_text() and "torch" not in maps.read_text()


def test_no_worker_is_left_behind():
    with Grader() as grader:
        grader.grade([(boxed("y"), ["x"])])
        (worker,) = {slot.process.pid for slot in grader._slots}
        assert _alive(worker)
    assert not _alive(worker)

    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from engine.grader import Grader\n"
        r"g = Grader(thinking=False); g.grade([(r'\boxed{y}', ['x'])]); print(g._slots[0].process.pid, flush=True)"
        "\nraise SystemError('the run fell over')"
    )
    run = subprocess.run([sys.executable, "-c", script, str(ROOT)], capture_output=True, text=True, timeout=30)
    assert "the run fell over" in run.stderr and run.returncode == 1
    assert not _alive(int(run.stdout))


def test_a_killed_parent_leaves_no_worker():
    script = (
        "import sys, os; sys.path.insert(0, sys.argv[1]); from engine.grader import Grader\n"
        r"g = Grader(thinking=False); g.grade([(r'\boxed{y}', ['x'])]); print(g._slots[0].process.pid, flush=True)"
        "\nos.kill(os.getpid(), 9)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(ROOT)], capture_output=True, text=True, timeout=30)
    worker = Path(f"/proc/{run.stdout.strip()}/cmdline")
    deadline = time.monotonic() + 5
    while worker.exists() and worker.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists() or not worker.read_bytes()  # a zombie has no command line


def test_closing_fails_what_is_left_rather_than_hang():
    grader = Grader()
    tickets = [grader.submit(boxed(f"y+{i}"), ["x"]) for i in range(50)]
    grader.close()
    assert {g.verdict for g in grader.collect(tickets)} <= {"grader failed", "wrong"}
    with pytest.raises(RuntimeError):
        grader.submit(boxed("1"), ["1"])


def test_exact_path_grades_2000_answers_a_second():
    items = [(boxed(str(i)), [str(i + i % 2)]) for i in range(4000)]
    with Grader() as grader:
        started = time.perf_counter()
        grades = grader.grade(items)
        assert time.perf_counter() - started < 2.0
        assert sum(g.correct for g in grades) == 2000 and not grader._threads


@pytest.mark.skipif(not DATA.is_dir(), reason="the real problems are not here")
def test_real_golds_match_themselves(grader, monkeypatch):
    """All of them as text; one in a hundred of the symbolic ones with that shortcut switched off."""
    golds = [str(row["answer"]) for file in sorted(DATA.glob("*.json")) for row in json.loads(file.read_text())]
    golds = [gold for gold in golds if gold]  # two of them are empty
    assert len(golds) > 8000
    assert all(grade.verdict == "right" for grade in grader.grade([(boxed(gold), [gold]) for gold in golds]))
    monkeypatch.setattr(answers, "same_text", lambda gold, answer: False)
    symbolic = [answers.tidy(gold) for gold in sorted(set(golds)) if number(gold) is None][::100]
    assert [gold for gold in symbolic if not answers.compare(gold, gold, answers.ask_math_verify)] == []
