"""engine/rollout_worker.py: responses are graded while others are being sampled, and a failing grader stops the work."""

import re
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import rollout_worker
from engine.distributed import Interrupted
from engine.grader import Grader, GraderError
from engine.rollout_worker import RolloutWorker, SamplingStats, combine, deal
from engine.tokenizer import load_tokenizer, read_chat, stop_tokens
from lab.problems import read_problems
from model import load
from reward import Grade
from rollout import CacheLimits, Prompt, Sampling


def test_counts_of_processes_are_summed_and_times_are_the_slowest_ones():
    stats = [SamplingStats(10, 2.0, 0.5, 1), SamplingStats(30, 1.0, 0.75, 2)]
    combined = combine(stats)
    assert combined == SamplingStats(40, 2.0, 0.75, 3, idle_shares=(0.0, 0.5)) and combined.idle_share == 0.25
    assert combine([SamplingStats()]).idle_shares == (0.0,)  # nothing was sampled


def test_every_response_is_dealt_once_and_ranks_finish_together():
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
        # no rank exceeds its fair share by more than one response and the prompts that a split prefills again
        assert max(loads) <= sum(loads) / ranks + max(expected.values()) + 60 * len(prompts) / ranks


def test_a_group_is_split_only_where_its_rank_would_otherwise_be_busy_for_longer():
    def dealt(lengths, ranks, n=8, prompt=10):
        prompts = [Prompt(f"p{i}", [0] * prompt, n) for i in range(len(lengths))]
        return [{p.problem_id: (p.first, p.n) for p in share} for share in deal(prompts, lengths, 5000, ranks)]

    # equal shares: complete groups, also with unknown lengths or with next to nothing to gain
    assert dealt([None] * 4, 2) == [{"p0": (0, 8), "p2": (0, 8)}, {"p1": (0, 8), "p3": (0, 8)}]
    assert dealt([100, 101], 2) == [{"p1": (0, 8)}, {"p0": (0, 8)}]
    # a group too many for equal shares is split; so is one that is longer than all others together
    assert dealt([None] * 3, 2) == [{"p0": (0, 8), "p2": (0, 4)}, {"p1": (0, 8), "p2": (4, 4)}]
    long = dealt([1000, 20, 20, 20], 2)
    assert [share["p0"] for share in long] == [(0, 4), (4, 4)] and sum("p1" in share for share in long) == 1
    assert dealt([None], 4) == [{"p0": (2 * i, 2)} for i in range(4)]
    # a prompt as long as all its responses is prefilled once; an unknown length is the mean
    assert dealt([100, 100, 100], 2, prompt=800) == [{"p0": (0, 8), "p2": (0, 8)}, {"p1": (0, 8)}]
    assert dealt([300, None, 100], 3) == dealt([300, 200, 100], 3)


def test_limits_are_dealt_with_their_responses():
    shares = deal([Prompt("p", [0], 5, limits=[10, 20, 30, 40, 50])], [None], 50, 2)
    assert sorted((p.first, *p.limits) for share in shares for p in share) in (
        [(0, 10, 20), (2, 30, 40, 50)],
        [(0, 10, 20, 30), (3, 40, 50)],
    )


def make_worker(small_world, grader):
    model = load(small_world / "model")
    chat = read_chat(load_tokenizer(small_world / "model", model))
    processes = SimpleNamespace(
        rank=0, world_size=1, device=torch.device("cpu"), all_gather=lambda value, place: [value], say=print
    )
    stops = stop_tokens(chat, model, small_world / "model")
    return RolloutWorker(model, chat, stops, CacheLimits(600, 96, 3), grader, processes, instruction="")


class SlowGrader:
    """Has graded an answer once two more are submitted; counts those submitted and collected."""

    reward, failures = None, {}

    def __init__(self, verdict="wrong"):
        self.verdict, self.submitted, self.collected = verdict, 0, 0

    def submit(self, response, answers, row=None):
        self.submitted += 1
        return self.submitted - 1

    def ready(self, ticket):
        return self.submitted > ticket + 2  # two more were submitted since

    def collect(self, tickets):
        self.collected += len(tickets)
        return [Grade(self.verdict, 0.0, 0.0, 0.0, None) for _ in tickets]


def test_attempts_are_yielded_as_soon_as_they_are_graded_and_none_is_lost(small_world):
    grader = SlowGrader()
    worker, problems = make_worker(small_world, grader), read_problems(small_world / "held-out.jsonl")
    prompts, stats = [worker.prompt(problem, 3) for problem in problems], SamplingStats()
    waiting, seen = [], []
    for attempt in worker.stream(problems, prompts, Sampling(1.0, 8, worker.stop_tokens, 0), stats):
        seen.append((attempt.rollout.problem_id, attempt.rollout.index))
        waiting.append(grader.submitted - grader.collected)
    assert sorted(seen) == sorted((problem.id, i) for problem in problems for i in range(3))
    assert max(waiting) == 2 and grader.collected == grader.submitted == 18
    assert stats.tokens > 0 and stats.sample_seconds > 0 and stats.grade_seconds > 0


