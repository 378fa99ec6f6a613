"""The POLARIS recipe, from a model to a better one: read it straight down.

    torchrun train.py                                            # the laptop world, from nothing to a report
    torchrun --nproc-per-node 8 train.py recipes/polaris-4b.toml
    python train.py recipes/tiny.toml --set stage.1.temperature=1.1
    torchrun train.py recipes/tiny.toml --resume                 # go on where it stopped, or begin
    python train.py recipes/polaris-4b.toml --plan --device 80GB --gpus 8    # will it fit, what does it cost?

A recipe is a list of stages. An `sft` stage imitates worked solutions. An `rl` stage learns from the answer alone:

    filter      once, before training: drop the problems that the model always solves
    temperature the recipe's, or the one that restores the diversity of the stage before
    each step   8 rollouts of each problem -> rewards -> rescue -> substitute -> advantages -> one update
    drop        after the stage: problems solved more than 9 times in 10

At the end the model is evaluated longer than it was trained, with and without YaRN, and report.html is written.
Departures from the official code are listed in the README.
"""

import argparse
import fcntl
import glob
import json
import math
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import transformers

import device as devices
from arithmetic import write_world
from attempts import Attempt, AttemptStats, GraderError, Respondent, encode, encode_chat, load_tokenizer, stop_tokens
from benchmarks import find_data
from checkpoint import (
    CheckpointError,
    RunState,
    code_version,
    data_identity,
    differences,
    git_commit,
    load_weights_and_optimizer,
    model_identity,
    read_state,
    save_checkpoint,
    together,
)
from data_filter import (
    BEFORE_STAGE,
    ESTIMATE_DRAW,
    DataOrder,
    Filtered,
    Visit,
    draw_histogram,
    drop_easy,
    estimate,
    filter_mirrored_j,
    require_batch,
    zero_variance_share,
)
from device import Device, Interrupted, StopRequest
from eval import evaluate, fingerprint, print_evaluation
from grpo import (
    Group,
    Substitution,
    TokenLoss,
    TrainingSequence,
    UpdateError,
    UpdateStats,
    optimizer_step,
    substitute,
    supervised_loss,
)
from model import (
    Lora,
    ModelConfig,
    ModelError,
    Offload,
    Transformer,
    add_lora,
    extend_window,
    initialise_lora,
    load_weights,
    read_config,
    resolve_folder,
    save,
    shard,
)
from optimizer import HostAdamW
from page import write_report
from plan import add_plan_options, read_machine, show_plan
from problems import (
    DATA_FILES,
    DataError,
    Problem,
    benchmark_copies,
    duplicated,
    existing_file,
    has_chats,
    read_chats,
    read_problems,
)
from recipe import EvalSettings, FinalSettings, Recipe, RecipeError, RlStage, SftStage, load_recipe, to_toml
from report import Metrics, MetricsError, console_line, new_alarms, read_metrics, whole_lines, write_atomically
from responses import respond
from reward import Grader
from rollout import CacheLimits, RolloutError, Sampling, cache_bytes_per_token, check_requests, distinct_ngrams
from scores import Evaluation, Response
from temperature import match_diversity, measure_temperature
from variants import choose_loss, mini_batches, over_steps, punish_overlong

# samples drawn for a purpose other than a training step are counted from a place of their own
EVALUATION_DRAW, SEARCH_DRAW = -1, -3
FEW = 3  # pairs of problems that guard_data names
WANTS_RESUMING = "resume-me"  # in a run's folder: it was asked to stop, and wants to go on
FINISHED = "finished"  # and: it came to its end
AGREED = "agreed.json"  # and: what changed on purpose since its newest checkpoint, so that it is asked once
# what a person can put right: one sentence, no traceback
EXPECTED_ERRORS = (
    RecipeError,
    ModelError,
    DataError,
    RolloutError,
    GraderError,
    CheckpointError,
    UpdateError,
    MetricsError,
    ImportError,
    OSError,
)


@dataclass
class Run:
    """What all parts of a run need."""

    recipe: Recipe
    folder: Path
    device: Device
    model: Transformer
    model_folder: Path  # where the tokenizer came from
    respondent: Respondent
    metrics: Metrics
    state: RunState
    stop: StopRequest
    resume_from: Path | None  # a checkpoint whose weights and optimizer the first stage to run loads
    micro_batch_tokens: int  # the recipe's, until memory runs out; a resumed run tries the recipe's again
    excluded: dict[tuple[str, str], set[str]] = field(
        default_factory=dict
    )  # ids by (kind of stage, data): see guard_data
    sft_sequences: dict[int, list[TrainingSequence]] = field(default_factory=dict)  # by stage
    stage_began: float = 0.0  # for the ETA: when, and at which of its steps, the stage began in this launch
    stage_first_step: int = 0
    saved: tuple[int, int, bool] | None = None  # step, stage, prepared: of the newest checkpoint
    nonfinite_batch: list[TrainingSequence] | None = None  # of the newest update without a finite gradient
    lock: int | None = None  # the folder, held as long as this process lives


class Stopped(Exception):
    """The run was asked to stop and has saved its work."""


# ------------------------------------------------------------------------------------------------------ the run


def train(run: Run) -> None:
    """Stages in order, then the last evaluation and the report."""
    state = run.state
    for index in range(state.stage, len(run.recipe.stage)):
        stage = run.recipe.stage[index]
        run.stage_began, run.stage_first_step = time.perf_counter(), state.stage_step
        if isinstance(stage, SftStage):
            sft_stage(run, index, stage)
        else:
            rl_stage(run, index, stage)
        export = run.folder / f"stage-{index}"
        if run.device.is_main and export.exists() and state.stage_step > run.stage_first_step:
            # of steps that came after the checkpoint that this launch goes on from: `save` removes it
            export.rename(export.with_name(f"{export.name}.unfinished"))
        if not run.device.share(export.exists()):
            save(run.model, export, run.device.compute_dtype, tokenizer_from=run.model_folder)
        if isinstance(stage, RlStage):
            drop_and_hand_on(run, index, stage)
        state.stage, state.stage_step, state.stage_tokens, state.position = index + 1, 0, 0, 0
        state.prepared = False
    final_evaluation(run)


