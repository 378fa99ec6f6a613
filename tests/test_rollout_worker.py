"""attempts.py: responses are graded while others are still being sampled, and a grader that fails stops the work."""

import re
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import rollout_worker
from engine.distributed import Interrupted
from engine.grader import Grader
from engine.rollout_worker import GraderError, RolloutWorker, SamplingStats, check_grader, deal, total_work
from engine.tokenizer import load_tokenizer, stop_tokens
from lab.problems import read_problems
from model import load
from reward import Grade
from rollout import CacheLimits, Prompt, Sampling


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
    works = [SamplingStats(10, 2.0, 0.5, 1), SamplingStats(30, 1.0, 0.75, 2)]
    whole = total_work(works)
    assert whole == SamplingStats(40, 2.0, 0.75, 3, idle_shares=(0.0, 0.5)) and whole.idle_share == 0.25
    assert total_work([SamplingStats()]).idle_shares == (0.0,)  # nothing was sampled


def test_work_is_dealt_whole_and_once_and_ranks_finish_together():
    random = np.random.default_rng(0)
    for _ in range(300):
        ranks, n = int(random.integers(1, 9)), int(random.integers(1, 9))
        lengths = np.exp(random.normal(6, 1, random.integers(1, 40)))
        prompts = [Prompt(f"p{i}", [0] * int(random.integers(1, 60)), n, first=3) for i in range(len(lengths))]
        shares = deal(prompts, list(lengths), 4000, ranks)
        answered = sorted((p.problem_id, i) for share in shares for p in share for i in range(p.first, p.first + p.n))
        assert len(shares) == ranks and answered == sorted((p.problem_id, i) for p in prompts for i in range(3, 3 + n))
        expected = {f"p{i}": min(length, 4000) for i, length in enumerate(lengths)}
        loads = [sum(len(p.tokens) + p.n * expected[p.problem_id] for p in share) for share in shares]
        # no rank is past the fair share by more than one response and the prompts that a split prefills again
        assert max(loads) <= sum(loads) / ranks + max(expected.values()) + 60 * len(prompts) / ranks


def test_a_group_is_split_only_where_its_rank_would_else_be_busy_for_longer():
    def dealt(lengths, ranks, n=8, prompt=10):
        prompts = [Prompt(f"p{i}", [0] * prompt, n) for i in range(len(lengths))]
        return [{p.problem_id: (p.first, p.n) for p in share} for share in deal(prompts, lengths, 5000, ranks)]

    # as many for each: whole groups, also where nothing is known, or next to nothing is to be won
    assert dealt([None] * 4, 2) == [{"p0": (0, 8), "p2": (0, 8)}, {"p1": (0, 8), "p3": (0, 8)}]
    assert dealt([100, 101], 2) == [{"p1": (0, 8)}, {"p0": (0, 8)}]
    # one more than can be divided: it is split; so is one that is longer than all others together
    assert dealt([None] * 3, 2) == [{"p0": (0, 8), "p2": (0, 4)}, {"p1": (0, 8), "p2": (4, 4)}]
    long = dealt([1000, 20, 20, 20], 2)
    assert [share["p0"] for share in long] == [(0, 4), (4, 4)] and sum("p1" in share for share in long) == 1
    assert dealt([None], 4) == [{"p0": (2 * i, 2)} for i in range(4)]
    # a prompt that takes as long to read as all its responses to write is read once; an unknown length is the mean
    assert dealt([100, 100, 100], 2, prompt=800) == [{"p0": (0, 8), "p2": (0, 8)}, {"p1": (0, 8)}]
    assert dealt([300, None, 100], 3) == dealt([300, 200, 100], 3)


def test_the_limits_of_responses_go_where_they_go():
    shares = deal([Prompt("p", [0], 5, limits=[10, 20, 30, 40, 50])], [None], 50, 2)
    assert sorted((p.first, *p.limits) for share in shares for p in share) in (
        [(0, 10, 20), (2, 30, 40, 50)],
        [(0, 10, 20, 30), (3, 40, 50)],
    )