def test_a_failing_grader_stops_the_work_with_a_sentence(small_world):
    problems = read_problems(small_world / "held-out.jsonl")
    worker = make_worker(small_world, SlowGrader("grader failed"))
    with pytest.raises(GraderError, match=r"failed on 12 of 12 answers \(100.0%, more than the 2.0% allowed\)"):
        worker.attempt(problems, 2, Sampling(1.0, 4, worker.stop_tokens, 0))
    worker.most_failed_share = 1.0
    groups, _ = worker.attempt(problems, 2, Sampling(1.0, 4, worker.stop_tokens, 0))
    assert [len(group) for group in groups] == [2] * 6


def test_keep_is_called_on_each_attempt_as_soon_as_it_is_graded(small_world):
    grader = SlowGrader()
    worker, problems = make_worker(small_world, grader), read_problems(small_world / "held-out.jsonl")
    prompts, graded = [worker.prompt(problem, 2) for problem in problems], []

    def keep(attempt):
        graded.append(grader.collected)
        return attempt.rollout.problem_id, attempt.rollout.index

    kept, stats, stopped = worker.sample(problems, prompts, Sampling(1.0, 8, worker.stop_tokens, 0), keep)
    assert sorted(kept) == sorted((problem.id, i) for problem in problems for i in range(2))
    assert graded == list(range(1, 13)) and stats.tokens > 0 and not stopped
    worker.stop = SimpleNamespace(asked=True)
    kept, _, stopped = worker.sample(problems, prompts, Sampling(1.0, 8, worker.stop_tokens, 0), keep)
    assert kept == [] and stopped
    with pytest.raises(Interrupted):
        worker.attempt(problems, 2, Sampling(1.0, 8, worker.stop_tokens, 0))


def test_right_answers_that_earn_nothing_are_said_at_once_and_once(small_world, capsys):
    """Regression: with thinking = true, a model that does not think got no reward, and nothing said why."""
    problems = read_problems(small_world / "held-out.jsonl")
    for thinking, text, said in [
        (True, r"\boxed{7}", ["12 of 12 responses have a box, but no </think> before it"]),
        (True, "", ["12 of 12 responses have no box (12 are empty)"]),
        (True, r"\boxed{7}</think>7", ["12 of 12 responses have a box, but no </think> before it"]),
        (True, "7", ["12 of 12 responses have no box (0 are empty)"]),
        (True, r"so</think>\boxed{7}", []),
        (False, r"\boxed{7}", []),
    ]:
        with Grader(thinking=thinking) as grader:
            worker = make_worker(small_world, grader)
            worker.chat = SimpleNamespace(prompt=worker.chat.prompt, decode=lambda tokens, text=text: text)
            for label, step in [("", 0), (None, 1), ("held-out", 2)]:
                worker.attempt(problems, 2, Sampling(1.0, 40, (*range(0, 200, 2),), 0, step), label)
        lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
        starts = [f"warning: {where}{sentence}" for where in ("", "held-out: ") for sentence in said]
        assert len(lines) == len(starts) and all(map(str.startswith, lines, starts))


def test_a_wrong_thinking_is_said_long_before_the_end_of_sampling(small_world, monkeypatch, capsys):
    monkeypatch.setattr(rollout_worker, "FIRST_RESPONSES", 4)
    problems, said = read_problems(small_world / "held-out.jsonl"), []
    with Grader(thinking=True) as grader:
        worker = make_worker(small_world, grader)
        worker.chat = SimpleNamespace(prompt=worker.chat.prompt, decode=lambda tokens: r"\boxed{7}")
        prompts = [worker.prompt(problem, 2) for problem in problems]
        worker.sample(problems, prompts, Sampling(1.0, 40, (), 0), lambda _: said.append(capsys.readouterr().out))
    assert [bool(text) for text in said].index(True) == 4 and said[4].startswith("warning: 4 of 4 responses have a box")
    assert not any(said[5:]) and "have a box" not in capsys.readouterr().out


def test_the_eta_is_not_estimated_from_the_shortest_responses(small_world, monkeypatch, capsys):
    """Guards: the ETA was wrong by hours after the first, short response."""
    monkeypatch.setattr(rollout_worker, "SECONDS_BETWEEN_LINES", 0.0)
    seen = []
    monkeypatch.setattr(rollout_worker, "timedelta", lambda seconds: seen.append(seconds) or timedelta(seconds=seconds))
    with Grader() as grader:
        worker = make_worker(small_world, grader)
        worker.limits = CacheLimits(3000, 96, 18)
        problems = read_problems(small_world / "held-out.jsonl")
        worker.attempt(problems, 3, Sampling(1.0, 30, worker.stop_tokens, 0), label="all")
    lines = [line for line in capsys.readouterr().out.splitlines() if "ETA" in line]
    assert len(lines) == 18 and re.fullmatch(r"all: 1/18 responses  [\d,]+ tok/s  ETA \d:\d\d:\d\d", lines[0])
    assert seen[-1] == 0 and all(seconds >= 0 for seconds in seen)