def sft_stage(run: Run, index: int, stage: SftStage) -> None:
    """Imitate worked solutions: cross-entropy on the assistant's tokens, packed, the mean over all of them."""
    state = run.state
    sequences = run.sft_sequences[index]
    run.device.say(f"stage {index}: sft on {len(sequences):,} solutions, {stage.steps} steps")
    optimizer = make_optimizer(run, stage)
    while state.stage_step < stage.steps:
        begun = time.perf_counter()
        epoch_order = [run.recipe.seed, index]
        batch = sft_batch(sequences, stage.batch_sequences, state.stage_step, epoch_order)
        set_learning_rate(optimizer, learning_rate(stage, state.stage_step))
        update = update_model(run, optimizer, batch, supervised_loss, stage)
        seconds = time.perf_counter() - begun
        row = {
            "kind": "sft",
            "loss": update.loss,
            "grad_norm": update.grad_norm,
            "nonfinite": int(not update.stepped),
            "lr": learning_rate(stage, state.stage_step),
            "tokens": sum(len(sequence.tokens) for sequence in batch),
            "micro_batch_tokens": update.micro_batch_tokens,
            "memory_retries": update.memory_retries,
            "seconds": seconds,
        }
        row["tokens_per_s"] = row["tokens"] / seconds
        end_step(run, index, stage, row, optimizer)


def rl_stage(run: Run, index: int, stage: RlStage) -> None:
    """Learn from verifiable rewards: see the top of this file."""
    state, recipe = run.state, run.recipe
    problems = stage_problems(run, index, stage)
    if not state.prepared:
        if stage.filter_before:
            problems = estimate_and_filter(run, index, stage, problems)
        choose_temperature(run, index, stage, problems)
        held_out_evaluation(run, index, f"before stage {index}")
        state.problem_ids, state.prepared = [problem.id for problem in problems], True
        state.metrics_position = list(run.metrics.position)  # a stop in the first step must not lose their rows
    order = DataOrder(problems, stage.batch_problems, recipe.seed, index)
    loss = choose_loss(stage)  # grpo.PolicyLoss, unless the stage asks for a variant
    sink_is_used = any(isinstance(later, RlStage) and later.rescue for later in recipe.stage[index:])
    optimizer = make_optimizer(run, stage)
    run.device.say(
        f"stage {index}: rl on {len(problems):,} problems, {stage.steps} steps of {stage.batch_problems} x "
        f"{stage.group_size}, temperature {state.temperature:g}, {stage.max_response_tokens:,} tokens"
    )
    while steps_left(stage, state):
        begun = time.perf_counter()
        # sample and grade: 8 rollouts of each problem of the batch
        batch = order.batch(state.position)
        sampling = training_sampling(run, stage, state.temperature, draw=state.step)
        try:
            if recipe.eval.every_steps and state.stage_step and state.stage_step % recipe.eval.every_steps == 0:
                held_out_evaluation(run, index, f"after step {state.step}", within_stage=True)
            attempts, work = run.respondent.attempt(batch, stage.group_size, sampling)
        except Interrupted:  # nothing of this step has been recorded or learned
            save_and_stop(run, optimizer)
        except GraderError:
            save_whole_step(run, optimizer)
            raise
        groups = make_groups(recipe, batch, attempts)
        row = describe(groups, attempts, work)  # of the original rewards: before rescue and substitution
        record_visits(run, index, groups)
        write_rollouts(run, groups, attempts)

        # give a signal to groups that have none
        if sink_is_used:
            state.sinks.remember(groups)
        if stage.rescue:
            groups = state.sinks.rescue(groups, recipe.seed, state.step)
        row["rescued"] = sum(group.rescued is not None for group in groups)
        groups = punish_overlong(groups, stage)  # a variant: POLARIS leaves the rewards as they are
        substitution = Substitution(groups, 0, skip_update=False)
        if stage.substitute:
            substitution = substitute(groups, recipe.seed, state.step, stage.informative_share)
        row["substituted"] = substitution.substituted

        # learn: one optimizer step on the whole batch; a variant may leave some of it out, or make several steps
        set_learning_rate(optimizer, learning_rate(stage, state.stage_step))
        updates, update_begun = [], time.perf_counter()
        if not substitution.skip_update:
            for sequences, divisor in mini_batches(substitution.groups, stage):
                begun_already = any(one.stepped for one in updates)
                updates.append(update_model(run, optimizer, sequences, loss, stage, divisor, begun_already))
        update = over_steps(updates)
        state.position += stage.batch_problems
        state.stage_tokens += row["tokens"]
        row |= describe_update(update, time.perf_counter() - update_begun)
        row |= {
            "micro_batch_tokens": run.micro_batch_tokens,
            "memory_retries": update.memory_retries if update else 0,
            "optimizer_steps": sum(one.stepped for one in updates),
            "temperature": state.temperature,
            "lr": learning_rate(stage, state.stage_step),
            "seconds": time.perf_counter() - begun,
            "problems": len(problems),
            "epoch": state.position / len(problems),
            "max_response_tokens": stage.max_response_tokens,
            "peak_memory_gib": run.device.peak_memory_gib(),
        }
        end_step(run, index, stage, row, optimizer)


def final_evaluation(run: Run) -> None:
    """Held-out problems once more, then longer responses than training allowed, with and without YaRN."""
    recipe, final = run.recipe, run.recipe.final
    held_out_evaluation(run, len(recipe.stage) - 1, "after training", final=True)
    if final.data:
        problems = problems_of(data_path(run, final.data))
        trained = run.model.config
        extended = final_config(trained, recipe)
        # without scaling, the same positions: rotary angles have no end, only an untrained part
        unscaled = replace(trained, max_position_embeddings=extended.max_position_embeddings)
        for name, config in {"beyond the window, no YaRN": unscaled, "beyond the window, YaRN": extended}.items():
            run.model.config = config
            run.model.set_rope(config.rope)
            sampling = evaluation_sampling(run, final)
            found, _ = evaluate(run.respondent, name, problems, final.samples, sampling, label=name)
            report_evaluation(run, len(recipe.stage) - 1, found, final=True)
        run.model.config = trained
        run.model.set_rope(trained.rope)


# ----------------------------------------------------------------------------------------- preparing an rl stage


def stage_problems(run: Run, index: int, stage: RlStage) -> list[Problem]:
    """The stage's own data, or what the stage before has left of its data."""
    own = [earlier.data for earlier in run.recipe.stage[: index + 1] if isinstance(earlier, RlStage) and earlier.data]
    problems = training_problems(run, "rl", own[-1])
    state = run.state
    if index == state.stage and state.problem_ids and (state.prepared or not stage.data):
        problems = by_ids(problems, state.problem_ids, own[-1])
    return problems


