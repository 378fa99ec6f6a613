"""lab/rows.py: the groups written for people to read, after the rescue and the substitution of a real batch."""

from types import SimpleNamespace

import numpy as np

from engine.rollout_worker import Attempt
from grpo import Group, Sinks, substitute
from lab import rows
from lab.problems import Problem
from reward import Grade
from rollout import Rollout

WORKER = SimpleNamespace(
    message=lambda problem: {"content": f"Solve {problem.text}"},
    chat=SimpleNamespace(decode=lambda tokens: " ".join(map(str, tokens))),
)


def attempt(problem: str, index: int, right: bool) -> Attempt:
    tokens, one = np.array([index, 7 if right else 8]), np.ones(2)
    rollout = Rollout(problem_id=problem, index=index, prompt=one, tokens=tokens, logprobs=one, finish_reason="stop",
                      temperature=1.2)
    grade = Grade("right" if right else "wrong", float(right), 1.0, 1.0, "7")
    return Attempt(rollout, WORKER.chat.decode(tokens), grade)


def test_groups_are_written_as_sampled_with_what_became_of_them():
    solved = {"mixed": "0101", "never": "0000", "always": "1111", "lost": "0000", "half": "0011"}
    attempts = [[attempt(name, i, mark == "1") for i, mark in enumerate(marks)] for name, marks in solved.items()]
    groups = [
        Group(Problem(name, f"the {name} sum", ("7",)), [a.rollout for a in own], np.array([a.grade.correct for a in own]),
              np.array([a.grade.right for a in own]))
        for name, own in zip(solved, attempts, strict=True)
    ]
    sinks = Sinks({"lost": (attempt("lost", 3, True).rollout, 1.0)})
    rescued = sinks.rescue(groups, seed=0, step=5)
    learned = substitute(rescued, seed=0, step=5).groups
    where = {"step": 6, "stage": 1, "kind": "training"}
    found = rows.groups_to_read(where, WORKER, attempts, rescued, learned)
    assert [(row["problem_id"], row["fate"]) for row in found] == [
        ("lost", "rescued"), ("never", "substituted"), ("mixed", ""), ("always", "substituted"), ("half", "")]
    first, second, *_ = found
    assert first["replacement"] == "3 7" and 0 <= first["replaced"] < 4
    assert second["replacement"] in ("mixed", "lost", "half")
    for row in found:
        right = "".join(str(int(response["verdict"] == "right")) for response in row["responses"])
        assert right == solved[row["problem_id"]] and row | where == row
        assert (row["prompt"], row["answers"], row["temperature"]) == (f"Solve the {row['problem_id']} sum", ["7"], 1.2)
    assert found[2]["responses"][1] == {
        "sample": 1, "tokens": 2, "finish_reason": "stop", "verdict": "right", "answer": "7", "text": "1 7"}
