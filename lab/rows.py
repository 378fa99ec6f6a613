"""Rows of metrics.jsonl: of a step, a filter, a temperature search and an evaluation."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import zip_longest

import numpy as np

from data_filter import Filtered
from engine.batches import TrainingSequence
from engine.rollout_worker import Attempt, RolloutWorker, SamplingStats
from eval import Response, TemperaturePoint, distinct_ngrams, response_of
from grpo import Group, UpdateStats
from lab.problems import Problem
from lab.scores import Evaluation


def sft_row(batch: Sequence[TrainingSequence], update: UpdateStats, learning_rate: float, seconds: float) -> dict:
    """Return the row of a step of supervised fine-tuning."""
    tokens = sum(len(sequence.tokens) for sequence in batch)
    return {
        "kind": "sft",
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "nonfinite": int(not update.stepped),
        "lr": learning_rate,
        "tokens": tokens,
        "micro_batch_tokens": update.micro_batch_tokens,
        "memory_retries": update.memory_retries,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }


def describe_groups(groups: list[Group], attempts: list[list[Attempt]], work: SamplingStats) -> dict:
    """Describe a batch as sampled, before rescue and substitution."""
    flat = [attempt for group in attempts for attempt in group]
    lengths = np.array([len(attempt.rollout.tokens) for attempt in flat])
    solved = np.array([group.correct.mean() for group in groups])
    diversity, left_out = distinct_ngrams([[attempt.text for attempt in group] for group in attempts])
    return {
        "kind": "rl",
        "reward_mean": float(np.mean([group.rewards.mean() for group in groups])),
        "accuracy": float(solved.mean()),
        "reward_correct": float(np.mean([attempt.grade.correct for attempt in flat])),
        "reward_format": float(np.mean([attempt.grade.format for attempt in flat])),
        "reward_steps": float(np.mean([attempt.grade.steps for attempt in flat])),
        "verdicts": dict(Counter(attempt.grade.verdict for attempt in flat)),
        "response_length_mean": float(lengths.mean()),
        "response_length_max": int(lengths.max()),
        "truncated_share": float(np.mean([attempt.rollout.finish_reason == "length" for attempt in flat])),
        "distinct4": diversity,
        "distinct4_left_out": left_out,
        "entropy": float(-np.concatenate([attempt.rollout.logprobs for attempt in flat]).mean()),
        "groups": len(groups),
        "solve_none": int((solved == 0).sum()),
        "solve_all": int((solved == 1).sum()),
        "zero_variance": sum(not group.informative for group in groups),
        "tokens": int(lengths.sum()),
        "problems_hash": _short_hash(group.problem.id.encode() for group in groups),
        "tokens_hash": _short_hash(attempt.rollout.tokens.tobytes() for attempt in flat),
        "idle_share": work.idle_share,
        "idle_shares": list(work.idle_shares),
        "seconds_sample": work.sample_seconds,
        "seconds_grade": work.grade_seconds,
        "sample_tokens_per_s": work.tokens / work.sample_seconds,
        "preemptions": work.preemptions,
        "sample_memory_retries": work.memory_retries,
    }


def _short_hash(parts: Iterable[bytes]) -> str:
    """Return a hash that does not depend on the number of processes that sampled."""
    return hashlib.blake2b(b"/".join(parts), digest_size=8).hexdigest()


def describe_update(update: UpdateStats | None, seconds: float) -> dict:
    """Describe a batch's update; None if it was skipped, with too few informative groups."""
    if update is None:
        return {"skipped": 1, "nonfinite": 0, "seconds_update": seconds, "memory_retries": 0, "optimizer_steps": 0}
    return {
        "skipped": 0,
        "nonfinite": int(not update.stepped),
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "update_tokens_per_s": update.tokens / seconds,
        "update_idle_share": update.idle_share,
        "seconds_update": seconds,
        "memory_retries": update.memory_retries,
        "optimizer_steps": update.optimizer_steps,
        **(asdict(update.ratios) if update.ratios else {}),
    }


def group_to_read(
    where: dict, problem: Problem, prompt: str, responses: Sequence[Response], temperature: float, fate: str = ""
) -> dict:
    """Return a whole group as a line of rollouts.jsonl; `where` is its step, stage and kind (held-out or training)."""
    kept = ("sample", "tokens", "finish_reason", "verdict", "answer", "text")
    return where | {
        "problem_id": problem.id,
        "prompt": prompt,
        "answers": list(problem.answers),
        "temperature": temperature,
        "fate": fate,
        "responses": [{key: getattr(response, key) for key in kept} for response in responses],
    }


def groups_to_read(
    where: dict,
    worker: RolloutWorker,
    attempts: Sequence[Sequence[Attempt]],
    groups: Sequence[Group],
    learned: Sequence[Group],
) -> list[dict]:
    """Return a step's groups as sampled: in turn a rescued one, a substituted one, and another.

    `groups` are those after rescue, `learned` those after substitution. A rescued group has the text that replaced
    one of its responses, a substituted one the problem that took its place.
    """
    by_fate: dict[str, list[dict]] = {"rescued": [], "substituted": [], "": []}
    for own, group, final in zip(attempts, groups, learned, strict=True):
        fate = "rescued" if group.rescued is not None else "substituted" if final is not group else ""
        prompt, responses = worker.message(group.problem)["content"], [response_of("", attempt) for attempt in own]
        row = group_to_read(where, group.problem, prompt, responses, own[0].rollout.temperature, fate)
        if fate == "rescued":
            text = worker.chat.decode(group.rollouts[group.rescued].tokens)
            row |= {"replaced": group.rescued, "replacement": text}
        elif fate:
            row["replacement"] = final.problem.id
        by_fate[fate].append(row)
    return [row for some in zip_longest(*by_fate.values()) for row in some if row]


def filter_row(label: str, rule: str, filtered: Filtered, tokens: int = 0) -> dict:
    """Return the row of a filter or a drop, with histograms of pass rates that took `tokens` to measure."""
    row = {"kind": "filter", "label": label, "rule": rule, "before": filtered.before, "after": filtered.after}
    return row | {"tokens": tokens, "kept": len(filtered.kept), "dropped": len(filtered.dropped)}


def temperature_row(
    label: str, target: float | None, chosen: float, curve: Sequence[TemperaturePoint], tokens: int
) -> dict:
    """Return the row of a temperature search: the measured temperatures and the chosen one."""
    row = {"kind": "temperature", "label": label, "target_distinct4": target, "chosen": chosen}
    return row | {"curve": [point.row() for point in curve], "tokens": tokens}


def evaluation_row(found: Evaluation, final: bool) -> dict:
    """Return the row of an evaluation, without the intervals of its groups."""
    row = {"kind": "eval", "final": final} | asdict(found)
    for grouping in ("by_type", "by_difficulty"):
        row[grouping] = {label: group["avg"] for label, group in row[grouping].items()}
    return row