def training_problems(run: Run, kind: str, source: str) -> list[Problem]:
    """A stage's data without what guard_data excludes."""
    excluded = run.excluded.get((kind, source), ())
    return [problem for problem in problems_of(data_path(run, source)) if problem.id not in excluded]


def by_ids(problems: list[Problem], ids: list[str], source: str) -> list[Problem]:
    """The problems that a run noted, in that order; DataError where some are no longer to be had."""
    by_id = {problem.id: problem for problem in problems}
    if gone := [problem_id for problem_id in ids if problem_id not in by_id]:
        raise DataError(
            f"{source}: {len(gone):,} of the {len(ids):,} problems that this run goes on with are not there "
            f"(first: {gone[0]}): resume with the data and the [guard] that it began with"
        )
    return [by_id[problem_id] for problem_id in ids]


def estimate_and_filter(run: Run, index: int, stage: RlStage, problems: list[Problem]) -> list[Problem]:
    """Pass rates of the model about to be trained, 8 rollouts each; the always solved are dropped.

    Estimates are kept in pass-rates-INDEX.jsonl, and an interrupted run goes on from there.
    """
    path = run.folder / f"pass-rates-{index}.jsonl"
    sampling = training_sampling(run, stage, run_temperature(run, stage), draw=ESTIMATE_DRAW)
    trained = run.folder / f"stage-{index - 1}" if index else run.model_folder  # the model in hand, as files
    weights = run.device.share(fingerprint(trained) if run.device.is_main else None)
    visits = (index + BEFORE_STAGE, run.state.step)
    known = estimate(run.respondent, problems, stage.group_size, sampling, path, weights, *visits)
    for problem in problems:
        for visit in known.visits(problem.id):
            run.state.history.append(visit)
    filtered = filter_mirrored_j(problems, run.state.history, stage.drop_at, group_size=stage.group_size)
    tokens = sum(visit.tokens for problem in problems for visit in known.visits(problem.id))
    report_filter(run, index, f"before stage {index}", f"pass rate below {stage.drop_at:g}", filtered, tokens)
    require_batch(filtered, stage.batch_problems)
    share = zero_variance_share(filtered.known_rates(filtered.kept), stage.group_size)
    run.device.say(f"expected share of groups without a signal: {share:.0%}")
    return filtered.kept


def run_temperature(run: Run, stage: RlStage) -> float:
    """The stage's own temperature, or the one before while a search is still to come."""
    return run.state.temperature if isinstance(stage.temperature, str) else float(stage.temperature)


def choose_temperature(run: Run, index: int, stage: RlStage, problems: list[Problem]) -> None:
    """Set the stage's temperature: the recipe's own, or the one that restores the diversity of the first stage.

    Diversity is measured in every stage on the same problems and with the same limit, those of the first.
    """
    search, state = run.recipe.search, run.state
    if not state.probe_ids:
        probe = DataOrder(problems, min(search.problems, len(problems)), run.recipe.seed, index).batch(0)
        state.probe_ids, state.probe_tokens = [problem.id for problem in probe], stage.max_response_tokens
    probe, tokens = probe_problems(run), 0

    def answer(problems: list[Problem], temperature: float) -> list[list[Response]]:
        nonlocal tokens
        sampling = training_sampling(run, stage, temperature, draw=SEARCH_DRAW)
        sampling = replace(sampling, max_new_tokens=state.probe_tokens)
        groups = respond(run.respondent, "temperature", problems, search.samples, sampling)
        tokens += sum(response.tokens for group in groups for response in group)
        return groups

    start, target = run_temperature(run, stage), state.diversity if stage.temperature == "match" else None
    if target is None:
        curve = [measure_temperature(answer, probe, start, search.margin)]
        state.temperature, state.diversity = curve[0].temperature, curve[0].distinct4
    else:
        state.temperature, curve = match_diversity(
            answer, probe, target, start, search.step, search.most, search.margin, run.device.say
        )
    chosen = next(point for point in curve if point.temperature == state.temperature)
    restored = "" if target is None else f" (to restore {target:.3f})"
    run.device.say(
        f"stage {index}: temperature {state.temperature:g}, distinct-4 {chosen.distinct4 or 0:.3f}{restored}"
    )
    row = {"kind": "temperature", "step": state.step, "stage": index, "label": f"before stage {index}"}
    row |= {"target_distinct4": target, "chosen": state.temperature, "curve": [point.row() for point in curve]}
    row |= {"tokens": tokens}
    run.metrics.write(row)


def probe_problems(run: Run) -> list[Problem]:
    """The problems on which diversity is measured, wherever they come from."""
    sources = [stage.data for stage in run.recipe.stage if isinstance(stage, RlStage) and stage.data]
    problems = [problem for source in sources for problem in training_problems(run, "rl", source)]
    return by_ids(problems, run.state.probe_ids, ", ".join(sources))


def drop_and_hand_on(run: Run, index: int, stage: RlStage) -> None:
    """Drop what the model has learned; the rest is the next stage's data."""
    problems = stage_problems(run, index, stage)
    filtered = drop_easy(
        problems, run.state.history, index, stage.drop_above, stage.drop_window, group_size=stage.group_size
    )
    report_filter(run, index, f"after stage {index}", f"accuracy above {stage.drop_above:g}", filtered)
    run.state.problem_ids = [problem.id for problem in filtered.kept]
    later = [s for s in run.recipe.stage[index + 1 :] if isinstance(s, RlStage)]
    if later and not later[0].data:
        require_batch(filtered, later[0].batch_problems)


def report_filter(run: Run, index: int, label: str, rule: str, filtered: Filtered, tokens: int = 0) -> None:
    """Show a filter's two histograms, and keep them for the report; `tokens` were generated to know the rates."""
    run.device.say(f"{label}: kept {len(filtered.kept):,}, dropped {len(filtered.dropped):,} (rule: {rule})")
    run.device.say(draw_histogram(filtered.before, filtered.after))
    row = {"kind": "filter", "step": run.state.step, "stage": index, "label": label, "rule": rule}
    row |= {"before": filtered.before, "after": filtered.after, "tokens": tokens}
    run.metrics.write(row | {"kept": len(filtered.kept), "dropped": len(filtered.dropped)})


# ----------------------------------------------------------------------------------------------- inside a step