def worker(small_world, grader):
    model = load(small_world / "model")
    tokenizer = load_tokenizer(small_world / "model", model)
    device = SimpleNamespace(
        rank=0, world_size=1, device=torch.device("cpu"), all_gather=lambda value, place: [value], say=print
    )
    stops = stop_tokens(tokenizer, model, small_world / "model")
    return RolloutWorker(model, tokenizer, stops, CacheLimits(600, 96, 3), grader, device, instruction="")


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
    asked, problems = worker(small_world, grader), read_problems(small_world / "held-out.jsonl")
    prompts, stats = [asked.prompt(problem, 3) for problem in problems], SamplingStats()
    waiting, seen = [], []
    for attempt in asked.stream(problems, prompts, Sampling(1.0, 8, asked.stop_tokens, 0), stats):
        seen.append((attempt.rollout.problem_id, attempt.rollout.index))
        waiting.append(grader.submitted - grader.collected)
    assert sorted(seen) == sorted((problem.id, i) for problem in problems for i in range(3))
    assert max(waiting) == 2 and grader.collected == grader.submitted == 18
    assert stats.tokens > 0 and stats.sample_seconds > 0 and stats.grade_seconds > 0


def test_a_failing_grader_stops_the_work_with_a_sentence(small_world):
    problems = read_problems(small_world / "held-out.jsonl")
    asked = worker(small_world, SlowGrader("grader failed"))
    with pytest.raises(GraderError, match=r"failed on 12 of 12 answers \(100.0%, more than the 2.0% allowed\)"):
        asked.attempt(problems, 2, Sampling(1.0, 4, asked.stop_tokens, 0))
    asked.most_failed_share = 1.0
    groups, _ = asked.attempt(problems, 2, Sampling(1.0, 4, asked.stop_tokens, 0))
    assert [len(group) for group in groups] == [2] * 6


def test_each_process_keeps_what_it_wants_of_an_attempt_as_soon_as_it_is_graded(small_world):
    grader = SlowGrader()
    asked, problems = worker(small_world, grader), read_problems(small_world / "held-out.jsonl")
    prompts, graded = [asked.prompt(problem, 2) for problem in problems], []

    def keep(attempt):
        graded.append(grader.collected)
        return attempt.rollout.problem_id, attempt.rollout.index

    kept, work, stopped = asked.sample(problems, prompts, Sampling(1.0, 8, asked.stop_tokens, 0), keep)
    assert sorted(kept) == sorted((problem.id, i) for problem in problems for i in range(2))
    assert graded == list(range(1, 13)) and work.tokens > 0 and not stopped
    asked.stop = SimpleNamespace(asked=True)
    kept, _, stopped = asked.sample(problems, prompts, Sampling(1.0, 8, asked.stop_tokens, 0), keep)
    assert kept == [] and stopped
    with pytest.raises(Interrupted):
        asked.attempt(problems, 2, Sampling(1.0, 8, asked.stop_tokens, 0))


def test_the_time_left_is_not_guessed_from_the_shortest(small_world, monkeypatch, capsys):
    """Guards: after one short response of many the ETA was hours."""
    monkeypatch.setattr(rollout_worker, "SECONDS_BETWEEN_LINES", 0.0)
    seen = []
    monkeypatch.setattr(rollout_worker, "timedelta", lambda seconds: seen.append(seconds) or timedelta(seconds=seconds))
    with Grader() as grader:
        asked = worker(small_world, grader)
        asked.limits = CacheLimits(3000, 96, 18)
        problems = read_problems(small_world / "held-out.jsonl")
        asked.attempt(problems, 3, Sampling(1.0, 30, asked.stop_tokens, 0), label="all")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 18 and re.fullmatch(r"all: 1/18 responses  [\d,]+ tok/s  ETA \d:\d\d:\d\d", lines[0])
    assert seen[-1] == 0 and all(seconds >= 0 for seconds in seen)
