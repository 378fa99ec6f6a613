"""attempts.py: responses are graded while others are still being sampled, and a grader that fails stops the work."""

from types import SimpleNamespace

import pytest
import torch

import attempts
from attempts import AttemptStats, GraderError, Respondent, check_grader, load_tokenizer, stop_tokens, whole_work
from model import load
from problems import read_problems
from reward import Grade, Grader
from rollout import CacheLimits, Sampling


@pytest.mark.parametrize(
    "failed, graded, stops",
    [(4, 4, False), (5, 10_000, False), (5, 100, True), (20, 1000, False), (21, 1000, True), (0, 0, False)],
)
def test_the_grader_may_fail_on_a_set_share_and_a_few_failures_stop_nothing(failed, graded, stops):
    verdicts = {"grader failed": failed, "right": graded - failed}
    if not stops:
        check_grader(verdicts, 0.02)
        return
    with pytest.raises(GraderError, match=f"the grader failed on {failed} of {graded} answers .* allowed") as raised:
        check_grader(verdicts, 0.02)
    assert "\n" not in str(raised.value)


def test_the_work_of_processes_adds_up_and_the_slowest_counts():
    works = [AttemptStats(10, 2.0, 0.5, 1), AttemptStats(30, 1.0, 0.75, 2)]
    assert whole_work(works) == AttemptStats(40, 2.0, 0.75, 3)


def respondent(small_world, grader):
    model = load(small_world / "model")
    tokenizer = load_tokenizer(small_world / "model", model)
    device = SimpleNamespace(rank=0, ranks=1, device=torch.device("cpu"), gather=lambda value: [value], say=print)
    stops = stop_tokens(tokenizer, model, small_world / "model")
    return Respondent(model, tokenizer, stops, CacheLimits(600, 96, 3), grader, device, instruction="")


class SlowGrader:
    """Grades an answer only when asked for it, and remembers how many were waiting."""

    def __init__(self, verdict="wrong"):
        self.verdict, self.submitted, self.collected = verdict, 0, 0

    def submit(self, response, answers):
        self.submitted += 1
        return self.submitted - 1

    def ready(self, ticket):
        return self.submitted > ticket + 2  # two more have come since

    def collect(self, tickets):
        self.collected += len(tickets)
        return [Grade(self.verdict, 0.0, 0.0, 0.0, None) for _ in tickets]


def test_attempts_come_as_soon_as_they_are_graded_and_none_is_lost(small_world):
    grader = SlowGrader()
    asked, problems = respondent(small_world, grader), read_problems(small_world / "held-out.jsonl")
    prompts, stats = [asked.prompt(problem, 3) for problem in problems], AttemptStats()
    waiting, seen = [], []
    for attempt in asked.stream(problems, prompts, Sampling(1.0, 8, asked.stop_tokens, 0), stats):
        seen.append((attempt.rollout.problem_id, attempt.rollout.index))
        waiting.append(grader.submitted - grader.collected)
    assert sorted(seen) == sorted((problem.id, i) for problem in problems for i in range(3))
    assert max(waiting) == 2 and grader.collected == grader.submitted == 18
    assert stats.tokens > 0 and stats.sample_seconds > 0 and stats.grade_seconds > 0


def test_a_failing_grader_stops_the_work_with_a_sentence(small_world):
    problems = read_problems(small_world / "held-out.jsonl")
    asked = respondent(small_world, SlowGrader("grader failed"))
    with pytest.raises(GraderError, match=r"failed on 12 of 12 answers \(100.0%, more than the 2.0% allowed\)"):
        asked.attempt(problems, 2, Sampling(1.0, 4, asked.stop_tokens, 0))
    asked.most_failed_share = 1.0
    groups, _ = asked.attempt(problems, 2, Sampling(1.0, 4, asked.stop_tokens, 0))
    assert [len(group) for group in groups] == [2] * 6


def test_the_time_left_is_not_guessed_from_the_shortest(small_world, monkeypatch, capsys):
    """Guards: after one short response of many the ETA was hours."""
    monkeypatch.setattr(attempts, "SECONDS_BETWEEN_LINES", 0.0)
    seen = []
    monkeypatch.setattr(attempts, "format_eta", lambda seconds: seen.append(seconds) or "soon")
    with Grader() as grader:
        asked = respondent(small_world, grader)
        asked.limits = CacheLimits(3000, 96, 18)
        problems = read_problems(small_world / "held-out.jsonl")
        asked.attempt(problems, 3, Sampling(1.0, 30, asked.stop_tokens, 0), label="all")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 18 and lines[0].startswith("all: 1/18 responses") and "tok/s  ETA soon" in lines[0]
    assert seen[-1] == 0.0 and all(seconds >= 0 for seconds in seen)