def training_sampling(run: Run, stage: RlStage, temperature: float, draw: int) -> Sampling:
    """Training samples the policy itself: no top-k, no top-p, logits / temperature."""
    return Sampling(temperature, stage.max_response_tokens, run.respondent.stop_tokens, run.recipe.seed, draw)


def make_groups(recipe: Recipe, problems: list[Problem], attempts: list[list[Attempt]]) -> list[Group]:
    """One group per problem; the reward is the weighted sum of its parts."""
    weights, groups = recipe.reward, []
    for problem, group in zip(problems, attempts, strict=True):
        parts = np.array([(a.grade.correct, a.grade.format, a.grade.steps) for a in group])  # (G, 3)
        rewards = parts @ np.array([weights.correct, weights.format, weights.steps])
        groups.append(Group(problem, [attempt.rollout for attempt in group], rewards, parts[:, 0] > 0))
    return groups


def record_visits(run: Run, index: int, groups: list[Group]) -> None:
    """Every problem's pass rate follows the training, from the original rewards."""
    for group in groups:
        solved = tuple(float(right) for right in group.correct)
        tokens = sum(len(rollout.tokens) for rollout in group.rollouts)
        run.state.history.append(Visit(group.problem.id, index, run.state.step, solved, tokens))


def describe(groups: list[Group], attempts: list[list[Attempt]], work: AttemptStats) -> dict:
    """The batch as it was sampled, in numbers."""
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
        "seconds_sample": work.sample_seconds,
        "seconds_grade": work.grade_seconds,
        "sample_tokens_per_s": work.tokens / work.sample_seconds,
        "preemptions": work.preemptions,
        "sample_memory_retries": work.memory_retries,
    }


def update_model(
    run: Run,
    optimizer: torch.optim.Optimizer,
    sequences: list[TrainingSequence],
    loss: TokenLoss,
    stage: SftStage | RlStage,
    divisor: float | None = None,
    begun: bool = False,
) -> UpdateStats:
    """One optimizer step; micro-batches that memory has made smaller stay so for the rest of the run.

    A step whose update was abandoned, between two micro-batches, is done again whole: its visits replace themselves.
    One whose weights have `begun` to change, by an earlier mini-batch, is not abandoned.
    """

    def leave_when_asked(*_: object) -> None:
        if not begun and any(
            run.device.gather(run.stop.asked)
        ):  # all leave before the same forward, of which each has as many
            raise Interrupted

    watch = run.model.register_forward_pre_hook(leave_when_asked, prepend=True)  # before sharded weights are gathered
    try:
        update = optimizer_step(
            run.model, optimizer, sequences, loss, run.micro_batch_tokens, stage.max_grad_norm, divisor
        )
    except Interrupted:
        optimizer.zero_grad(set_to_none=True)
        save_and_stop(run, optimizer)
    finally:
        watch.remove()
    if not update.stepped:
        run.nonfinite_batch = sequences
    if update.micro_batch_tokens < run.micro_batch_tokens:
        run.device.say(
            f"step {run.state.step + 1}: out of memory in the update: micro-batches of at most "
            f"{update.micro_batch_tokens:,} tokens from now on, not {run.micro_batch_tokens:,}"
        )
        run.micro_batch_tokens = update.micro_batch_tokens
    return update


def describe_update(update: UpdateStats | None, seconds: float) -> dict:
    """The batch's update in numbers; None is a batch from which there is too little to learn, which is skipped."""
    if update is None:
        return {"skipped": 1, "nonfinite": 0, "seconds_update": seconds}
    return {
        "skipped": 0,
        "nonfinite": int(not update.stepped),
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "update_tokens_per_s": update.tokens / seconds,
        "seconds_update": seconds,
    } | asdict(update.ratios)


def end_step(run: Run, index: int, stage: SftStage | RlStage, row: dict, optimizer: torch.optim.Optimizer) -> None:
    """Count the step, write its line, save where the recipe says so, stop when asked."""
    state, settings = run.state, run.recipe.run
    state.step, state.stage_step = state.step + 1, state.stage_step + 1
    row = {"kind": row["kind"], "step": state.step, "stage": index} | row
    run.metrics.write(row)
    state.metrics_position = list(run.metrics.position)
    left = steps_left(stage, state)
    per_step = (time.perf_counter() - run.stage_began) / (state.stage_step - run.stage_first_step)
    run.device.say(console_line(row, sum(s.steps for s in run.recipe.stage), per_step * left))
    for sentence in new_alarms(run.metrics.steps) if row["kind"] == "rl" else ():
        run.device.say(f"warning: step {state.step}: {sentence}")
    if row["nonfinite"]:
        run.device.say(f"warning: step {state.step}: the gradient is not finite; the weights were left as they are")
    if not row.get("skipped"):
        state.nonfinite_steps = (state.nonfinite_steps + 1) * row["nonfinite"]
    if row["nonfinite"] and state.nonfinite_steps >= settings.most_nonfinite_steps:
        stop_at_nonfinite(run, optimizer)
    if any(run.device.gather(run.stop.asked)):
        save_and_stop(run, optimizer)
    if left == 0 or state.stage_step % settings.checkpoint_every_steps == 0:
        save_whole_step(run, optimizer)


def stop_at_nonfinite(run: Run, optimizer: torch.optim.Optimizer) -> NoReturn:
    """Leave the newest batch where a person can look at it; the weights are those before the first of these steps."""
    state, path = run.state, run.folder / f"nonfinite-step-{run.state.step}.pt"
    steps, state.nonfinite_steps = state.nonfinite_steps, 0  # a resumed run, with another rate perhaps, gets its chance
    if run.device.is_main:
        rows = [asdict(sequence) for sequence in run.nonfinite_batch]
        torch.save(
            [{k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in r.items()} for r in rows], path
        )
    save_whole_step(run, optimizer)
    raise UpdateError(
        f"step {state.step}: {steps} updates in a row without a finite gradient (run.most_nonfinite_steps): the "
        f"batch is in {path} (tokens, advantages, old log-probs); lower the learning rate or mend the data, then "
        f"{how_to_go_on(run)}"
    )


def steps_left(stage: SftStage | RlStage, state: RunState) -> int:
    """Steps until the stage ends, by number or, at the length of its rollouts so far, by their tokens; 0 at its end."""
    left = stage.steps - state.stage_step
    if isinstance(stage, RlStage) and stage.generated_tokens and state.stage_tokens:
        tokens_left = max(0, stage.generated_tokens - state.stage_tokens)
        left = min(left, math.ceil(tokens_left * state.stage_step / state.stage_tokens))
    return max(0, left)


