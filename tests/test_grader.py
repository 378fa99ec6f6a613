"""engine/grader.py: no response can hang or break the grader, and no worker outlives it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine import grader as graders
from engine.grader import Grader, GraderError, check_grader
from lab import answers

ROOT = Path(__file__).resolve().parent.parent


def boxed(answer: str) -> str:
    return rf"<think>hm</think> So \boxed{{{answer}}}"


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as grader:
        yield grader


@pytest.fixture(scope="module")
def hasty_grader(tmp_path_factory):
    """Its worker runs in an empty directory, which must stay empty."""
    home, previous = tmp_path_factory.mktemp("empty"), os.getcwd()
    os.chdir(home)
    with Grader(time_limit_s=1.0) as grader:
        yield grader
    os.chdir(previous)


def test_any_accepted_answer_counts(grader):
    golds = ["6630.65\n", "6630\n"]
    verdicts = [g.verdict for g in grader.grade([(boxed(a), golds) for a in ("6630", "6630.65", "6631")])]
    assert verdicts == ["right", "right", "wrong"]
    assert grader.grade([(boxed("x+1"), ["3", "1+x"])])[0].verdict == "right"
    with pytest.raises(TypeError):  # it would be read as the golds 1 and 2
        grader.submit(boxed("1"), "12")


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
    hasty_grader.grade([(boxed("y"), ["x"])])  # the limit excludes the start-up of a worker
    started = time.monotonic()
    (grade,) = hasty_grader.grade([(boxed(answer), ["5"])])
    assert grade.verdict != "right" and grade.correct == 0.0
    assert time.monotonic() - started < 1.5
    assert os.listdir() == []


def _alive(pid: int) -> bool:
    """Return whether a process runs or is a zombie."""
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


def test_a_killed_worker_is_replaced_and_its_answer_asked_again():
    with Grader() as grader:
        grader.grade([(boxed("y"), ["x"])])
        grader._slots[0].process.kill()
        verdicts = [g.verdict for g in grader.grade([(boxed("y+1"), ["1+y"]), (boxed("z+1"), ["1+z"])])]
        assert verdicts == ["right", "right"]


def test_a_worker_that_sends_nonsense_is_replaced(monkeypatch):
    with Grader() as grader:
        real, told = graders._Worker.read, []

        def read(worker, limit_s):
            reply = real(worker, limit_s)
            if "score" in reply and not told:
                told.append(reply)
                return {"id": -1, "score": 1.0}
            return reply

        monkeypatch.setattr(graders._Worker, "read", read)
        verdicts = [g.verdict for g in grader.grade([(boxed("y+1"), ["1+y"]), (boxed("z+1"), ["1+z"])])]
        assert verdicts == ["grader failed", "right"]


def test_a_gold_that_math_verify_cannot_compare_is_a_grader_failure(grader):
    assert grader.grade([(boxed(r"\frac{2}{0}"), ["1/0"])])[0].verdict == "grader failed"
    assert grader.grade([(boxed("1+x"), ["x+1"])])[0].verdict == "right"


def test_the_memory_limit_holds():
    with Grader(memory_limit_bytes=2 << 30) as grader:
        grader.grade([(boxed("y"), ["x"])])
        limits = Path(f"/proc/{grader._slots[0].process.pid}/limits")
        if not limits.exists():
            pytest.skip("there is no /proc")
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
    """Neither directly nor through math-verify: a loaded library would appear in its memory map."""
    assert grader.grade([(boxed("1+x"), ["x+1"])])[0].verdict == "right"
    maps = Path(f"/proc/{grader._slots[0].process.pid}/maps")
    if not maps.exists():
        pytest.skip("there is no /proc")
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


def test_closing_fails_pending_answers_instead_of_hanging():
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


# ---- cached verdicts ----------------------------------------------------------------------


def test_verdicts_are_cached_but_failures_are_not(monkeypatch):
    with Grader() as grader:
        grader.grade([(boxed("1+y"), ["y+1"])])
        asked, ask = [], grader._ask
        monkeypatch.setattr(grader, "_ask", lambda *job: asked.append(job) or ask(*job))
        repeats = [
            (boxed("1+y"), ["y+1"]),
            (boxed("2+y"), ["y+1"]),
            (boxed("2+y"), ["y+1"]),
            (boxed("1+y"), ["y+2", "y+1"]),
        ]
        assert [g.verdict for g in grader.grade(repeats)] == ["right", "wrong", "wrong", "right"]
        assert len(asked) == 2
        for verdict in ("timed out", "grader failed"):
            monkeypatch.setattr(grader, "_ask", lambda *job, verdict=verdict: verdict)
            assert grader.grade([(boxed("1+z"), ["z+1"])])[0].verdict == verdict
        monkeypatch.setattr(grader, "_ask", ask)
        assert grader.grade([(boxed("1+z"), ["z+1"])])[0].verdict == "right"


def test_the_cache_of_verdicts_is_bounded(monkeypatch):
    monkeypatch.setattr(graders, "CACHED_VERDICTS", 3)
    with Grader() as grader:
        assert all(g.correct for g in grader.grade([(boxed(f"{i}+y"), [f"y+{i}"]) for i in range(6)]))
        assert [key[-1] for key in grader._verdicts] == ["3+y", "4+y", "5+y"]


def test_ready_tells_whether_collect_would_wait(monkeypatch):
    with Grader() as grader:
        gate = threading.Event()
        monkeypatch.setattr(grader, "_ask", lambda *job: gate.wait(20) and "wrong")
        plain, symbolic = grader.submit(boxed("1"), ["1"]), grader.submit(boxed("1+y"), ["y"])
        assert grader.ready(plain) and not grader.ready(symbolic)
        gate.set()
        deadline = time.monotonic() + 20
        while not grader.ready(symbolic) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert grader.ready(symbolic)
        assert [g.verdict for g in grader.collect([plain, symbolic])] == ["right", "wrong"]
        with pytest.raises(KeyError):
            grader.ready(plain)


def test_an_answer_that_exhausts_memory_is_not_a_grader_failure():
    """Otherwise a model could stop its training by writing such answers."""
    with Grader() as grader:
        pairs = [(boxed("10^{10^{10}}!"), ["5"]), (boxed("1+x"), ["x+1"]), (boxed("7"), ["((7!)!)!"])]
        assert [grade.verdict for grade in grader.grade(pairs)] == ["timed out", "right", "timed out"]


def test_an_unreadable_gold_is_a_grader_failure():
    """Not a silent "wrong": only the same text could ever be right."""
    with Grader() as grader:
        pairs = [(boxed("5x"), ["$t(0,4]$"]), (boxed("t(0,4]"), ["$t(0,4]$"]), (boxed("x+"), ["1+x"])]
        assert [grade.verdict for grade in grader.grade(pairs)] == ["grader failed", "right", "wrong"]


@pytest.mark.parametrize(
    "failed, graded, stops",
    [(4, 4, False), (5, 10_000, False), (5, 100, True), (20, 1000, False), (21, 1000, True), (0, 0, False)],
)
def test_the_grader_may_fail_on_a_set_share_of_answers_and_a_few_failures_never_stop_a_run(failed, graded, stops):
    verdicts = {"grader failed": failed, "right": graded - failed}
    if not stops:
        check_grader(verdicts, 0.02)
        return
    with pytest.raises(GraderError, match=f"the grader failed on {failed} of {graded} answers .* allowed") as raised:
        check_grader(verdicts, 0.02)
    assert "\n" not in str(raised.value)


def test_the_error_of_many_failures_names_the_first_gold_that_cannot_be_read():
    with Grader() as grader:
        grades = grader.grade([(boxed(str(i)), ["5～10"]) for i in range(8)] + [(boxed("1+x"), ["x+1"])])
        assert [grade.verdict for grade in grades] == ["grader failed"] * 8 + ["right"]
        with pytest.raises(GraderError, match="fix the rows whose gold cannot be read.*first: the gold 5～10") as raised:
            check_grader({"grader failed": 8, "right": 120}, 0.02, grader.failures)
    assert "imports" not in str(raised.value) and "memory" not in str(raised.value)


def nested(entry, depth):
    return r"\{" * depth + entry + r"\}" * depth


@pytest.mark.parametrize(
    "answer, gold",
    [
        (nested("1.0", 25), nested("1", 25)),  # every level of sets doubles the comparisons
        (",".join(f"{i}.0" for i in range(300)), ",".join(map(str, reversed(range(300))))),
        ("1,2", "," * 100_000),
        ("y", "(" * 900 + "1+x" + ")" * 900),
    ],
)
def test_the_calling_process_leaves_large_comparisons_to_a_worker_under_its_limit_of_time(answer, gold):
    started = time.perf_counter()
    assert answers.text_verdict(answer, [gold])[0] is None
    assert time.perf_counter() - started < 1.0


def test_an_answer_whose_every_worker_is_killed_is_a_grader_failure(monkeypatch):
    with Grader() as grader:
        asked = []
        monkeypatch.setattr(grader, "_ask", lambda slot, ticket, question: asked.append(question["text"]) or "killed")
        assert grader.grade([(boxed("1+x"), ["x+1"])])[0].verdict == "grader failed"
        assert asked == ["1+x"] * graders.ATTEMPTS