def save_whole_step(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """A checkpoint of the last whole step, unless there is one already: little time may be left."""
    state, kept = run.state, run.recipe.run.checkpoints_kept
    place = state.step, state.stage, state.prepared
    if run.saved != place:
        run.metrics.sync()
        save_checkpoint(run.folder, run.model, optimizer, state, run.device, kept)
        run.saved = place


def save_and_stop(run: Run, optimizer: torch.optim.Optimizer) -> NoReturn:
    """Save the last whole step and leave in order."""
    save_whole_step(run, optimizer)
    raise Stopped(f"stopped after step {run.state.step}; go on with: {how_to_go_on(run)}")


def how_to_go_on(run: Run) -> str:
    """The command for a person."""
    return f"torchrun train.py --resume {run.folder}"


def write_rollouts(run: Run, groups: list[Group], attempts: list[list[Attempt]]) -> None:
    """A few whole rollouts of this step, for people to read."""
    rows = []
    for group, tried in list(zip(groups, attempts, strict=True))[: run.recipe.run.rollouts_written]:
        attempt = tried[0]
        rows.append(
            {
                "step": run.state.step + 1,
                "problem_id": group.problem.id,
                "problem_text": group.problem.text,
                "answers": list(group.problem.answers),
                "response": attempt.text,
                "verdict": attempt.grade.verdict,
                "reward": float(group.rewards[0]),
                "group_accuracy": float(group.correct.mean()),
                "tokens": len(attempt.rollout.tokens),
                "finish_reason": attempt.rollout.finish_reason,
                "temperature": attempt.rollout.temperature,
            }
        )
    run.metrics.write_rollouts(rows)


# --------------------------------------------------------------------------------------------------- evaluation


def held_out_evaluation(run: Run, index: int, label: str, within_stage: bool = False, final: bool = False) -> None:
    """avg@k on problems that are never trained on."""
    settings = run.recipe.eval
    if not settings.data:
        return
    most = (settings.problems_within_stage if within_stage else 0) or settings.problems or None
    problems = problems_of(data_path(run, settings.data))[:most]
    sampling = evaluation_sampling(run, settings)
    found, _ = evaluate(run.respondent, "held-out", problems, settings.samples, sampling, label=f"held-out, {label}")
    report_evaluation(run, index, found, final)


def evaluation_sampling(run: Run, settings: EvalSettings | FinalSettings) -> Sampling:
    """How evaluations sample: with the recipe's own top-k, and from draws that training never uses."""
    return Sampling(
        temperature=settings.temperature,
        max_new_tokens=settings.max_response_tokens,
        stop_tokens=run.respondent.stop_tokens,
        seed=run.recipe.seed,
        step=EVALUATION_DRAW,
        top_k=settings.top_k,
    )


def report_evaluation(run: Run, index: int, found: Evaluation, final: bool) -> None:
    """Show an evaluation and keep it for the report."""
    if run.device.is_main:
        print_evaluation(found)
    row = {"kind": "eval", "step": run.state.step, "stage": index, "final": final} | asdict(found)
    for grouping in ("by_type", "by_difficulty"):
        row[grouping] = {label: group["avg"] for label, group in row[grouping].items()}
    run.metrics.write(row)


# ------------------------------------------------------------------------------------------------ fine-tuning data


def sft_sequences(run: Run, stage: SftStage) -> list[TrainingSequence]:
    """Worked solutions, or chats, as tokens; the loss is on the assistant's part alone, end-of-sequence included."""
    ending = encode(run.respondent.tokenizer, run.respondent.tokenizer.eos_token)
    sequences = []
    for name, prompt, reply in sft_rows(run, stage):
        response = encode(run.respondent.tokenizer, reply) + ending
        if len(prompt) + len(response) > stage.max_tokens:
            raise DataError(
                f"{name} in {stage.data}: {len(prompt) + len(response)} tokens exceed the stage's "
                f"max_tokens = {stage.max_tokens}: raise it or remove the row"
            )
        sequences.append(TrainingSequence(np.array([*prompt, *response], dtype=np.int32), len(prompt)))
    if len(sequences) < stage.batch_sequences:
        raise DataError(f"{stage.data}: {len(sequences)} solutions cannot fill a batch of {stage.batch_sequences}")
    return sequences


def sft_rows(run: Run, stage: SftStage) -> Iterator[tuple[str, list[int], str]]:
    """What to learn from: a name for errors, the prompt's tokens, the assistant's reply."""
    tokenizer, path = run.respondent.tokenizer, data_path(run, stage.data)
    if has_chats(path):
        for number, messages in enumerate(read_chats(path), 1):
            if f"row {number}" in run.excluded.get(("sft", stage.data), ()):
                continue
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":  # every reply is learned, after all that came before it
                    yield f"row {number}", encode_chat(tokenizer, messages[:turn]), message["content"]
        return
    for problem in training_problems(run, "sft", stage.data):
        if not problem.solution:
            raise DataError(f"problem {problem.id} in {stage.data} has no worked solution to learn from")
        yield f"problem {problem.id}", list(run.respondent.prompt(problem, 1).tokens), problem.solution


def sft_batch(sequences: list[TrainingSequence], size: int, step: int, seed: list[int]) -> list[TrainingSequence]:
    """The batch of a step: epochs are permutations drawn from the seed, so that the step alone says what it is."""
    per_epoch = len(sequences) // size
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([*seed, epoch]).permutation(len(sequences))
    return [sequences[i] for i in order[place * size : (place + 1) * size]]


def learning_rate(stage: SftStage | RlStage, step: int) -> float:
    """Constant, after a linear warm-up; an sft stage may fall linearly to a tenth at its end."""
    rate = stage.learning_rate * min(1.0, (step + 1) / max(stage.warmup_steps, 1))
    if isinstance(stage, RlStage) or not stage.decay_share:
        return rate
    return rate * max(0.1, min(1.0, (stage.steps - step) / (stage.decay_share * stage.steps)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def make_optimizer(run: Run, stage: SftStage | RlStage) -> torch.optim.Optimizer:
    """AdamW, new in each stage; when the run resumes inside a stage, with the moments (and weights) it had."""
    betas = (0.9, stage.adam_beta2)
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    settings = {"lr": stage.learning_rate, "betas": betas, "weight_decay": stage.weight_decay}
    if run.recipe.offload_optimizer:
        optimizer = HostAdamW(trained, **settings)
    else:
        optimizer = torch.optim.AdamW(trained, **settings, fused=True)
    if run.resume_from is not None:
        load_weights_and_optimizer(run.resume_from, run.model, optimizer, run.device)
        run.resume_from = None
        for group in optimizer.param_groups:  # the recipe's word counts, not the checkpoint's
            group |= {"betas": betas, "weight_decay": stage.weight_decay}
    return optimizer


def data_path(run: Run, source: str) -> str:
    """A recipe's data: world/... is what this run has written; anything else is a file or a hub data set."""
    return str(run.folder / source) if source.startswith("world/") else source


@cache
def problems_of(path: str) -> list[Problem]:
    """The problems of a file or hub data set, read once per run."""
    return read_problems(path)


# --------------------------------------------------------------------------- twice in the data, or in a benchmark


def guard_data(run: Run) -> None:
    """Find what stands twice in the training data, or in a benchmark, and exclude what [guard] says to.

    What is excluded depends on files and recipe alone: it is the same on every process and after a resume.
    """
    recipe, guard, benchmark = run.recipe, run.recipe.guard, []
    for source in dict.fromkeys(filter(None, [recipe.eval.data, recipe.final.data])):
        benchmark += problems_of(data_path(run, source))
        if pairs := duplicated(problems_of(data_path(run, source))):
            run.device.say(f"{source}: {len(pairs):,} problems repeat an earlier one's text ({some_pairs(pairs)})")
    for source in find_data(guard.benchmarks).values():
        benchmark += read_problems(source, "keep")  # to be compared with, a problem needs no answer
    seen: dict[str, dict[str, Problem]] = {"sft": {}, "rl": {}}
    held = [] if not run.device.is_main else [row | {"step": 0} for row in read_metrics(run.folder)]
    for index, stage in enumerate(recipe.stage):
        place = stage.kind, stage.data
        if not stage.data or place in run.excluded:
            continue
        asked, learned = training_texts(run, stage)
        found = {
            "duplicates": (guard.duplicates, "repeat an earlier one's text", duplicated(learned, seen[stage.kind])),
            "contamination": (guard.contamination, "are a benchmark's", benchmark_copies(asked, benchmark)),
        }
        excluded = {p.id for rule, _, pairs in found.values() if rule == "exclude" for p, _ in pairs}
        run.excluded[place] = excluded
        row = {"kind": "guard", "step": 0, "stage": index, "data": stage.data, "rows": len(learned)}
        for name, (rule, what, pairs) in found.items():
            count = len({problem.id for problem, _ in pairs})
            row |= {name: count, f"{name}_first": [[a.id, b.id] for a, b in pairs[:FEW]], f"{name}_rule": rule}
            if pairs:
                done = "excluded" if rule == "exclude" else f'trained on all the same (guard.{name} = "exclude" drops)'
                run.device.say(f"{stage.data}: {count:,} of {len(learned):,} {what} ({some_pairs(pairs)}): {done}")
        row |= {"excluded": len(excluded), "excluded_ids": sorted(excluded)}
        if run.device.is_main and row not in held:  # a resumed run has its rows
            run.metrics.write(row | {"step": run.state.step})


def training_texts(run: Run, stage: SftStage | RlStage) -> tuple[list[Problem], list[Problem]]:
    """What a stage's data asks, to compare with benchmarks, and what it teaches, of which once is enough.

    Fine-tuning may learn a problem from several solutions, so that there a copy has the same solution.
    """
    path = data_path(run, stage.data)
    if isinstance(stage, RlStage):
        return (problems := problems_of(path)), problems
    if not has_chats(path):
        return (problems := problems_of(path)), [replace(p, text=p.text + p.solution) for p in problems]
    chats = [(f"row {number}", messages) for number, messages in enumerate(read_chats(path), 1)]
    asked = [Problem(name, m["content"], ()) for name, messages in chats for m in messages if m["role"] == "user"]
    return asked, [Problem(name, "\n".join(m["content"] for m in messages), ()) for name, messages in chats]


def some_pairs(pairs: list[tuple[Problem, Problem]]) -> str:
    """The first few of the pairs found, by their ids."""
    return ", ".join(f"{a.id} is {b.id}" for a, b in pairs[:FEW]) + ", ..." * (len(pairs) > FEW)


# -------------------------------------------------------------------------------------------------- starting up


def check_recipe(recipe: Recipe, device: Device) -> None:
    """What can be found wrong before anything is written or loaded."""
    for index, stage in enumerate(recipe.stage):
        if isinstance(stage, RlStage) and stage.batch_problems % device.ranks:
            raise RecipeError(
                f"stage.{index}.batch_problems = {stage.batch_problems} cannot be divided among "
                f"{device.ranks} processes: use a multiple of {device.ranks}"
            )
    for source in [stage.data for stage in recipe.stage] + [recipe.eval.data, recipe.final.data]:
        if source.startswith("world/") and not recipe.world:
            raise RecipeError(f"{source}: the recipe has no [world] that would write it; write ./{source} for a file")
        if source.endswith(DATA_FILES) and not source.startswith("world/"):
            existing_file(Path(source))
    for source in find_data(recipe.guard.benchmarks).values():
        if source.endswith(DATA_FILES):
            existing_file(Path(source))
    if not recipe.model.startswith("world/"):
        config = model_config(resolve_folder(recipe.model), recipe)
        if recipe.final.data:
            final_config(config, recipe)


def model_config(folder: Path, recipe: Recipe) -> ModelConfig:
    """The model's config with the recipe's window, in which every stage must fit."""
    config = read_config(folder)
    if recipe.max_position_embeddings:
        config = replace(config, max_position_embeddings=recipe.max_position_embeddings)
    for index, stage in enumerate(recipe.stage):
        if isinstance(stage, SftStage):
            continue
        if stage.max_prompt_tokens + stage.max_response_tokens > config.max_position_embeddings:
            raise RecipeError(
                f"stage.{index}: {stage.max_prompt_tokens} + {stage.max_response_tokens} tokens exceed the model's "
                f"window of {config.max_position_embeddings}: set max_position_embeddings in the recipe"
            )
    return config


def final_config(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """The config of the last evaluation: YaRN, and a window as long as it makes it."""
    final = recipe.final
    return extend_window(config, final.yarn_factor, final.yarn_original_window, final.yarn_attention_factor)


def build_model(folder: Path, recipe: Recipe, device: Device) -> Transformer:
    """The model, split over all processes before any weight is read, so that no process holds all of it.

    With an adapter, every process holds the frozen base (see `shard`), and the adapter is split.
    """
    with torch.device("meta"):
        model = Transformer(model_config(folder, recipe))
    if recipe.lora.rank:
        is_hub_id = not recipe.model.startswith("world/") and not Path(recipe.model).is_dir()
        add_lora(model, Lora(recipe.lora.rank, recipe.lora.alpha, recipe.model if is_hub_id else str(folder.resolve())))
    stream = torch.cuda.Stream() if recipe.offload_activations and device.device.type == "cuda" else None
    offload = Offload(stream) if recipe.offload_activations else None
    for layer in model.model.layers:
        layer.recompute, layer.offload = recipe.recompute_activations, offload
    model.float32_head = recipe.float32_head
    shard(model, device.mesh, device.compute_dtype)
    model.to_empty(device=device.device)
    model.tie()
    load_weights(model, folder)
    initialise_lora(model, recipe.seed)
    return model


def check_inputs(run: Run) -> None:
    """Find before the first step what a later stage or evaluation would stumble over: rows, prompts, lengths."""
    respondent, recipe = run.respondent, run.recipe
    for index, stage in enumerate(recipe.stage):
        if index < run.state.stage:
            continue
        if isinstance(stage, SftStage):
            run.sft_sequences[index] = sft_sequences(run, stage)
            continue
        problems = stage_problems(run, index, stage)
        DataOrder(problems, stage.batch_problems, recipe.seed, index)
        prompts = [respondent.prompt(problem, 1, stage.max_prompt_tokens) for problem in problems]
        check_requests(run.model, prompts, training_sampling(run, stage, 1.0, 0), respondent.limits)
    windows = {recipe.eval: run.model.config}
    if recipe.final.data:
        windows[recipe.final] = final_config(run.model.config, recipe)
    trained = run.model.config
    for settings, config in windows.items():
        if settings.data:
            run.model.config = config
            prompts = [respondent.prompt(problem, 1) for problem in problems_of(data_path(run, settings.data))]
            check_requests(run.model, prompts, evaluation_sampling(run, settings), respondent.limits)
    run.model.config = trained


def new_name(parent: Path, name: str, ending: str = "") -> Path:
    """NAME, or NAME-2 and so on when that is taken: nothing is ever overwritten."""
    numbered = (parent / f"{name}{f'-{number}' if number > 1 else ''}{ending}" for number in count(1))
    return next(path for path in numbered if not path.exists())


def new_folder(parent: Path, name: str) -> Path:
    """A new folder runs/NAME, or runs/NAME-2 and so on."""
    while True:
        try:
            folder = new_name(parent, name)
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run took the name in the meantime
            continue
        except OSError as error:
            raise RecipeError(f"{folder} cannot be made ({error.strerror}); give another --out") from None


def versions() -> str:
    """What the run was made with, as TOML comments."""
    parts = [
        f"python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    ]
    return f"# {', '.join(parts)}, commit {git_commit(Path(__file__).parent)}\n"


def find_unfinished(out: Path, recipe: Recipe, anyway: bool) -> Path | None:
    """The newest unfinished run of this very recipe in `out`; None where none has its name.

    Raises CheckpointError when those of its name differ, unless that is allowed: none is passed over in silence.
    """
    found, told = [], []
    for path in out.glob(f"{glob.escape(recipe.name)}*/recipe.toml"):
        own = re.fullmatch(rf"{re.escape(recipe.name)}(-\d+)?", path.parent.name)
        if own and not (path.parent / FINISHED).exists():
            found.append(path)
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        differing = differences({"recipe": path.read_text(encoding="utf-8")}, {"recipe": to_toml(recipe)})
        if anyway or not differing:
            return path.parent
        told.append(f"{path.parent} ({differing[0]}{f' and {len(differing) - 1} more' * (len(differing) > 1)})")
    if told:
        raise CheckpointError(
            f"no unfinished run in {out} has this recipe: {'; '.join(told)}: name one with --resume RUN, leave "
            "--resume out to begin another, or take the newest as it is with --resume-anyway"
        )
    return None


def hold(folder: Path) -> int:
    """Take a run's folder for this process, until it ends however it ends; CheckpointError when another has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"{folder} is being written by another process: wait for its end, or stop it") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def run_fingerprint(recipe: Recipe, folder: Path) -> dict[str, str]:
    """What a run depends on beside its checkpoint: see `differences`."""
    found = {"recipe": to_toml(recipe), "code": code_version(Path(__file__).parent)}
    found["model"] = model_identity(model_source(recipe, folder))
    for source in {stage.data for stage in recipe.stage} | {recipe.eval.data, recipe.final.data}:
        if source:
            path = str(folder / source) if source.startswith("world/") else source
            found[f"data {source}"] = data_identity(read_chats(path) if has_chats(path) else problems_of(path))
    return found


def model_source(recipe: Recipe, folder: Path) -> Path:
    """The folder of the model that the run begins with."""
    return folder / recipe.model if recipe.model.startswith("world/") else resolve_folder(recipe.model)


def by_main(device: Device, work: Callable[[], Any]) -> Any:
    """What the main process's `work` returned; when it fails, it fails on every process, and none is left waiting."""
    return together(device, lambda: work() if device.is_main else None)[0]


def open_run(arguments: argparse.Namespace, device: Device) -> tuple[Recipe, Path, int | None, Path | None, RunState]:
    """A new run's folder, or an old one with the place where it stopped; held by the main process."""
    folder = arguments.resume if isinstance(arguments.resume, Path) else None
    if folder and not (folder / "recipe.toml").is_file():
        raise RecipeError(f"{folder} is no run: it has no recipe.toml; give a folder that train.py has made")
    recipe = load_recipe(folder / "recipe.toml" if folder else arguments.recipe, arguments.set)
    check_recipe(recipe, device)
    # torchrun --max-restarts starts the same command again: it goes on
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if folder is None and (arguments.resume or restarted):
        anyway = arguments.resume_anyway
        folder = by_main(device, lambda: find_unfinished(arguments.out, recipe, anyway))
        if folder is None:
            device.say(f"no unfinished run of {recipe.name} in {arguments.out}: beginning")
    resumed, found = folder is not None, None
    if not resumed:
        folder = by_main(device, lambda: new_folder(arguments.out, recipe.name))
    held = by_main(device, lambda: hold(folder))
    lock = held if device.is_main else None  # a number that means another file in another process
    if not resumed and device.is_main and recipe.world:
        write_world(recipe.world, folder / "world")
    device.share(None)  # nobody reads the world before it is written
    now = run_fingerprint(recipe, folder)
    if resumed:
        found = read_state(folder, device, device.share(whole_lines(folder) if device.is_main else None))
        device.say(
            f"resuming {folder} after step {found[1].step}" if found else f"{folder} has no checkpoint: beginning again"
        )
    state = found[1] if found else RunState()
    if found:
        # a value set beside the name of a run is changed on purpose; in "the same command" nothing is
        chosen = [value.partition("=")[0] for value in arguments.set] if isinstance(arguments.resume, Path) else []
        agreed = json.loads((folder / AGREED).read_text()) if (folder / AGREED).exists() else {}
        differing = differences(agreed.get(found[0].name, state.fingerprint), now, chosen)
        for difference in differing:
            device.say(f"differs from the run so far: {difference}")
        if differing and not arguments.resume_anyway:
            if lock is not None:
                os.close(lock)
            raise CheckpointError(
                f"{folder} was made otherwise: {'; '.join(differing)}: put it back as it was, or go on all the same "
                "with --resume-anyway"
            )
    if device.is_main:
        path = folder / "recipe.toml"
        changed = path.exists() and differences({"recipe": path.read_text(encoding="utf-8")}, now) != []
        if resumed:
            forget_what_follows(folder, recipe, state, changed)
        if changed:  # what the earlier part of the run was made with stays on record
            new_name(folder, "recipe-before", ".toml").write_bytes(path.read_bytes())
        if changed or not path.exists():
            write_atomically(path, [(versions() + to_toml(recipe)).encode()])
        if found and now != state.fingerprint:
            write_atomically(folder / AGREED, [json.dumps({found[0].name: now}).encode()])
    state.fingerprint = now
    return recipe, folder, lock, *(found or (None, state))


def forget_what_follows(folder: Path, recipe: Recipe, state: RunState, changed: bool) -> None:
    """Remove the pass rates of weights that this run will not have: after an older checkpoint, or another recipe.

    Those that the checkpoint's own weights have stay: the next stage's, when the checkpoint is at its stage's end.
    """
    at_end = state.stage < len(recipe.stage) and not steps_left(recipe.stage[state.stage], state)
    first = state.stage + (0 if changed and not state.prepared else 1 if changed or not at_end else 2)
    for index in range(first, len(recipe.stage)):
        (folder / f"pass-rates-{index}.jsonl").unlink(missing_ok=True)


def start_run(arguments: argparse.Namespace, device: Device) -> Run:
    """Everything that a run needs, in the order in which it can go wrong."""
    recipe, folder, lock, resume_from, state = open_run(arguments, device)
    model_folder = model_source(recipe, folder)
    model = build_model(model_folder, recipe, device)
    tokenizer = load_tokenizer(model_folder, model)
    sampler, reward, stop = recipe.sampler, recipe.reward, StopRequest()
    grader = Grader(reward.workers, reward.time_limit_seconds, thinking=recipe.thinking)
    limits = CacheLimits(sampler.cache_tokens, sampler.page_tokens, sampler.rows)
    stops = stop_tokens(tokenizer, model, model_folder)
    respondent = Respondent(
        model, tokenizer, stops, limits, grader, device, recipe.instruction, stop, reward.most_failed_share
    )
    metrics = Metrics(folder, recipe.run.tensorboard, device.is_main, state.metrics_position)
    most = recipe.micro_batch_tokens
    run = Run(recipe, folder, device, model, model_folder, respondent, metrics, state, stop, resume_from, most)
    run.lock, run.saved = lock, (state.step, state.stage, state.prepared) if resume_from else None
    guard_data(run)
    check_inputs(run)
    if device.is_main:
        for name in (WANTS_RESUMING, FINISHED):  # it goes on
            (folder / name).unlink(missing_ok=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    of_these = f" ({trained:,} of them trained)" * (trained < parameters)
    cache_gib = sampler.cache_tokens * cache_bytes_per_token(model.config, device.compute_dtype) / 2**30
    device.say(
        f"{recipe.name}: {parameters:,} parameters{of_these}, {device.ranks} processes, "
        f"at most {cache_gib:.2f} GiB of cache each, {folder}"
    )
    return run


def main() -> None:
    """Run a recipe, or go on with one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", type=Path, default=Path(__file__).parent / "recipes" / "tiny.toml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="such as stage.1.temperature=1.1"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the run's folder is made")
    parser.add_argument(
        "--resume", nargs="?", const=True, type=Path, metavar="RUN",
        help="go on with this run, or without a name with the newest unfinished one of the recipe, if there is one",
    )  # fmt: skip
    parser.add_argument(
        "--resume-anyway", action="store_true", help="although recipe, data, model or code are not what they were"
    )
    parser.add_argument("--plan", action="store_true", help="say what memory, time and money it takes, and run nothing")
    add_plan_options(parser)
    arguments = parser.parse_args()
    arguments.resume = arguments.resume or arguments.resume_anyway or None
    run, status = None, 0
    try:
        if arguments.plan:
            sys.exit(not show_plan(load_recipe(arguments.recipe, arguments.set), read_machine(arguments)))
        run = start_run(arguments, devices.start())
        train(run)
        run.metrics.close()
        if run.device.is_main:
            print(f"report in {write_report(run.folder)}")
            (run.folder / FINISHED).write_text(f"after step {run.state.step}\n")
    except (Stopped, Interrupted) as stopped:
        # Interrupted is raised between stages: what the last checkpoint holds is all there is
        if run.device.is_main:  # torchrun hides the exit code of its workers
            (run.folder / WANTS_RESUMING).write_text(f"{how_to_go_on(run)}\n")
        run.device.say(stopped if isinstance(stopped, Stopped) else f"stopped; go on with: {how_to_go_on(run)}")
    except EXPECTED_ERRORS as error:
        # memory may run out in one process alone: then it is the one to say so
        status = f"train.py: {error}" if devices.speaks() or isinstance(error, UpdateError) else 1
    finally:
        if run is not None:
            run.respondent.grader.close()
            if run.lock is not None:
                os.close(run.lock)
        devices.stop()
    devices.leave(status)


if __name__ == "__main__":
    main()
